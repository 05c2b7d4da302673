"""A structure of some of its groups; those of others stay whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .axes import CoordinateGroup, Structure


def only(structure: Structure, kind: str) -> Structure:
    """The groups of one kind, "channel", "head" or "neuron"; the others become protected.

    Raises:
        ValueError: there are none.
    """
    if all(group.kind != kind for group in structure.groups):
        found = ", ".join(sorted({f"{group.kind}s" for group in structure.groups}))
        raise ValueError(f"granularity: wanted what the model has, {found}, got {kind!r}")
    others = [group for group in structure.groups if group.kind != kind]
    return without(structure, {one.name: f"its {one.kind}s stay, those that may go are {kind}s" for one in others})


def without(
    structure: Structure,
    reasons: Mapping[str, str],  # by the names of groups
) -> Structure:
    """All other groups; these become protected.

    Raises:
        ValueError: nothing is left.
    """
    number = torch.full((structure.size,), -1, dtype=torch.int64, device="cpu")
    groups: list[CoordinateGroup] = []
    protected = {**structure.protected, **reasons}
    first = 0
    for group in structure.groups:
        if group.name in reasons:
            continue
        number[group.span] = torch.arange(first, first + group.size, dtype=torch.int64, device="cpu")
        groups.append(replace(group, first=first))
        first += group.size
    if not groups:
        raise nothing(protected)

    def renumbered(index: torch.Tensor) -> torch.Tensor:
        return torch.where(index < 0, -1, number[index.clamp_min(0)])

    def left(entries: tuple[Any, ...]) -> tuple[Any, ...]:
        made = (replace(one, index=renumbered(one.index)) for one in entries)
        return tuple(one for one in made if int(one.index.max()) >= 0)

    return Structure(
        tuple(groups), left(structure.entries), left(structure.norms), left(structure.attributes), protected
    )


def nothing(protected: Mapping[str, str]) -> ValueError:
    """The error for a model of which nothing can be removed."""
    why = "".join(f"; {name or 'model'}: {reason}" for name, reason in protected.items())
    return ValueError(f"model: wanted channels, heads or neurons that can be removed, found none{why}")
