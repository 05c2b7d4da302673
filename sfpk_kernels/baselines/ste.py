"""Learned straight-through masks: a score per weight, trained through the top-k mask it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.coverage import coordinates_for
from ..masks.maskset import MaskSet
from ..modeling.batches import BatchStream
from ..modeling.state import autograd_allowed, seeded
from ..modeling.turns import alone
from ..ops import topk_mask
from ..search.energy import LossFn
from ..search.polarizer import budget
from ..search.schedule import density_schedule
from ..search.unreached import NoGradientError
from ..utils.arguments import called, check_least, check_positive
from ._passes import check_data, gradients
from .select import check_sparsity, select

_RAMP = 0.7  # share of the passes after which the density is the target
_MOMENTUM = 0.9
_BETAS, _EPS = (0.9, 0.999), 1e-12
_RATES = {"sgd": 0.02, "adam": 0.1}


@called("ste(model, loader, sparsity, loss_fn=…)")
@alone
@autograd_allowed()
def ste(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    *,
    loss_fn: LossFn | None = None,
    optimizer: str = "sgd",
    passes: int = 1000,
    lr: float | None = None,
    prior: str = "normalized",
    seed: int = 0,
    **coordinate_options: Any,
) -> MaskSet:
    """The round((1 - sparsity)·d) weights of highest learned score, trained straight through the mask.

    The weights stay as they are; each has a multiplier m, at first 1, and the score m·a with its prior a. In pass k the
    model runs with the weights θ ⊙ P, P the top of the scores, and m descends along θ ⊙ ∂L/∂(θ ⊙ P), as if P were m
    itself: the straight-through estimator of edge-popup (Ramanujan et al., *What's hidden in a randomly weighted
    neural network?*, CVPR 2020, section 3) and of movement pruning (Sanh et al., NeurIPS 2020, section 4), which
    learns the weights, too. A score is signed: a weight pushed below 0 ranks last. The density falls by the cubic
    schedule of Zhu and Gupta (2017), reaches the target after 0.7 of the passes and stays there. Departures from both
    papers: the trained network with its weights frozen, scores that begin as those of magnitude pruning, all
    tensors ranked together, the learning rate falling linearly to 0.

    One pass is one forward and backward of one batch, so that a search of n particles and K steps costs as much as
    ``passes=n * K``. The model is not changed.

    Args:
        model: the trained model.
        loader: batches, taken in order, from the beginning again whenever it ends.
        sparsity: fraction removed, in (0, 1).
        loss_fn: ``loss_fn(model, batch) -> scalar``; ``None`` for the default loss.
        optimizer: of m. ``"sgd"``: momentum 0.9, the gradient divided by its root mean square over all coordinates.
            ``"adam"``: β = (0.9, 0.999), divided coordinate by coordinate; wants more passes.
        passes: how many.
        lr: learning rate at first; ``None`` for 0.02 with SGD, 0.1 with Adam.
        prior: a. ``"normalized"``: |θ| by its tensor's mean. ``"magnitude"``: |θ|.
        seed: of the loader's order.
        coordinate_options: those of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        ValueError: an empty loader or a one-shot iterator that runs out, a sparsity outside (0, 1), nothing prunable,
            another option out of its range, or gradients that are all zero.
        FloatingPointError: a loss or gradient that is not finite.
    """
    check_data(loader, loss_fn)
    check_sparsity(sparsity)
    check_least("passes", passes, 1)
    check_least("seed", seed, 0)
    if optimizer not in _RATES:
        raise ValueError(f"optimizer: wanted one of {', '.join(_RATES)}, got {optimizer!r}")
    if prior not in ("normalized", "magnitude"):
        raise ValueError(f"prior: wanted one of normalized, magnitude, got {prior!r}")
    rate = _RATES[optimizer] if lr is None else lr
    check_positive("lr", rate)
    coordinates = coordinates_for(model, **coordinate_options)
    theta = coordinates.flatten(model)
    saliency = theta.abs()
    if prior == "normalized":
        coordinates.normalize_(saliency)
    multiplier = torch.ones_like(theta)
    update = {"sgd": _sgd, "adam": _adam}[optimizer](multiplier)
    ramp = max(1, round(_RAMP * passes))
    densities = density_schedule("cubic", 1.0 - float(sparsity), ramp)
    least = budget(float(sparsity), coordinates.d)
    moved = False
    with seeded(seed, coordinates.device), gradients(model, loss_fn, coordinates, theta) as gradient:
        stream = BatchStream(loader, coordinates.device, passes, "passes")
        for k in range(passes):
            kept = max(least, round(densities[min(k, ramp)] * coordinates.d))
            mask = topk_mask(multiplier * saliency, kept)
            grad = gradient(mask, stream.take(1)[0]).mul_(theta)
            moved = moved or bool(grad.any())
            update(grad, rate * (1.0 - k / passes))
    if not moved:
        raise NoGradientError("batch")
    return select(coordinates, multiplier * saliency, sparsity)


Update = Callable[[Tensor, float], None]  # of m along minus a gradient (d,), by a learning rate


def _sgd(multiplier: Tensor) -> Update:
    velocity = torch.zeros_like(multiplier)

    def update(grad: Tensor, lr: float) -> None:
        # One number for all: unlike Adam's it leaves the coordinates' order of size, which says what matters.
        scale = torch.linalg.vector_norm(grad, dtype=torch.float64) / grad.numel() ** 0.5
        grad.div_(torch.where(scale > 0, scale, 1.0).to(grad.dtype))
        multiplier.sub_(velocity.mul_(_MOMENTUM).add_(grad), alpha=lr)

    return update


def _adam(multiplier: Tensor) -> Update:
    first, second = torch.zeros_like(multiplier), torch.zeros_like(multiplier)
    (beta1, beta2), step = _BETAS, 0

    def update(grad: Tensor, lr: float) -> None:
        nonlocal step
        step += 1
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = second.div(1 - beta2**step).sqrt_().add_(_EPS)
        multiplier.addcdiv_(first, root, value=-lr / (1 - beta1**step))

    return update
