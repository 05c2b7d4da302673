"""WoodFisher (Singh and Alistarh, NeurIPS 2020): optimal brain surgeon by blocks of the empirical Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.coverage import coordinates_for
from ..coordinates.flat import Coordinates
from ..masks.maskset import MaskSet
from ..modeling.state import autograd_allowed
from ..search.energy import LossFn
from ..search.unreached import NoGradientError
from ..utils.arguments import called, check_least, check_positive
from ._passes import batches, check_data, gradients
from .select import check_allocation, check_sparsity, select

_CHUNK = 1 << 24  # entries of blocks inverted at once, in fp64


@called("woodfisher(model, loader, sparsity, loss_fn=…)")
@autograd_allowed()
def woodfisher(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    **options: Any,
) -> MaskSet:
    """The masks of :func:`woodfisher_update_`, whose arguments and errors it has; the model is not changed."""
    return _woodfisher(model, loader, sparsity, **options)[1]


@called("woodfisher_update_(model, loader, sparsity, loss_fn=…)")
@autograd_allowed()
def woodfisher_update_(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    **options: Any,
) -> MaskSet:
    """Prune ``model`` by the Fisher matrix, in place: removed weights are 0, the others of their blocks are updated.

    Kept are the round((1 - sparsity)·d) weights of largest w_e² / (2 [F⁻¹]_ee), the loss that their removal costs (the
    paper's pruning statistic), F = λI + 1/N Σ g gᵀ over the gradients g of N batches, cut down to blocks of
    consecutive weights of a tensor. The removed set R of a block is taken out at once,
    δw = -F⁻¹_:R ([F⁻¹]_RR)⁻¹ w_R, where the paper adds up the updates of single weights: the same for one, and the
    minimum of the quadratic model for any. The inverse that the paper finds by Woodbury's recursion is taken from
    Cholesky factors: the same matrix, without the recursion's rounding.

    A batch gives one gradient: batches of one sample make it the empirical Fisher matrix, larger ones the paper's
    mini-batches. Costs one forward and backward pass a batch, d · block fp64 numbers of memory, and O(d · block²) for
    the inverses. Batch-norm uses batch statistics. The model's weights are written once, after all has succeeded.

    Args:
        model: the trained model.
        loader: batches; one pass over it.
        sparsity: fraction removed, in (0, 1).
        options: ``loss_fn=None``: ``loss_fn(model, batch) -> scalar``; ``None`` for the default loss.
            ``max_batches=None``: use only the first ones. ``allocation="global"`` (published as joint), ``"uniform"``
            (as independent) or ``"erk"``, as for :func:`magnitude`. ``damping=1e-5``: λ, as published; smaller batches
            have larger gradients and want a larger one. ``block=50``: weights in one block (50 as in *The optimal BERT
            surgeon*, EMNLP 2022; the paper has up to a few thousand). Others are those of
            :class:`~sfpk_kernels.Coordinates`.

    Returns:
        What is kept.

    Raises:
        TypeError: an unknown option.
        ValueError: an empty loader, a sparsity outside (0, 1), nothing prunable, another option out of its range, or
            gradients that are all zero.
        FloatingPointError: a loss or gradient that is not finite.
    """
    coordinates, masks, theta, fisher = _woodfisher(model, loader, sparsity, **options)
    kept = masks.flat().to(theta.device)
    mended = _each_tensor(coordinates, fisher, obs_update, theta, kept)
    with torch.no_grad():
        for parameter, weight in zip(coordinates.parameters(model), coordinates.split(mended), strict=True):
            parameter.copy_(weight)
    return masks


def _woodfisher(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    *,
    loss_fn: LossFn | None = None,
    max_batches: int | None = None,
    allocation: str = "global",
    damping: float = 1e-5,
    block: int = 50,
    **coordinate_options: Any,
) -> tuple[Coordinates, MaskSet, Tensor, list[Tensor]]:
    check_data(loader, loss_fn, max_batches)
    check_sparsity(sparsity)
    check_allocation(allocation, ("global", "uniform", "erk"))
    check_positive("damping", damping)
    check_least("block", block, 1)
    coordinates = coordinates_for(model, **coordinate_options)
    theta = coordinates.flatten(model)
    fisher = []
    for tensor in coordinates.tensors:
        size = min(block, tensor.numel)
        fisher.append(torch.zeros(-(-tensor.numel // size), size, size, dtype=torch.float64, device=theta.device))
    dense, count = torch.ones_like(theta, dtype=torch.bool), 0
    with gradients(model, loss_fn, coordinates, theta) as gradient:
        for batch in batches(loader, max_batches, coordinates.device):
            for matrices, part in zip(fisher, coordinates.split(gradient(dense, batch)), strict=True):
                rows = in_blocks(part.reshape(-1).double(), matrices.shape[-1])
                matrices.baddbmm_(rows.unsqueeze(2), rows.unsqueeze(1))
            count += 1
    if not any(bool(matrices.any()) for matrices in fisher):
        raise NoGradientError("batch")
    for matrices in fisher:
        matrices.div_(count).diagonal(dim1=1, dim2=2).add_(damping)
    score = _each_tensor(coordinates, fisher, obs_score, theta, dense)
    return coordinates, select(coordinates, score, sparsity, allocation), theta, fisher


def in_blocks(flat: Tensor, block: int) -> Tensor:  # (blocks, block), zeros behind the last entry
    """A vector cut into blocks."""
    return nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def inverses(matrices: Tensor) -> Tensor:  # (blocks, B, B) fp64
    """Their inverses.

    Raises:
        ValueError: one is not positive definite to working precision.
    """
    factors, failed = torch.linalg.cholesky_ex(matrices)
    if bool(failed.any()):
        raise ValueError("damping: wanted enough for positive definite blocks beside these gradients, got less")
    return torch.cholesky_inverse(factors)


def obs_score(matrices: Tensor, weight: Tensor, keep: Tensor) -> Tensor:  # (blocks, B, B); (blocks, B) fp64; bool
    """w² / (2 [F⁻¹]_ee), whatever else is kept."""
    return weight.square() / (2 * inverses(matrices).diagonal(dim1=1, dim2=2))


def obs_update(matrices: Tensor, weight: Tensor, keep: Tensor) -> Tensor:  # (blocks, B, B); (blocks, B); bool likewise
    """The weights after those that are not kept are taken out at once."""
    inverse = inverses(matrices)
    removed = ~keep
    both = removed.unsqueeze(1) & removed.unsqueeze(2)
    # Rows and columns of what is kept are those of the identity, so that all blocks have one size.
    system = torch.where(both, inverse, 0.0) + torch.diag_embed(keep.double())
    multipliers = torch.linalg.solve(system, weight * removed)
    return (weight - (inverse @ multipliers.unsqueeze(2)).squeeze(2)) * keep


def _each_tensor(
    coordinates: Coordinates,
    fisher: list[Tensor],  # (blocks, B, B) each, fp64
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    theta: Tensor,  # (d,)
    kept: Tensor,  # (d,) bool
) -> Tensor:  # (d,)
    """A function of matrices, weights and what is kept, block by block in fp64."""
    out = torch.empty_like(theta)
    for matrices, weight, keep, part in zip(
        fisher, coordinates.split(theta), coordinates.split(kept), coordinates.split(out), strict=True
    ):
        block = matrices.shape[-1]
        weights, keeps = in_blocks(weight.reshape(-1), block), in_blocks(keep.reshape(-1), block)
        chunk = max(1, _CHUNK // block**2)
        found = [
            function(matrices[i : i + chunk], weights[i : i + chunk].double(), keeps[i : i + chunk])
            for i in range(0, len(matrices), chunk)
        ]
        part.copy_(torch.cat(found).view(-1)[: weight.numel()].view(part.shape))
    return out
