"""Moments of layers: what they meet in the pruned model, and what the dense one gives at the same place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.flat import Coordinates, PrunableTensor
from ..masks.maskset import MaskSet
from ..modeling.batches import move_to
from ..modeling.layers import Layer, hooked, layer_of
from .least_squares import Moments

Run = Callable[[nn.Module, Any], Any]


def masked_layers(model: nn.Module, mask: MaskSet) -> tuple[list[Layer], dict[str, str]]:
    """The Linear and Conv2d layers under a mask; by name, why the others are none."""
    everything = Coordinates(model, include_embeddings=True, include_biases=True, include_norms=True)
    layers, skipped = [], {}
    for index, tensor in enumerate(everything.tensors):
        names = names_in(mask, tensor)
        if not names:
            continue
        layer = layer_of(model, tensor, index)
        if layer is None:
            skipped[names[0]] = f"{tensor.layer}: no weight of Linear or Conv2d layers alone"
        else:
            layers.append(layer)
    known = {name for layer in layers for name in (layer.tensor.name, *layer.tensor.aliases)}
    skipped |= {name: "not prunable" for name in mask if name not in known and name not in skipped}
    return layers, skipped


@torch.no_grad()
def stages(model: nn.Module, layers: Sequence[Layer], batch: Any, run: Run) -> list[list[Layer]]:
    """The layers that are called, in order of execution; those that share an input, such as q, k and v, together."""
    order: dict[Layer, Tensor] = {}
    with hooked(layers, lambda layer, module, x: order.setdefault(layer, x)):
        run(model, batch)
    found: list[list[Layer]] = []
    last: Tensor | None = None
    for layer, x in order.items():
        if x is last:
            found[-1].append(layer)
        else:
            found.append([layer])
        last = x
    return found


@torch.no_grad()
def moments_of(
    stage: Sequence[Layer],
    model: nn.Module,
    dense: nn.Module,
    batches: Sequence[Any],
    device: torch.device,
    run: Run,
) -> dict[Layer, Moments]:
    """Of the layers' inputs in ``model`` and of their outputs in ``dense``, one forward pass of each a batch.

    Positions that an ``attention_mask`` in the batch leaves out do not count.

    Raises:
        ValueError: a dense model that calls the layers otherwise.
        FloatingPointError: inputs or outputs that are not finite.
    """
    found = {layer: Moments() for layer in stage}
    for host in batches:
        batch = move_to(host, device)
        wanted: dict[Layer, list[Tensor]] = {layer: [] for layer in stage}
        with _outputs(stage, dense, wanted):
            run(dense, batch)
        calls = {layer: iter(outputs) for layer, outputs in wanted.items()}
        seen = _seen(batch)

        def add(
            layer: Layer,
            module: nn.Module,
            x: Tensor,
            calls: dict[Layer, Iterator[Tensor]] = calls,
            seen: Tensor | None = seen,
        ) -> None:
            y = next(calls[layer], None)
            if y is None or y.shape[0] != x.shape[0]:
                raise ValueError(
                    f"dense: wanted a model that calls {layer.tensor.name} as the pruned one does, on the same samples"
                )
            if seen is not None and x.dim() == 3 and x.shape[:2] == seen.shape:
                x, y = x[seen], y[seen]
            weight = module.weight
            assert isinstance(weight, Tensor)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            found[layer].add(layer.columns(module, x.to(dtype)), _rows(layer, y.to(dtype)))

        with hooked(stage, add):
            run(model, batch)
    for layer, moments in found.items():
        if not moments.finite:
            raise FloatingPointError(f"loader: wanted finite inputs and outputs of {layer.tensor.name}, got others")
    return found


def names_in(mask: MaskSet, tensor: PrunableTensor) -> list[str]:
    """Of all names of a tensor those under which the mask has it."""
    return [name for name in (tensor.name, *tensor.aliases) if name in mask]


def own_bias(layer: Layer) -> nn.Parameter | None:
    """The bias that belongs to the weight alone; None where there is none, or the weight has several modules."""
    module = layer.modules[0]
    bias = module.bias if len(set(layer.modules)) == 1 else None
    return bias if isinstance(bias, nn.Parameter) else None


def _rows(layer: Layer, y: Tensor) -> Tensor:  # (G, samples, R)
    """What the matrices give, for an output of the module."""
    if isinstance(layer.modules[0], nn.Linear):
        return y.reshape(1, -1, y.shape[-1])
    y = y if y.dim() == 4 else y.unsqueeze(0)
    apart = y.reshape(y.shape[0], layer.groups, -1, y.shape[-2] * y.shape[-1])  # (N, G, R, places)
    return apart.permute(1, 0, 3, 2).reshape(layer.groups, -1, apart.shape[2])


def _seen(batch: Any) -> Tensor | None:
    """Positions that count, (batch, length) bool."""
    inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


@contextmanager
def _outputs(stage: Sequence[Layer], dense: nn.Module, wanted: dict[Layer, list[Tensor]]) -> Iterator[None]:
    """Outputs of the same layers in the dense model, call by call; without the biases of tied weights."""
    handles = []
    try:
        for layer in stage:
            twin = layer_of(dense, layer.tensor, layer.index)
            if twin is None:
                raise ValueError(f"dense: wanted a copy of the model, got one with another layer {layer.tensor.name}")
            for module in dict.fromkeys(twin.modules):

                def hook(module: nn.Module, x: Any, y: Tensor, layer: Layer = layer) -> None:
                    bias = module.bias
                    if own_bias(layer) is None and isinstance(bias, Tensor):
                        y = y - (bias if isinstance(module, nn.Linear) else bias.view(-1, 1, 1))
                    wanted[layer].append(y)

                handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
