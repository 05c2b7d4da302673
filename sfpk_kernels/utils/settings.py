"""Frozen dataclasses of settings: each field says once what it means and what it takes.

The checks, the docstring's ``Args:``, the options of the command and the words of the report are all made from that.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .ranges import Ranges, check_ranges

RANGES = "Mapping[str, tuple[float, float]]"  # as the type of a field is written
_Class = TypeVar("_Class", bound=type)
_Self = TypeVar("_Self", bound="Settings")


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What a field means and takes."""

    words: str  # as in a docstring
    choices: tuple[str | None, ...] | None = None
    least: int | None = None  # of an integer
    wanted: str = ""  # of a number: its range in words; of a pair: what it is
    accepts: Callable[[Any], bool] | None = None  # the same range

    @property
    def plain(self) -> str:
        """The words without markup."""
        return self.words.replace("``", "")


def setting(default: Any, words: str, **what: Any) -> Any:
    """A field: its default (``dataclasses.MISSING`` for none), its meaning, and what :class:`Meaning` says of it."""
    return dataclasses.field(default=default, metadata={"meaning": Meaning(words, **what)})


def described(cls: _Class) -> _Class:
    """Add the fields' meanings to the docstring (which ``python -OO`` has none of)."""
    if cls.__doc__ is not None:
        lines = "".join(f"\n    {name}: {meaning.words}" for name, meaning in meanings(cls).items())
        cls.__doc__ = (
            f"{inspect.cleandoc(cls.__doc__)}\n\nArgs:{lines}\n\nRaises:\n"
            "    TypeError: a value of the wrong type, or an unknown field.\n"
            "    ValueError: a value out of its range; the message names the field.\n"
        )
    return cls


def meanings(cls: type) -> dict[str, Meaning]:
    """What every field means, by name."""
    return {field.name: meaning_of(field) for field in dataclasses.fields(cls)}


def meaning_of(field: dataclasses.Field[Any]) -> Meaning:
    """What one field means."""
    meaning: Meaning = field.metadata["meaning"]
    return meaning


def kind_of(field: dataclasses.Field[Any]) -> tuple[type, bool]:
    """A field's type, and whether it may be None."""
    written = str(field.type)
    kinds: dict[str, type] = {"int": int, "float": float, "str": str, "bool": bool}
    kinds |= {"tuple[int, int]": tuple, RANGES: Ranges}
    return kinds[written.removesuffix(" | None")], written.endswith("| None")


class Settings:
    """What the classes of settings share."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            checked = _checked(field.name, value, *kind_of(field), meaning_of(field))
            object.__setattr__(self, field.name, checked)

    def replace(self: _Self, **changes: Any) -> _Self:
        """A copy with some fields changed, checked again."""
        return type(self)(**{**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, booleans, pairs of numbers, dicts of such pairs and None by field name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {name: dict(value) if isinstance(value, Ranges) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls: type[_Self], values: Mapping[str, Any]) -> _Self:
        """The inverse of :meth:`to_dict`; unknown names are an error, missing ones take their default."""
        return cls(**values)

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls: type[_Self], text: str) -> _Self:
        """The inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))


def known_fields(cls: type, given: Mapping[str, Any], elsewhere: Mapping[str, str]) -> None:
    """Refuse names that are no field of ``cls``.

    Args:
        cls: a class of settings.
        given: values by name.
        elsewhere: where names that one may look for here are instead.

    Raises:
        TypeError: another name; the message says which are known, or where it is.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = [name for name in given if name not in known]
    for name in unknown:
        if name in elsewhere:
            raise TypeError(f"{name}: wanted as {elsewhere[name]}, got it as a field of {cls.__name__}")
    if unknown:
        raise TypeError(
            f"{cls.__name__}: unknown field {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}"
        )


def _checked(name: str, value: Any, kind: type, optional: bool, meaning: Meaning) -> Any:
    if value is None and optional:
        return None
    if meaning.choices is not None:
        _one_of(name, value, meaning.choices)
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError(f"{name}: wanted a bool, got {value!r}")
        return value
    if kind is Ranges:
        return check_ranges(name, value)
    if kind is tuple:
        return _pair(name, value, meaning)
    wanted = f"an integer ≥ {meaning.least}" if kind is int else f"a number {meaning.wanted}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
        raise TypeError(f"{name}: wanted {wanted}, got {value!r}")
    number: float = kind(value)
    high_enough = meaning.least is None or number >= meaning.least
    if not (math.isfinite(number) and high_enough and (meaning.accepts is None or meaning.accepts(number))):
        raise ValueError(f"{name}: wanted {wanted}, got {value!r}")
    return number


def _pair(name: str, value: Any, meaning: Meaning) -> tuple[int, int]:
    """A pair as files and callers give it."""
    if not isinstance(value, tuple | list) or not all(type(number) is int for number in value):
        raise TypeError(f"{name}: wanted {meaning.wanted}, got {value!r}")
    if meaning.accepts is not None and not meaning.accepts(value):
        raise ValueError(f"{name}: wanted {meaning.wanted}, got {value!r}")
    first, second = value
    return first, second


def _one_of(name: str, value: Any, choices: Sequence[str | None]) -> None:
    if not isinstance(value, str) or value not in choices:
        wanted = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: wanted one of {wanted}, got {value!r}")
