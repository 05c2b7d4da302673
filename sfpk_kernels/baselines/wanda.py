"""Wanda (Sun et al., ICLR 2024): prune by weights and activations, output by output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.coverage import coordinates_for
from ..coordinates.pattern import best_of_groups, check_divides, check_pattern
from ..masks.maskset import MaskSet
from ..modeling.layers import Layer, find_layers
from ..modeling.state import autograd_allowed
from ..ops import topk_mask
from ..search.energy import LossFn
from ..utils.arguments import called
from ._layers import layerwise
from ._passes import check_data
from .select import backend_of, check_sparsity


@called("wanda(model, loader, sparsity, loss_fn=…)")
@autograd_allowed()
def wanda(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float,
    *,
    loss_fn: LossFn | None = None,
    max_batches: int | None = None,
    sequential: bool = True,
    pattern: tuple[int, int] | None = None,
    **coordinate_options: Any,
) -> MaskSet:
    """Of every output the weights of largest |W_ij|·‖X_j‖₂, the norm over all samples of input j (eq. 1).

    Counted by output, not in all: each row of C weights keeps round((1 - sparsity)·C) of them, one at least. Linear
    and Conv2d layers, the latter unfolded: a row is a filter, its inputs the patches. Forward passes alone: with
    ``sequential`` one over the batches for each block of layers, met with the blocks before it pruned, as the authors
    do (who keep each block's outputs and so run every block twice); without it one in all. Blocks are layers whose
    names agree up to the first number, such as ``model.layers.3``. Batch-norm uses batch statistics. The model is not
    changed.

    Args:
        model: the trained model.
        loader: batches; one pass over it, held meanwhile.
        sparsity: fraction removed, in (0, 1).
        loss_fn: ``loss_fn(model, batch)`` where only it knows how to run the model on a batch (no gradient is taken);
            ``None`` for the plain forward pass, which needs no labels.
        max_batches: use only the first ones; ``None`` for all.
        sequential: whether a block meets the inputs of the pruned model.
        pattern: (N, M): N of every M consecutive inputs (channels) instead, for a sparsity of 1 - N/M.
        coordinate_options: those of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        ValueError: an empty loader, a sparsity outside (0, 1), nothing prunable, other layers or ones that are not
            called, a pattern that does not divide the inputs, or has another sparsity.
        FloatingPointError: inputs that are not finite.
    """
    check_data(loader, loss_fn, max_batches)
    check_sparsity(sparsity)
    check_pattern(pattern, sparsity)
    coordinates = coordinates_for(model, **coordinate_options)
    find_layers(model, coordinates)  # refuses others than Linear and Conv2d
    check_divides(coordinates.tensors, pattern)

    def prune(layer: Layer, matrices: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        score = matrices.abs() * squares.sqrt().to(matrices.dtype).unsqueeze(1)
        rows = score.reshape(-1, score.shape[-1])
        if pattern is not None:
            mask = best_of_groups(rows, pattern)
        else:
            mask = topk_mask(rows, max(1, round((1.0 - float(sparsity)) * rows.shape[1])), backend=backend_of(rows))
        return mask.view(matrices.shape), matrices

    return layerwise(
        model, loader, coordinates, loss_fn=loss_fn, max_batches=max_batches, sequential=sequential,
        statistic=lambda columns: columns.square().sum(dim=1, dtype=torch.float64), prune=prune,
    )[0]  # fmt: skip
