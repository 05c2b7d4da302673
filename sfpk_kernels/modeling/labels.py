"""Cross-entropy of logits and labels, where it means something; in words, where it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_INSTEAD = "pass loss_fn=lambda model, batch: "
_REGRESSION = f"for regression {_INSTEAD}F.mse_loss(model(batch[0]), batch[1])"
_BINARY = "F.binary_cross_entropy_with_logits"
_CLASSES = "F.cross_entropy(model(batch[0]), batch[1]"  # and what is done to them, and a bracket


def label_loss(
    output: Tensor,  # (N, C, …) or (C,)
    y: Tensor,  # class numbers (N, …), or distributions in the shape of the output
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of logits and labels, where it can be computed of them.

    Raises:
        TypeError, ValueError: as ``default_loss``, which says what is looked at.
    """
    _check_labels(output, y)
    try:
        return F.cross_entropy(output, y, label_smoothing=label_smoothing)
    except IndexError as error:  # the CPU's word for a class that is not there
        classes = output.shape[1 if output.dim() > 1 else 0]
        raise ValueError(
            f"loss_fn: the default loss wants class numbers 0 … {classes - 1} for {classes} outputs, got "
            f"{int(y.min())} … {int(y.max())}: number the classes from 0, or pass loss_fn(model, batch)"
        ) from error


def _check_labels(output: Tensor, y: Tensor) -> None:
    """That cross-entropy of the two means something."""
    found = f"outputs {tuple(output.shape)} and targets {tuple(y.shape)} of {str(y.dtype).removeprefix('torch.')}"
    floats = y.is_floating_point()
    if y.is_complex() or y.dtype == torch.bool:
        several = y.shape == output.shape
        instead = f"{_BINARY}(model(batch[0]), batch[1].float())" if several else f"{_CLASSES}.long())"
        raise TypeError(
            f"loss_fn: the default loss, cross-entropy, wants class numbers or distributions, got {found}: "
            f"{_INSTEAD}{instead}"
        )
    one_each = output.dim() == 0 or (output.dim() == 1 and y.dim() == 1)  # one number for every sample
    if one_each or output.shape[1 if output.dim() > 1 else 0] == 1:
        # Flat: (N, 1) and (N,) would be broadcast to (N, N).
        flat = f"(model(batch[0]).flatten(), batch[1].flatten(){'' if floats else '.float()'})"
        raise ValueError(
            "loss_fn: the default loss, cross-entropy, wants one output for each of two classes or more, got "
            f"{found}: for regression {_INSTEAD}F.mse_loss{flat}, for two classes "
            f"loss_fn=lambda model, batch: {_BINARY}{flat}"
        )
    numbers = (*output.shape[:1], *output.shape[2:]) if output.dim() > 1 else ()
    if floats:
        if y.shape == output.shape:
            if _readable(y):
                _check_distributions(y, found)
            return
        if tuple(y.shape) != numbers:
            raise ValueError(_shapes(found, output))
        raise ValueError(
            f"loss_fn: the default loss, cross-entropy, wants class numbers as integers, got {found}: if they are "
            f"classes {_INSTEAD}{_CLASSES}.long()); {_REGRESSION}, in shapes that agree"
        )
    if tuple(y.shape) != numbers:
        if y.shape == output.shape:  # rows of 0 and 1
            raise ValueError(
                f"loss_fn: the default loss, cross-entropy, wants class numbers, got {found}: for one label each "
                f"{_INSTEAD}{_CLASSES}.argmax(1)), for several "
                f"loss_fn=lambda model, batch: {_BINARY}(model(batch[0]), batch[1].float())"
            )
        raise ValueError(_shapes(found, output))


def _shapes(found: str, output: Tensor) -> str:
    if output.dim() > 2:
        instead = (
            f"with the classes in the last dimension {_INSTEAD}"
            f"F.cross_entropy(model(batch[0]).flatten(0, {output.dim() - 2}), batch[1].flatten())"
        )
    else:
        instead = f"{_INSTEAD}F.cross_entropy(model(batch[0]), batch[1].flatten())"
    return (
        "loss_fn: the default loss, cross-entropy, wants outputs (samples, classes, …) and a class number for each "
        f"(samples, …), got {found}: {instead}; {_REGRESSION}, in shapes that agree"
    )


def check_targets(batch: Any) -> None:
    """That float targets of a batch (x, y) are distributions, on any device: for a first batch, whose reading may wait.

    Raises:
        ValueError: they are not.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        y = batch[1]
        if y.is_floating_point() and y.dim() > 1 and y.numel() and y.layout == torch.strided:
            _check_distributions(y, f"targets {tuple(y.shape)} of {str(y.dtype).removeprefix('torch.')}")


def _check_distributions(y: Tensor, found: str) -> None:
    y = y.detach()
    rows = y.sum(1 if y.dim() > 1 else 0, dtype=torch.float64)
    # 1e-2: distributions in bf16, of many classes.
    if not bool(((y >= 0).all() & ((rows - 1).abs() <= 1e-2).all()).item()):
        raise ValueError(
            "loss_fn: the default loss, cross-entropy, wants float targets that are distributions over the classes "
            f"(not negative, adding up to 1), got others, {found}: {_REGRESSION}, for several labels each "
            f"loss_fn=lambda model, batch: {_BINARY}(model(batch[0]), batch[1])"
        )


def _readable(y: Tensor) -> bool:
    """Whether the host can read values here without waiting for a device, or ending a trace."""
    plain = type(y) in (Tensor, nn.Parameter) and y.device.type == "cpu" and y.layout == torch.strided
    return plain and y.numel() > 0 and not torch.compiler.is_compiling() and not _in_functorch(y)


def _in_functorch(y: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(y))
