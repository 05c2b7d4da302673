"""A structured run's outcome as a table: what the model costs before and after, and what each group keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...utils.memory import format_bytes

COSTS = {"params": "parameters", "macs": "multiply-accumulates", "bytes": "bytes", "channels": "coordinates"}


def outcome(
    before: Mapping[str, int],  # costs by name
    after: Mapping[str, int],
    groups: Mapping[str, tuple[str, int, int]],  # name → kind, kept, all
) -> str:
    """Both tables, columns aligned."""
    costs: list[tuple[str, ...]] = [("", "dense", "shrunk", "left")]
    for name, title in COSTS.items():
        shown = [format_bytes(one[name]) if name == "bytes" else f"{one[name]:,}" for one in (before, after)]
        costs.append((title, *shown, f"{100 * after[name] / before[name]:.1f} %"))
    kept: list[tuple[str, ...]] = [("group", "kind", "kept", "of", "left")]
    for name, (kind, left, size) in groups.items():
        kept.append((name, kind, f"{left:,}", f"{size:,}", f"{100 * left / size:.1f} %"))
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
