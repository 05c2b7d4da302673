"""SFPKCallback: masks that hold through training with Lightning. Needs ``pip install lightning``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn

from ..coordinates.flat import named_parameters
from ..masks.enforce import MaskEnforcer
from ..masks.maskset import MaskSet
from ..utils.extras import missing
from ._restore import check_masks, restored

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(f"{missing('SFPKCallback', 'lightning')} ({error})") from error

__all__ = ["SFPKCallback"]


class SFPKCallback(Callback):
    """Keeps removed weights at exactly 0 while a Lightning Trainer fits, and saves the masks in its checkpoints.

    The weights are masked before the first step, after every step of every optimizer (accumulated batches, manual
    optimization and mixed precision included) and at the end. Parameter groups and optimizers may be added or exchanged
    meanwhile. Gradient clipping counts kept weights alone, except by hand (``clip_gradients`` in manual optimization).
    Resuming from a checkpoint restores its masks. Several callbacks may hold masks of different submodules; two for the
    same parameter, or Lightning's own ``ModelPruning`` for one of ours, are refused at the start. Strategies that shard
    parameters or keep copies of them (FSDP, DeepSpeed) are not covered.

    Args:
        masks: of the module, named as in its ``named_parameters()``; ``None`` to take those of the checkpoint that
            ``fit(ckpt_path=…)`` resumes from.
        submodule: name of the part of the LightningModule that the masks were made for, such as ``"model"``; empty for
            the whole.

    Raises:
        TypeError: no MaskSet, or no name.
        ValueError: at the start of a fit: masks of another model, none at all, or others than those of the checkpoint;
            another callback that prunes the same parameters.
    """

    def __init__(self, masks: MaskSet | None = None, submodule: str = ""):
        check_masks(masks)
        if not isinstance(submodule, str):
            raise TypeError(f"submodule: wanted a name, got {submodule!r:.80}")
        self.masks = masks
        self.submodule = submodule
        self._optimizers: list[Any] = []
        self._enforcers: list[MaskEnforcer] = []  # one for each of them, while training

    @property
    def state_key(self) -> str:
        """Under which the masks lie in a checkpoint: one for each submodule."""
        return self._generate_state_key(submodule=self.submodule) if self.submodule else super().state_key

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check and mask, before the sanity check validates."""
        self._check_alone(trainer, pl_module)
        if self.masks is not None:
            self.masks.apply_(self._model(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask what was restored, and from now on after every optimizer step."""
        if self.masks is None:
            raise ValueError("masks: wanted a MaskSet, or a checkpoint with masks to resume from, got neither")
        self._check_alone(trainer, pl_module)
        self.masks.apply_(self._model(pl_module))
        self._follow(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Enforce on other optimizers, if they were exchanged."""
        optimizers = trainer.optimizers
        if len(optimizers) != len(self._optimizers) or not all(map(operator.is_, optimizers, self._optimizers)):
            self._follow(trainer, pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """No gradients for removed weights: Lightning clips after this."""
        for enforcer in self._enforcers:
            enforcer.mask_gradients_()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mask a last time, and stop enforcing."""
        if self.masks is not None:
            self.masks.apply_(self._model(pl_module))
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop enforcing."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """The masks as the bytes of a mask file, for the checkpoint."""
        if self.masks is None:
            return {}
        return {"masks": torch.frombuffer(bytearray(self.masks.to_bytes()), dtype=torch.uint8)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the masks of a checkpoint.

        Raises:
            ValueError: others were given, or they were altered.
        """
        if "masks" in state_dict:
            found = MaskSet.from_bytes(state_dict["masks"].cpu().numpy().tobytes())
            self.masks = restored(self.masks, found, "the checkpoint")

    def _model(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.submodule)
        except AttributeError as error:
            raise ValueError(f"submodule: wanted a part of the module, got {self.submodule!r}: {error}") from error

    def _masked_parameters(self, pl_module: LightningModule) -> dict[int, str]:
        """Names of the parameters that the masks are for, by the parameters' ids."""
        if self.masks is None:
            return {}
        model = self._model(pl_module)
        self.masks.check(model)
        parameters = named_parameters(model)
        return {id(parameters[name]): name for name in self.masks}

    def _check_alone(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No other callback prunes parameters of ours.

        Raises:
            ValueError: one does.
        """
        ours = self._masked_parameters(pl_module)
        for other in trainer.callbacks:
            if other is self or not ours:
                continue
            kinds = {kind.__name__ for kind in type(other).__mro__}
            if isinstance(other, SFPKCallback):
                both = [ours[number] for number in other._masked_parameters(pl_module) if number in ours]
                remedy = "put all masks of a parameter into one (masks & others)"
            elif "ModelPruning" in kinds:
                both = [ours[id(weight)] for weight in _to_be_pruned(other, pl_module) if id(weight) in ours]
                remedy = (
                    "leave one of the two callbacks out, or give ModelPruning other parameters_to_prune, which renames "
                    "those it has"
                )
            else:
                continue
            if both:
                more = f" and {len(both) - 3} more" if len(both) > 3 else ""
                raise ValueError(
                    f"callbacks: wanted one that prunes {', '.join(both[:3])}{more}, got {type(self).__name__} and "
                    f"{'another ' if type(other) is type(self) else ''}{type(other).__name__}: {remedy}"
                )

    def _follow(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.masks is not None
        self._release()
        model = self._model(pl_module)
        self._optimizers = list(trainer.optimizers)
        self._enforcers = [self.masks.enforce(optimizer, model, strict=False) for optimizer in self._optimizers]

    def _release(self) -> None:
        for enforcer in self._enforcers:
            enforcer.remove()
        self._optimizers, self._enforcers = [], []

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which enforce nothing before a fit of their own."""
        return {**self.__dict__, "_optimizers": [], "_enforcers": []}


def _to_be_pruned(pruning: Any, pl_module: LightningModule) -> list[Any]:
    """What Lightning's callback is going to prune: as it says itself after its setup, or every weight."""
    listed = getattr(pruning, "_parameters_to_prune", None)
    if not isinstance(listed, list | tuple):
        return list(pl_module.parameters())
    return [getattr(module, name, None) for module, name in listed]
