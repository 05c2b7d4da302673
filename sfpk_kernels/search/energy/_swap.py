"""Other tensors in the place of a model's parameters, for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def stand_ins(
    model: nn.Module,
    prunable: Mapping[int, Any],  # id of the parameter → what takes its place
) -> list[tuple[nn.Module, str, Any]]:
    """For every place a parameter is held in, tied ones included: module, name, and what stands in.

    A module under several names is one place: put in twice, what is put back would be the first stand-in.

    Parameters that are not prunable are stood in for by themselves without a gradient, so that none is computed.
    """
    others: dict[int, nn.Parameter] = {}
    places: list[tuple[nn.Module, str, Any]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            stand_in = prunable.get(id(parameter))
            if stand_in is None:
                if not parameter.requires_grad:
                    continue
                stand_in = others.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
            places.append((module, name, stand_in))
    return places


@contextmanager
def swapped(places: Sequence[tuple[nn.Module, str, nn.Parameter]]) -> Iterator[None]:
    """The model with the stand-ins; its own parameters, the very objects, are back at the end, also after errors."""
    own = [(module, name, module._parameters[name]) for module, name, _ in places]
    try:
        for module, name, stand_in in places:
            _put(module, name, stand_in)
        yield
    finally:
        for module, name, parameter in own:
            _put(module, name, parameter)


@contextmanager
def stood_in(places: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """As :func:`swapped` for tensors that are no parameters (those of vmap): straight into the modules' tables."""
    own = [(module, name, module._parameters[name]) for module, name, _ in places]
    try:
        for module, name, tensor in places:
            module._parameters[name] = tensor  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in own:
            module._parameters[name] = parameter


def _put(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    if type(module).__setattr__ is nn.Module.__setattr__:
        module._parameters[name] = parameter
    else:
        setattr(module, name, parameter)  # such as RNNs, which keep a list of their weights besides
