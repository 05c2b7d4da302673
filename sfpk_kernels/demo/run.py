"""The demo: train a network on digits, prune it in one shot by several methods, compare honestly."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..baselines import magnitude, snip, ste
from ..config import SFPKConfig
from ..masks.maskset import MaskSet
from ..modeling.batchnorm import recalibrate_batchnorm
from ..search.merging import passes
from ..search.prune import prune
from ..search.result import PruneResult
from ..utils.files import atomic_write, check_place
from .task import TRAINING_BATCH, Digits, accuracy, load_digits, train

SPARSITIES = (0.80, 0.90, 0.95, 0.98)
HEADLINE = 0.95  # the sparsity that gets all seeds
SEEDS = (0, 1, 2)
EPOCHS = 15
_PICTURE = "loss-versus-sparsity.png"
_OVERVIEW = "accuracy.png"  # with --full the picture of README.md, docs/images/accuracy.png
_NAMES = {
    "sfpk": "SFPK (default)",
    "sfpk-paper": "SFPK (paper)",
    "sfpk-authors": "SFPK (authors' code)",
    "straight-through": "straight-through",
    "magnitude": "magnitude",
    "snip": "SNIP",
}


class Demo:
    """One run of the demo; every method sees the same models, data, seeds and batch-norm re-estimation.

    Args:
        out: folder for masks, comparison.json, the plot, and the report of the run it shows; created.
        full: all seeds at every sparsity, and the presets paper and authors.
        progress: show bars; ``None`` for only on a terminal.
        say: prints a line.
        sparsities, seeds, epochs, config: smaller values make a quick run; ``config`` overrides fields of
            every SFPK preset.
    """

    def __init__(
        self,
        out: Path,
        *,
        full: bool = False,
        progress: bool | None = None,
        say: Callable[[str], None] = print,
        sparsities: Sequence[float] = SPARSITIES,
        seeds: Sequence[int] = SEEDS,
        epochs: int = EPOCHS,
        config: dict[str, Any] | None = None,
    ):
        self.out = out
        self.full = full
        self.presets = ("default", "paper", "authors") if full else ("default",)
        self.progress = progress
        self.say = say
        self.sparsities = tuple(sparsities)
        self.seeds = tuple(seeds)
        self.epochs = epochs
        self.overrides = dict(config or {})
        self.runs: dict[float, PruneResult] = {}  # of the first seed, by sparsity

    def run(self) -> dict[str, Any]:
        """The whole demo; returns what comparison.json holds."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name in ("comparison.json", _PICTURE, _OVERVIEW, *self._mask_names()):
            check_place(self.out / name, name)  # before two minutes of work
        digits = load_digits()
        self.say(
            f"Real handwritten digits: {len(digits.train_y):,} training and {len(digits.test_y)} test images "
            "(scikit-learn)."
        )
        models = {seed: train(digits, seed, self.epochs) for seed in self.seeds}
        dense = {seed: accuracy(model, digits) for seed, model in models.items()}
        self.say(
            f"Trained {len(models)} residual networks (one per seed): dense test accuracy "
            f"{_percent(list(dense.values()))}."
        )
        results = []
        for sparsity in self.sparsities:
            seeds = self._seeds_at(sparsity)
            for method, search in self._methods(digits):
                results.append(self._measure(method, search, sparsity, seeds, models, digits))
        report = {
            "dense_accuracy": statistics.mean(dense.values()),
            "dense_accuracy_by_seed": {str(seed): value for seed, value in dense.items()},
            "data": "scikit-learn digits, 1347 training / 450 test images",
            "config": {
                preset: SFPKConfig.preset(preset, sparsity=HEADLINE, **self.overrides).to_dict()
                for preset in self.presets
            },
            "results": results,
        }
        with atomic_write(self.out / "comparison.json") as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")
        self._plot(report)
        self._summarize(report)
        return report

    def _seeds_at(self, sparsity: float) -> tuple[int, ...]:
        return self.seeds if self.full or sparsity == HEADLINE else self.seeds[:1]

    def _mask_names(self) -> list[str]:
        methods = ("magnitude", "snip", "straight-through", *map(_method, self.presets))
        return [_mask_name(m, sparsity, seed) for m in methods for sparsity in self.sparsities
                for seed in self._seeds_at(sparsity)]  # fmt: skip

    def _methods(self, digits: Digits) -> list[tuple[str, Callable[[nn.Module, float, int], MaskSet]]]:
        def sfpk(preset: str) -> Callable[[nn.Module, float, int], MaskSet]:
            def search(model: nn.Module, sparsity: float, seed: int) -> MaskSet:
                config = SFPKConfig.preset(preset, sparsity=sparsity, **{"seed": seed, **self.overrides})
                result = prune(model, digits.loader(seed), config=config, progress=self.progress)
                if preset == "default":
                    self.runs.setdefault(sparsity, result)
                return result.mask

            return search

        def learned(model: nn.Module, sparsity: float, seed: int) -> MaskSet:
            allowed = passes(SFPKConfig.preset("default", sparsity=sparsity, **self.overrides))
            return ste(model, digits.loader(seed), sparsity, passes=allowed, seed=seed)

        return [
            ("magnitude", lambda model, sparsity, seed: magnitude(model, sparsity)),
            ("snip", lambda model, sparsity, seed: snip(model, digits.loader(seed), sparsity)),
            ("straight-through", learned),
            *((_method(preset), sfpk(preset)) for preset in self.presets),
        ]

    def _measure(
        self,
        method: str,
        search: Callable[[nn.Module, float, int], MaskSet],
        sparsity: float,
        seeds: Sequence[int],
        models: dict[int, nn.Module],
        digits: Digits,
    ) -> dict[str, Any]:
        accuracies, seconds = [], []
        for seed in seeds:
            started = time.perf_counter()
            mask = search(models[seed], sparsity, seed)
            seconds.append(time.perf_counter() - started)
            pruned = mask.apply_(copy.deepcopy(models[seed]))
            recalibrate_batchnorm(pruned, digits.loader(seed, TRAINING_BATCH))
            accuracies.append(accuracy(pruned, digits))
            mask.save(self.out / _mask_name(method, sparsity, seed))
        row = {
            "method": method,
            "sparsity": sparsity,
            "accuracy_mean": statistics.mean(accuracies),
            **({"accuracy_std": statistics.stdev(accuracies)} if len(accuracies) > 1 else {}),
            "accuracies": accuracies,
            "seeds": list(seeds),
            "kept": mask.kept,
            "prunable": mask.prunable,
            "seconds": statistics.mean(seconds),
        }
        self.say(f"  {sparsity:.0%} removed  {method:<16} accuracy {_percent(accuracies)}  {row['seconds']:.1f} s")
        return row

    def _plot(self, report: dict[str, Any]) -> None:
        from ..report import plot_loss_versus_sparsity, plot_methods

        longest = max(self.runs)
        result = self.runs[longest]
        plot_loss_versus_sparsity(
            self.out / _PICTURE,
            result.history,
            report["results"],
            report["dense_accuracy"],
            f"Residual network on handwritten digits (left: run to {longest:.0%} sparsity)",
        )
        runs = max(len(row["seeds"]) for row in report["results"])
        plot_methods(
            self.out / _OVERVIEW,
            report["results"],
            report["dense_accuracy"],
            _NAMES,
            f"One shot, no retraining: a residual network on digits{f', {runs} seeds' if runs > 1 else ''}",
        )
        seed = self.seeds[0]  # of the run that is reported
        (row,) = (row for row in report["results"] if (row["method"], row["sparsity"]) == ("sfpk", longest))
        result.report(
            self.out,
            report["results"],
            report["dense_accuracy"],
            dense_eval={"test accuracy": report["dense_accuracy_by_seed"][str(seed)]},
            pruned_eval={"test accuracy": row["accuracies"][row["seeds"].index(seed)]},
        )

    def _summarize(self, report: dict[str, Any]) -> None:
        header = f"{'sparsity':>8}  {'method':<16} {'accuracy %':>14}  {'kept':>6} of {'prunable':>8}  {'seconds':>7}"
        self.say("\n" + header + "\n" + "-" * len(header))
        for row in report["results"]:
            self.say(
                f"{row['sparsity']:>8.0%}  {row['method']:<16} {_percent(row['accuracies']):>14}  "
                f"{row['kept']:>6,} of {row['prunable']:>8,}  {row['seconds']:>7.1f}"
            )
        self.say(
            f"\nDense accuracy {100 * report['dense_accuracy']:.1f} %. One shot, no retraining; the same models, "
            "data, seeds and batch-norm\nre-estimation for every method; ± is the standard deviation over seeds. "
            f"Masks, comparison.json, picture and report.html: {self.out}/"
        )


def _method(preset: str) -> str:
    return "sfpk" if preset == "default" else f"sfpk-{preset}"


def _mask_name(method: str, sparsity: float, seed: int) -> str:
    return f"mask-{method}-{sparsity:g}-seed{seed}.safetensors"


def _percent(accuracies: Sequence[float]) -> str:
    mean = f"{100 * statistics.mean(accuracies):.1f}"
    return f"{mean} ± {100 * statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else mean
