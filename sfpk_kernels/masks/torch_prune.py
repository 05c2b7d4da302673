"""Masks handed over to torch.nn.utils.prune."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.utils import prune

from ..coordinates.flat import named_parameters

if TYPE_CHECKING:
    from .maskset import MaskSet


def to_torch_prune(masks: MaskSet, model: nn.Module) -> nn.Module:
    """What :meth:`MaskSet.to_torch_prune` does."""
    masks.check(model)
    parameters = named_parameters(model)
    names = {id(parameters[name]): name for name in masks}
    uses = [
        (module, local, names[id(parameter)])
        for module in model.modules()
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in names
    ]
    for module, local, name in uses:
        prune.custom_from_mask(module, local, masks[name].to(parameters[name].device))
    return model
