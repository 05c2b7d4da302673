"""Plots of runs and comparisons. matplotlib is imported here alone, and only when a plot is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .records import StepRecord

# Distinct in greyscale, too: each series has its own marker and line style.
_STYLES = [("#1b5e9e", "o", "-"), ("#c4541a", "s", "--"), ("#5b8c2a", "^", "-."), ("#7d3c98", "D", ":")]


def plot_loss_versus_sparsity(
    path: Path,
    history: Sequence[StepRecord],
    results: Sequence[Mapping[str, Any]],  # method, sparsity, accuracy_mean, accuracy_std
    dense_accuracy: float,
    title: str,
) -> None:
    """A PNG of two panels: energy over soft sparsity with the particles' spread, and accuracy by method.

    Args:
        path: the PNG to write.
        history: of one run; the energy of a step belongs to the soft density at its start.
        results: rows of the comparison.
        dense_accuracy: of the unpruned model, in [0, 1].
        title: above both panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)

    starts = [1.0, *(record.density for record in history[:-1])]
    sparsities = [100 * (1 - density) for density in starts]
    mean = [record.energy for record in history]
    left.fill_between(
        sparsities,
        [min(record.energies) for record in history],
        [max(record.energies) for record in history],
        alpha=0.25,
        color=_STYLES[0][0],
        linewidth=0,
        label="lowest to highest particle",
    )
    left.plot(sparsities, mean, color=_STYLES[0][0], label="mean of the particles")
    left.set_yscale("log")
    left.set_xlabel("soft sparsity (% removed)")
    left.set_ylabel("mini-batch loss")
    left.set_title("Loss along one SFPK run")
    left.legend()
    left.grid(alpha=0.3)

    methods = list(dict.fromkeys(row["method"] for row in results))
    for number, method in enumerate(methods):
        colour, marker, line = _STYLES[number % len(_STYLES)]
        rows = sorted((row for row in results if row["method"] == method), key=lambda row: row["sparsity"])
        right.errorbar(
            [100 * row["sparsity"] for row in rows],
            [100 * row["accuracy_mean"] for row in rows],
            yerr=[100 * row["accuracy_std"] for row in rows],
            color=colour,
            marker=marker,
            linestyle=line,
            capsize=3,
            label=method,
        )
    right.set_xticks(sorted({100 * row["sparsity"] for row in results}))
    right.axhline(100 * dense_accuracy, color="black", linewidth=0.8, label="dense")
    right.set_xlabel("sparsity (% removed)")
    right.set_ylabel("test accuracy (%)")
    right.set_title("One shot, no retraining")
    right.legend()
    right.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
