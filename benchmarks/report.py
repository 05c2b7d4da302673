"""Markdown from recorded results: the tables of README and docs, and the full report. Nothing here is typed by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from .pages import has_place, markers, put
from .record import Line, Run
from .registry import NAIVE, TARGETS, all_ops

HEADLINES = ("transition", "selection", "apply", "step")  # ops of the short table, a line each
FEWEST_POINTS = 3  # of a fit


def shown(runs: Sequence[Run]) -> list[Run]:
    """The latest complete run of each device, or its latest one. Quick runs only if there is nothing else."""
    latest: dict[str, Run] = {}
    for run in runs:  # oldest first
        name = run.facts["device_name"]
        if name not in latest or _weight(run) >= _weight(latest[name]):
            latest[name] = run
    return list(latest.values())


def _weight(run: Run) -> int:
    return 0 if run.facts["size"] == "quick" else 1 + run.facts["complete"]


def tables_in(text: str) -> list[str]:
    """Names of the tables that a page has a place for."""
    return [name for name in TABLES if has_place(text, name)]


def into_page(text: str, runs: Sequence[Run]) -> str:
    """The page with its tables renewed.

    Raises:
        ValueError: it has a place for none.
    """
    names = tables_in(text)
    if not names:
        wanted = " or ".join(" and ".join(markers(name)) for name in TABLES)
        raise ValueError(f"wanted the markers {wanted}, got a text without")
    for name in names:
        text = put(text, name, TABLES[name](runs))
    return text


def full_table(runs: Sequence[Run]) -> str:
    """The latest complete runs, not quick ones, a part per device: ops, whole steps, growth, targets."""
    return _by_device(runs, _parts)


def short_table(runs: Sequence[Run]) -> str:
    """Of the same runs the headlines alone, at the largest size measured."""
    return _by_device(runs, _headlines)


def structured_table(runs: Sequence[Run]) -> str:
    """Of each device the latest run with shrunk models, not a quick one: how many times as fast as dense they are."""
    latest = {
        run.facts["device_name"]: run
        for run in runs
        if run.facts["size"] != "quick" and any(row["group"] == "structured" for row in run.rows)
    }
    parts = []
    for run in latest.values():
        names = list(dict.fromkeys(
            row["provider"] for row in run.rows if row["group"] == "structured" and row["provider"] != NAIVE
        ))  # fmt: skip
        lines = [f"| dense / shrunk | {' | '.join(name.removeprefix('ours, ') for name in names)} |"]
        lines.append("|---" * (1 + len(names)) + "|")
        for rows in _cases(run, "structured").values():
            ratios = {row["provider"]: row["ratio_to_naive"] for row in rows if row["status"] == "ok"}
            shape = rows[0]["shape"]
            model = f"{shape['model']}, {shape['image']} × {shape['image']}, batch {shape['batch']}"
            model += f", {shape['threads']} thread" if run.facts["device"] == "cpu" else ""
            cells = [f"**{number(ratios[name])} ×**" if ratios.get(name) else "–" for name in names]
            lines.append(f"| {model} | {' | '.join(cells)} |")
        parts.append(f"{machine(run)}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) or "No shrunk models are measured yet; `python -m benchmarks --group structured` does."


def structured_step_table(runs: Sequence[Run]) -> str:
    """Of each device the latest run with steps over channels, not a quick one: shares of forward and backward."""
    latest = {
        run.facts["device_name"]: run
        for run in runs
        if run.facts["size"] != "quick" and any(row["group"] == "structured_step" for row in run.rows)
    }
    parts = []
    for run in latest.values():
        lines = ["| | coordinates | forward and backward | ours | of the step | plain |", "|---|---|---|---|---|---|"]
        for rows in _cases(run, "structured_step").values():
            ours, naive, pass_ = _rivals(rows)
            if ours is None or pass_ is None:
                continue
            shape, share = ours["shape"], ours["median_s"] / (ours["median_s"] + pass_["median_s"])
            model = f"{shape['model']}, {shape['image']} × {shape['image']}, batch {shape['batch']}"
            model += f", {shape['threads']} thread" if run.facts["device"] == "cpu" else ""
            cells = [
                model, f"{shape['coordinates']:,}", duration(pass_["median_s"]), duration(ours["median_s"]),
                f"**{100 * share:.1f} %**", duration(naive["median_s"]) if naive else "–",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        parts.append(f"{machine(run)}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) or "No steps are measured yet; `python -m benchmarks --group structured_step` does."


TABLES: dict[str, Callable[[Sequence[Run]], str]] = {
    "bench": full_table, "bench-short": short_table, "bench-structured": structured_table,
    "bench-structured-step": structured_step_table,
}  # fmt: skip


def _by_device(runs: Sequence[Run], parts: Callable[[Run], list[str]]) -> str:
    complete = [run for run in shown(runs) if _weight(run) == 2]
    if not complete:
        return "No complete run of the benchmark suite is recorded yet; `make bench` makes one."
    return "\n\n".join("\n\n".join(filter(None, parts(run))) for run in complete)


def _parts(run: Run) -> list[str]:
    usual = run
    if run.facts["size"] == "full":
        rows = [row for row in run.rows if row["group"] != "ops" or _is_usual(row, run.facts["device"])]
        usual = Run(run.facts, rows)
    return [machine(run), op_table(usual), end_to_end_table(run), scaling_table(run), target_table(run)]


def _headlines(run: Run) -> list[str]:
    largest: dict[str, list[Line]] = {}  # of several sizes of the same numbers the first measured
    for (op, _), rows in _cases(run, "ops").items():
        if op in HEADLINES and (op not in largest or _numbers(rows) > _numbers(largest[op])):
            largest[op] = rows
    lines = ["| | size | ours | naive | fastest other |", "|---|---|---|---|---|"]
    for op in HEADLINES:
        ours, naive, other = _rivals(largest.get(op, []))
        if ours is None:
            continue
        cells = [
            what(op), size(ours["shape"]), f"**{duration(ours['median_s'])}**", _against(naive, ours),
            _against(other, ours, named=True),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    facts = run.facts
    where = facts["device_name"] if facts["device"] == "cuda" else f"{facts['cpu']}, no GPU"
    return ["\n".join(lines), f"{where}; torch {facts['torch']}, {facts['date'][:10]}"]


def _numbers(rows: Sequence[Line]) -> int:
    """How many numbers a case is about."""
    return math.prod(rows[0]["shape"].get(name, 1) for name in ("n", "d"))


def _rivals(rows: Sequence[Line]) -> tuple[Line | None, Line | None, Line | None]:
    """Of one case: ours, naive and the best of the others."""
    timed = [row for row in rows if row["status"] == "ok"]
    others = [row for row in timed if row["provider"] != NAIVE and not row["provider"].startswith("ours")]
    return (
        _best(row for row in timed if row["provider"].startswith("ours")),
        _best(row for row in timed if row["provider"] == NAIVE),
        _best(others),
    )


def _is_usual(row: Line, device: str) -> bool:
    """Whether a default run has the row's shape: pages leave out what only a full one has."""
    op = all_ops().get(row["op"])
    return op is None or row["shape"] in op.shapes_for("default", torch.device(device))


