"""PNG charts of recorded results: speed-ups, bandwidth under its roof, scaling. matplotlib is imported here alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .record import Line, Run
from .registry import NAIVE
from .report import fits, rate, size, what

# Distinct in greyscale, too: lightness, hatch, marker and line style all differ.
FILLS = {"ours": ("#123a63", ""), "our reference": ("#9a9a9a", ".."), "others": ("#f0c89a", "//")}
LINES = [("#123a63", "o", "-"), ("#c4541a", "s", "--"), ("#5b8c2a", "^", "-."), ("#8a6bb0", "D", ":"),
         ("#6b6b6b", "v", (0, (5, 1)))]  # fmt: skip


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write the charts of each run that has something to show; the paths written."""
    paths = []
    runs = [run for run in runs if any(row["group"] in ("ops", "scaling") for row in run.rows)]
    for run in runs:
        stem = run.facts["device"] if len({r.facts["device"] for r in runs}) == len(runs) else run.facts["id"]
        for name, chart in (("speedup", speedup), ("roofline", roofline), ("scaling", scaling)):
            path = folder / f"{name}-{stem}.png"
            if chart(run, path):
                paths.append(path)
    return paths


def _timed(run: Run, group: str) -> list[Line]:
    return [row for row in run.rows if row["group"] == group and row["status"] == "ok"]


def blank(width: float, height: float) -> Any:
    """A figure of so many inches, drawn without a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _title(run: Run) -> str:
    facts = run.facts
    return f"{facts['device_name']}, torch {facts['torch']}, {facts['date'][:10]}"


def speedup(run: Run, path: Path) -> bool:
    """How many times as fast as naive, a group of bars per op at its largest shape; whether there was any."""
    cases: dict[str, tuple[str, list[Line]]] = {}
    for row in _timed(run, "ops"):
        if row["ratio_to_naive"] is None:
            continue
        shape = size(row["shape"])
        known = cases.get(row["op"])
        if known is None or (known[0] != shape and (row["bytes"] or 0) > (known[1][0]["bytes"] or 0)):
            cases[row["op"]] = (shape, [row])
        elif known[0] == shape:
            known[1].append(row)
    cases = {op: (shape, [r for r in rows if r["provider"] != NAIVE]) for op, (shape, rows) in cases.items()}
    if not any(rows for _, rows in cases.values()):
        return False
    bars = sum(len(rows) + 1 for _, rows in cases.values())
    figure = blank(9, 1.4 + 0.27 * bars)
    axes = figure.subplots()
    place, ticks, labels = 0.0, [], []
    for op, (shape, rows) in cases.items():
        begin = place
        for row in sorted(rows, key=lambda row: row["ratio_to_naive"]):
            colour, hatch = FILLS[_kind(row)]
            axes.barh(place, row["ratio_to_naive"], color=colour, hatch=hatch, edgecolor="black", linewidth=0.6)
            axes.annotate(f" {row['provider']}  {row['ratio_to_naive']:.3g} ×", (row["ratio_to_naive"], place),
                          va="center", fontsize=7)  # fmt: skip
            place += 1
        ticks.append((begin + place - 1) / 2)
        labels.append(f"{what(op)}\n{shape}")
        place += 1
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * 6)  # room for the names
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.set_xlabel("times as fast as the naive provider (line: equal)")
    axes.set_title(_title(run), fontsize=9)
    figure.savefig(path, dpi=130)
    return True


def _kind(row: Line) -> str:
    """Bars of a kind look alike; their labels name the provider."""
    if "reference" in row["provider"]:
        return "our reference"
    return "ours" if row["provider"].startswith("ours") else "others"


def roofline(run: Run, path: Path) -> bool:
    """Bandwidth reached over the bytes to move, under the roofs of copy and triad.

    All ops are bound by memory (a few operations per number), so the roof is flat: bandwidth, not operations.
    """
    rows = [row for row in _timed(run, "ops") if row["ceiling_share"] is not None]
    if not rows:
        return False
    figure = blank(8, 5)
    axes = figure.subplots()
    kinds: dict[str, list[Line]] = {}
    for row in rows:
        name = str(row["provider"])
        kinds.setdefault(name if name.startswith("ours") or name == NAIVE else "others", []).append(row)
    for number, (name, members) in enumerate(kinds.items()):
        colour, marker, _ = LINES[number % len(LINES)]
        axes.plot([row["bytes"] / 1e6 for row in members],
                  [row["bytes"] / row["median_s"] / 1e9 for row in members],
                  marker, color=colour, fillstyle="full" if name.startswith("ours") else "none",
                  label=name)  # fmt: skip
    for (name, limit), style in zip(run.facts["ceilings"].items(), ("-", "--"), strict=False):
        if limit["unit"] == "bytes/s":
            axes.axhline(limit["rate"] / 1e9, color="black", linestyle=style, linewidth=1,
                         label=f"{name}: {rate(limit['rate'], limit['unit'])}")  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("bytes an op has to move (MB)")
    axes.set_ylabel("these bytes per second (GB/s)")
    axes.set_title(_title(run), fontsize=9)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    return True


def scaling(run: Run, path: Path) -> bool:
    """Time over size, a panel per scaling op, with the fitted exponents."""
    series = fits(run)
    ops = list(dict.fromkeys(fit["op"] for fit in series))
    if not ops:
        return False
    figure = blank(4.2 * len(ops), 4)
    panels = figure.subplots(1, len(ops), squeeze=False)[0]
    for op, axes in zip(ops, panels, strict=True):
        for number, fit in enumerate(fit for fit in series if fit["op"] == op):
            colour, marker, line = LINES[number % len(LINES)]
            grows = "" if fit["exponent"] is None else f" ~ {fit['axis']}^{fit['exponent']:.2f}"
            axes.plot(*zip(*fit["points"], strict=True), color=colour, marker=marker, linestyle=line,
                      label=fit["provider"] + grows)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(next(fit["axis"] for fit in series if fit["op"] == op))
        axes.set_title(what(op), fontsize=8)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7)
    panels[0].set_ylabel("median time (s)")
    figure.suptitle(_title(run), fontsize=9)
    figure.savefig(path, dpi=130)
    return True
