"""Structured baselines: whole channels, neurons and heads, by their weights, their gradients, or at random."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..modeling.state import autograd_allowed
from ..search.energy import LossFn
from ..search.unreached import NoGradientError
from ..utils.arguments import called, check_least
from ._passes import batches, check_data, gradients
from ._structured import StructuredBaseline, StructuredProblem


@called("structured_magnitude(model, sparsity, example_inputs=…)")
def structured_magnitude(
    model: nn.Module,
    sparsity: float,
    *,
    example_inputs: Any,
    norm: str = "l2",
    allocation: str = "normalized",
    budget: str = "macs",
    **options: Any,
) -> StructuredBaseline:
    """The coordinates with the largest weights: the norm of all that reads or computes them (Li et al., *Pruning
    filters for efficient ConvNets*, ICLR 2017, of the filter alone there). The model is not changed.

    Args:
        model: the trained model.
        sparsity: fraction of the budget removed, in (0, 1).
        example_inputs: what the model is called with, as for :func:`~sfpk_kernels.structure.find_structure`.
        norm: ``"l2"``, √Σw², or ``"l1"``, Σ|w|.
        allocation: ``"normalized"``: scores are divided by the mean of their group, as sums over many weights do not
            compare with sums over few. ``"global"``: as they are. ``"uniform"``: of every group the same fraction.
        budget: what the sparsity is of: ``"macs"``, ``"params"`` or ``"channels"``, met to the finest coordinate.
        options: ``structure=None``: one that was found before; ``min_keep=1``, ``round_to=1`` and
            ``layer_sparsity=None`` as in :func:`~sfpk_kernels.structure.select`. Others are those of
            :func:`~sfpk_kernels.structure.find_structure`.

    Raises:
        TypeError: an argument of the wrong type, an unknown option.
        ValueError: one out of its range, weights that are not finite, a model without or of another structure, or
            that cannot be shrunk right.
    """
    if norm not in ("l1", "l2"):
        raise ValueError(f"norm: wanted one of l1, l2, got {norm!r}")
    problem = StructuredProblem(model, sparsity, example_inputs, allocation, budget, options)
    coordinates = problem.coordinates()
    theta = coordinates.flatten(model)
    if norm == "l1":
        score = problem.sums(coordinates, theta.abs())
    else:
        score = problem.sums(coordinates, theta.double().square()).sqrt()
    return problem.solved(score)


@called("structured_snip(model, loader, sparsity, loss_fn=…, example_inputs=…)")
@autograd_allowed()
def structured_snip(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    *,
    example_inputs: Any,
    loss_fn: LossFn | None = None,
    max_batches: int | None = None,
    sensitivity: str = "gate",
    allocation: str = "normalized",
    budget: str = "macs",
    **options: Any,
) -> StructuredBaseline:
    """The coordinates of largest connection sensitivity: :func:`snip` (Lee et al., ICLR 2019) in group sums, as in
    the structured experiments of the SFPK paper (Mo et al., ICLR 2025).

    Scores are means over the batches. One pass a batch; batch-norm uses batch statistics. The model is not changed.

    Args:
        model: the trained model.
        loader: batches; one pass over it.
        sparsity: fraction of the budget removed, in (0, 1).
        example_inputs: what the model is called with, as for :func:`~sfpk_kernels.structure.find_structure`.
        loss_fn: ``loss_fn(model, batch) -> scalar``; ``None`` for the default loss.
        max_batches: use only the first ones; ``None`` for all.
        sensitivity: ``"gate"``: the absolute value of ∂L/∂keep = Σ θ ∂L/∂θ over the weights that read the coordinate:
            the change of the loss without it, to first order. ``"weights"``: Σ|θ ∂L/∂θ| over the weights that read or
            compute it, weaker.
        allocation: as for :func:`structured_magnitude`. ``"global"`` takes whole layers but for one channel.
        budget: likewise.
        options: likewise.

    Raises:
        TypeError: an argument of the wrong type, an unknown option.
        ValueError: as for :func:`structured_magnitude`; an empty loader, or gradients that are all zero.
        FloatingPointError: a loss or gradient that is not finite.
    """
    check_data(loader, loss_fn, max_batches)
    if sensitivity not in ("weights", "gate"):
        raise ValueError(f"sensitivity: wanted one of weights, gate, got {sensitivity!r}")
    problem = StructuredProblem(model, sparsity, example_inputs, allocation, budget, options)
    coordinates = problem.coordinates()
    theta = coordinates.flatten(model)
    dense = torch.ones_like(theta, dtype=torch.bool)
    score, count = torch.zeros(problem.structure.size, dtype=torch.float64, device="cpu"), 0
    with gradients(model, loss_fn, coordinates, theta) as gradient:
        for batch in batches(loader, max_batches, coordinates.device):
            change = theta.double() * gradient(dense, batch)
            if sensitivity == "gate":
                score += problem.sums(coordinates, change, ("gate",)).abs()
            else:
                score += problem.sums(coordinates, change.abs())
            count += 1
    if not bool(score.any()):
        raise NoGradientError("batch")
    return problem.solved(score / count)


@called("structured_random(model, sparsity, example_inputs=…, seed=…)")
def structured_random(
    model: nn.Module,
    sparsity: float,
    *,
    example_inputs: Any,
    seed: int = 0,
    allocation: str = "global",
    budget: str = "macs",
    **options: Any,
) -> StructuredBaseline:
    """Coordinates in a random order, as many as the budget allows. The model is not changed.

    Args:
        model: any model; its weights play no part.
        sparsity: fraction of the budget removed, in (0, 1).
        example_inputs: what the model is called with, as for :func:`~sfpk_kernels.structure.find_structure`.
        seed: of the draw, which is the same on every device and leaves torch's generators alone.
        allocation: ``"global"``, or ``"uniform"``: of every group the same fraction.
        budget: as for :func:`structured_magnitude`.
        options: likewise.

    Raises:
        TypeError, ValueError: as for :func:`structured_magnitude`.
    """
    check_least("seed", seed, 0)
    if allocation not in ("global", "uniform"):
        raise ValueError(f"allocation: wanted one of global, uniform, got {allocation!r}")
    problem = StructuredProblem(model, sparsity, example_inputs, allocation, budget, options)
    generator = torch.Generator().manual_seed(seed)
    return problem.solved(torch.rand(problem.structure.size, dtype=torch.float64, device="cpu", generator=generator))