def machine(run: Run) -> str:
    """One paragraph: what was measured where, with what."""
    facts = run.facts
    if facts["device"] == "cuda":
        on = f"{facts['device_name']} (driver {facts['driver'] or 'unknown'}, CUDA {facts['cuda']}), {facts['cpu']}"
    else:
        on = f"{facts['cpu']}; no GPU was used"
    versions = f"torch {facts['torch']}" + (f", Triton {facts['triton']}" if facts["triton"] else "")
    limits = "; ".join(f"{name} {rate(limit['rate'], limit['unit'])}" for name, limit in facts["ceilings"].items())
    return (
        f"`{facts['command']}`, {facts['date'][:10]}, commit {facts['commit'] or 'unknown'}: {on}, "
        f"{facts['threads']} threads, {versions}, Python {facts['python']}. Ceilings in the same run: {limits}."
    )


def op_table(run: Run) -> str:
    """One line per op and shape: ours, naive and the best of the others."""
    lines = [
        "| | size | ours | share of copy bandwidth | naive | fastest other |",
        "|---|---|---|---|---|---|",
    ]
    for (op, _), rows in _cases(run, "ops").items():
        ours, naive, other = _rivals(rows)
        if ours is None:
            continue
        cells = [
            what(op), size(ours["shape"]), f"**{duration(ours['median_s'])}** ({_inner(ours)})",
            percent(ours["ceiling_share"]), _against(naive, ours), _against(other, ours, named=True),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def end_to_end_table(run: Run) -> str:
    """One line per model: seconds per step and peak memory, naive and ours."""
    lines = [
        "| one pruning step | weights | batch, particles | ours | naive | ratio | peak memory, ours and naive |",
        "|---|---|---|---|---|---|---|",
    ]
    for rows in _cases(run, "end_to_end").values():
        ours = _best(row for row in rows if row["provider"] == "ours" and row["status"] == "ok")
        naive = _best(row for row in rows if row["provider"] == NAIVE and row["status"] == "ok")
        if ours is None:
            continue
        shape, ratio = ours["shape"], ours["ratio_to_naive"]
        cells = [
            str(shape["model"]), f"{shape.get('coordinates', 0):,}",
            f"{shape.get('batch', '–')}, {shape.get('particles', '–')}", f"**{duration(ours['median_s'])}**",
            duration(naive["median_s"]) if naive else "–", f"{number(ratio)} ×" if ratio else "–",
            f"{_memory(ours)}, {_memory(naive)}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _memory(row: Line | None) -> str:
    peak = row["extra"].get("peak_bytes") if row else None
    return "–" if peak is None else f"{peak / 1e9:.2f} GB"


def fits(run: Run) -> list[dict[str, Any]]:
    """Exponents of time over size, by least squares in the logarithms, per scaling op and provider."""
    series: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in run.rows:
        if row["group"] == "scaling" and row["status"] == "ok":
            axis = row["extra"]["axis"]
            key = (row["op"], row["provider"], axis)
            series.setdefault(key, []).append((row["shape"][axis], row["median_s"]))
    found = []
    for (op, provider, axis), points in series.items():
        points.sort()
        fit: dict[str, Any] = {"op": op, "provider": provider, "axis": axis, "points": points, "exponent": None}
        if len(points) >= FEWEST_POINTS:
            logs = [[math.log(value) for value in values] for values in zip(*points, strict=True)]
            fit["exponent"] = statistics.linear_regression(*logs).slope
        found.append(fit)
    return found


def scaling_table(run: Run) -> str:
    """One line per series: its range and the fitted exponent."""
    lines = ["| how time grows | provider | from | to | exponent |", "|---|---|---|---|---|"]
    for fit in fits(run):
        if fit["exponent"] is None:
            continue
        (first, start), (last, end) = fit["points"][0], fit["points"][-1]
        lines.append(
            f"| {what(fit['op'])} | {fit['provider']} | {duration(start)} at {first:,} | {duration(end)} at {last:,} | "
            f"{fit['axis']}^{fit['exponent']:.2f} |"
        )
    return "\n".join(lines) if len(lines) > 2 else ""


def target_table(run: Run) -> str:
    """What a GPU run should reach, and whether it does; nothing for runs on a CPU."""
    if run.facts["device"] != "cuda":
        return ""
    lines = ["| target | reached | met |", "|---|---|---|"]
    for target in TARGETS:
        rows = [row for row in run.rows if target.judges(row)]
        if not rows:
            lines.append(f"| {target.name} | not measured | – |")
            continue
        best = min(rows, key=lambda row: row["median_s"])
        value = target.reached(best)
        text = percent(value) if target.measure == "ceiling_share" else number(value)
        lines.append(f"| {target.name} | {text} ({best['provider']}) | {'yes' if target.met(best) else 'no'} |")
    return "\n".join(lines)


def tables(run: Run) -> str:
    """Every row of one run, with its machine, fits and targets."""
    parts = [machine(run)]
    for (op, _), rows in _cases(run, None).items():
        lines = [
            f"**{what(op)}**, {size(rows[0]['shape'])}"
            + (f": {rows[0]['bytes'] / 1e6:,.1f} MB to move" if rows[0]["bytes"] else ""),
            "",
            "| provider | median | p20 … p80 | rounds | share of copy bandwidth | ratio to naive |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row["status"] != "ok":
                lines.append(f"| {row['provider']} | {row['status']}: {_cell(row['reason'])} | | | | |")
                continue
            spread = f"{duration(row['p20_s'])} … {duration(row['p80_s'])}" if row["p20_s"] else "–"
            share, ratio = row["ceiling_share"], row["ratio_to_naive"]
            lines.append(
                f"| {row['provider']} | {duration(row['median_s'])} | {spread} | {row['rounds'] or '–'} | "
                f"{percent(share) if share else '–'} | {number(ratio) + ' ×' if ratio else '–'} |"
            )
        parts.append("\n".join(lines))
    parts += [scaling_table(run), target_table(run)]
    return "\n\n".join(filter(None, parts))


def report(runs: Sequence[Run]) -> str:
    """The whole report: every row of the runs shown."""
    intro = (
        "# Benchmark report\n\nGenerated by `python -m benchmarks --report` from the `*.jsonl` files in this folder: "
        "the latest run of each device. The ratio to naive says how many times as fast as the naive provider of the "
        "case; the share is the bytes an op has to move, over its time, by the bandwidth of a copy that took turns "
        "with it."
    )
    parts = [f"## {run.facts['device_name']}\n\n{tables(run)}" for run in shown(runs)]
    return "\n\n".join([intro, *parts]) + "\n"


def _cases(run: Run, group: str | None) -> dict[tuple[str, str], list[Line]]:
    cases: dict[tuple[str, str], list[Line]] = {}
    for row in run.rows:
        if group is None or row["group"] == group:
            cases.setdefault((row["op"], size(row["shape"])), []).append(row)
    return cases


def _best(rows: Iterable[Line]) -> Line | None:
    return min(rows, key=lambda row: row["median_s"], default=None)


def _against(row: Line | None, ours: Line, named: bool = False) -> str:
    if row is None:
        return "–"
    factor = row["median_s"] / ours["median_s"]
    name = f", {row['provider']}" if named else ""
    return f"{duration(row['median_s'])} ({number(factor)} ×{name})"


def _inner(row: Line) -> str:
    """ "cpp, warm" of "ours[cpp] warm"."""
    return str(row["provider"]).removeprefix("ours").replace("[", "").replace("] ", ", ").replace("]", "")


def what(op: str) -> str:
    """An op in words."""
    known = all_ops()
    return known[op].what if op in known else op.replace("_", " ")


def size(shape: Line) -> str:
    """A shape in words."""
    return ", ".join(
        f"{percent(value)} kept" if name == "kept"
        else str(value) if isinstance(value, str)
        else f"{name} = {value:,}"
        for name, value in shape.items()
    )  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds with three digits and a unit."""
    unit, factor = next(((u, f) for u, f in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)) if seconds * f >= 1), ("µs", 1e6))
    return f"{number(seconds * factor)} {unit}"


def number(value: float) -> str:
    """Three digits, at least the integer part."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{min(digits, 4)}f}"


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.0f} %"


def rate(value: float, unit: str) -> str:
    """A rate in GB/s or Tflop/s."""
    return f"{value / 1e9:,.1f} GB/s" if unit == "bytes/s" else f"{value / 1e12:,.0f} Tflop/s"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
