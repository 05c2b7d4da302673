"""Names of masks and of a model that differ by what wrappers and frameworks put before them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

logger = logging.getLogger(__name__)

_INSIDE = {"_orig_mod", "_checkpoint_wrapped_module"}  # of torch.compile and of activation checkpointing, anywhere
_PARALLEL = "module."  # of DataParallel and DistributedDataParallel

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Fit:
    """Where masks belong whose names are other ones."""

    names: dict[str, str]  # there, by the masks' own
    added: str  # before the masks' names
    taken: str  # away from them, first

    def __str__(self) -> str:
        if not self.added and not self.taken:
            return "wrappers inside the names left out"
        words = [f"prefix {self.taken!r} of the masks taken away"] if self.taken else []
        return ", ".join([*words, *([f"prefix {self.added!r} added"] if self.added else [])])


def fit(masks: Shapes, held: Mapping[str, Tensor], argument: str) -> Fit | None:
    """Where masks belong in a model or state dict that has not all of their names.

    One prefix is added to all names, or taken away from all, so that every mask meets a tensor of its shape:
    ``module.``, ``_orig_mod.``, the attribute of a LightningModule, a submodule's name.

    Args:
        masks: their shapes by name.
        held: tensors by name.
        argument: which one they came in, for the error.

    Returns:
        None where all names are there as they are, or none of this helps.

    Raises:
        ValueError: several parts that they fit.
    """
    if all(name in held for name in masks):
        return None
    plain: dict[str, str] = {}
    for name in held:
        plain.setdefault(_without_wrappers(name), name)
    fits: dict[tuple[object, ...], Fit] = {}
    for taken in _common_prefixes(list(masks)):
        for added in _endings(next(iter(masks)), taken, plain):
            names = {name: plain.get(added + _without_wrappers(name)[len(taken) :], "") for name in masks}
            if all(there and tuple(held[there].shape) == masks[name] for name, there in names.items()):
                # One parameter may go by several names.
                place = tuple(id(held[there]) for there in names.values())
                fits.setdefault(
                    place, Fit(names, _ahead(names, added), _ahead({v: k for k, v in names.items()}, taken))
                )
        if fits:
            break
    if len(fits) > 1:
        parts = ", ".join(repr(found.added) for found in list(fits.values())[:5])
        raise ValueError(
            f"{argument}: wanted one part that these masks fit, got several, at the prefixes {parts}: name them as "
            "the whole names its parameters, or pass the part, such as model.get_submodule(name)"
        )
    return next(iter(fits.values()), None)


def say(found: Fit) -> None:
    """In the log: as a warning where more than a wrapper's name was left out or added."""
    ours = {part for prefix in (found.added, found.taken) for part in prefix.split(".") if part}
    level = logging.INFO if ours <= {"module", *_INSIDE} else logging.WARNING
    logger.log(level, "masks: their names are not those of the model; they fit with %s", found)


def _ahead(names: Mapping[str, str], plain: str) -> str:
    """What stands before all of some names in all of others, wrappers' own names with it; else ``plain``."""
    ahead = {there[: -len(name)] if there.endswith(f".{name}") else plain for name, there in names.items()}
    return ahead.pop() if len(ahead) == 1 else plain


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _INSIDE)


def _common_prefixes(names: list[str]) -> Iterator[str]:
    """What all names begin with, shortest first: nothing, then ``a.``, ``a.b.``, …"""
    split = [_without_wrappers(name).split(".")[:-1] for name in names]
    prefix = ""
    yield prefix
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            return
        prefix += f"{parts[0]}."
        yield prefix


def _endings(name: str, taken: str, plain: Mapping[str, str]) -> Iterator[str]:
    """What stands before the rest of a name where names end with it.

    Where more than a wrapper is taken away, nothing may stand there: another part of a model may look the same.
    """
    rest = _without_wrappers(name)[len(taken) :]
    for other in plain:
        if other == rest:
            yield ""
        elif taken in ("", _PARALLEL) and other.endswith(f".{rest}"):
            yield other[: -len(rest)]
