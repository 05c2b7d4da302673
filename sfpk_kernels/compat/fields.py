"""Fields of both classes of settings in one call, as the compatible interfaces take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..execution import EXECUTION_FIELDS, Execution


def separated(fields: Mapping[str, Any]) -> tuple[dict[str, Any], Execution]:
    """Fields of :class:`SFPKConfig`, and the :class:`Execution` that the others make.

    ``memory`` ("fast", "lean"), the earlier word for ``update``, is understood.

    Raises:
        TypeError, ValueError: a value that a field does not take.
    """
    method = dict(fields)
    execution = Execution(**{name: method.pop(name) for name in EXECUTION_FIELDS if name in method})
    memory = method.pop("memory", None)
    if memory not in (None, "auto", "fast", "lean"):
        raise ValueError(f"memory: wanted one of 'auto', 'fast', 'lean', got {memory!r}")
    if memory is not None:
        method.setdefault("update", "gauss_seidel" if memory == "lean" else "jacobi")
    return method, execution


def renamed(message: str, names: Mapping[str, str]) -> str:
    """The message with the argument's name of this function."""
    field, colon, rest = message.partition(":")
    return next((name for name, of in names.items() if of == field), field) + colon + rest
