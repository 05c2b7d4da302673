"""Masks and a model: whether they fit, and the removed weights set to 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..coordinates.flat import Coordinates, named_parameters
from .prefixes import Fit, fit

if TYPE_CHECKING:
    from .maskset import MaskSet


def check_fits(masks: MaskSet, model: nn.Module) -> None:
    """What :meth:`MaskSet.check` does."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: wanted an nn.Module, got {type(model).__name__}")
    parameters = named_parameters(model)
    handed_over = {id(p): n.removesuffix("_orig") for n, p in parameters.items() if n.endswith("_orig")}
    problems = []
    for name, shape in masks.shapes.items():
        parameter = parameters.get(name, parameters.get(f"{name}_orig"))
        pruned_as = handed_over.get(id(parameter))
        if parameter is None:
            problems.append(f"{name} is not in the model")
        elif pruned_as is not None:
            tied = "" if pruned_as == name else f", tied to {name},"
            problems.append(f"{pruned_as}{tied} is under torch.nn.utils.prune: call prune.remove first")
        elif tuple(parameter.shape) != shape:
            problems.append(f"{name} is {tuple(parameter.shape)} in the model, {shape} in the masks")
        elif parameter.is_meta:
            problems.append(f"{name} has no values here (meta device): it is offloaded, or not loaded yet")
    if problems:
        raise ValueError(
            f"model: wanted the model these masks were made for, got another: {_some(problems, '; ')}"
            f"{_unmasked(masks, model)}"
        )


@torch.no_grad()
def apply_masks_(masks: MaskSet, model: nn.Module) -> nn.Module:
    """What :meth:`MaskSet.apply_` does."""
    check_fits(masks, model)
    parameters = named_parameters(model)
    for name in masks:
        parameter = parameters[name]
        parameter.masked_fill_(~masks[name].to(parameter.device), 0)
    return model


@torch.no_grad()
def mask_state_dict_(masks: MaskSet, state: Mapping[str, Any]) -> Fit | None:
    """Set the removed weights of a state dict to exactly 0, in place: tied weights share it under all their names.

    Returns:
        By which prefix names of the masks and of the state dict differ; None where they are the same.

    Raises:
        ValueError: a mask of a name that is not there, or in another shape, or masks that fit several parts; nothing is
            written then.
    """
    found = fit(masks.shapes, {name: value for name, value in state.items() if isinstance(value, Tensor)}, "state")
    names = {name: name for name in masks} if found is None else found.names
    for name, shape in masks.shapes.items():
        value = state.get(names[name])
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"state: wanted {name} in shape {shape}, got {'nothing of that name' if value is None else got}"
            )
    for name in masks:
        state[names[name]].masked_fill_(~masks[name], 0)
    return found


def _unmasked(masks: MaskSet, model: nn.Module) -> str:
    """For the message: what could be pruned in the model but has no mask."""
    try:
        tensors = Coordinates(model).tensors
    except ValueError:
        return ""
    extra = [tensor.name for tensor in tensors if not {tensor.name, *tensor.aliases} & set(masks)]
    return f"; prunable but without a mask: {_some(extra, ', ')}" if extra else ""


def _some(items: list[str], separator: str) -> str:
    more = f" (and {len(items) - 5} more)" if len(items) > 5 else ""
    return separator.join(items[:5]) + more
