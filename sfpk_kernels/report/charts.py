"""Pictures of runs and comparisons. matplotlib is imported here alone, and only when one is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..search.records import StepRecord
from ..utils.extras import require
from ..utils.files import atomic_write
from ..utils.smoothing import WINDOW, running_median
from .contents import before_the_merge
from .names import shortened_apart

_COLOURS = ("#1b5e9e", "#c4541a", "#5b8c2a", "#7d3c98")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
_LINES = ("-", "--", "-.", ":")
_NAMED = 60  # layers whose names fit below a picture
_INSIDE = 4  # series whose legend fits beside them
_RIGHT = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
_BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "borderaxespad": 3.8}  # under ticks and label
_TICK = 36  # characters of a layer's name below a picture
_LONG = 20  # characters of a name that needs the width of the picture
_REMOVED = (0, 50, 80, 90, 95, 98, 99, 99.5, 99.8, 99.9, 99.95, 99.98, 99.99)  # ticks, evenly apart in their logarithm


def plot_loss_versus_sparsity(
    path: Path,
    history: Sequence[StepRecord],
    results: Sequence[Mapping[str, Any]],  # method, sparsity, accuracy_mean, accuracy_std
    dense_accuracy: float,
    title: str,
) -> None:
    """A PNG of two panels: energy over soft sparsity with the particles' spread, and accuracy by method.

    Args:
        path: the PNG to write, atomically.
        history: of one run; the energy of a step belongs to the soft density at its start.
        results: rows of the comparison.
        dense_accuracy: of the unpruned model, in [0, 1].
        title: above both panels.
    """
    figure, (left, right) = _figure(2)

    sparsities = [100 * (1 - record.start_density) for record in history]
    low, high = [min(record.energies) for record in history], [max(record.energies) for record in history]
    _losses(left, sparsities, [record.energy for record in history], low, high, len(history[0].energies))
    _sparsity_axis(left, sparsities)
    left.set_yscale("log")
    left.set_ylabel("mini-batch loss")
    left.set_title("Loss along one SFPK run")
    left.legend()
    left.grid(alpha=0.3)

    _accuracies(right, results, dense_accuracy)
    right.set_title("One shot, no retraining")
    figure.suptitle(title)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def plot_methods(
    path: Path,
    results: Sequence[Mapping[str, Any]],
    dense_accuracy: float,
    names: Mapping[str, str],
    title: str,
) -> None:
    """A PNG of accuracy over sparsity for a page: few words, each method's name at the end of its line.

    Args:
        path: the PNG to write, atomically.
        results: as for :func:`plot_loss_versus_sparsity`.
        dense_accuracy: of the unpruned model, in [0, 1].
        names: methods to show, the one to stress first, and what to call them.
        title: above the picture.
    """
    figure, axes = _figure(1, (8.2, 4.0))
    methods = [method for method in names if any(row["method"] == method for row in results)]
    shown = [row for row in results if row["method"] in methods]
    ends = []  # height and number of each line at its end
    for number, method in enumerate(methods):
        rows = sorted((row for row in shown if row["method"] == method), key=lambda row: row["sparsity"])
        colour = (*_COLOURS, "#555555", "#00838f")[number % 6]
        accuracies = [100 * row["accuracy_mean"] for row in rows]
        axes.errorbar(
            [100 * row["sparsity"] for row in rows], accuracies,
            yerr=[100 * row.get("accuracy_std", 0.0) for row in rows], color=colour, marker=_MARKERS[number],
            linestyle=_LINES[number % len(_LINES)], linewidth=2.6 if number == 0 else 1.4, capsize=3,
            zorder=3 if number == 0 else 2,
        )  # fmt: skip
        ends.append((accuracies[-1], number, colour))
    axes.axhline(100 * dense_accuracy, color="black", linewidth=0.8, zorder=1)
    _sparsity_axis(axes, [100 * row["sparsity"] for row in shown])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.03 * (high - low))
    room, above = 0.065 * (high - low), math.inf  # a line of text
    for height, number, colour in sorted(ends, reverse=True):
        above = min(height, above - room)
        axes.annotate(
            names[methods[number]], (1.015, above), xycoords=("axes fraction", "data"), va="center", color=colour,
            weight="bold" if number == 0 else "normal", fontsize=11, annotation_clip=False,
        )  # fmt: skip
    axes.annotate(f"dense: {100 * dense_accuracy:.1f}", (0.01, 100 * dense_accuracy), fontsize=9,
                  xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points")  # fmt: skip
    axes.set(xlabel="weights removed (%), logarithmic in those kept", ylabel="test accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def plot_loss(target: IO[bytes], report: Mapping[str, Any]) -> None:
    """Energy and spread of the particles over soft sparsity, the knee and the masks taken on the way."""
    figure, axes = _figure(1)
    points = [point for point in report["curve"] if point["energy"] is not None]
    sparsity = [100 * point["sparsity"] for point in points]
    low, high = [point["lowest"] for point in points], [point["highest"] for point in points]
    _losses(axes, sparsity, [point["energy"] for point in points], low, high, report["config"]["n_particles"])
    if min(low, default=0) > 0 and max(high) > 20 * min(low):
        axes.set_yscale("log")
    if report["knee"] is not None:
        axes.axvline(100 * report["knee"], color="black", linestyle="--", linewidth=1,
                     label=f"knee: {100 * report['knee']:.0f} %")  # fmt: skip
    for number, waypoint in enumerate(report["waypoints"]):
        axes.axvline(100 * waypoint["sparsity"], color="0.6", linestyle=":", linewidth=1,
                     label="mask taken" if number == 0 else None)  # fmt: skip
    _sparsity_axis(axes, [*sparsity, *(100 * waypoint["sparsity"] for waypoint in report["waypoints"])])
    axes.set(ylabel="mini-batch loss", title="Loss along the run")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(target, dpi=130)


def plot_particles(target: IO[bytes], report: Mapping[str, Any]) -> None:
    """How far apart the particles are: their deviation (the paper's Figure 5), overlap and effective number."""
    figure, (left, right) = _figure(2, (11, 4.8))
    steps = before_the_merge(report["history"])  # merged ones would be a line at 0
    sparsity = [100 * (1 - step["start_density"]) for step in steps]
    after = [100 * (1 - sum(step["densities"]) / len(step["densities"])) for step in steps]
    left.plot(after, [100 * step["deviation"] for step in steps], color=_COLOURS[0], marker=_dot(steps))
    left.set(ylabel="distance from the mean particle\n(% of a particle's norm)",
             title="Spread of the soft masks", ylim=(0, None))  # fmt: skip
    overlaps = [step["mean_overlap"] for step in steps]
    right.plot(sparsity, overlaps, color=_COLOURS[0], label="mean IoU of two (left axis)", marker=_dot(steps))
    right.set(ylabel="intersection over union", title="Binary masks", ylim=(0, 1.03))
    count = right.twinx()
    count.plot(sparsity, [step["effective_particles"] for step in steps], color=_COLOURS[1], linestyle="--",
               label="effective number (right axis)", marker=_dot(steps))  # fmt: skip
    count.set(ylabel=f"effective particles of {report['config']['n_particles']}", ylim=(0, None))
    lines = [*right.get_lines(), *count.get_lines()]
    right.legend(lines, [str(line.get_label()) for line in lines], **_BELOW)
    for axes in (left, right):
        _sparsity_axis(axes, [*sparsity, *after])
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=130)


