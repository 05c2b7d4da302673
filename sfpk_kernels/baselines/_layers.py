"""Layer by layer: weights as the matrices they multiply by, the inputs they meet, blocks pruned in forward order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..coordinates.flat import Coordinates, PrunableTensor, unwrapped
from ..masks.maskset import MaskSet
from ..modeling.batches import forward
from ..search.energy import LossFn
from ._passes import batches, stood_in

Run = Callable[[nn.Module, Any], Any]
Statistic = Callable[[Tensor], Tensor]  # of inputs (G, samples, C) in fp32 at least; added up over batches in fp64


@dataclass(frozen=True)
class Layer:
    """A weight as G matrices (R, C) of outputs by inputs: one of a Linear, one for each group of a Conv2d.

    Columns of a convolution are ordered by kernel position first and channel last, so that an N:M pattern along them
    runs along the channels.
    """

    tensor: PrunableTensor
    index: int  # among the coordinates' tensors
    modules: tuple[nn.Module, ...]  # more than one for tied weights

    @property
    def groups(self) -> int:
        """G."""
        return int(getattr(self.modules[0], "groups", 1))

    def matrices(self, weight: Tensor) -> Tensor:  # (G, R, C)
        """The weight's entries in their places."""
        return weight.movedim(1, -1).reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight(self, matrices: Tensor) -> Tensor:
        """The inverse of :meth:`matrices`, in the weight's shape."""
        out, channels, *kernel = self.tensor.shape
        return matrices.reshape(out, *kernel, channels).movedim(-1, 1)

    def columns(self, module: nn.Module, x: Tensor) -> Tensor:  # (G, samples, C)
        """What the matrices are multiplied by, for an input of the module; convolutions unfolded."""
        if isinstance(module, nn.Linear):
            return x.reshape(1, -1, module.in_features)
        assert isinstance(module, nn.Conv2d)
        x = x if x.dim() == 4 else x.unsqueeze(0)
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        unfolded = F.unfold(x, module.kernel_size, dilation=module.dilation, stride=module.stride)  # (N, C, samples)
        samples, channels = unfolded.shape[0], self.tensor.shape[1]
        apart = unfolded.view(samples, self.groups, channels, -1, unfolded.shape[-1])
        return apart.permute(1, 0, 4, 3, 2).reshape(self.groups, samples * unfolded.shape[-1], -1)


def find_layers(model: nn.Module, coordinates: Coordinates) -> list[Layer]:
    """The layer of every prunable tensor.

    Raises:
        ValueError: one that is no weight of a Linear or Conv2d.
    """
    model, layers = unwrapped(model), []
    for index, tensor in enumerate(coordinates.tensors):
        places = [name.rpartition(".") for name in (tensor.name, *tensor.aliases)]
        modules = tuple(model.get_submodule(prefix) for prefix, _, _ in places)
        fits = all(isinstance(module, nn.Linear | nn.Conv2d) for module in modules)
        if not fits or any(local != "weight" for _, _, local in places) or len({*map(type, modules)}) > 1:
            raise ValueError(
                f"model: wanted weights of Linear and Conv2d layers, got {tensor.name} ({tensor.layer}), for which "
                f"this method is not defined here: leave it out, ignored_layers=[{tensor.name!r}]"
            )
        layers.append(Layer(tensor, index, modules))
    return layers


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
        with _hooked(layers, lambda layer, module, x: order.setdefault(layer)):
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

    with _hooked(block, add):
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


@contextmanager
def _hooked(layers: Sequence[Layer], look: Callable[[Layer, nn.Module, Tensor], Any]) -> Iterator[None]:
    """``look`` at every input that one of the layers is called with."""
    handles = []
    try:
        for layer in layers:
            for module in dict.fromkeys(layer.modules):

                def hook(
                    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layer: Layer = layer
                ) -> None:
                    look(layer, module, args[0] if args else kwargs["input"])

                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers whose names agree up to the first number (``model.layers.3``, ``layer1.0``); others by themselves."""
    blocks: dict[str, list[Layer]] = {}
    for layer in layers:
        parts = layer.tensor.name.split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        blocks.setdefault(".".join(parts[: number + 1]), []).append(layer)
    return list(blocks.values())
