"""The structure of convolutional nets and chains of Linear, by Torch-Pruning's dependency graph."""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..coordinates.flat import Ignored, ignored_names
from ..utils.extras import require
from .axes import Attribute, CoordinateGroup, Entry, Norm, Structure
from .governed import Governed, governed, why_not

if TYPE_CHECKING:
    from ._coupling import Position
    from ._tracing import Traced


def trace(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    ignored_layers: Iterable[Ignored] = (),
    time_limit: float = 30,
) -> Structure:
    """The structure of a model, found by calling a copy of it once.

    Raises:
        ImportError: torch-pruning is not installed.
        ValueError: channels that cannot be removed right, named; nothing that can be removed; a graph that could not
            be followed within ``time_limit`` seconds.
    """
    require("structured pruning of this model", "torch_pruning")
    from ._coupling import couple
    from ._tracing import Traced

    ignored = {name.rpartition(".")[0] for name in ignored_names(model, ignored_layers)}
    deadline = time.monotonic() + time_limit
    spare = copy.deepcopy(model).eval()
    for parameter in spare.parameters():
        parameter.requires_grad_()  # a frozen one would not be seen
    try:
        traced = Traced(spare, args, kwargs, deadline)
        components = couple(traced, deadline)
    except TimeoutError:
        raise ValueError(
            f"model: its graph could not be followed within time_limit={time_limit:g} s, as that of detection heads: "
            "pass the part that computes features alone, or a larger time_limit"
        ) from None
    return _Table(spare, traced, ignored).structure(components)


class _Table:
    """Components → coordinates, their groups and what they govern."""

    def __init__(self, model: nn.Module, traced: Traced, ignored: set[str]):
        self._model, self._traced, self._ignored = model, traced, ignored
        self._names = {id(module): name for name, module in reversed(list(model.named_modules()))}
        self._order = {name: i for i, (name, _) in enumerate(model.named_modules())}
        uses: dict[int, int] = defaultdict(int)
        for _, parameter in model.named_parameters(remove_duplicate=False):
            uses[id(parameter)] += 1
        self._tied = {name for name, p in model.named_parameters(remove_duplicate=False) if uses[id(p)] > 1}
        self._protected: dict[str, str] = {}

    def structure(self, components: list[list[Position]]) -> Structure:
        """All coordinates, group after group in the order of the modules."""
        by_group: dict[str, list[tuple[int, str, list[Governed]]]] = defaultdict(list)
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
                for part in parts:
                    positions[part.key].append((part.position, coordinate))
                    sizes[part.key] = part.size
            first += len(members)
        if not groups:
            why = "".join(f"; {name or 'model'}: {reason}" for name, reason in self._protected.items())
            raise ValueError(f"model: wanted channels or neurons that can be removed, found none{why}")
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

    def _coordinate(self, component: list[Position]) -> tuple[str, int, str, list[Governed]] | None:
        """(its group, its position there, kind, what it governs), or None if it is protected."""
        from ._coupling import out_positions

        producers: list[tuple[int, str, int]] = []  # (order, name, position)
        parts: list[Governed] = []
        trouble: str | None = None
        reason: str | None = None
        for (number, side), position in component:
            node = self._traced.nodes[number]
            module = node.module
            name = self._names.get(id(module), "")
            if side == "out" and out_positions(module):
                producers.append((self._order[name], name, position))
            if any(module is one for one in self._traced.inputs):
                reason = "added to, or beside, what goes into the model"
            if side == "out" and self._traced.leaves_model(node):
                reason = "leaves the model"
            strange = self._traced.unfollowed(node) or module
            handled = why_not(strange)
            strange_name = self._names.get(id(strange), "")
            if (name in self._ignored and side == "out" and isinstance(module, nn.Module)) or (
                handled and strange_name in self._ignored
            ):
                reason = "ignored_layers"
            if handled:
                trouble = trouble or f"{strange_name} ({type(strange).__name__}): {handled}"
                continue
            named = self._traced.names.get(module, "") if isinstance(module, nn.Parameter) else name
            parts += governed(self._model, module, named, side, position, int(node.pruning_dim))
        _, root, position = min(producers)
        if any(part.name in self._tied for part in parts):
            reason = reason or "tied weights"
        if not reason and not trouble and not any(part.role == "gate" for part in parts):
            reason = "no layer reads it"
        if reason is None:
            trouble = trouble or next((part.trouble for part in parts if part.trouble), None)
            if trouble:
                raise ValueError(
                    f"model: the outputs of {root} cannot be removed one by one, as they reach {trouble}: keep them "
                    f"all, ignored_layers=[{root!r}]"
                )
            kinds = {isinstance(self._model.get_submodule(name), nn.Linear) for _, name, _ in producers}
            return root, position, "neuron" if kinds == {True} else "channel", parts
        for _, name, _ in producers:
            self._protected.setdefault(name, reason)
        return None


def _index(pairs: list[tuple[int, int]], size: int, name: str) -> Tensor:
    index = torch.full((size,), -1, dtype=torch.int64)
    for position, coordinate in pairs:
        if int(index[position]) not in (-1, coordinate):
            raise ValueError(f"model: position {position} of {name} belongs to two coordinates at once")
        index[position] = coordinate
    return index