def plot_layers(target: IO[bytes], report: Mapping[str, Any]) -> None:
    """Share of each tensor's weights that is kept (the paper's Figure 4), of the final mask and of those on the way."""
    final = report["layer_densities"]
    names = list(final)
    places = range(len(names))
    figure, axes = _named_bars(names, "prunable tensors, numbered in the model's order")
    axes.bar(places, [100 * final[name] for name in names], color="0.75", edgecolor="0.3", linewidth=0.6,
             label=f"{100 * report['summary']['sparsity']:.4g} % removed")  # fmt: skip
    for number, waypoint in enumerate(report["waypoints"]):
        if waypoint["sparsity"] == report["config"]["sparsity"]:
            continue
        colour, marker, line = _style(number)
        values = [100 * waypoint["layer_densities"][name] for name in names]
        axes.plot(places, values, color=colour, marker=marker, linestyle=line, markersize=4,
                  label=f"{100 * waypoint['sparsity']:.4g} % removed")  # fmt: skip
    dead = [i for i in places if final[names[i]] == 0]
    if dead:
        axes.plot(dead, [0.015] * len(dead), "x", color="black", markersize=7, markeredgewidth=2, zorder=5,
                  transform=axes.get_xaxis_transform(), label="nothing kept")  # fmt: skip
    axes.axhline(100 * (1 - report["summary"]["sparsity"]), color="black", linewidth=0.8, label="all weights together")
    axes.set(ylabel="weights kept (%)", title="Density by layer")
    axes.legend(**_RIGHT)
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(target, dpi=130)


