"""Optimizers followed: the ones inside others, what is done after their methods, the names of their parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn


class Followed:
    """A method of an object with something done after it, until :meth:`remove`; copies of the object have it plain."""

    def __init__(
        self,
        holder: Any,
        name: str,
        arguments: Callable[[tuple[Any, ...], dict[str, Any]], tuple[Any, Any]] | None,
        after: Callable[[Any, str], None],
    ):
        before = getattr(holder, name)
        self._holder, self._name, self._active = holder, name, True
        self._own = vars(holder).get(name)  # where something else has put itself before the method, such as a scheduler

        def method(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not holder:
                return getattr(type(this), name)(this, *args, **kwargs)
            if self._active and arguments is not None:
                args, kwargs = arguments(args, kwargs)
            value = before(*args, **kwargs)
            if self._active:
                after(holder, name)
            return value

        functools.update_wrapper(method, before)
        method.__name__ = name  # by which copies and pickles find the plain method
        self._method = MethodType(method, holder)
        setattr(holder, name, self._method)

    def remove(self) -> None:
        """The method as it was; where something has put itself before it meanwhile, it stays and does nothing."""
        self._active = False
        if vars(self._holder).get(self._name) is self._method:
            if self._own is None:
                delattr(self._holder, self._name)
            else:
                setattr(self._holder, self._name, self._own)


def all_inside(optimizer: Any) -> list[Any]:
    """An optimizer and those it holds, however deep: around another one (accelerate's, Lookahead), or of several."""
    found: list[Any] = []
    waiting = [optimizer]
    while waiting:
        one = waiting.pop(0)
        if any(one is other for other in found):
            continue
        held: list[Any] = []
        if hasattr(one, "__dict__"):
            for value in vars(one).values():
                held += value if isinstance(value, list | tuple) else value.values() if _is_dict(value) else [value]
        inside = [other for other in held if isinstance(other, torch.optim.Optimizer)]
        if isinstance(one, torch.optim.Optimizer) or (inside and callable(getattr(one, "step", None))):
            found.append(one)
            waiting += inside
    return [one for one in found if isinstance(getattr(one, "param_groups", None), list)]


def _is_dict(value: Any) -> bool:
    return type(value) is dict and len(value) < 1_000  # optimizer state is a defaultdict


def has_hooks(optimizer: Any) -> bool:
    """Whether its steps call hooks: not those of wrappers that were never set up as optimizers."""
    return hasattr(optimizer, "_optimizer_step_post_hooks") and bool(getattr(type(optimizer).step, "hooked", False))


def names_of(optimizer: Any) -> dict[str, nn.Parameter]:
    """The parameters of an optimizer that was made from ``model.named_parameters()``."""
    named: dict[str, nn.Parameter] = {}
    for group in optimizer.param_groups:
        if "param_names" not in group:
            raise ValueError(
                "optimizer: its parameters have no names: pass the model too, enforce(optimizer, model), "
                "or make the optimizer from model.named_parameters()"
            )
        named.update(zip(group["param_names"], group["params"], strict=True))
    return named
