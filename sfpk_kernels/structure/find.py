"""The structure of a model, found and proven."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..coordinates.flat import Ignored, ignored_names, unwrapped
from ..coordinates.wrapped import check_structure
from ..utils.arguments import check_model, check_positive
from .adapters import blocks
from .axes import ON_REFUSAL, Structure
from .graph import trace
from .verify import proven, verify


def find_structure(
    model: nn.Module,
    example_inputs: Any,
    *,
    ignored_layers: Iterable[Ignored] = (),
    time_limit: float = 30,
    check: bool = True,
    on_refusal: str = "raise",
) -> Structure:
    """Which channels, neurons and heads of a model can be removed, and what goes with each of them.

    Channels that are added, concatenated, normalized, flattened or scaled together are one coordinate. What leaves the
    model stays, and what is added to its inputs.

    Args:
        model: it stays as it is.
        example_inputs: what the model is called with: a tensor, a tuple of positional arguments, or a dict of keywords.
        ignored_layers: modules or names, as in :class:`Coordinates`, whose outputs all stay.
        time_limit: seconds for following the model's graph.
        check: compare masked and shrunk outputs under random removals (:func:`verify`).
        on_refusal: ``"raise"`` an error for what cannot be shrunk right, or ``"protect"`` it: those groups stay whole,
            and ``structure.protected`` says why.

    Raises:
        ImportError: torch-pruning is needed and not installed.
        TypeError: an argument of the wrong type.
        ValueError: what cannot be shrunk right, by the names of its modules; nothing that can be removed.
    """
    check_model(model)
    check_positive("time_limit", time_limit)
    if on_refusal not in ON_REFUSAL:
        raise ValueError(f"on_refusal: wanted one of {', '.join(ON_REFUSAL)}, got {on_refusal!r}")
    protect = on_refusal == "protect"
    model = unwrapped(model)
    check_structure(model)
    args, kwargs = split_inputs(example_inputs)
    ignored = {name.rpartition(".")[0] for name in ignored_names(model, ignored_layers)}
    structure = blocks(model, ignored) or trace(model, args, kwargs, ignored, float(time_limit), protect)
    if check and protect:
        return proven(model, structure, args, kwargs)
    if check:
        verify(model, structure, args, kwargs)
    return structure


def check_structure_of(model: nn.Module, structure: Any) -> Structure:
    """A structure that was found before.

    Raises:
        TypeError: it is none.
        ValueError: it is one of another model.
    """
    if not isinstance(structure, Structure):
        raise TypeError(f"structure: wanted a Structure or None, got {type(structure).__name__}")
    inner = unwrapped(model)
    tensors = {**dict(inner.named_parameters(remove_duplicate=False)), **dict(inner.named_buffers())}
    for entry in structure.entries:
        shape = tuple(tensors[entry.tensor].shape) if entry.tensor in tensors else None
        if shape is None or entry.dim >= len(shape) or shape[entry.dim] != entry.index.numel():
            wanted = f"{entry.tensor} with {entry.index.numel()} positions along dim {entry.dim}"
            raise ValueError(f"structure: wanted one of this model, got one of {wanted}: {shape or 'there is none'}")
    return structure


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments and keywords.

    Raises:
        TypeError: neither a tensor, nor a tuple or list, nor a dict.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    raise TypeError(
        "example_inputs: wanted a tensor, a tuple of arguments or a dict of keywords for the model, got "
        f"{type(example_inputs).__name__}"
    )
