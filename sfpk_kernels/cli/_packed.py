"""``--packed``: the masked model in one small file."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..config import SFPKConfig
from ..export.export import ExportReport, export
from ..masks.maskset import MaskSet
from ._outcome import WrongOption, recalibrate
from ._task import Task

PACKED = "packed.safetensors"


@dataclasses.dataclass(frozen=True)
class Written:
    """What there is to say of the file; without one, nothing."""

    report: ExportReport | None = None

    @property
    def files(self) -> list[str]:
        """Its path."""
        return [] if self.report is None else [self.report.path]

    @property
    def numbers(self) -> dict[str, Any]:
        """For JSON."""
        if self.report is None:
            return {}
        whole = self.report.to_dict()
        return {"packed": {name: whole[name] for name in ("bytes_on_disk", "bytes_dense", "times_smaller")}}

    def below(self, head: str) -> str:
        """A line of sizes below what was found."""
        return head if self.report is None else f"{head}\n{PACKED}: {self.report.size}"


def check_packed(options: argparse.Namespace, config: SFPKConfig) -> None:
    """That single weights are removed.

    Raises:
        WrongOption: channels, heads or neurons are.
    """
    if options.packed and config.granularity != "weight":
        raise WrongOption(f"--packed: wanted without --granularity {config.granularity}, got both: --shrunk is smaller")


def write_packed(task: Task, mask: MaskSet, options: argparse.Namespace) -> Written:
    """The masked model, its batch-norm re-estimated, in the folder of ``--out``; the model stays so.

    Raises:
        RuntimeError, ValueError: a model that cannot be written.
    """
    if not options.packed:
        return Written()
    mask.apply_(task.model)
    recalibrate(task.model, task, options.bn_batches)
    return Written(export(task.model, Path(options.out) / PACKED, kind="packed", masks=mask))
