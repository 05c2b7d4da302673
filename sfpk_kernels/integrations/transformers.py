"""SFPKTrainerCallback: masks that hold through training with the Hugging Face Trainer.

Needs ``pip install 'sfpk_kernels[transformers]'``.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..enforce import MaskedParameters
from ..masks import MaskSet
from ._restore import check_masks, restored

logger = logging.getLogger(__name__)

__all__ = ["MASK_FILE", "SFPKTrainerCallback"]

MASK_FILE = "sfpk_masks.safetensors"  # in every checkpoint folder


class SFPKTrainerCallback(TrainerCallback, ExportableState):
    """Keeps removed weights at exactly 0 while a Hugging Face Trainer trains, and saves the masks with checkpoints.

    The weights are masked before the first step and after every optimizer step (not after every accumulated batch).
    Every checkpoint folder gets a file ``sfpk_masks.safetensors``, and the masks' fingerprint goes into its
    ``trainer_state.json``. A run that resumes is refused if its masks are not those of the checkpoint. Sharded or
    offloaded parameters (FSDP, DeepSpeed) are not covered.

    Args:
        masks: of the model. ``None`` when a run resumes: they are read from the checkpoint, if it lies in the
            ``output_dir``; :meth:`from_checkpoint` reads them from anywhere.

    Raises:
        TypeError: no MaskSet.
        ValueError: at the start of training: masks of another model, none at all, or others than those of the
            checkpoint.
    """

    def __init__(self, masks: MaskSet | None = None):
        check_masks(masks)
        self.masks = masks
        self._masked: MaskedParameters | None = None  # while training

    @classmethod
    def from_checkpoint(cls, folder: str | os.PathLike[str]) -> SFPKTrainerCallback:
        """With the masks of a checkpoint folder; errors as in :meth:`MaskSet.load`."""
        return cls(MaskSet.load(Path(folder) / MASK_FILE))

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into ``trainer_state.json``; see :class:`transformers.TrainerCallback`."""
        return {"args": {}, "attributes": {} if self.masks is None else {"fingerprint": self.masks.fingerprint()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore or check the masks of a resumed run; mask."""
        if state.global_step > 0:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}", state)
        if self.masks is None:
            raise ValueError(
                "masks: wanted a MaskSet, or a checkpoint with masks in output_dir to resume from, got neither"
            )
        model = kwargs["model"]
        self.masks.apply_(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._masked = MaskedParameters(self.masks, {name: parameters[name] for name in self.masks})

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mask again."""
        if self._masked is not None:
            self._masked.apply_()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the masks into the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.masks is None or not state.is_world_process_zero:
            return
        if folder.is_dir():
            self.masks.save(folder / MASK_FILE)
        else:
            logger.warning("no checkpoint folder %s: the masks were not saved", folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mask what ``load_best_model_at_end`` may have loaded, a last time."""
        if self._masked is not None:
            self._masked.apply_()
            self._masked = None

    def _resume(self, checkpoint: Path, state: TrainerState) -> None:
        """Masks of the checkpoint, if they are found; the trainer's state says which belong to it."""
        saved: Any = (state.stateful_callbacks or {}).get(type(self).__name__) or {}
        saved = saved[0] if isinstance(saved, list) else saved
        expected = saved.get("attributes", {}).get("fingerprint")
        file = checkpoint / MASK_FILE
        if file.is_file():
            found = MaskSet.load(file)
            if expected in (None, found.fingerprint()):
                self.masks = restored(self.masks, found, f"the checkpoint {checkpoint.name}")
                return
        if expected is not None and self.masks is not None and self.masks.fingerprint() != expected:
            raise ValueError(
                f"masks: wanted those of the checkpoint, with the fingerprint {expected[:12]}, got {self.masks!r}: "
                "SFPKTrainerCallback.from_checkpoint(folder) takes them from there"
            )
