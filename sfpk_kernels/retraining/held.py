"""The weights that shots prune: the values that removed ones keep for the search, and how the others are trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..coordinates.flat import Coordinates, named_parameters, unwrapped
from ..masks.maskset import MaskSet
from ..search.structured.coordinates import StructuredCoordinates
from ..structure import kept_statistics
from ..structure.axes import kept


class Held:
    """Single weights: all that masks cover is what the coordinates are."""

    def __init__(self, coordinates: Coordinates):
        self._coordinates = coordinates

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that masks cover, in order."""
        return {tensor.name: tuple(tensor.shape) for tensor in self._coordinates.tensors}

    def read(self, model: nn.Module) -> Tensor:  # (weights,)
        """All of them, in the order of :meth:`MaskSet.flat`.

        Raises:
            ValueError: one that is not finite.
        """
        return self._coordinates.flatten(model)

    @torch.no_grad()
    def write(self, model: nn.Module, flat: Tensor) -> None:
        """Put values into the model, in place."""
        parts = self._coordinates.split(flat)
        for parameter, values in zip(self._coordinates.parameters(model), parts, strict=True):
            parameter.copy_(values)

    def check(self, name: str, masks: MaskSet) -> None:
        """That masks of the right shapes are such as the search makes.

        Raises:
            ValueError: they are not.
        """

    def trained(self, model: nn.Module, masks: MaskSet) -> AbstractContextManager[None]:
        """Within it the masked model computes what the pruned one does."""
        return nullcontext()

    def followers(self, model: nn.Module) -> Callable[[MaskSet], None]:
        """Remember what no mask covers and still goes; what is returned puts back what has gone."""
        return lambda masks: None


class HeldGroups(Held):
    """Channels, heads and neurons: the weights that compute and read them; biases, norms and their statistics go along.

    A removed channel has other statistics while its weights are 0, and weight decay acts on its bias and norm. None of
    that reaches the loss, but it would come back with the channel.
    """

    def __init__(self, coordinates: StructuredCoordinates):
        super().__init__(coordinates)
        self._groups = coordinates

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that masks cover, in order."""
        return self._groups.masked

    def read(self, model: nn.Module) -> Tensor:  # (weights,)
        """As for single weights."""
        parameters, dtype = named_parameters(model), self._groups.flatten(model).dtype  # which looks at them
        return torch.cat([parameters[name].detach().reshape(-1).to(dtype) for name in self.shapes])

    @torch.no_grad()
    def write(self, model: nn.Module, flat: Tensor) -> None:
        """As for single weights."""
        parameters, begin = named_parameters(model), 0
        for name, shape in self.shapes.items():
            end = begin + torch.Size(shape).numel()
            parameters[name].copy_(flat[begin:end].view(shape))
            begin = end

    def check(self, name: str, masks: MaskSet) -> None:
        """That whole coordinates are masked, and no layer is dead.

        Raises:
            ValueError: something else.
        """
        keep = self._groups.keep_of(masks)
        if self._groups.masks_of(keep) != masks:
            raise ValueError(f"{name}: wanted masks of whole channels, heads and neurons, got others")
        self._groups.structure.check_keep(keep)

    def trained(self, model: nn.Module, masks: MaskSet) -> AbstractContextManager[None]:
        """Norms over a pruned width see the statistics of the kept channels, as in the smaller model."""
        return kept_statistics(model, self._groups.structure, self._groups.keep_of(masks))

    def followers(self, model: nn.Module) -> Callable[[MaskSet], None]:
        """Biases, weights and statistics of norms of the coordinates that masks remove."""
        inner = unwrapped(model)
        tensors = {**dict(inner.named_parameters(remove_duplicate=False)), **dict(inner.named_buffers())}
        entries = [entry for entry in self._groups.structure.entries if entry.tensor not in self.shapes]
        saved = [tensors[entry.tensor].detach().clone() for entry in entries]

        @torch.no_grad()
        def put_back(masks: MaskSet) -> None:
            keep = self._groups.keep_of(masks)
            for entry, before in zip(entries, saved, strict=True):
                gone = ~kept(entry.index, keep).to(before.device)
                tensors[entry.tensor].movedim(entry.dim, 0)[gone] = before.movedim(entry.dim, 0)[gone]

        return put_back


def held_of(coordinates: Coordinates) -> Held:
    """What the coordinates are of."""
    return HeldGroups(coordinates) if isinstance(coordinates, StructuredCoordinates) else Held(coordinates)
