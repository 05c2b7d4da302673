"""A plain retraining loop for pruned models: SGD with momentum and a cosine learning rate, masks enforced."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from ..masks.maskset import MaskSet
from ..modeling.batches import BatchStream, default_loss
from ..modeling.state import seeded
from ..modeling.turns import end_contexts, lock
from ..modeling.whole_model import Buffers
from ..search.energy import LossFn
from ..utils.arguments import called, check_loss_fn


@dataclasses.dataclass(frozen=True)
class RetrainConfig:
    """How :func:`retrain` trains, checked when constructed.

    Args:
        epochs: passes over the loader, > 0; fractions are whole steps, rounded.
        lr: learning rate at the start, > 0; it falls to 0 along half a cosine: ``lr·(1 + cos(π·step/steps))/2``.
        momentum: of SGD (Nesterov), in [0, 1).
        weight_decay: of every trained parameter, ≥ 0.
        label_smoothing: of the default cross-entropy on batches (x, y), in [0, 1).
        clip_norm: largest norm of the gradient of all parameters together, without removed weights, > 0; ``None`` for
            no clipping.

    Raises:
        TypeError: a value that is no number.
        ValueError: a value out of its range; the message names the field.
    """

    epochs: float
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        ranges = {
            "epochs": ("> 0", lambda x: x > 0),
            "lr": ("> 0", lambda x: x > 0),
            "momentum": ("in [0, 1)", lambda x: 0 <= x < 1),
            "weight_decay": ("≥ 0", lambda x: x >= 0),
            "label_smoothing": ("in [0, 1)", lambda x: 0 <= x < 1),
            "clip_norm": ("> 0 or None", lambda x: x > 0),
        }
        for name, (wanted, accepts) in ranges.items():
            value = getattr(self, name)
            if name == "clip_norm" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name}: wanted a number {wanted}, got {value!r}")
            if not math.isfinite(value) or not accepts(value):
                raise ValueError(f"{name}: wanted a number {wanted}, got {value!r}")
            object.__setattr__(self, name, float(value))

    def total_steps(self, loader: Iterable[Any]) -> int:
        """Optimizer steps of ``epochs`` passes over ``loader``, at least 1.

        Raises:
            TypeError: a loader without a length, such as one over an IterableDataset.
            ValueError: a loader of length 0.
        """
        length = _length(loader)
        if length is None:
            dataset = getattr(loader, "dataset", None)
            over = "" if dataset is None else f" over a {type(dataset).__name__}"
            raise TypeError(
                f"loader: wanted one with a length, to count epochs, got {type(loader).__name__}{over}: pass steps= to "
                "retrain(); to GradualPruner a retrain_loader= with a length, or a function as retrain="
            )
        if length == 0:
            raise ValueError("loader: wanted batches, got a loader of length 0")
        return max(1, round(self.epochs * length))


def _length(loader: Iterable[Any]) -> int | None:
    """None for one without: a DataLoader has ``__len__`` even where its dataset has not."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def check_label_smoothing(loss_fn: LossFn | None, config: RetrainConfig) -> None:
    """Label smoothing belongs to the default loss.

    Raises:
        ValueError: it was asked for together with another loss.
    """
    if loss_fn is not None and config.label_smoothing > 0:
        raise ValueError(
            f"label_smoothing: wanted 0 beside a loss_fn of your own, which may smooth itself, got "
            f"{config.label_smoothing!r}"
        )


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that require gradients.

    Raises:
        ValueError: none does.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("model: wanted parameters that require gradients, got none")
    return parameters


