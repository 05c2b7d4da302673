"""Exported models back from their files: all or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..coordinates.flat import unwrapped
from ..modeling.state import autograd_allowed
from ..structure import ShrinkRecipe
from .dense_files import read_dense
from .packed_files import PACKED
from .packed_reading import PackedFile, load_packed
from .shrunk_files import recipe_in


@autograd_allowed()
def load_exported(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read a file of :func:`~sfpk_kernels.export` into a model, in place: of any kind but ``"masks"``.

    The model is returned. ``safetensors.torch.load_model`` reads dense files, too, but for models with sparse buffers,
    or with one batch-norm layer under several names.

    Args:
        model: of the structure that was exported, such as the dense model; its tensors may lie on any device. By a file
            of ``kind="shrunk"`` a dense model becomes the shrunk one: its parameters and buffers are others then, so
            optimizers are made afterwards. One that is as small already gets the values alone.
        path: the file.

    A packed file is checked first and then read tensor by tensor into the model's own memory; an interruption waits
    until that is done.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: a packed file whose tensors could not all be written into the model, such as for want of memory.
        ValueError: no such safetensors file, or one of another model: the message names what differs. The model is as
            it was then.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: wanted an exported model, got {os.fspath(path)!r}, which is no file")
    model = unwrapped(model)
    with ExitStack() as opened:
        try:
            file = opened.enter_context(safe_open(os.fspath(path), framework="pt"))
            packed = PackedFile(file) if PACKED in (file.metadata() or {}) else None
            if packed is None:
                state, metadata = read_dense(path)
                recipe = recipe_in(metadata, state)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"path: wanted an exported model, got {os.fspath(path)!r}, which is damaged: {error}"
            ) from error
        if packed is not None:
            _check(model, packed.tensors)
            load_packed(model, packed)
            return model
    if recipe is None or _is_shrunk(model, recipe):
        _check(model, state)
        model.load_state_dict(state)
        return model
    smaller = recipe.shrink(model)  # apart from the model, which changes only once everything fits
    _check(smaller, state)
    smaller.load_state_dict(state)
    recipe.move(smaller, model)
    return model


def _is_shrunk(model: nn.Module, recipe: ShrinkRecipe) -> bool:
    try:
        return recipe.state_of(model) == "shrunk"
    except ValueError as error:
        words = str(error).removeprefix("model: ")
        raise ValueError(
            f"path: wanted a file of this {type(model).__name__}, got one of another model: {words}"
        ) from error


def _check(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """That the file is one of this model.

    Raises:
        ValueError: what differs.
    """
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    other = sorted(
        f"{name} {tuple(state[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape or state[name].layout != wanted[name].layout
    )
    differing = [
        f"{what} {', '.join(names[:5])}"
        for what, names in (("no", missing), ("also", unknown), ("other shapes or layouts:", other))
        if names
    ]
    if differing:
        raise ValueError(
            f"path: wanted the tensors of this {type(model).__name__}, got a file with {'; '.join(differing)}"
        )
