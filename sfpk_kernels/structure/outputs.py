"""What goes into a model and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
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
