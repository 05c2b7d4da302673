"""Entries of ``ignored_layers`` and ``include``: which parameters of a model each of them means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

Ignored = str | type[nn.Module] | nn.Module | Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True)
class Entry:
    """One entry, and what it means in a model."""

    label: str  # for messages
    names: tuple[str, ...]  # full names of parameters, in the model's order
    wanted: tuple[str, ...]  # of them, where all of a module is meant, those of two dimensions and more


def entries_of(model: nn.Module, entries: Iterable[Ignored], argument: str) -> list[Entry]:
    """What every entry covers.

    Args:
        model: without wrappers.
        entries: module instances or types, names of modules or parameters, ``"re:PATTERN"``, matched from the start of
            parameter names, functions of name and parameter.
        argument: for messages.

    Raises:
        TypeError: no list, or an entry of another type.
        ValueError: a pattern that is none, an entry that covers no parameter (a type may).
    """
    if isinstance(entries, str | nn.Module | type) or not isinstance(entries, Iterable):
        raise TypeError(f"{argument}: wanted a list, got {entries!r:.80}: put it in a list")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [_entry(model, parameters, entry, argument) for entry in entries]


def ignored_names(model: nn.Module, ignored_layers: Iterable[Ignored]) -> dict[str, str]:
    """Full parameter name → the entry of ignored_layers that covers it.

    Raises:
        TypeError, ValueError: entries as in :func:`entries_of`.
    """
    found = entries_of(model, ignored_layers, "ignored_layers")
    return {name: entry.label for entry in found for name in entry.names}


def _entry(model: nn.Module, parameters: dict[str, nn.Parameter], entry: Ignored, argument: str) -> Entry:
    may_be_empty = whole = False
    if isinstance(entry, str) and entry.startswith("re:"):
        try:
            pattern = re.compile(entry.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"{argument}: wanted a valid pattern, got {entry!r}: {error}") from error
        label, names = entry, tuple(name for name in parameters if pattern.match(name))
    elif isinstance(entry, str):
        names = tuple(name for name in parameters if name == entry or name.startswith(f"{entry}."))
        label, whole = entry, entry not in parameters
    elif isinstance(entry, nn.Module) or (isinstance(entry, type) and issubclass(entry, nn.Module)):
        inside = [
            prefix
            for prefix, module in model.named_modules(remove_duplicate=False)
            if (isinstance(module, entry) if isinstance(entry, type) else module is entry)
        ]
        kind = entry if isinstance(entry, type) else type(entry)
        label = kind.__name__ if isinstance(entry, type) or not inside or not inside[0] else inside[0]
        names = tuple(name for name in parameters if any(p == "" or name.startswith(f"{p}.") for p in inside))
        whole = True
        may_be_empty = isinstance(entry, type) or bool(inside)  # a type may match nothing, a module without weights too
    elif callable(entry) and not isinstance(entry, type):
        label = getattr(entry, "__name__", type(entry).__name__)
        names = tuple(name for name, one in parameters.items() if entry(name, one))
    else:
        raise TypeError(f"{argument}: wanted modules, module types, names or functions, got {entry!r}")
    if not names and not may_be_empty:
        raise ValueError(f"{argument}: {entry!r:.80} matches no parameter of the model")
    matrices = tuple(name for name in names if parameters[name].dim() > 1)
    return Entry(label, names, matrices if whole else names)
