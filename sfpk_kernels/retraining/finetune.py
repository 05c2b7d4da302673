"""``finetune_masked``: the kept weights trained with Adam for a few hundred steps."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..masks.maskset import MaskSet
from ..modeling.batches import default_loss
from ..modeling.turns import alone, end_contexts
from ..modeling.whole_model import Registered, WholeModel
from ..search.energy import LossFn
from ..utils.arguments import called, check_least, check_loader, check_loss_fn, check_model, check_positive
from .distillation import Compare, Dense, Distillation, check_dense
from .loop import train_masked, trained_parameters
from .measured import check_mask, held_batches, mean_loss

_CALL = "finetune_masked(model, mask, loader, steps=…)"
_BETAS = (0.9, 0.99)


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What :func:`finetune_masked` did; the model holds the trained weights."""

    losses: list[float]  # of every step, as trained
    loss_before: float | None  # on the batches of ``evaluate``, masked; None without them
    loss_after: float | None
    seconds: float  # of all, with measuring

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return len(self.losses)

    def __repr__(self) -> str:
        measured = "" if self.loss_before is None else f", loss {self.loss_before:.4f} → {self.loss_after:.4f}"
        return f"FinetuneResult({self.steps} steps{measured}, {self.seconds:.1f} s)"


@called(_CALL)
@alone
def finetune_masked(
    model: nn.Module,
    mask: MaskSet,
    loader: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    steps: int = 200,
    lr: float = 3e-3,
    decay: str = "linear",
    warmup: float = 0.05,
    clip_norm: float | None = None,
    distill: Dense | None = None,
    distance: str | Compare = "kl",
    temperature: float = 1.0,
    evaluate: Iterable[Any] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> FinetuneResult:
    """Train the kept weights of a pruned model in place, removed ones exactly 0 after every step.

    Adam with β = (0.9, 0.99) over all parameters that require gradients; gradients of removed weights are 0 before
    each step, so that nothing of them is in its state. It is the loop of :func:`retrain` (train mode, a seed of its
    own, modes as before and gradients None afterwards). It pays most after a searched mask; after a one-shot one
    :func:`repair` comes first. A step is one forward/backward pass, with ``distill`` one more forward pass of the dense
    model; memory is that of training, and a copy of the model.

    After an error or an interruption the model is as it came in: weights, buffers, gradients, modes.

    Args:
        model: to be trained; masked first.
        mask: of ``model``.
        loader: batches, cycled; no length is needed.
        loss_fn: ``loss_fn(model, batch) -> scalar``; ``None`` for the default loss. With ``distill`` it is measured by
            ``evaluate``, not trained.
        steps: optimizer steps, ≥ 1, one batch each.
        lr: the largest learning rate, > 0; a pretrained encoder may want a tenth of it.
        decay: of the learning rate to 0 after the warm-up: ``"linear"`` or ``"cosine"``.
        warmup: fraction of the steps in which it rises to ``lr``, in [0, 1).
        clip_norm: largest norm of the gradient, > 0; ``None`` for no clipping.
        distill: train towards the outputs of this dense model (a copy made before masking,
            ``copy.deepcopy(model)``), which is not changed, instead of the loss; or a function of a batch that gives
            them. No labels are needed then.
        distance: of outputs: ``"kl"`` for logits, classes in the last dimension; ``"mse"``, ``"cosine"`` for others;
            or a function ``(output, dense_output) -> scalar``.
        temperature: of ``"kl"``, > 0.
        evaluate: batches on which the loss is measured before and after, in eval mode; ``None`` for none.
        seed: of data order and dropout.
        progress: show a bar; ``None`` for only on a terminal.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: masks of another model, an empty loader, an option out of its range, nothing to train, a ``distill``
            that shares weights with ``model`` or has outputs of another shape.
        FloatingPointError: a loss that is not finite.
    """
    check_model(model)
    check_mask(mask, model, _CALL)
    check_loader(loader)
    check_loss_fn(loss_fn)
    check_least("steps", steps, 1)
    check_positive("lr", lr)
    if decay not in ("linear", "cosine"):
        raise ValueError(f"decay: wanted 'linear' or 'cosine', got {decay!r}")
    if isinstance(warmup, bool) or not isinstance(warmup, int | float):
        raise TypeError(f"warmup: wanted a number in [0, 1), got {warmup!r}")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup: wanted a number in [0, 1), got {warmup!r}")
    if clip_norm is not None:
        check_positive("clip_norm", clip_norm)
    distillation = None
    if distill is not None:
        distillation = Distillation(distill, distance, temperature)
        if isinstance(distill, nn.Module):
            check_dense("distill", distill, model)
    held = None if evaluate is None else held_batches("evaluate", evaluate)
    device = trained_parameters(model)[0].device

    def descent(parameters: list[nn.Parameter]) -> tuple[Optimizer, LRScheduler]:
        adam = torch.optim.Adam(parameters, lr, betas=_BETAS)
        return adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _share(step, steps, warmup, decay))

    def measured() -> float | None:
        loss = loss_fn or distillation or default_loss  # the one that is trained, unless another is given
        return None if held is None else mean_loss(model, loss, held, device, "running")

    started, whole = time.perf_counter(), WholeModel(model)
    run = [each for each in (model, distill) if isinstance(each, nn.Module)]
    before_all: list[Registered | WholeModel] = [*map(Registered, run), whole]
    try:
        whole.put_gradients_aside()
        mask.apply_(model)
        with nullcontext() if distillation is None else distillation.ready():
            before = measured()
            trained = distillation or loss_fn or default_loss
            losses = train_masked(
                model, loader, mask, descent, steps, trained,
                clip_norm=clip_norm, seed=seed, progress=progress, left="the model is put back as it came in",
            )  # fmt: skip
            after = measured()
        return FinetuneResult(losses, before, after, time.perf_counter() - started)
    except BaseException as error:
        end_contexts(error)
        for part in before_all:
            part.restore()
        raise


def _share(step: int, steps: int, warmup: float, decay: str) -> float:
    """Of the largest learning rate, in a step from 0."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    return 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
