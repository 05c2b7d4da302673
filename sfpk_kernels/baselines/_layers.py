"""Layer by layer: statistics of the inputs they meet, blocks pruned in forward order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.flat import Coordinates, unwrapped
from ..masks.maskset import MaskSet
from ..modeling.batches import forward
from ..modeling.layers import Layer, find_layers, hooked
from ..search.energy import LossFn
from ._passes import batches, stood_in

Run = Callable[[nn.Module, Any], Any]
Statistic = Callable[[Tensor], Tensor]  # of inputs (G, samples, C) in fp32 at least; added up over batches in fp64


Prune = Callable[[Layer, Tensor, Tensor], tuple[Tensor, Tensor]]
# (layer, matrices (G, R, C), statistic (G, …)) -> masks (G, R, C) bool, matrices afterwards


def layerwise(
    model: nn.Module,
    loader: Iterable[Any],
    coordinates: Coordinates,
    *,
    loss_fn: LossFn | None,
    max_batches: int | None,
    sequential: bool,
    statistic: Statistic,
    prune: Prune,
) -> tuple[MaskSet, list[Tensor]]:
    """Prune every layer by a statistic of its inputs; the masks, and the weights that come out, as in the coordinates.

    Args:
        model: not changed: stand-ins take the place of its weights meanwhile.
        loader: batches, held meanwhile.
        coordinates: the tensors.
        loss_fn: runs the model on a batch, its loss unused; ``None`` for the plain forward pass.
        max_batches: use only the first ones; ``None`` for all.
        sequential: block by block in forward order, each with the inputs it meets when those before are pruned: one
            pass over the batches a block. Otherwise one pass over the dense model.
        statistic: of the inputs of one call.
        prune: one layer.

    Raises:
        ValueError: an empty loader, a layer of another kind, or one that no batch reaches.
        FloatingPointError: inputs that are not finite.
    """
    layers = find_layers(model, coordinates)
    run, inner = loss_fn or forward, unwrapped(model)
    held = list(islice(loader, max_batches))
    masks: dict[str, Tensor] = {}
    theta = coordinates.flatten(model)
    with stood_in(model, loss_fn, coordinates, theta) as runner, torch.no_grad():
        order: dict[Layer, None] = {}
        first = next(batches(held, None, coordinates.device))
        with hooked(layers, lambda layer, module, x: order.setdefault(layer)):
            run(inner, first)
        blocks = _blocks([*order, *(layer for layer in layers if layer not in order)]) if sequential else [layers]
        for block in blocks:
            totals = _totals(inner, block, held, run, statistic, coordinates)
            for layer in block:
                leaf = runner.leaves[layer.index]
                matrices = layer.matrices(leaf.detach().to(theta.dtype))
                mask, matrices = prune(layer, matrices, totals[layer])
                leaf.copy_(layer.weight(matrices * mask))
                masks[layer.tensor.name] = layer.weight(mask)
        weights = [leaf.detach().clone() for leaf in runner.leaves]
    return MaskSet({tensor.name: masks[tensor.name] for tensor in coordinates.tensors}), weights


def _totals(
    model: nn.Module,
    block: Sequence[Layer],
    held: list[Any],
    run: Run,
    statistic: Statistic,
    coordinates: Coordinates,
) -> dict[Layer, Tensor]:
    """The statistics of a block's inputs over all batches, fp64."""
    totals: dict[Layer, Tensor] = {}

    def add(layer: Layer, module: nn.Module, x: Tensor) -> None:
        found = statistic(layer.columns(module, x.to(coordinates.dtype))).double()
        totals[layer] = totals[layer] + found if layer in totals else found

    with hooked(block, add):
        for batch in batches(held, None, coordinates.device):
            run(model, batch)
    for layer in block:
        name = layer.tensor.name
        if layer not in totals:
            raise ValueError(
                f"model: wanted layers that are called with the batches, got {name}, which is not (or is read without "
                f"a call, as in nn.MultiheadAttention): leave it out, ignored_layers=[{name!r}]"
            )
        if not bool(totals[layer].isfinite().all()):
            raise FloatingPointError(f"loader: wanted finite inputs of every layer, got others at {name}")
    return totals


def _blocks(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers whose names agree up to the first number (``model.layers.3``, ``layer1.0``); others by themselves."""
    blocks: dict[str, list[Layer]] = {}
    for layer in layers:
        parts = layer.tensor.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        blocks.setdefault(".".join(parts[: number + 1]), []).append(layer)
    return list(blocks.values())
