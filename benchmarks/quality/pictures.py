"""Pictures from the rows, a panel per task: quality over sparsity, over passes, density of the layers."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sfpk_kernels.utils.files import atomic_write

from ..charts import LINES, blank
from .records import ONE_SHOT, Row, of
from .study import TASKS
from .task import Task

_COLUMNS = 3
_PANEL = (3.35, 2.55)  # inches
_DOTS = 100  # per inch: three panels are 1,000 px wide
_SHADES = 256  # colours of the file
_LINE = 0.085  # height of a line of text, of a panel's


class Shown(NamedTuple):
    """How a method appears."""

    name: str
    style: int  # its number in ``LINES``: the same in all pictures


Draw = Callable[[Any, Task, list[Row]], Sequence[float]]  # on axes; heights of the lines' ends, NaN for no line


def over_sparsity(path: Path, rows: Sequence[Row], names: Mapping[str, Shown], passes: int) -> bool:
    """Write the means over the seeds at so many passes; whether there was anything to show.

    Args:
        path: the PNG to write, atomically.
        rows: of the study.
        names: the methods to show, the one to stress first.
        passes: how many; methods without passes are shown, too.
    """

    def draw(axes: Any, task: Task, mine: list[Row]) -> Sequence[float]:
        places = {sparsity: -math.log(1 - sparsity) for sparsity in sorted({row.cell.sparsity for row in mine})}
        axes.set_xticks(list(places.values()), [f"{100 * sparsity:g}" for sparsity in places])
        return _lines(axes, task, mine, names, lambda row: places[row.cell.sparsity])

    found = _with_passes([row for row in _of(rows, names) if row.cell.passes in (0, passes)])
    title = f"{passes:,} passes, one shot: over the weights removed (%)"
    return _panels(path, found, title, names, draw, _title)


def over_passes(path: Path, rows: Sequence[Row], names: Mapping[str, Shown]) -> bool:
    """Likewise over passes, at one sparsity of each task; methods without passes as a level."""

    def draw(axes: Any, task: Task, mine: list[Row]) -> Sequence[float]:
        counts = sorted({row.cell.passes for row in mine} - {0})
        axes.set_xscale("log")
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.set_xticks([], minor=True)
        level = [row._replace(cell=row.cell._replace(passes=count)) for row in of(mine, passes=0) for count in counts]
        return _lines(axes, task, [*mine, *level], names, lambda row: row.cell.passes)

    found = [row for task in TASKS.values() for row in of(_of(rows, names), task=task.name, sparsity=task.telling)]
    return _panels(path, _with_passes(found), "One shot: over the number of passes", names, draw, _removed)


def layer_densities(path: Path, rows: Sequence[Row], names: Mapping[str, Shown], passes: int) -> bool:
    """Share of the weights kept in each tensor, in the model's order, at one sparsity of each task; first seed."""

    def draw(axes: Any, task: Task, mine: list[Row]) -> Sequence[float]:
        ends = []
        least = 100 * (1 - task.telling)
        for number, (name, shown) in enumerate(names.items()):
            row = next(iter(of(mine, method=name)), None)
            if row is None or row.layers is None:
                ends.append(math.nan)
                continue
            # A tensor without weights is drawn at the bottom.
            shares = [100 * kept / size for kept, size in row.layers.values()]
            least = min([least, *(share for share in shares if share > 0)])
            ends.append(max(shares[-1], 1e-2))
            colour, marker, line = LINES[shown.style]
            axes.plot(range(1, len(shares) + 1), [max(share, 1e-2) for share in shares], color=colour, linestyle=line,
                      marker=marker if len(shares) < 20 else None, markersize=3.5, **_weight(number))  # fmt: skip
        axes.set_yscale("log")
        axes.set_yticks([0.01, 0.1, 1, 10, 100], ["0", "0.1", "1", "10", "100"])
        axes.set_ylim(max(least / 2, 0.008), 130)
        count = max(len(row.layers or ()) for row in mine)
        axes.set_xticks(range(1, count + 1, -(-count // 10)))
        axes.axhline(100 * (1 - task.telling), color="black", linewidth=0.8)
        return ends

    first = {task: min(row.cell.seed for row in of(rows, task=task)) for task in {row.cell.task for row in rows}}
    found = _with_passes([row for row in _of(rows, names) if row.layers and row.cell.passes in (0, passes)])
    found = [row for row in found if row.cell.seed == first[row.cell.task]
             and row.cell.sparsity == TASKS[row.cell.task].telling]  # fmt: skip
    title = f"Weights kept (%) by tensor, in the model's order; {passes:,} passes"
    return _panels(path, found, title, names, draw, _removed)


def _of(rows: Sequence[Row], names: Mapping[str, Shown]) -> list[Row]:
    return [row for row in of(rows, protocol=ONE_SHOT) if row.cell.method in names and row.cell.task in TASKS]


def _with_passes(rows: Sequence[Row]) -> list[Row]:
    """Of tasks that have more than methods without passes."""
    tasks = {row.cell.task for row in rows if row.cell.passes}
    return [row for row in rows if row.cell.task in tasks]


def _title(task: Task) -> str:
    """Without the number of weights."""
    return task.title.rsplit(",", 1)[0]


def _removed(task: Task) -> str:
    return f"{_title(task)}\n{100 * task.telling:g} % removed"  # two lines: the names are long


def _weight(number: int) -> dict[str, float]:
    """The first method is stressed."""
    return {"linewidth": 2.4, "zorder": 3} if number == 0 else {"linewidth": 1.3, "zorder": 2}


def _lines(
    axes: Any,
    task: Task,
    mine: Sequence[Row],
    names: Mapping[str, Shown],
    place: Callable[[Row], float],
) -> Sequence[float]:
    """A line per method through its means, with bars of a standard deviation; heights of the ends."""
    ends = []
    for number, (name, shown) in enumerate(names.items()):
        values: dict[float, list[float]] = {}
        for row in of(mine, method=name):
            if math.isfinite(row.value):
                values.setdefault(place(row), []).append(row.value)
        points = sorted(values)
        colour, marker, line = LINES[shown.style]
        means = [statistics.fmean(values[point]) for point in points]
        bars = [statistics.stdev(values[point]) if len(values[point]) > 1 else 0.0 for point in points]
        axes.errorbar(points, means, yerr=bars, color=colour, marker=marker, linestyle=line, markersize=4,
                      capsize=2, **_weight(number))  # fmt: skip
        ends.append(means[-1] if means else math.nan)
    axes.set_ylabel(task.metric, fontsize=7.5)
    dense = statistics.fmean({row.cell.seed: row.dense for row in mine}.values())
    axes.axhline(dense, color="black", linewidth=0.8)
    low, high = axes.get_ylim()
    axes.set_ylim(low, max(high, dense + 0.07 * (high - low)))  # room for the word
    axes.annotate("dense", (0.01, dense), xycoords=("axes fraction", "data"), xytext=(0, 2),
                  textcoords="offset points", fontsize=7)  # fmt: skip
    return ends


def _panels(
    path: Path,
    rows: Sequence[Row],
    title: str,
    names: Mapping[str, Shown],
    draw: Draw,
    head: Callable[[Task], str],
) -> bool:
    """A panel per task that has rows."""
    tasks = [task for task in TASKS.values() if any(row.cell.task == task.name for row in rows)]
    if not tasks:
        return False
    from PIL import Image  # comes with matplotlib

    columns = min(_COLUMNS, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = blank(_PANEL[0] * columns, _PANEL[1] * lines + 0.3)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for task, axes in zip(tasks, panels, strict=False):
        ends = draw(axes, task, of(rows, task=task.name))
        axes.set_title(head(task), fontsize=8.5)
        axes.tick_params(labelsize=7.5)
        axes.grid(alpha=0.3)
        _name_ends(axes, ends, list(names.values()))
    for axes in list(panels):
        axes.set_axis_off()
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as whole, atomic_write(path) as temporary:
        figure.savefig(whole, dpi=_DOTS, format="png")
        with Image.open(whole) as picture:  # a palette takes a third of the bytes
            picture.convert("RGB").quantize(_SHADES).save(temporary, format="png", optimize=True)
    return True


def _name_ends(axes: Any, ends: Sequence[float], names: Sequence[Shown]) -> None:
    """Each line's name beside its end, moved apart where they would meet."""
    axes.figure.canvas.draw()  # limits are known then
    to_share = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    heights = [(float(to_share.transform((x, end))[1]), number) for number, end in enumerate(ends) if end == end]
    heights = sorted(((min(max(height, 0.0), 1.0), number) for height, number in heights), reverse=True)
    places: list[float] = []
    for rank, (height, _) in enumerate(heights):
        above = places[-1] - _LINE if places else 1.0
        places.append(max(min(height, above), (len(heights) - 1 - rank) * _LINE))
    for place, (_, number) in zip(places, heights, strict=True):
        axes.annotate(names[number].name, (1.02, place), xycoords="axes fraction", va="center", fontsize=8,
                      color=LINES[names[number].style][0], weight="bold" if number == 0 else "normal",
                      annotation_clip=False)  # fmt: skip
