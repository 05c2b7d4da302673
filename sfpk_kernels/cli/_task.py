"""``package.module:task``: a function that returns what is to be pruned, and how."""

from __future__ import annotations

import difflib
import importlib
import inspect
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..utils.arguments import check_loader, check_loss_fn

WANTED = "a function without arguments that returns (model, loss_fn, loader) or (model, loss_fn, loader, eval_fn)"


class WrongTask(ValueError):
    """The task is not what was wanted."""


class Task(NamedTuple):
    """What the function returned."""

    model: nn.Module
    loss_fn: Callable[..., Any] | None
    loader: Iterable[Any]
    eval_fn: Callable[[nn.Module], Any] | None = None  # a number, or numbers by name

    def evaluate(self) -> float | dict[str, float] | None:
        """What eval_fn says of the model as it is now.

        Raises:
            TypeError: neither a number nor a dict of numbers.
        """
        if self.eval_fn is None:
            return None
        value = self.eval_fn(self.model)
        if isinstance(value, Mapping):
            return {str(name): _number(part) for name, part in value.items()}
        return _number(value)


def find_task(name: str) -> Callable[[], Any]:
    """Import a function by ``package.module:function``; modules of the current folder are found.

    Raises:
        WrongTask: there is none that can be called without arguments.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise WrongTask(f"wanted package.module:function, got {name!r}")
    if os.sep in module_name or module_name.endswith(".py"):
        dotted = ".".join(Path(module_name.removesuffix(".py")).parts)
        raise WrongTask(f"wanted a module's name, got the path {module_name!r}: try {dotted}:{function_name}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            raise WrongTask(f"wanted a module that can be imported from here, got {module_name!r}: {error}") from error
        raise WrongTask(f"{module_name!r} cannot be imported: {error}{place(error)}") from error
    except Exception as error:
        raise WrongTask(f"{module_name!r} cannot be imported: {type(error).__name__}: {error}{place(error)}") from error
    function = getattr(module, function_name, None)
    if function is None:
        own = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        near = difflib.get_close_matches(function_name, own)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise WrongTask(f"wanted a function of {module_name}, got {function_name!r}, which it does not have{hint}")
    if not callable(function):
        raise WrongTask(f"wanted {WANTED}, got {name}, a {type(function).__name__}")
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise WrongTask(f"wanted {WANTED}, got {name}: {error}") from error
    except ValueError:
        pass  # some builtins have no signature
    return function


def call_task(function: Callable[[], Any]) -> Task:
    """Call it and look at what it returns.

    Raises:
        WrongTask: something else than wanted. Errors inside the function pass through.
    """
    given = function()
    if not isinstance(given, tuple) or len(given) not in (3, 4):
        got = f"a tuple of {len(given)}" if isinstance(given, tuple) else type(given).__name__
        raise WrongTask(f"wanted {WANTED}, got one that returns {got}")
    task = Task(*given)
    for part, wanted, right in (
        ("model", "an nn.Module", isinstance(task.model, nn.Module)),
        ("loss_fn", "a function (model, batch) -> scalar or None", task.loss_fn is None or callable(task.loss_fn)),
        ("loader", "an iterable of batches", isinstance(task.loader, Iterable)),
        ("eval_fn", "a function of the model or None", task.eval_fn is None or callable(task.eval_fn)),
    ):
        if not right:
            raise WrongTask(f"{part}: wanted {wanted}, got {type(getattr(task, part)).__name__}")
    try:
        check_loss_fn(task.loss_fn)
        check_loader(task.loader)
    except TypeError as error:
        raise WrongTask(str(error)) from error
    return task


def place(error: BaseException) -> str:
    """Where it was raised, as a line of its own."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"\n  at {error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen ")]
    return f"\n  at {frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}" if frames else ""


def _number(value: Any) -> float:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"eval_fn: wanted a number or a dict of numbers, got {type(value).__name__}")
    return float(value)
