"""Arguments that were swapped, or are nearly what was wanted: said before anything runs."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

_Call = TypeVar("_Call", bound=Callable[..., Any])

_ORDER = "the call is prune(model, loader, sparsity, loss_fn=…)"
_OUTPUTS = {
    "input", "inputs", "output", "outputs", "out", "o", "pred", "preds", "prediction", "predictions", "p", "logits",
    "logit", "scores", "score", "y_pred", "y_hat", "yhat", "y_predicted", "x", "x1", "estimate", "log_probs",
}  # fmt: skip
_TARGETS = {
    "target", "targets", "label", "labels", "y", "t", "y_true", "ytrue", "true", "truth", "gt", "gold", "expected",
    "reference", "x2", "tgt", "answer", "answers",
}  # fmt: skip


def called(call: str, **renamed: str) -> Callable[[_Call], _Call]:
    """Have calls in the order of earlier versions, or with their names, told how it is called now.

    Args:
        call: as in "prune(model, loader, sparsity, loss_fn=…)".
        renamed: keywords of earlier versions, or that belong into another argument, and what they are here.
    """

    def decorate(function: _Call) -> _Call:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        most = sum(parameter.kind in kinds for parameter in inspect.signature(function).parameters.values())

        @functools.wraps(function)
        def checked(*arguments: Any, **keywords: Any) -> Any:
            if len(arguments) > most:
                own = most - (1 if "self" in inspect.signature(function).parameters else 0)
                got = len(arguments) - (most - own)
                raise TypeError(f"wanted {call}, with at most {own} arguments without a name, got {got}")
            for name in keywords.keys() & renamed.keys():
                raise TypeError(f"{name}: wanted {renamed[name]}; the call is {call}")
            return function(*arguments, **keywords)

        return checked  # type: ignore[return-value]

    return decorate


def check_loss_fn(loss_fn: Any) -> None:
    """That it can be called as ``loss_fn(model, batch)``, or is None.

    Raises:
        TypeError: it cannot, or looks like a function of (output, target); the message says what to pass instead.
    """
    if loss_fn is None:
        return
    wanted = "loss_fn: wanted a function (model, batch) -> scalar"
    if not callable(loss_fn):
        raise TypeError(f"{wanted} or None, got {_named(loss_fn)}: {_ORDER}")
    name = _name_of(loss_fn)
    if isinstance(loss_fn, type):
        made = f"criterion = {name}(), then " if issubclass(loss_fn, nn.Module) else ""
        raise TypeError(
            f"{wanted}, got the class {name}: {made}loss_fn=lambda model, batch: criterion(model(batch[0]), batch[1])"
        )
    if isinstance(loss_fn, nn.modules.loss._Loss | nn.CosineSimilarity | nn.PairwiseDistance):
        raise TypeError(_of_outputs(wanted, name, "input, target", loss_fn))
    try:
        # A module takes what its forward takes.
        signature = inspect.signature(loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn)
    except (TypeError, ValueError):  # of some builtins, and scripted ones
        return
    names = [
        parameter.name
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ][:2]
    if len(names) == 2 and names[0].lower() in _OUTPUTS and names[1].lower() in _TARGETS:
        raise TypeError(_of_outputs(wanted, name, ", ".join(names), loss_fn))
    try:
        signature.bind(None, None)
    except TypeError as error:
        hint = f": {_ORDER}" if isinstance(loss_fn, nn.Module) else ""
        raise TypeError(f"{wanted}, got {name}{signature}, which cannot be called so ({error}){hint}") from error


def check_loader(loader: Any) -> None:
    """That it yields batches, as far as its type tells.

    Raises:
        TypeError: no iterable, or a single batch; the message says what to pass instead.
    """
    wanted = "loader: wanted an iterable of batches"
    if isinstance(loader, Tensor | Mapping | str):
        raise TypeError(f"{wanted}, got a {_named(loader)}: put a single batch in a list, [batch]")
    if isinstance(loader, Dataset) and not isinstance(loader, Iterable):
        raise TypeError(
            f"{wanted}, got the dataset {_named(loader)}: pass DataLoader({_named(loader).lower()}, batch_size=64)"
        )
    if isinstance(loader, nn.Module) or not isinstance(loader, Iterable):
        hint = "" if loader is None or isinstance(loader, int | float) else f": {_ORDER}"
        raise TypeError(f"{wanted}, got {_named(loader)}{hint}")


def check_model(model: Any) -> None:
    """That it is a module.

    Raises:
        TypeError: it is not; the message says where one is to be had.
    """
    if isinstance(model, nn.Module):
        return
    name = _named(model)
    hint = ""
    if type(model).__name__ == "ExportedProgram":
        hint = ": an exported program has no layers, prune the model before torch.export"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        name, hint = f"the class {model.__name__}", ": pass a trained instance"
    elif isinstance(model, Mapping):
        hint = ": a state_dict has no layers, load it into the model first, model.load_state_dict(…)"
    elif isinstance(getattr(model, "model", None), nn.Module):
        hint = ": pass its .model"
    elif isinstance(model, DataLoader | list | tuple) or callable(model):
        hint = f": {_ORDER}"
    raise TypeError(f"model: wanted an nn.Module, got {name}{hint}")


def check_least(name: str, value: Any, least: int, more: str = "") -> None:
    """An integer of at least so much.

    Raises:
        TypeError, ValueError: it is none; the message names it.
    """
    if type(value) is not int:
        raise TypeError(f"{name}: wanted an integer ≥ {least}{more}, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: wanted ≥ {least}{more}, got {value}")


def check_positive(name: str, value: Any) -> None:
    """A finite number above 0.

    Raises:
        TypeError, ValueError: it is none; the message names it.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: wanted a number > 0, got {value!r}")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name}: wanted a finite number > 0, got {value!r}")


def _of_outputs(wanted: str, name: str, names: str, loss_fn: Callable[..., Any]) -> str:
    called = "criterion" if isinstance(loss_fn, nn.Module) or name == "<lambda>" else name
    return (
        f"{wanted}, which calls the model itself, got {name}, a function of ({names}): pass "
        f"loss_fn=lambda model, batch: {called}(model(batch[0]), batch[1])"
    )


def _name_of(function: Any) -> str:
    inner = getattr(function, "func", function)  # of a functools.partial
    return str(getattr(inner, "__name__", type(inner).__name__))


def _named(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
