"""A structured run's outcome as a table: what the model costs before and after, and what each group keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...structure import Structure
from ...utils.memory import format_bytes

COSTS = {"params": "parameters", "macs": "multiply-accumulates", "bytes": "bytes", "channels": "coordinates"}


def groups_of(
    structure: Structure,
    keep: Tensor,  # (C,) bool
) -> dict[str, dict[str, Any]]:
    """Kind, kept and size of each group, by its name: plain values."""
    counts = structure.kept_of_groups(keep)
    return {one.name: {"kind": one.kind, "kept": counts[one.name][0], "size": one.size} for one in structure.groups}


def costs_and_groups(
    before: Mapping[str, int],  # costs by name
    after: Mapping[str, int],
    structure: Structure,
    keep: Tensor,  # (C,) bool
) -> dict[str, Any]:
    """What the summary of every structured outcome has beside."""
    return {"costs_before": dict(before), "costs_after": dict(after), "groups": groups_of(structure, keep)}


def outcome(
    before: Mapping[str, int],  # costs by name
    after: Mapping[str, int],
    groups: Mapping[str, Mapping[str, Any]],  # as groups_of gives them
) -> str:
    """Both tables, columns aligned."""
    costs: list[tuple[str, ...]] = [("", "dense", "shrunk", "left")]
    for name, title in COSTS.items():
        shown = [format_bytes(one[name]) if name == "bytes" else f"{one[name]:,}" for one in (before, after)]
        costs.append((title, *shown, f"{100 * after[name] / before[name]:.1f} %"))
    kept: list[tuple[str, ...]] = [("group", "kind", "kept", "of", "left")]
    for name, one in groups.items():
        left, size = one["kept"], one["size"]
        kept.append((name, one["kind"], f"{left:,}", f"{size:,}", f"{100 * left / size:.1f} %"))
    return f"{_table(costs, 1)}\n\n{_table(kept, 2)}"


def _table(rows: Sequence[Sequence[str]], texts: int) -> str:
    """``texts``: how many of the first columns stand on the left; the others are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i < texts else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
