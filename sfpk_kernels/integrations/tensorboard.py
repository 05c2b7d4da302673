"""TensorBoardCallback: the steps of a run in TensorBoard. Needs ``pip install tensorboard``."""

from __future__ import annotations

from typing import Any

from ..search.records import StepRecord
from ..utils.extras import require
from ._tracked import Evaluation, of_end, of_step

__all__ = ["TensorBoardCallback"]


class TensorBoardCallback:
    """Writes loss, densities and alarms of every step, one of ``callbacks=``; :meth:`finish` what came out.

    Args:
        to: a folder for the event file, or a ``torch.utils.tensorboard.SummaryWriter``, which stays open.
        layers: names of the prunable tensors, such as ``list(masks)``, for a curve of each one's density.
    """

    def __init__(self, to: Any, layers: list[str] | None = None):
        require("TensorBoardCallback", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._own = not hasattr(to, "add_scalar")
        self._writer, self._layers = SummaryWriter(str(to)) if self._own else to, layers

    def __call__(self, record: StepRecord) -> None:
        """Write a step; the run calls this."""
        for name, value in of_step(record, self._layers).items():
            self._writer.add_scalar(name, value, record.step)
        for words in record.alarms:
            self._writer.add_text("sfpk/alarms", words, record.step)

    def finish(self, result: Any, evaluation: Evaluation = None) -> None:
        """Write the sparsity of a PruneResult or MaskSet, and an evaluation: a number, or numbers by name."""
        for name, value in of_end(result, evaluation).items():
            self._writer.add_scalar(name, value, 0)
        self._writer.close() if self._own else self._writer.flush()
