"""What a model returns, as a list of tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in an output: of containers, dataclasses and objects alike."""
    found: list[Tensor] = []
    for one in _pytree.tree_leaves(value):
        if isinstance(one, Tensor):
            found.append(one)
        elif hasattr(one, "__dict__") and not isinstance(one, nn.Module | type):
            found += tensors_in(list(vars(one).values()))
    return found
