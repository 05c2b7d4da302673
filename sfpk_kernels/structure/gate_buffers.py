"""The gates of a run: the consumers' weights, gated anew for every particle, and ∂L/∂keep from their gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.masking import Blocks, PreparedMasking
from .axes import Entry, Structure


@dataclass(frozen=True, eq=False)
class _Part:
    """A gated weight in a flat buffer, its dims in the order they have in memory."""

    name: str
    begin: int
    shape: tuple[int, ...]
    order: tuple[int, ...]  # dims from the outermost on

    def of(self, flat: Tensor) -> Tensor:
        """Its part, in the shape of the weight."""
        sizes = [self.shape[dim] for dim in self.order]
        view = flat[self.begin : self.begin + torch.Size(sizes).numel()].view(sizes)
        return view.permute([self.order.index(dim) for dim in range(len(sizes))])

    def along(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape with its dims in the order of memory."""
        return tensor if self.order == tuple(range(len(self.order))) else tensor.permute(self.order)


class _Flat:
    """All gated weights of one dtype."""

    def __init__(self, entries: Sequence[Entry], tensors: Mapping[str, Tensor], backend: str | None):
        self.parts: list[_Part] = []
        layout: list[Blocks] = []
        coordinates: list[Tensor] = []
        size = 0
        for entry in entries:
            weight = tensors[entry.tensor]
            part = _Part(entry.tensor, size, tuple(weight.shape), _order(weight))
            sizes = [weight.shape[dim] for dim in part.order]
            at = part.order.index(entry.dim)
            together = _run(entry.index)
            outer, inner = torch.Size(sizes[:at]).numel(), torch.Size(sizes[at + 1 :]).numel()
            self.parts.append(part)
            layout.append(Blocks(outer, sizes[at] // together, inner * together))
            coordinates.append(entry.index[::together])
            size += weight.numel()
        first = tensors[entries[0].tensor]
        self.coordinates = torch.cat(coordinates)  # (P,) of each place of the layout, on the CPU; −1: always kept
        self.dense = torch.empty(size, dtype=first.dtype, device=first.device)
        for part in self.parts:
            part.of(self.dense).copy_(tensors[part.name].detach())
        self.masking = PreparedMasking(self.dense, layout, backend)
        index = self.coordinates.to(first.device)
        self.always, self.read = index < 0, index.clamp_min(0)


class GateBuffers:
    """What :func:`~sfpk_kernels.structure.gated_weights` and :func:`~sfpk_kernels.structure.gate_gradient` compute.

    In few passes over memory, by the ops for masked weights; nothing waits for the device.

    Args:
        structure: whose gates they are.
        tensors: the dense weights by name, of one device. They are copied.
        backend: of the ops.
    """

    def __init__(self, structure: Structure, tensors: Mapping[str, Tensor], backend: str | None = None):
        by_dtype: dict[torch.dtype, list[Entry]] = {}
        for entry in structure.gates:
            by_dtype.setdefault(tensors[entry.tensor].dtype, []).append(entry)
        self._flats = [_Flat(entries, tensors, backend) for entries in by_dtype.values()]
        places = _places(torch.cat([flat.coordinates for flat in self._flats]), structure.size)
        self._places = places.to(self._flats[0].dense.device)

    def new(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Memory for gated weights: for :meth:`fill_`, and what of it is which weight, in its shape and strides."""
        memory = [torch.empty_like(flat.dense) for flat in self._flats]
        views = {part.name: part.of(one) for flat, one in zip(self._flats, memory, strict=True) for part in flat.parts}
        return memory, views

    def fill_(
        self,
        memory: Sequence[Tensor],  # of :meth:`new`
        keep: Tensor,  # (C,) bool or floating point, on the device of the weights
    ) -> None:
        """Write every input column times the value of its coordinate; of those removed 0, whatever the weights are.

        All of them, as another particle's were there before: most columns may be other ones.
        """
        for flat, out in zip(self._flats, memory, strict=True):
            values = keep[flat.read].masked_fill_(flat.always, 1)
            flat.masking.apply_(values[None], flat.masking.parts(out[None]))

    def gradient(
        self,
        gradients: Mapping[str, Tensor],  # ∂L/∂(gated w) by name; not given: 0
    ) -> Tensor:  # (C,) fp32, or fp64 for fp64 weights
        """∂L/∂keep_c = Σ w · ∂L/∂(gated w) over the gates of coordinate c.

        Products are rounded to fp32 and added in fp64, and so are the sums of several weights.
        """
        sums = []
        for flat in self._flats:
            rows = {
                i: part.along(gradients[part.name]).reshape(1, -1)
                for i, part in enumerate(flat.parts)
                if part.name in gradients
            }
            sums.append(flat.masking.gradient(rows))
        all_ = torch.cat([*sums, sums[0].new_zeros(1)])
        return all_[self._places].sum(1, dtype=torch.float64).to(all_.dtype)


def _order(weight: Tensor) -> tuple[int, ...]:
    """The dims of a weight as they lie in memory; in their own order where there are gaps."""
    strides = weight.stride()
    order = sorted(range(len(strides)), key=lambda dim: (-strides[dim], dim))
    return tuple(order) if weight.permute(order).is_contiguous() else tuple(range(len(strides)))


def _run(index: Tensor) -> int:
    """The largest divisor of its length by which successive positions are of one coordinate."""
    ends = (index.diff().nonzero().flatten() + 1).tolist()
    return math.gcd(index.numel(), *ends)


def _places(
    index: Tensor,  # (P,) on the CPU
    size: int,
) -> Tensor:  # (C, most) int64
    """Where each coordinate has its sums among P places, and P where it has no more."""
    counts = index[index >= 0].bincount(minlength=size)
    order = index.argsort(stable=True)[int((index < 0).sum()) :]
    within = torch.arange(len(order), dtype=torch.int64, device="cpu")
    within -= (counts.cumsum(0) - counts).repeat_interleave(counts)
    found = torch.full((size, int(counts.max())), len(index), dtype=torch.int64, device="cpu")
    found[index[order], within] = order
    return found
