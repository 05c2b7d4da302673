"""Coupled channels, heads and neurons as coordinates: one table of what each of them governs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

KINDS = ("channel", "neuron", "head")
ROLES = ("gate", "producer", "follower")
BUDGETS = ("params", "macs", "channels")
ON_REFUSAL = ("raise", "protect")


@dataclass(frozen=True)
class CoordinateGroup:
    """Coordinates first … first + size − 1: those that one module produces."""

    name: str  # of the module
    kind: str  # "channel", "neuron" or "head"
    first: int
    size: int

    @property
    def span(self) -> slice:
        """Its part of a vector (C,)."""
        return slice(self.first, self.first + self.size)


@dataclass(frozen=True, eq=False)
class Entry:
    """One dim of a parameter or buffer: which coordinate every position of it belongs to.

    ``role``: ``"gate"`` a consumer's input, ``"producer"`` what computes the coordinate, ``"follower"`` what goes with
    it: biases, weights and statistics of norms.
    """

    tensor: str
    dim: int
    index: Tensor  # (shape[dim],) int64; −1: always kept
    role: str


@dataclass(frozen=True, eq=False)
class Norm:
    """A LayerNorm or RMSNorm over a pruned width, whose statistics are those of the kept positions."""

    module: str
    index: Tensor  # (width,) int64; −1: always kept


@dataclass(frozen=True, eq=False)
class Attribute:
    """A number that a module keeps: ``unit`` times how many positions are kept, ``num_heads`` for one."""

    module: str
    name: str
    index: Tensor  # (positions,) int64; −1: always kept
    unit: int = 1


@dataclass(frozen=True, eq=False)
class Structure:
    """The coordinates of a model and everything they govern. It holds names and indices, no reference to the model.

    Raises:
        ValueError: groups that do not follow each other; an index outside the coordinates; two gates on one tensor; a
            coordinate that no gate reads.
    """

    groups: tuple[CoordinateGroup, ...]
    entries: tuple[Entry, ...]
    norms: tuple[Norm, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    protected: dict[str, str] = field(default_factory=dict)  # module whose outputs all stay → why

    def __post_init__(self) -> None:
        first = 0
        for group in self.groups:
            if group.first != first or group.size < 1 or group.kind not in KINDS:
                raise ValueError(f"groups: wanted kinds of {KINDS}, one after the other from {first}, got {group}")
            first += group.size
        dims: set[tuple[str, int]] = set()
        gated: set[str] = set()
        read = torch.zeros(first, dtype=torch.bool, device="cpu")
        for entry in self.entries:
            where = f"entries: {entry.tensor}, dim {entry.dim}"
            if entry.role not in ROLES:
                raise ValueError(f"{where}: wanted a role of {ROLES}, got {entry.role!r}")
            if (entry.tensor, entry.dim) in dims or (entry.role == "gate" and entry.tensor in gated):
                raise ValueError(f"{where}: wanted one entry a dim and one gate a tensor, got a second")
            dims.add((entry.tensor, entry.dim))
            _check_index(where, entry.index, first)
            if entry.role == "gate":
                gated.add(entry.tensor)
                read[entry.index[entry.index >= 0]] = True
        for norm in self.norms:
            _check_index(f"norms: {norm.module}", norm.index, first)
        for attribute in self.attributes:
            _check_index(f"attributes: {attribute.module}", attribute.index, first)
        if not bool(read.all()):
            lost = int((~read).nonzero()[0])
            raise ValueError(f"entries: wanted a gate on every coordinate, got none on {self.describe(lost)}")

    @property
    def size(self) -> int:
        """C, the number of coordinates."""
        return sum(group.size for group in self.groups)

    @property
    def gates(self) -> tuple[Entry, ...]:
        """The consumers' inputs."""
        return tuple(entry for entry in self.entries if entry.role == "gate")

    def by_tensor(self) -> dict[str, list[Entry]]:
        """The entries of each tensor."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            found.setdefault(entry.tensor, []).append(entry)
        return found

    def group_of(self, coordinate: int) -> CoordinateGroup:
        """The group that a coordinate belongs to."""
        return next(g for g in self.groups if g.first <= coordinate < g.first + g.size)

    def norm_indices(self, device: torch.device) -> list[Tensor]:
        """The indices of the norms there; copied once, as from the host each copy would be waited for."""
        if device not in self._norm_indices:
            self._norm_indices[device] = [norm.index.to(device) for norm in self.norms]
        return self._norm_indices[device]

    @cached_property
    def _norm_indices(self) -> dict[torch.device, list[Tensor]]:
        return {}

    def describe(self, coordinate: int) -> str:
        """``"channel 3 of conv1"``."""
        group = self.group_of(coordinate)
        return f"{group.kind} {coordinate - group.first} of {group.name}"

    def kept_of_groups(
        self,
        keep: Tensor,  # (C,) bool
    ) -> dict[str, tuple[int, int]]:
        """(kept, all) coordinates of each group, by its name."""
        return {group.name: (int(keep[group.span].sum()), group.size) for group in self.groups}

    @cached_property
    def layers(self) -> tuple[Tensor, ...]:
        """The coordinates of each dim that would be empty without all of them; the same ones once."""
        found: dict[tuple[int, ...], Tensor] = {}
        for entry in self.entries:
            if entry.role != "follower" and int(entry.index.min()) >= 0:
                coordinates = entry.index.unique()
                found.setdefault(tuple(coordinates.tolist()), coordinates)
        return tuple(found.values())

    @cached_property
    def narrow(self) -> tuple[Tensor, ...]:
        """The layers that have no group as a whole: one kept coordinate of every group may leave them empty."""
        sizes = torch.tensor([group.size for group in self.groups], dtype=torch.int64, device="cpu")
        groups = torch.arange(len(sizes), dtype=torch.int64, device="cpu").repeat_interleave(sizes)
        return tuple(
            layer for layer in self.layers if not bool((groups[layer].bincount(minlength=len(sizes)) == sizes).any())
        )

    def check_keep(self, keep: Tensor) -> Tensor:
        """``keep`` on the CPU.

        Raises:
            TypeError, ValueError: it is no bool tensor (C,), or leaves a layer without any input or output.
        """
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            got = str(keep.dtype) if isinstance(keep, Tensor) else type(keep).__name__
            raise TypeError(f"keep: wanted a bool tensor ({self.size},), got {got}")
        if keep.shape != (self.size,):
            raise ValueError(f"keep: wanted shape ({self.size},), got {tuple(keep.shape)}")
        keep = keep.cpu()
        for coordinates in self.layers:
            if not bool(keep[coordinates].any()):
                group = self.group_of(int(coordinates[0]))
                raise ValueError(f"keep: wanted at least one {group.kind} of {group.name}, got none")
        return keep


def kept(index: Tensor, keep: Tensor) -> Tensor:  # (positions,) bool
    """Which positions stay when the coordinates of ``keep`` (C,) do."""
    return (index < 0) | keep[index.clamp_min(0)]


def _check_index(where: str, index: Tensor, size: int) -> None:
    if index.dtype != torch.int64 or index.dim() != 1 or index.numel() == 0:
        raise ValueError(f"{where}: wanted an int64 index (positions,), got {index.dtype} {tuple(index.shape)}")
    if int(index.min()) < -1 or int(index.max()) >= size:
        raise ValueError(f"{where}: wanted coordinates from -1 to {size - 1}, got {index.min()} to {index.max()}")
