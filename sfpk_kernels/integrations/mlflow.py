"""MLflowCallback: the steps of a run in MLflow. Needs ``pip install mlflow-skinny``, or mlflow itself."""

from __future__ import annotations

from typing import Any

from ..search.records import StepRecord
from ..utils.extras import require
from ._tracked import Evaluation, of_end, of_step

__all__ = ["MLflowCallback"]


class MLflowCallback:
    """Logs loss, densities and alarms (as tags, too) of every step; :meth:`finish` what came out.

    Args:
        run_id: of the run; None for the active one.
        layers: names of the prunable tensors, such as ``list(masks)``, for a curve of each one's density.
    """

    def __init__(self, run_id: str | None = None, layers: list[str] | None = None):
        require("MLflowCallback", "mlflow")
        import mlflow

        if run_id is None and mlflow.active_run() is None:
            raise ValueError("run_id: wanted that of a run, got None and no active run: call mlflow.start_run() first")
        self._run_id, self._layers = run_id or mlflow.active_run().info.run_id, layers
        self._log_metrics, self._client = mlflow.log_metrics, mlflow.MlflowClient()

    def __call__(self, record: StepRecord) -> None:
        """Log a step; the run calls this."""
        self._log_metrics(of_step(record, self._layers), step=record.step, run_id=self._run_id)
        if record.alarms:
            self._client.set_tag(self._run_id, f"sfpk.alarms.{record.step}", "; ".join(record.alarms)[:5000])

    def finish(self, result: Any, evaluation: Evaluation = None) -> None:
        """Log the sparsity of a PruneResult or MaskSet, and an evaluation: a number, or numbers by name."""
        self._log_metrics(of_end(result, evaluation), step=0, run_id=self._run_id)
