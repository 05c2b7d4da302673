"""A written file, read back into a copy of the model and compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..masks.maskset import MaskSet
from ..utils.tensors import is_sparse, parts
from .loading import load_exported
from .measure import Forward, run


def verify_file(
    pruned: nn.Module, model: nn.Module, masks: MaskSet | None, path: Path, batch: Any, forward_fn: Forward
) -> str:
    """Read the file back into a copy of ``model`` and compare with ``pruned``; says what was compared.

    ``masks``: those that the file holds; None for one that holds a model.
    """
    again = copy_of(model, "verify=False writes it without reading it back")
    if masks is None:
        _wipe(again)
        load_exported(again, path)
    else:
        loaded = MaskSet.load(path)
        if loaded != masks:
            raise RuntimeError(f"export: verify: masks read back from {path.parent} differ from those written")
        loaded.apply_(again)
    written, read = pruned.state_dict(), again.state_dict()
    tensors = {name: value for name, value in written.items() if isinstance(value, Tensor)}
    differing = [name for name, value in tensors.items() if not _equal(value, read.get(name))]
    if differing or written.keys() != read.keys():
        raise RuntimeError(f"export: verify: what was read back differs in {', '.join(differing[:5]) or 'its names'}")
    if batch is None:
        return "every tensor, exactly"
    first, second = (tensors_of(run(each, batch, forward_fn)) for each in (pruned, again))
    if not first:
        raise RuntimeError("export: verify: the output on the example holds no tensor to compare; pass forward_fn")
    if len(first) != len(second) or not all(map(_equal, first, second)):
        raise RuntimeError("export: verify: the outputs on the example differ after reading back")
    return "every tensor, and the outputs on the example, exactly"


@torch.no_grad()
def _wipe(model: nn.Module) -> None:
    """No value of the state dict survives, so that one that is not read back shows."""
    for value in model.state_dict().values():
        if isinstance(value, Tensor):
            value = parts(value)["values"] if is_sparse(value) else value
            value.fill_(float("nan") if value.is_floating_point() or value.is_complex() else 0)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.layout == b.layout
        if same and is_sparse(a):
            return all(map(_equal, parts(a).values(), parts(b).values()))
        return same and bool(((a == b) | ((a != a) & (b != b))).all())
    return bool(a == b)


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in a model's output, in its order."""
    if isinstance(output, Mapping):  # model outputs of Hugging Face among them
        output = dict(output)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def copy_of(model: nn.Module, cure: str, who: str = "export") -> nn.Module:
    """A deep copy, for the function ``who``.

    Raises:
        RuntimeError: it cannot be copied; the message ends with the cure.
    """
    # Of compressed sparse tensors torch makes no deep copy.
    known: dict[int, Any] = {id(t): t.clone() for t in model.buffers() if is_sparse(t)}
    try:
        return copy.deepcopy(model, known)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"{who}: the model cannot be copied ({reason}): {cure}") from error