def plot_groups(target: IO[bytes], report: Mapping[str, Any]) -> None:
    """Share of each group's channels, heads or neurons that is kept; a colour per kind."""
    groups = report["summary"]["groups"]
    figure, axes = _named_bars(list(groups), "groups, numbered as in the table")
    hatches = ("", "//", "..")
    for number, kind in enumerate(dict.fromkeys(one["kind"] for one in groups.values())):
        own = {i: one for i, one in enumerate(groups.values()) if one["kind"] == kind}
        axes.bar(list(own), [100 * one["kept"] / one["size"] for one in own.values()], color=_COLOURS[number],
                 alpha=0.6, hatch=hatches[number % len(hatches)], edgecolor="0.3", linewidth=0.6,
                 label=f"{kind}s")  # fmt: skip
    kept, size = (sum(one[name] for one in groups.values()) for name in ("kept", "size"))
    axes.axhline(100 * kept / size, color="black", linewidth=0.8, label="all together")
    axes.set(ylabel="kept (%)", title="Kept by group", ylim=(0, 103))
    axes.legend(**_RIGHT)
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(target, dpi=130)


def plot_baselines(target: IO[bytes], report: Mapping[str, Any]) -> None:
    """Accuracy of several methods over sparsity, as given to the report."""
    methods = {row["method"] for row in report["baselines"]}
    below = len(methods) + 1 if max(map(len, methods)) > _LONG else 0  # lines of the legend there
    figure, axes = _figure(1, (7.5, 4.2 + 0.2 * below))
    _accuracies(axes, report["baselines"], report["dense_accuracy"])
    axes.set_title("Accuracy by method")
    figure.savefig(target, dpi=130)


def _named_bars(names: Sequence[str], what: str) -> tuple[Any, Any]:
    """A figure with a place per name, from 0 on: named where there is room, else numbered, as ``what`` says."""
    short = shortened_apart(names, _TICK)
    shown = list(range(len(names))) if len(names) <= _NAMED else []
    longest = max((len(short[i]) for i in shown), default=0)  # characters of 7 points, at 60 degrees
    figure, axes = _figure(1, (max(9.5, 3.5 + 0.18 * len(shown)), 3.8 + 0.05 * longest))
    if shown:
        axes.set_xticks(shown, [short[i] for i in shown], rotation=60, ha="right", fontsize=7)
    else:
        numbers = _numbers(len(names))
        axes.set_xticks([number - 1 for number in numbers], [str(number) for number in numbers])
        axes.set_xlabel(f"{len(names)} {what}")
    return figure, axes


def _losses(
    axes: Any,
    sparsity: Sequence[float],
    energies: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    particles: int,
) -> None:
    """The particles' mean energy over sparsity in %, as it is and smoothed, with their band; one has none."""
    if particles > 1:
        axes.fill_between(
            sparsity, low, high, alpha=0.25, color=_COLOURS[0], linewidth=0, label="lowest to highest particle"
        )
    label = "mean of the particles" if particles > 1 else "the particle"
    known = [(x, y) for x, y in zip(sparsity, energies, strict=True) if math.isfinite(y)]
    smooth = len(known) >= WINDOW  # the raw curve then stands back, and stays
    axes.plot(sparsity, energies, color=_COLOURS[0], label=label, marker=_dot(energies),
              linewidth=0.8 if smooth else 1.5, alpha=0.6 if smooth else 1.0)  # fmt: skip
    if smooth:
        axes.plot([x for x, _ in known], running_median([y for _, y in known]), color=_COLOURS[1], linewidth=2,
                  label=f"smoothed: median of {WINDOW} steps")  # fmt: skip


