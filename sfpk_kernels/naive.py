"""The paper's Algorithm 3, written literally: the yardstick of tests and benchmarks, never optimised.

Read it beside the paper: one particle at a time, the kernel penalty differentiated by autograd, ``torch.topk``
for the binary masks, the transition as printed in eq. 8. No flat buffers, no batching, no saved statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .search.schedule import density_schedule


@dataclass(frozen=True)
class NaiveRun:
    """Everything a naive run passed through."""

    trajectory: list[Tensor]  # K tensors (n, d): particles after each step
    energies: list[list[float]]  # (K, n)
    mask: Tensor  # (d,) bool: exactly round((1 - sparsity) d) coordinates


def naive_sfpk(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Sequence[Any],  # n · K, consumed step by step, particle by particle
    names: Sequence[str],  # prunable parameters of the model
    *,
    sparsity: float,
    n_particles: int = 10,
    n_steps: int = 100,
    radius: float = 1.4,  # r > 1, relative: the paper's r_t is r / ‖∇s‖
    repulsion: float = 0.2,  # λ
    kernel: str = "rbf",  # or "weighted_rbf" (authors)
    density: str = "l2_squared",  # or "l2" (authors)
    schedule: str = "linear",  # or "exponential" (authors), "cubic" (ours)
    polarizer: str = "mask",  # or "mask_weight" (authors)
) -> NaiveRun:
    """Prune ``model`` by Algorithm 3; its parameters are only read.

    The model runs in the mode it is in. Shapes: d = number of prunable weights, flattened in the order of
    ``names``.
    """
    parameters = {name: model.get_parameter(name).detach() for name in names}
    theta = torch.cat([parameter.flatten() for parameter in parameters.values()])
    d = theta.numel()
    saliency = theta.abs()

    def soft_density(m: Tensor) -> Tensor:
        share = (m**2).sum() / d
        return share.sqrt() if density == "l2" else share

    def soft_sparsity(m: Tensor) -> Tensor:
        return 1 - soft_density(m)

    def score(m: Tensor) -> Tensor:
        return m if polarizer == "mask" else m.abs() * saliency

    def polarize(m: Tensor, kept: int) -> Tensor:
        binary = torch.zeros_like(m)
        binary[torch.topk(score(m), kept).indices] = 1
        return binary

    def energy_and_gradient(m: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        kept = round(float(soft_density(m.detach())) * d)
        straight_through = m + (polarize(m.detach(), kept) - m).detach()
        masked = (straight_through * theta).split([p.numel() for p in parameters.values()])
        weights = {f"model.{name}": w.view_as(p) for w, (name, p) in zip(masked, parameters.items(), strict=True)}
        return functional_call(_Energy(model, loss_fn), weights, (batch, m))

    def kernel_penalty(m: Tensor, others: list[Tensor]) -> Tensor:
        values = []
        for other in others:
            if kernel == "rbf":
                values.append(torch.exp(-((m - other) ** 2).sum() / d))
            else:
                width = ((saliency * m.detach() ** 2).sum() * (saliency * other**2).sum()).sqrt()
                values.append(torch.exp(-(saliency**2 * (m - other) ** 2).sum() / width))
        return torch.stack(values).mean()

    densities = density_schedule(schedule, 1 - sparsity, n_steps)
    particles = [torch.ones_like(theta) for _ in range(n_particles)]
    trajectory, energies = [], []
    stream = iter(batches)
    for k in range(n_steps):
        old = [m.clone() for m in particles]
        losses = []
        for i in range(n_particles):
            m = old[i].clone().requires_grad_()
            loss, grad_energy = energy_and_gradient(m, next(stream))
            (grad_kernel,) = torch.autograd.grad(kernel_penalty(m, old), m)
            (s,) = torch.autograd.grad(soft_sparsity(m), m)
            g = -grad_energy - repulsion * grad_kernel
            # eq. 8: T = x g + y s with s·T = 1 and ‖T‖ = r / ‖s‖
            inner, s_square, g_square = s @ g, s @ s, g @ g
            x = torch.sqrt((radius**2 - 1) / (s_square * g_square - inner**2))
            y = (1 - x * inner) / s_square
            particles[i] = old[i] + (densities[k] - densities[k + 1]) * (x * g + y * s)
            losses.append(loss.item())
        trajectory.append(torch.stack(particles))
        energies.append(losses)

    consensus = torch.stack([score(m) for m in particles]).mean(dim=0)
    mask = torch.zeros(d, dtype=torch.bool, device=consensus.device)
    mask[torch.topk(consensus, round((1 - sparsity) * d)).indices] = True
    return NaiveRun(trajectory, energies, mask)


class _Energy(nn.Module):
    """Loss and mask gradient of the model whose weights functional_call has put in place."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor]):
        super().__init__()
        self.model = model
        self._loss_fn = (loss_fn,)  # in a tuple: a loss that is a module is not registered

    def forward(self, batch: Any, m: Tensor) -> tuple[Tensor, Tensor]:
        loss = self._loss_fn[0](self.model, batch)
        (gradient,) = torch.autograd.grad(loss, m)
        return loss, gradient
