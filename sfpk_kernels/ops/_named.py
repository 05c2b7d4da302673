"""The arguments of a registered op by the names in its schema, so that no implementation spells the list again."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch

# What stands in a schema for what stands in an annotation.
_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "float | None": "float?",
    "int": "SymInt",
    "str": "str",
}


def schema_of(fields: Any) -> str:
    """The fields of a NamedTuple class, whose module has postponed annotations, as arguments of a schema, in order."""
    types = {name: getattr(hint, "__forward_arg__", hint) for name, hint in fields.__annotations__.items()}
    return ", ".join(f"{_SCHEMA_TYPES[types[name]]} {name}" for name in fields._fields)


def argument_names(op: str) -> tuple[str, ...]:
    """The names of the arguments of a defined op ``"sfpk::name"``, in the order of its schema."""
    return tuple(argument.name for argument in _schema(op).arguments)


def argument_tuple(op: str) -> Any:
    """The class of named tuples of an op's arguments, in the order of its schema, with its defaults."""
    arguments = _schema(op).arguments
    # The dispatcher leaves out trailing arguments that have their default value.
    defaults = [argument.default_value for argument in arguments if argument.has_default_value()]
    make: Any = namedtuple  # whose fields a type checker wants literal
    return make("Arguments", argument_names(op), defaults=defaults)


def by_name(op: str, function: Callable[[Any], Any]) -> Callable[..., Any]:
    """``function`` of one value, whose attributes are the arguments of ``op``, called with the arguments themselves.

    The value is a named tuple in the order of the schema. ``op`` ("sfpk::name") must be defined; what comes back is
    what ``torch.library.impl`` and ``torch.library.register_fake`` take.
    """
    bind = argument_tuple(op)

    def call(*values: Any, **named: Any) -> Any:
        return function(bind(*values, **named))

    return call


def register(op: str, function: Callable[[Any], Any], fake: Callable[[Any], Any]) -> None:
    """``op`` is ``function`` on the CPU and on CUDA, ``fake`` on fake tensors; both called as in :func:`by_name`."""
    torch.library.impl(op, ("cpu", "cuda"))(by_name(op, function))
    torch.library.register_fake(op)(by_name(op, fake))


def _schema(op: str) -> Any:
    namespace, _, name = op.partition("::")
    return getattr(getattr(torch.ops, namespace), name).default._schema
