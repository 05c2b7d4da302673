"""The structure of convolutional nets and chains of Linear, by Torch-Pruning's dependency graph."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..utils.extras import require
from .axes import Attribute, CoordinateGroup, Entry, Norm, Structure
from .governed import Governed, governed, why_not
from .kinds import nothing

if TYPE_CHECKING:
    from ._coupling import Position
    from ._tracing import Side, Traced


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    ignored: Collection[str] = (),
    time_limit: float = 30,
    protect: bool = False,
) -> Structure:
    """The structure of a model, found by calling a copy of it once; outputs of ``ignored`` modules all stay.

    With ``protect`` channels that cannot be removed right stay, too, instead of an error.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: channels that cannot be removed right, named; nothing that can be removed; a graph that could not
            be followed within ``time_limit`` seconds.
    """
    require("structured pruning of this model", "torch_pruning")
    from ._coupling import couple
    from ._tracing import Traced

    deadline = time.monotonic() + time_limit
    spare = copy.deepcopy(model).eval()
    for parameter in spare.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_()  # a frozen one would not be seen
    try:
        traced = Traced(spare, args, kwargs, deadline)
        components = couple(traced, deadline)
    except TimeoutError:
        raise ValueError(
            f"model: its graph could not be followed within time_limit={time_limit:g} s, as that of detection heads: "
            "pass the part that computes features alone, or a larger time_limit"
        ) from None
    return _Table(spare, traced, set(ignored), protect).structure(components)


class _Table:
    """Components → coordinates, their groups and what they govern."""

    def __init__(self, model: nn.Module, traced: Traced, ignored: set[str], protect: bool):
        self._model, self._traced, self._ignored, self._protect = model, traced, ignored, protect
        self._names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self._order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        uses: dict[int, int] = defaultdict(int)
        for _, parameter in model.named_parameters(remove_duplicate=False):
            uses[id(parameter)] += 1
        self._tied = {name for name, p in model.named_parameters(remove_duplicate=False) if uses[id(p)] > 1}
        self._protected: dict[str, str] = {}
        self._known: dict[Side, _Known] = {}

    def structure(self, components: list[list[Position]]) -> Structure:
        """All coordinates, group after group in the order of the modules."""
        by_group: dict[str, list[tuple[int, str, list[tuple[Governed, int]]]]] = defaultdict(list)
        for component in components:
            found = self._coordinate(component)
            if found is not None:
                name, position, kind, parts = found
                by_group[name].append((position, kind, parts))
        groups: list[CoordinateGroup] = []
        positions: dict[tuple[str, str, int, str], list[tuple[int, int]]] = defaultdict(list)
        sizes: dict[tuple[str, str, int, str], int] = {}
        first = 0
        for name in sorted(by_group, key=self._order.__getitem__):
            members = sorted(by_group[name], key=lambda one: one[0])
            groups.append(CoordinateGroup(name, members[0][1], first, len(members)))
            for coordinate, (_, _, parts) in enumerate(members, start=first):
                for part, position in parts:
                    positions[part.key].append((part.place(position), coordinate))
                    sizes[part.key] = part.size
            first += len(members)
        if not groups:
            raise nothing(self._protected)
        entries: list[Entry] = []
        norms: list[Norm] = []
        attributes: list[Attribute] = []
        for key, pairs in positions.items():
            what, name, dim, role = key
            index = _index(pairs, sizes[key], name)
            if what == "tensor":
                entries.append(Entry(name, dim, index, role))
            elif what == "norm":
                norms.append(Norm(name, index))
            else:
                attributes.append(Attribute(name, role, index))
        places = {name: i for i, name in enumerate(self._model.state_dict())}
        entries.sort(key=lambda entry: (places.get(entry.tensor, -1), entry.dim))
        for name in {group.name for group in groups} & self._protected.keys():
            self._protected[name] = f"some outputs only: {self._protected[name]}"
        return Structure(tuple(groups), tuple(entries), tuple(norms), tuple(attributes), self._protected)

    def _coordinate(self, component: list[Position]) -> tuple[str, int, str, list[tuple[Governed, int]]] | None:
        """(its group, its position there, kind, what it governs and where), or None if it is protected."""
        producers: list[tuple[int, str, int]] = []  # (order, name, position)
        parts: list[tuple[Governed, int]] = []
        reason: str | None = None
        trouble: str | None = None
        gated, linear = False, True
        for side, position in component:
            found = self._side(side)
            if found.produces:
                producers.append((self._order[found.name], found.name, position))
                linear &= found.linear
            reason, trouble = reason or found.reason, trouble or found.trouble
            gated |= found.gated
            parts += [(part, position) for part in found.parts]
        _, root, position = min(producers)
        if reason is None and trouble is None and not gated:
            reason = "no layer reads it"
        if reason is None:
            trouble = trouble or next(filter(None, (part.trouble_at(at) for part, at in parts)), None)
            if trouble and self._protect:
                reason = f"cannot be removed one by one, it reaches {trouble}"
        if reason is not None:
            for _, name, _ in producers:
                self._protected.setdefault(name, reason)
            return None
        if trouble:
            raise ValueError(
                f"model: the outputs of {root} cannot be removed one by one, as they reach {trouble}: keep them all, "
                f"ignored_layers=[{root!r}]"
            )
        return root, position, "neuron" if linear else "channel", parts

    def _side(self, side: Side) -> _Known:
        """What is known of all positions of a side alike."""
        if side not in self._known:
            self._known[side] = self._look(*side)
        return self._known[side]

    def _look(self, number: int, side: str) -> _Known:
        from ._coupling import out_positions

        node = self._traced.nodes[number]
        module = node.module
        name = self._names.get(id(module), "")
        strange = self._traced.unfollowed(node) or module
        why, strange_name = why_not(strange), self._names.get(id(strange), "")
        reason = None
        if any(module is one for one in self._traced.inputs):
            reason = "added to, or beside, what goes into the model"
        elif side == "out" and self._traced.leaves_model(node):
            reason = "leaves the model"
        elif (side == "out" and isinstance(module, nn.Module) and name in self._ignored) or (
            why and strange_name in self._ignored
        ):
            reason = "ignored_layers"
        named = self._traced.names.get(module, "") if isinstance(module, nn.Parameter) else name
        parts = [] if why else governed(self._model, module, named, side, int(node.pruning_dim))
        if any(part.name in self._tied for part in parts):
            reason = reason or "tied weights"
        return _Known(
            name,
            side == "out" and out_positions(module) > 0,
            isinstance(module, nn.Linear),
            any(part.role == "gate" for part in parts),
            reason,
            f"{strange_name} ({type(strange).__name__}): {why}" if why else None,
            parts,
        )


@dataclass(frozen=True)
class _Known:
    name: str  # of the module
    produces: bool
    linear: bool
    gated: bool
    reason: str | None  # why all of it stays
    trouble: str | None  # why it cannot be followed
    parts: list[Governed]


def _index(pairs: list[tuple[int, int]], size: int, name: str) -> Tensor:
    found = torch.full((size,), -1, dtype=torch.int64, device="cpu")
    positions, coordinates = torch.tensor(pairs, dtype=torch.int64, device="cpu").unbind(1)
    found[positions] = coordinates
    if not torch.equal(found[positions], coordinates):
        raise ValueError(f"model: a position of {name} belongs to two coordinates at once")
    return found
