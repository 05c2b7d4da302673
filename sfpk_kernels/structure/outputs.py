"""What goes into a model and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in an output, in containers and dataclasses; not those of a cache of keys and values."""
    found: list[Tensor] = []
    for one in _pytree.tree_leaves(value, is_leaf=lambda one: type(one).__name__.endswith("Cache")):
        if isinstance(one, Tensor):
            found.append(one)
        elif dataclasses.is_dataclass(one) and not isinstance(one, type):
            found += tensors_in(list(vars(one).values()))
    return found


def called(model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The output for copies of the inputs: a model may write into what it is given."""
    args, kwargs = _pytree.tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, (args, kwargs))
    return model(*args, **kwargs)


def reached(functions: Iterable[Any]) -> set[Any]:
    """These nodes of autograd's graph, and all before them."""
    found, waiting = set(functions), list(functions)
    while waiting:
        for function, _ in waiting.pop().next_functions:
            if function is not None and function not in found:
                found.add(function)
                waiting.append(function)
    return found


def leaf(value: Any) -> Any:
    """A copy of an input that autograd follows, where it can."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone()
    return value.requires_grad_() if value.is_floating_point() else value
