"""Tables from the rows: mean ± standard deviation over the seeds, the best of every column in bold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from .records import Row, of
from .study import TASKS
from .task import Task


def table(task: Task, rows: Sequence[Row], passes: int) -> str:
    """Methods × sparsities of one task at so many passes (methods without passes beside them), as Markdown."""
    mine = [row for row in of(rows, task=task.name) if row.cell.passes in (0, passes)]
    methods = list(dict.fromkeys(row.cell.method for row in mine))
    sparsities = sorted({row.cell.sparsity for row in mine})
    best = {s: _best(task, [of(mine, method=m, sparsity=s) for m in methods]) for s in sparsities}
    dense = sorted({(row.cell.seed, row.dense) for row in mine})
    head = (
        f"| {task.title}; {task.metric}, {passes:,} passes | " + " | ".join(f"{100 * s:g} %" for s in sparsities) + " |"
    )
    lines = [head, "|---" * (len(sparsities) + 1) + "|", f"| dense | {_words([d for _, d in dense], task)} |" +
             " |" * (len(sparsities) - 1)]  # fmt: skip
    for method in methods:
        parts = []
        for sparsity in sparsities:
            values = [row.value for row in of(mine, method=method, sparsity=sparsity)]
            words = _words(values, task) if values else ""
            parts.append(f"**{words}**" if values and _tied(task, values, best[sparsity]) else words)
        lines.append(f"| {method} | " + " | ".join(parts) + " |")
    return "\n".join(lines)


def tables(rows: Sequence[Row], passes: Sequence[int]) -> str:
    """One table per task and number of passes."""
    return "\n\n".join(
        table(task, rows, count)
        for task in TASKS.values()
        for count in passes
        if any(row.cell.passes == count for row in of(rows, task=task.name))
    )


def difference(task: Task, rows: Sequence[Row], one: str, other: str, sparsity: float, passes: int) -> str:
    """``one`` against ``other`` on the same seeds: mean of the paired differences ± its standard error."""
    pairs = []
    for row in of(rows, task=task.name, method=one, sparsity=sparsity, passes=passes):
        for count in (passes, 0):
            for rival in of(rows, task=task.name, method=other, sparsity=sparsity, passes=count, seed=row.cell.seed):
                pairs.append(row.value - rival.value)
    if not pairs:
        return ""
    error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
    return f"{statistics.fmean(pairs):+.3f} ± {error:.3f} ({len(pairs)} seeds)"


def _best(task: Task, groups: Sequence[Sequence[Row]]) -> float:
    means = [statistics.fmean(row.value for row in group) for group in groups if group]
    return max(means) if task.higher else min(means)


def _tied(task: Task, values: Sequence[float], best: float) -> bool:
    """Whether the mean is the best, or within one standard error of it."""
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 and math.isfinite(mean) else 0.0
    return mean == best or abs(mean - best) <= max(error, 1e-12)


def _words(values: Sequence[float], task: Task) -> str:
    digits = 1 if task.unit >= 0.1 else 3
    mean = statistics.fmean(values)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 and math.isfinite(mean) else ""
    return f"{mean:.{digits}f}{spread}"
