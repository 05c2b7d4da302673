"""GraSP (Wang et al., ICLR 2020): keep the weights without which the gradients would shrink."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..coordinates.coverage import coordinates_for
from ..coordinates.flat import unwrapped
from ..masks.maskset import MaskSet
from ..modeling.state import autograd_allowed
from ..search.energy import LossFn
from ..search.energy.sequential import OneByOne
from ..search.unreached import NoGradientError
from ..utils.arguments import called
from ._passes import batches, check_data, stood_in
from .select import check_allocation, check_sparsity, select


@called("grasp(model, loader, sparsity, loss_fn=…)")
@autograd_allowed()
def grasp(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    *,
    loss_fn: LossFn | None = None,
    max_batches: int | None = None,
    allocation: str = "global",
    **coordinate_options: Any,
) -> MaskSet:
    """The round((1 - sparsity)·d) weights of lowest S = -θ ⊙ Hg: those whose removal would most reduce gradient flow.

    To first order, removing weight e changes ‖∇L‖² by -2 θ_e (Hg)_e (section 4, algorithm 1), g the gradient and H the
    Hessian of the mean loss over the batches. A departure: the paper divides the logits by a temperature of 200, which
    a ``loss_fn`` of yours may do. Costs three passes a batch, one of them backward through a backward; the batches are
    held meanwhile. Batch-norm uses batch statistics. The model is not changed.

    Args:
        model: the model; the paper's are at initialization. At a minimum, where g is 0, the score says little.
        loader: batches; one pass over it.
        sparsity: fraction removed, in (0, 1).
        loss_fn: ``loss_fn(model, batch) -> scalar``, twice differentiable; ``None`` for the default loss.
        max_batches: use only the first ones; ``None`` for all.
        allocation: ``"global"`` (published), ``"uniform"`` or ``"erk"``, as for :func:`magnitude`.
        coordinate_options: those of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        ValueError: an empty loader, a sparsity outside (0, 1), nothing prunable, an unknown allocation, or products Hg
            that are all zero.
        FloatingPointError: a loss or a product that is not finite.
    """
    check_data(loader, loss_fn, max_batches)
    check_sparsity(sparsity)
    check_allocation(allocation, ("global", "uniform", "erk"))
    coordinates = coordinates_for(model, **coordinate_options)
    theta = coordinates.flatten(model)
    held = list(islice(loader, max_batches))  # both passes see the same
    # Compiled models and the fused attention kernels have no second derivative.
    with stood_in(unwrapped(model), loss_fn, coordinates, theta) as runner, sdpa_kernel(SDPBackend.MATH):
        gradient = torch.zeros_like(theta)
        for number, batch in enumerate(batches(held, None, coordinates.device)):
            gradient += _flat(_gradient(runner, batch, number, twice=False)) / len(held)
        product = torch.zeros_like(theta)
        for number, batch in enumerate(batches(held, None, coordinates.device)):
            grads = _gradient(runner, batch, number, twice=True)
            along = (_flat(grads) * gradient).sum()
            if along.requires_grad:  # a loss that is linear in the weights has no curvature
                product += _flat(torch.autograd.grad(along, runner.leaves, allow_unused=True, materialize_grads=True))
    if not bool(product.isfinite().all()):
        raise FloatingPointError("loss_fn: wanted finite products of its Hessian with the gradient, got others")
    if not bool(product.any()):
        raise NoGradientError("batch, or no second derivative")
    return select(coordinates, theta * product, sparsity, allocation)


def _gradient(runner: OneByOne, batch: Any, number: int, twice: bool) -> tuple[Tensor, ...]:
    problem = runner.problem
    loss = problem.checked(problem.loss_fn, batch)
    if not bool(loss.isfinite()):
        raise FloatingPointError(f"loss_fn: wanted a finite loss, got {float(loss)} in batch {number}")
    if not loss.requires_grad:
        raise NoGradientError("batch")
    return torch.autograd.grad(loss, runner.leaves, create_graph=twice, allow_unused=True, materialize_grads=True)


def _flat(parts: Iterable[Tensor]) -> Tensor:  # (d,)
    return torch.cat([part.reshape(-1) for part in parts])
