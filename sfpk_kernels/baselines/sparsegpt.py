"""SparseGPT (Frantar and Alistarh, ICML 2023): prune columns one after another, mend what is left of each row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.coverage import coordinates_for
from ..coordinates.flat import Coordinates
from ..coordinates.pattern import best_of_groups, check_divides, check_pattern
from ..masks.maskset import MaskSet
from ..modeling.layers import Layer, find_layers
from ..modeling.state import autograd_allowed
from ..modeling.turns import alone
from ..ops import topk_mask
from ..search.energy import LossFn
from ..utils.arguments import called, check_least, check_positive
from ._layers import layerwise
from ._passes import check_data
from .select import allocated, backend_of, check_allocation, check_sparsity


@called("sparsegpt(model, loader, sparsity, loss_fn=…)")
@alone
@autograd_allowed()
def sparsegpt(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    **options: Any,
) -> MaskSet:
    """The masks of :func:`sparsegpt_update_`, whose arguments and errors it has; the model is not changed.

    Which weights go depends on the updates on the way, so they are computed and forgotten.
    """
    return _sparsegpt(model, loader, sparsity, **options)[1]


@called("sparsegpt_update_(model, loader, sparsity, loss_fn=…)")
@alone
@autograd_allowed()
def sparsegpt_update_(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    **options: Any,
) -> MaskSet:
    """Prune ``model`` by layer-wise optimal brain surgeon, in place: removed weights are 0, the others are updated.

    With H = XᵀX + λI of a layer's inputs and U the upper Cholesky factor of H⁻¹, columns are passed from left to right
    (algorithm 1): of each block of columns those go whose w²/U_jj² is least over all rows, and what a removed weight
    did is spread over the columns to its right, w ← w - (w_j / U_jj)·U_j. Kept are exactly round((1 - sparsity)·d),
    in every layer the same fraction, evenly over its blocks of columns. Columns without any input go first. The
    model's weights are written once, after all has succeeded.

    Linear and Conv2d layers, the latter unfolded. Forward passes as for :func:`wanda`; a layer of R × C weights takes
    O(C³ + R C²) beyond them, and C² fp64 numbers of memory while its block is under way.

    Args:
        model: the trained model.
        loader: batches; one pass over it, held meanwhile.
        sparsity: fraction removed, in (0, 1).
        options: ``loss_fn=None``, ``max_batches=None``, ``sequential=True``: as for :func:`wanda`.
            ``allocation="uniform"`` (published) or ``"erk"``: weights per layer, as for :func:`magnitude`.
            ``pattern=None`` or (N, M): of every M consecutive inputs (channels) the N best, for a sparsity of 1 - N/M.
            ``damping=0.01``: λ as a share of the mean of the diagonal. ``block=128``: columns whose weights are chosen
            together. Others are those of :class:`~sfpk_kernels.Coordinates`.

    Returns:
        What is kept.

    Raises:
        TypeError: an unknown option.
        ValueError: an empty loader, a sparsity outside (0, 1), nothing prunable, other layers or ones that are not
            called, another option out of its range, or a Hessian without a Cholesky factor.
        FloatingPointError: inputs that are not finite.
    """
    coordinates, masks, weights = _sparsegpt(model, loader, sparsity, **options)
    with torch.no_grad():
        for parameter, weight in zip(coordinates.parameters(model), weights, strict=True):
            parameter.copy_(weight)
    return masks


def _sparsegpt(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    *,
    loss_fn: LossFn | None = None,
    max_batches: int | None = None,
    sequential: bool = True,
    allocation: str = "uniform",
    pattern: tuple[int, int] | None = None,
    damping: float = 0.01,
    block: int = 128,
    **coordinate_options: Any,
) -> tuple[Coordinates, MaskSet, list[Tensor]]:
    check_data(loader, loss_fn, max_batches)
    check_sparsity(sparsity)
    check_allocation(allocation, ("uniform", "erk"))
    check_pattern(pattern, sparsity)
    check_positive("damping", damping)
    check_least("block", block, 1)
    coordinates = coordinates_for(model, **coordinate_options)
    counts = allocated(coordinates, sparsity, allocation)
    find_layers(model, coordinates)  # refuses others than Linear and Conv2d
    check_divides(coordinates.tensors, pattern)
    if pattern is not None:
        block = -(-block // pattern[1]) * pattern[1]

    def prune(layer: Layer, matrices: Tensor, grams: Tensor) -> tuple[Tensor, Tensor]:
        pairs = []
        for g, (matrix, gram) in enumerate(zip(matrices, grams, strict=True)):
            kept = share(counts[layer.index], g, g + 1, layer.groups)
            factor = inverse_factor(gram, damping, layer.tensor.name).to(matrix.dtype)
            pairs.append(prune_matrix(matrix, factor, gram.diagonal() == 0, kept, pattern, block))
        masks, mended = zip(*pairs, strict=True)
        return torch.stack(masks), torch.stack(mended)

    masks, weights = layerwise(
        model, loader, coordinates, loss_fn=loss_fn, max_batches=max_batches, sequential=sequential,
        statistic=lambda columns: columns.transpose(1, 2) @ columns, prune=prune,
    )  # fmt: skip
    return coordinates, masks, weights


def share(count: int, begin: int, end: int, of: int) -> int:
    """How many of ``count`` fall to the parts from ``begin`` to ``end`` of so many equal ones, rounded to add up."""
    return (2 * count * end + of) // (2 * of) - (2 * count * begin + of) // (2 * of)


def inverse_factor(
    gram: Tensor,  # (C, C) fp64
    damping: float,
    name: str,
) -> Tensor:  # (C, C) fp64
    """U of H⁻¹ = Uᵀ U, H = XᵀX + λI; columns without input have an H of their own."""
    diagonal = gram.diagonal()
    mean = float(diagonal.mean()) or 1.0
    hessian = gram + torch.diag(torch.where(diagonal == 0, mean, 0.0) + damping * mean)
    lower, failed = torch.linalg.cholesky_ex(hessian)
    inverse = torch.cholesky_inverse(lower)
    upper, failed_again = torch.linalg.cholesky_ex(inverse, upper=True)
    if bool(failed) or bool(failed_again):
        raise ValueError(f"damping: wanted enough for a positive definite Hessian at {name}, got {damping!r}")
    return upper


def prune_matrix(
    weight: Tensor,  # (R, C)
    factor: Tensor,  # (C, C) U
    unused: Tensor,  # (C,) bool: columns that go first
    kept: int,
    pattern: tuple[int, int] | None,
    block: int,
) -> tuple[Tensor, Tensor]:  # mask (R, C) bool, weights (R, C)
    """Algorithm 1 of the paper on one matrix."""
    weight, mask = weight.clone(), torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    columns = weight.shape[1]
    for begin in range(0, columns, block):
        end = min(begin + block, columns)
        inner, corner = weight[:, begin:end], factor[begin:end, begin:end]  # a view, updated column by column
        errors, keep = torch.empty_like(inner), mask[:, begin:end]
        if pattern is None:
            score = _score(inner, corner.diagonal(), unused[begin:end])
            count = share(kept, begin, end, columns)
            keep.copy_(topk_mask(score.reshape(-1), count, backend=backend_of(score)).view(score.shape))
        for j in range(end - begin):
            if pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                score = _score(inner[:, group], corner.diagonal()[group], unused[begin:end][group])
                keep[:, group] = best_of_groups(score, pattern)
            errors[:, j] = torch.where(keep[:, j], 0.0, inner[:, j] / corner[j, j])
            inner[:, j:] -= errors[:, j : j + 1] * corner[j, j:]
        weight[:, end:] -= errors @ factor[begin:end, end:]
    return mask, weight * mask


def _score(weight: Tensor, diagonal: Tensor, unused: Tensor) -> Tensor:
    return (weight / diagonal).square().masked_fill(unused, 0.0)
