"""SFPKTrainerCallback: masks that hold through training with the Hugging Face Trainer.

Needs ``pip install transformers accelerate``.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ..coordinates.flat import named_parameters
from ..masks.masked_parameters import MaskedParameters, Watch
from ..masks.maskset import MaskSet
from ..utils.extras import missing
from ._restore import check_masks

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ImportError as error:
    raise ImportError(f"{missing('SFPKTrainerCallback', 'transformers', 'accelerate')} ({error})") from error

logger = logging.getLogger(__name__)

__all__ = ["MASK_FILE", "SFPKTrainerCallback"]

MASK_FILE = "sfpk_masks.safetensors"  # in every checkpoint folder


class SFPKTrainerCallback(TrainerCallback, ExportableState):
    """Keeps removed weights at exactly 0 while a Hugging Face Trainer trains, and saves the masks with checkpoints.

    The weights are masked before the first step and after every optimizer step (not after every accumulated batch).
    Every checkpoint folder gets a file ``sfpk_masks.safetensors``, and the masks' fingerprint goes into its
    ``trainer_state.json``. A run that resumes is refused if its masks are not those of the checkpoint. The Trainer
    clips before any callback is asked, so ``max_grad_norm`` counts the gradients of removed weights, too. Removed
    weights that something else has written are found before the next step, set to 0 and reported in the log, once.
    Sharded or offloaded parameters (FSDP, DeepSpeed) are not covered.

    Args:
        masks: of the model. ``None`` when a run resumes: they are read from the checkpoint, if it lies in the
            ``output_dir``; :meth:`from_checkpoint` reads them from anywhere. With
            ``restore_callback_states_from_checkpoint=True`` the Trainer makes the callback anew, as with ``None``.

    Raises:
        TypeError: no MaskSet.
        ValueError: for a second one in the same Trainer; at the start of training: masks of another model, none at
            all, or others than those of the checkpoint.
    """

    def __init__(self, masks: MaskSet | None = None):
        check_masks(masks)
        self.masks = masks
        self._masked: MaskedParameters | None = None  # while training
        self._watch = Watch()

    @classmethod
    def from_checkpoint(cls, folder: str | os.PathLike[str]) -> SFPKTrainerCallback:
        """With the masks of a checkpoint folder; errors as in :meth:`MaskSet.load`."""
        return cls(MaskSet.load(Path(folder) / MASK_FILE))

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into ``trainer_state.json``; see :class:`transformers.TrainerCallback`."""
        return {"args": {}, "attributes": {} if self.masks is None else {"fingerprint": self.masks.fingerprint()}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse a second callback of this kind."""
        self._claim(state)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restore or check the masks of a resumed run; mask."""
        self._claim(state)
        if state.global_step > 0:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}", state)
        if self.masks is None:
            lost = ""
            if state.global_step > 0 and args.restore_callback_states_from_checkpoint:
                lost = (
                    " (restore_callback_states_from_checkpoint=True made the callback anew, without the masks it may "
                    "have had: leave that option off)"
                )
            raise ValueError(
                "masks: wanted a MaskSet, or a checkpoint with masks in output_dir to resume from, got neither"
                f"{lost}: SFPKTrainerCallback.from_checkpoint(folder) takes them from a checkpoint elsewhere"
            )
        model = kwargs["model"]
        self.masks.apply_(model)
        if isinstance(state.stateful_callbacks, dict):  # the Trainer saves into the entry a resumed state may lack
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        parameters = named_parameters(model)
        self._masked = MaskedParameters(self.masks, {name: parameters[name] for name in self.masks})
        self._watch = Watch()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mask what was written since the last step, and say so."""
        if self._masked is not None:
            self._watch.look(
                self._masked,
                "before a step of the Trainer",
                "they were set to 0 again. Something else than its optimizer's steps wrote them (an optimizer's own "
                "averages, load_state_dict), and may have been evaluated and saved with them",
            )
            if self._watch.said:  # whatever writes them will do so again
                self._masked.apply_()

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

    def _claim(self, state: TrainerState) -> None:
        """One callback for each Trainer: two would write the same file. Its state is what they share."""
        if vars(state).setdefault("_sfpk_callback", self) is not self:
            raise ValueError(
                f"callbacks: wanted one {type(self).__name__} in a Trainer, got a second one, which would write the "
                f"same {MASK_FILE}: put all masks into one MaskSet"
            )

    def _resume(self, checkpoint: Path, state: TrainerState) -> None:
        """Masks of the checkpoint, whose state names their fingerprint: the folder here may be of another run."""
        saved: Any = (state.stateful_callbacks or {}).get(type(self).__name__) or {}
        saved = saved[0] if isinstance(saved, list) else saved
        expected = saved.get("attributes", {}).get("fingerprint")
        if expected is None:  # of a run without masks
            return
        file = checkpoint / MASK_FILE
        if self.masks is None and file.is_file():
            found = MaskSet.load(file)
            self.masks = found if found.fingerprint() == expected else None
        elif self.masks is not None and self.masks.fingerprint() != expected:
            raise ValueError(
                f"masks: wanted those of the checkpoint, with the fingerprint {expected[:12]}, got {self.masks!r}: "
                "SFPKTrainerCallback.from_checkpoint(folder) takes them from there"
            )