@called("retrain(model, loader, masks, config, loss_fn=…)")
def retrain(
    model: nn.Module,
    loader: Iterable[Any],
    masks: MaskSet,
    config: RetrainConfig,
    *,
    loss_fn: LossFn | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> list[float]:
    """Train a pruned model in place, removed weights exactly 0 after every step.

    SGD over all parameters that require gradients, in train mode (so batch-norm statistics move), under a seed of its
    own. Afterwards the modes are as before and the gradients are None; parameters keep their identity.

    Args:
        model: to be trained; masked first.
        loader: batches, with a length unless ``steps`` is given; cycled. Its order is drawn under ``seed`` where it
            uses torch's global generator.
        masks: of ``model``.
        config: learning rate and the rest.
        loss_fn: ``loss_fn(model, batch) -> scalar``; ``None`` for the default loss.
        steps: optimizer steps, 0 for none; ``None`` for ``config.epochs`` passes over the loader.
        seed: of data order and dropout.
        progress: show a bar; ``None`` for only on a terminal.

    Returns:
        The loss of every step.

    Raises:
        ValueError: masks of another model, an empty loader, label smoothing with a ``loss_fn``, nothing to train.
        FloatingPointError: a loss that is not finite; the model is then as that step found it, as after any other error
            of a forward or backward pass. An interruption in the optimizer's step may leave a part of that step in the
            weights; the masks hold then, too.
    """
    check_loss_fn(loss_fn)
    check_label_smoothing(loss_fn, config)
    total = config.total_steps(loader) if steps is None else steps

    def descent(parameters: list[nn.Parameter]) -> tuple[Optimizer, LRScheduler]:
        sgd = torch.optim.SGD(
            parameters,
            config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )
        return sgd, torch.optim.lr_scheduler.CosineAnnealingLR(sgd, total)

    return train_masked(
        model,
        loader,
        masks,
        descent,
        total,
        lambda model, batch: _loss(model, loss_fn, batch, config.label_smoothing),
        clip_norm=config.clip_norm,
        seed=seed,
        progress=progress,
    )


Descent = Callable[[list[nn.Parameter]], tuple[Optimizer, LRScheduler]]


def train_masked(
    model: nn.Module,
    loader: Iterable[Any],
    masks: MaskSet,
    descent: Descent,
    total: int,
    loss_fn: LossFn,
    *,
    clip_norm: float | None = None,
    seed: int = 0,
    progress: bool | None = None,
    left: str = "the model keeps what the steps before have trained, masked",
) -> list[float]:
    """The loop of :func:`retrain`, with any optimizer and schedule.

    Removed weights are 0 after every step, and their gradients before it: they count neither in the norm of the
    gradient nor in the optimizer's state.

    Args:
        descent: makes the optimizer of these parameters and its schedule, which is stepped after it.
        total: optimizer steps, 0 for none.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        left: what an error leaves behind, in words.

    Returns:
        The loss of every step.

    Raises:
        ValueError, FloatingPointError: as for :func:`retrain`.
    """
    masks.apply_(model)
    if total == 0:
        return []
    parameters = trained_parameters(model)
    optimizer, schedule = descent(parameters)
    device = parameters[0].device
    modes = [(module, module.training) for module in model.modules()]
    losses: list[float] = []
    step = 0
    try:
        model.train()
        with (
            lock(),
            seeded(seed, device),
            masks.enforce(optimizer, model, strict=False) as enforcer,
            tqdm(total=total, desc="retrain", disable=None if progress is None else not progress) as bar,
        ):
            stream, buffers = BatchStream(loader, device, total, "steps of retraining"), Buffers(model)
            for step in range(1, total + 1):
                buffers.keep()
                try:
                    loss = loss_fn(model, stream.take(1)[0])
                    losses.append(float(loss.detach()))
                    if not math.isfinite(losses[-1]):
                        raise FloatingPointError(
                            f"loss_fn: wanted a finite loss, got {losses[-1]} in step {step} of {total} of retraining"
                        )
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    enforcer.mask_gradients_()
                    if clip_norm is not None:
                        nn.utils.clip_grad_norm_(parameters, clip_norm)
                except BaseException:
                    buffers.restore()  # a forward pass writes batch-norm statistics, also of a batch with NaN
                    raise
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
                bar.update()
    except BaseException as error:
        end_contexts(error)
        masks.apply_(model)  # a step that was left half-way has moved removed weights
        if hasattr(error, "add_note"):  # Python ≥ 3.11
            error.add_note(f"sfpk_kernels: in step {max(step, 1)} of {total} of retraining; {left}")
        raise
    finally:
        for parameter in parameters:
            parameter.grad = None
        for module, training in modes:
            module.training = training
    return losses


def _loss(model: nn.Module, loss_fn: LossFn | None, batch: Any, label_smoothing: float) -> Tensor:
    if loss_fn is not None:
        return loss_fn(model, batch)
    if label_smoothing == 0:
        return default_loss(model, batch)
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(b, Tensor) for b in batch)):
        raise TypeError(f"label_smoothing: wanted batches (x, y) of tensors, got {type(batch).__name__}")
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=label_smoothing)
