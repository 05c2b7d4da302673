"""WandbCallback: the steps of a run in Weights & Biases. Needs ``pip install wandb``."""

from __future__ import annotations

from typing import Any

from ..search.records import StepRecord
from ..utils.extras import require
from ._tracked import Evaluation, of_end, of_step

__all__ = ["WandbCallback"]


class WandbCallback:
    """Logs loss, densities and alarms (as alerts, too) of every step, by ``sfpk/step``; :meth:`finish` what came out.

    Args:
        run: what ``wandb.init()`` returned; None for the one in progress.
        layers: names of the prunable tensors, such as ``list(masks)``, for a curve of each one's density.
    """

    def __init__(self, run: Any = None, layers: list[str] | None = None):
        require("WandbCallback", "wandb")
        import wandb

        self._run: Any = wandb.run if run is None else run
        self._layers = layers
        if self._run is None:
            raise ValueError("run: wanted a run of Weights & Biases, got none in progress: call wandb.init() first")
        self._run.define_metric("sfpk/*", step_metric="sfpk/step")

    def __call__(self, record: StepRecord) -> None:
        """Log a step; the run calls this."""
        self._run.log({"sfpk/step": record.step, **of_step(record, self._layers)})
        for words in record.alarms:
            self._run.alert(title="SFPK", text=f"step {record.step}: {words}")

    def finish(self, result: Any, evaluation: Evaluation = None) -> None:
        """Sum up: the sparsity of a PruneResult or MaskSet, and an evaluation: a number, or numbers by name."""
        self._run.summary.update(of_end(result, evaluation))