def _sparsity_axis(axes: Any, values: Sequence[float]) -> None:
    """Sparsity in %; for a run beyond 90 % even in the logarithm of what is kept, or its end would be one line."""
    import numpy as np

    first, last = (max(100 - value, 1e-6) for value in (min(values, default=0.0), max(values, default=0.0)))  # kept, %
    ticks = [tick for tick in _REMOVED if 0.98 * last <= 100 - tick <= 1.02 * first]
    label = "soft sparsity (% removed)"
    if last < 10 and len(ticks) > 2:
        axes.set_xscale(
            "function",
            functions=(lambda removed: -np.log(np.maximum(100 - removed, 1e-6)), lambda x: 100 - np.exp(-x)),
        )
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        margin = (first / last) ** 0.03
        axes.set_xlim(100 - first * margin, 100 - last / margin)
        label += ", logarithmic in the weights kept"
    axes.set_xlabel(label)


def _style(number: int) -> tuple[str, str, str]:
    """Colour, marker and line of a series: marker and line together are distinct up to the 36th, in greyscale too."""
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)], _LINES[number % len(_LINES)]


def _numbers(count: int) -> list[int]:
    """Of 1 … count every 5th, 10th, 20th, 50th, …: at most 20."""
    step = next(step for power in range(20) for step in (5 * 10**power, 10 ** (power + 1), 2 * 10 ** (power + 1))
                if count <= 20 * step)  # fmt: skip
    return list(range(step, count + 1, step))


def _dot(points: Sequence[Any]) -> str | None:
    """A line of one point shows nothing."""
    return "o" if len(points) == 1 else None


def _apart(axes: Any, values: Sequence[float]) -> None:
    """Ticks at all the values, numbers at those that have the room for one, from the last on."""
    span = max(values, default=0.0) - min(values, default=0.0)
    named: list[float] = []
    for value in reversed(values):
        room = 0.0125 * (len(f"{value:g}") + len(f"{named[-1]:g}")) * span if named else 0.0
        if not named or named[-1] - value >= room:
            named.append(value)
    axes.set_xticks(named, [f"{value:g}" for value in named])
    axes.set_xticks([value for value in values if value not in named], minor=True)
    axes.tick_params(which="minor", length=3.5)


def _figure(panels: int, size: tuple[float, float] | None = None) -> tuple[Any, Any]:
    require("a picture", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size or (5.5 * panels if panels > 1 else 7.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels)


def _accuracies(right: Any, results: Sequence[Mapping[str, Any]], dense_accuracy: float | None) -> None:
    methods = list(dict.fromkeys(row["method"] for row in results))
    for number, method in enumerate(methods):
        colour, marker, line = _style(number)
        rows = sorted((row for row in results if row["method"] == method), key=lambda row: row["sparsity"])
        right.errorbar(
            [100 * row["sparsity"] for row in rows],
            [100 * row["accuracy_mean"] for row in rows],
            yerr=[100 * row.get("accuracy_std", 0.0) for row in rows],
            color=colour,
            marker=marker,
            linestyle=line,
            capsize=3,
            label=textwrap.fill(method, 70).replace("$", r"\$"),
        )
    _apart(right, sorted({100 * row["sparsity"] for row in results}))
    if dense_accuracy is not None:
        right.axhline(100 * dense_accuracy, color="black", linewidth=0.8, label="dense")
    right.set_xlabel("sparsity (% removed)")
    right.set_ylabel("test accuracy (%)")
    if max(map(len, methods), default=0) > _LONG:
        right.legend(**_BELOW)
    elif len(methods) + (dense_accuracy is not None) > _INSIDE:
        right.legend(**_RIGHT)
    else:
        right.legend()
    right.grid(alpha=0.3)
