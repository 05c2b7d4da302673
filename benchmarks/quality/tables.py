"""Tables from the rows, as Markdown: values, differences paired over seeds, passes to equal quality."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterator, Sequence

from .compare import Difference, Values, best, by_network, difference, passes_to, tied
from .methods import METHODS
from .protocols import PROTOCOLS
from .records import ONE_SHOT, Row, label, of
from .study import TASKS
from .task import Task


def table(task: Task, rows: Sequence[Row], passes: int) -> str:
    """Methods × sparsities of one task at so many passes (methods without passes beside them).

    Mean ± standard deviation over the seeds, which the head counts; cells with fewer say how many. Bold: the best of a
    column, and what is within one standard error of it.
    """
    mine = [row for row in of(rows, task=task.name) if row.cell.passes in (0, passes)]
    names = list(dict.fromkeys(label(row.cell) for row in sorted(mine, key=_order)))
    sparsities = sorted({row.cell.sparsity for row in mine})
    columns = {s: {name: by_network(row for row in of(mine, sparsity=s) if label(row.cell) == name) for name in names}
               for s in sparsities}  # fmt: skip
    bests = {s: best(task, columns[s]) for s in sparsities}
    seeds = max((len(values) for column in columns.values() for values in column.values()), default=0)
    dense: dict[Hashable, float] = {row.cell.seed: row.dense for row in mine}
    lines = [
        f"| {task.title}; {task.metric}, {passes:,} passes, {_seeds(seeds)} | "
        + " | ".join(_percent(s) for s in sparsities) + " |",
        "|---" * (len(sparsities) + 1) + "|",
        f"| dense | {_words(dense, task)} |" + " |" * (len(sparsities) - 1),
    ]  # fmt: skip
    for name in names:
        parts = []
        for sparsity, column in columns.items():
            values, winner = column[name], bests[sparsity]
            words = _words(values, task) + (f" ({_seeds(len(values))})" if 0 < len(values) < seeds else "")
            bold = bool(values) and winner is not None and tied(task, values, column[winner])
            parts.append(f"**{words}**" if bold else words)
        lines.append(f"| {name} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def tables(rows: Sequence[Row], passes: Sequence[int], protocols: Sequence[str] = (ONE_SHOT,)) -> str:
    """One table per task and number of passes, of these protocols together."""
    chosen = [row for row in rows if row.cell.protocol in protocols]
    return "\n\n".join(
        table(task, chosen, count)
        for task in TASKS.values()
        for count in passes
        if any(row.cell.passes == count for row in of(chosen, task=task.name))
    )


def differences(rows: Sequence[Row], ours: str, rivals: Sequence[str], passes: int) -> str:
    """Tasks and sparsities × rivals: how much better ``ours`` is, in the task's metric; "" where nothing was measured.

    Mean of the differences, paired over seeds, ± their standard error; bold where it is more than two of them. The last
    line counts those: better, worse, of so many.
    """
    lines, counts = [], {rival: [0, 0, 0] for rival in rivals}
    for task, sparsity in _columns(rows):
        mine = _values(rows, task, sparsity, ours, passes)
        parts = []
        for rival in rivals:
            found = difference(task, mine, _values(rows, task, sparsity, rival, passes))
            parts.append(_difference(task, found))
            if found is None:
                continue
            for place, counted in enumerate((found.clear and found.mean > 0, found.clear and found.mean < 0, True)):
                counts[rival][place] += counted
        if any(parts):
            lines.append(f"| {_where(task, sparsity)} | " + " | ".join(parts) + " |")
    if not lines:
        return ""
    sums = [f"{better} better, {worse} worse, of {all_}" for better, worse, all_ in counts.values()]
    head = [f"| {ours} against, {passes:,} passes | " + " | ".join(rivals) + " |", "|---" * (len(rivals) + 1) + "|"]
    return "\n".join([*head, *lines, "| clear differences | " + " | ".join(sums) + " |"])


def changes(rows: Sequence[Row], ours: str, variants: Sequence[str], passes: int) -> str:
    """Variants of ``ours`` × tasks and sparsities: how much better each is than it; "" where nothing was measured.

    As in :func:`differences`, turned around.
    """
    columns = [
        (task, sparsity, mine)
        for task, sparsity in _columns(rows)
        if (mine := _values(rows, task, sparsity, ours, passes))
        and any(_values(rows, task, sparsity, variant, passes) for variant in variants)
    ]
    lines = []
    for variant in variants:
        found = [difference(task, _values(rows, task, s, variant, passes), mine) for task, s, mine in columns]
        if any(found):
            cells = [_difference(task, one) for (task, _, _), one in zip(columns, found, strict=True)]
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    if not lines:
        return ""
    head = f"| {passes:,} passes | " + " | ".join(_where(task, s) for task, s, _ in columns) + " |"
    return "\n".join([head, "|---" * (len(columns) + 1) + "|", *lines])


def _difference(task: Task, found: Difference | None) -> str:
    """Mean ± standard error, bold where it is more than two of them."""
    if found is None:
        return ""
    digits = _digits(task)
    words = f"{round(found.mean, digits) + 0.0:+.{digits}f}" + (
        f" ± {found.error:.{digits}f}" if found.seeds > 1 else ""
    )
    return f"**{words}**" if found.clear else words


def equal_quality(rows: Sequence[Row], ours: str, rivals: Sequence[str]) -> str:
    """Tasks and sparsities × rivals: the passes that ``ours`` needs to be as good as the rival at its most.

    Means over the seeds that all of them have; ≤ and >: already at the fewest measured, not yet at the most. In
    brackets how many times fewer.
    """
    lines = []
    for task, sparsity in _columns(rows):
        counts = _counts(rows, task, sparsity, ours)
        parts = []
        for rival in rivals:
            theirs = _counts(rows, task, sparsity, rival)
            most = max((count for count in theirs if count in counts), default=None)
            if most is None:
                parts.append("")
                continue
            goal = _values(rows, task, sparsity, rival, most)
            curves = {count: _values(rows, task, sparsity, ours, count) for count in counts}
            shared = set(goal).intersection(*curves.values())
            if not shared:
                parts.append("")
                continue
            curve = {count: statistics.fmean(values[seed] for seed in shared) for count, values in curves.items()}
            sign, found = passes_to(task, curve, statistics.fmean(goal[seed] for seed in shared))
            factor = f" ({most / found:.1f} ×)" if sign != ">" and found < 0.95 * most else ""
            parts.append(f"{f'{sign} ' if sign else ''}{found:,.0f} for {most:,}{factor}")
        if any(parts):
            lines.append(f"| {_where(task, sparsity)} | " + " | ".join(parts) + " |")
    if not lines:
        return ""
    head = [f"| passes of {ours} to equal | " + " | ".join(rivals) + " |", "|---" * (len(rivals) + 1) + "|"]
    return "\n".join([*head, *lines])


def short(rows: Sequence[Row], methods: Sequence[str], passes: int) -> str:
    """One line per task, at the last sparsity but one: for a first page."""
    lines = []
    for task in TASKS.values():
        sparsity = task.telling
        groups = {name: _values(rows, task, sparsity, name, passes) for name in methods}
        if not groups[methods[0]]:
            continue
        winner = best(task, groups)
        parts = [_words(values, task) for values in groups.values()]
        for place, values in enumerate(groups.values()):
            if values and winner is not None and tied(task, values, groups[winner]):
                parts[place] = f"**{parts[place]}**"
        dense: dict[Hashable, float] = {row.cell.seed: row.dense for row in of(rows, task=task.name)}
        lines.append(f"| {task.title}; {task.metric} | {_percent(sparsity)} | "
                     f"{statistics.fmean(dense.values()):.{_digits(task)}f} | " + " | ".join(parts) + " |")  # fmt: skip
    if not lines:
        return "No row of the quality study is recorded yet; `make quality` makes them."
    head = [f"| {passes:,} passes | removed | dense | " + " | ".join(methods) + " |", "|---" * (len(methods) + 3) + "|"]
    return "\n".join([*head, *lines])


def _order(row: Row) -> tuple[int, int]:
    """Protocol by protocol, methods as they are listed; those that are listed no more last."""
    protocols, methods = list(PROTOCOLS), list(METHODS)
    method = row.cell.method
    return protocols.index(row.cell.protocol), methods.index(method) if method in METHODS else len(methods)


def _columns(rows: Sequence[Row]) -> Iterator[tuple[Task, float]]:
    for task in TASKS.values():
        for sparsity in sorted({row.cell.sparsity for row in of(rows, task=task.name)}):
            yield task, sparsity


def _values(rows: Sequence[Row], task: Task, sparsity: float, name: str, passes: int) -> Values:
    """By seed; of a method without passes the only ones."""
    mine = [row for row in of(rows, task=task.name, sparsity=sparsity) if label(row.cell) == name]
    return by_network([*of(mine, passes=0), *of(mine, passes=passes)])


def _counts(rows: Sequence[Row], task: Task, sparsity: float, name: str) -> set[int]:
    """Passes with which the method was measured there."""
    mine = of(rows, task=task.name, sparsity=sparsity)
    return {row.cell.passes for row in mine if label(row.cell) == name and row.cell.passes > 0}


def _where(task: Task, sparsity: float) -> str:
    return f"{task.name}, {_percent(sparsity)}"


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:g} %"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _digits(task: Task) -> int:
    return 1 if task.unit >= 0.1 else 3


def _words(values: Values, task: Task) -> str:
    if not values:
        return ""
    digits, mean = _digits(task), statistics.fmean(values.values())
    spread = statistics.stdev(values.values()) if len(values) > 1 and math.isfinite(mean) else None
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
