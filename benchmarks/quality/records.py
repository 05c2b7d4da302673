"""One JSON line per cell; what is there is not measured again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

SCHEMA = 1
ONE_SHOT = "one-shot"  # the protocol of rows that name none
ABOUT = ("version", "torch", "threads")


class Cell(NamedTuple):
    """One measurement."""

    task: str
    method: str
    sparsity: float
    passes: int  # 0 for methods that need none
    seed: int
    protocol: str = ONE_SHOT  # what is done with the mask


class Row(NamedTuple):
    """What it gave."""

    cell: Cell
    value: float  # of the task's metric
    dense: float  # likewise, before
    kept: int  # weights
    seconds: float
    layers: dict[str, tuple[int, int]] | None = None  # by tensor: weights kept, and weights
    about: dict[str, Any] | None = None  # with what it was measured


def label(cell: Cell) -> str:
    """Method, and what was done with its mask."""
    return cell.method if cell.protocol == ONE_SHOT else f"{cell.method}, {cell.protocol}"


def read(path: Path) -> list[Row]:
    """All rows of a file, in order; of a cell measured again the last; a line cut by a killed process is left out.

    Raises:
        ValueError: another schema.
    """
    rows: dict[Cell, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry.get("schema") != SCHEMA:
            raise ValueError(f"{path}: wanted rows of schema {SCHEMA}, got {entry.get('schema')!r}")
        entry.setdefault("protocol", ONE_SHOT)
        cell = Cell(*(entry[name] for name in Cell._fields))
        layers = {name: (kept, size) for name, (kept, size) in (entry.get("layers") or {}).items()}
        about = {name: entry[name] for name in ABOUT if name in entry}
        rows[cell] = Row(cell, entry["value"], entry["dense"], entry["kept"], entry["seconds"], layers or None, about)
    return list(rows.values())


def append(path: Path, row: Row) -> None:
    """Write a row at the end."""
    entry = {"schema": SCHEMA, **row.cell._asdict(), **row._asdict(), **(row.about or {})}
    del entry["cell"], entry["about"]
    cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")  # by a killed process
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(entry) + "\n")


def of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Those whose cell has these values."""
    return [row for row in rows if all(getattr(row.cell, name) == value for name, value in wanted.items())]
