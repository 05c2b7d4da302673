"""A shrunk model's file: its state dict, and beside it the recipe by which a dense model becomes as small."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..structure import ShrinkRecipe
from .dense_files import save_dense
from .digest import digest_of

_KEY = "sfpk_shrunk"  # of the metadata


def save_shrunk(smaller: nn.Module, recipe: ShrinkRecipe, path: Path, facts: Mapping[str, str]) -> None:
    """Write the state dict as :func:`save_dense` does, the recipe and a digest of both in the metadata."""
    text = json.dumps(recipe.to_dict(), separators=(",", ":"))
    digest = digest_of(text, sorted(smaller.state_dict().items()))
    save_dense(smaller, path, {**facts, _KEY: json.dumps({"recipe": text, "digest": digest})})


def recipe_in(metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> ShrinkRecipe | None:
    """The recipe of a file that was read; None for a dense model's.

    Raises:
        KeyError, TypeError, ValueError: a damaged one, or tensors that are not those that were written.
    """
    if _KEY not in metadata:
        return None
    found = json.loads(metadata[_KEY])
    if digest_of(found["recipe"], sorted(state.items())) != found["digest"]:
        raise ValueError("its recipe or tensors are not those that were written")
    return ShrinkRecipe.from_dict(json.loads(found["recipe"]))


def recipe_of(given: Any) -> ShrinkRecipe:
    """The recipe in what was given: itself, or that of a result.

    Raises:
        TypeError: nothing that has one; a result over single weights is no such thing.
    """
    wanted = "recipe: wanted the result of a run with granularity 'channel', 'head', 'neuron' or 'group', or a recipe"
    if isinstance(given, ShrinkRecipe):
        return given
    found = getattr(given, "recipe", None)
    found = found() if callable(found) else found
    if isinstance(found, ShrinkRecipe):
        return found
    granularity = getattr(getattr(given, "config", None), "granularity", None)
    got = type(given).__name__ if granularity is None else f"{type(given).__name__} of granularity {granularity!r}"
    raise TypeError(f"{wanted}, got {got}: zeros among single weights leave tensors as large, kind='dense' writes them")
