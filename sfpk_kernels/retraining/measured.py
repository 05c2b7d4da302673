"""What a repair or a fine-tune is judged by: the loss on given batches, and outputs to compare."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..masks.maskset import MaskSet
from ..modeling.batches import move_to
from ..modeling.state import guarded
from ..search.energy import LossFn


def check_mask(mask: Any, model: nn.Module, call: str) -> None:
    """That it is a set of masks which fit the model.

    Raises:
        TypeError: another thing, such as the loader.
        ValueError: the masks of another model.
    """
    if not isinstance(mask, MaskSet):
        raise TypeError(f"mask: wanted a MaskSet, got {type(mask).__name__}: the call is {call}")
    mask.check(model)


def held_batches(name: str, batches: Iterable[Any]) -> list[Any]:
    """All of them, in a list.

    Raises:
        TypeError, ValueError: no iterable, or an empty one; the message names the argument.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(f"{name}: wanted an iterable of batches or None, got {type(batches).__name__}")
    held = list(batches)
    if not held:
        raise ValueError(f"{name}: wanted batches or None, got an empty iterable")
    return held


@torch.no_grad()
def mean_loss(model: nn.Module, loss_fn: LossFn, batches: Sequence[Any], device: torch.device, bn: str) -> float:
    """The mean of the loss over the batches, in eval mode.

    Args:
        bn: ``"running"`` or ``"batch"``: which statistics batch-norm normalizes with.

    Raises:
        FloatingPointError: it is not finite.
    """
    with guarded(model, bn=bn, training=False):
        found = math.fsum(float(loss_fn(model, move_to(batch, device))) for batch in batches) / len(batches)
    if not math.isfinite(found):
        raise FloatingPointError(f"loss_fn: wanted a finite loss on the batches it is measured on, got {found}")
    return found


def tensor_of(output: Any) -> Tensor:
    """The tensor in a model's output: itself, its logits (or out, or last_hidden_state), or the first of several.

    Raises:
        TypeError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "out", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"model: wanted an output with a tensor, such as .logits, got {type(output).__name__}")
