"""Linear and Conv2d layers as the matrices they multiply by, and the inputs they meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..coordinates.flat import Coordinates, PrunableTensor, unwrapped

_NAMED = 3  # tensors, in one message


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


def layer_of(model: nn.Module, tensor: PrunableTensor, index: int) -> Layer | None:
    """The layer whose weight that is; None for one that is no weight of Linear or Conv2d modules alone."""
    model = unwrapped(model)
    places = [name.rpartition(".") for name in (tensor.name, *tensor.aliases)]
    modules = tuple(model.get_submodule(prefix) for prefix, _, _ in places)
    fits = all(isinstance(module, nn.Linear | nn.Conv2d) for module in modules)
    if not fits or any(local != "weight" for _, _, local in places) or len({*map(type, modules)}) > 1:
        return None
    return Layer(tensor, index, modules)


def find_layers(model: nn.Module, coordinates: Coordinates) -> list[Layer]:
    """The layer of every prunable tensor.

    Raises:
        ValueError: one that is no weight of a Linear or Conv2d.
    """
    found = [layer_of(model, tensor, index) for index, tensor in enumerate(coordinates.tensors)]
    others = [tensor for tensor, layer in zip(coordinates.tensors, found, strict=True) if layer is None]
    if others:
        got = ", ".join(f"{tensor.name} ({tensor.layer})" for tensor in others[:_NAMED])
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        names = ", ".join(repr(tensor.name) for tensor in others)
        raise ValueError(
            f"model: wanted weights of Linear and Conv2d layers, got {got}{more}, for which this method is not defined "
            f"here: leave out what is none, ignored_layers=[{names}]"
        )
    return [layer for layer in found if layer is not None]


@contextmanager
def hooked(layers: Sequence[Layer], look: Callable[[Layer, nn.Module, Tensor], Any]) -> Iterator[None]:
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


class Hooks:
    """The forward hooks of models, to be put back after work that was stopped as it set or removed its own."""

    def __init__(self, *models: nn.Module):
        self._hooks: list[tuple[dict[Any, Any], dict[Any, Any]]] = [
            (hooks, dict(hooks))
            for model in models
            for module in model.modules()
            for hooks in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks)
        ]

    def restore(self) -> None:
        """Those that were there, and no others."""
        for hooks, saved in self._hooks:
            if hooks != saved:
                hooks.clear()
                hooks.update(saved)
