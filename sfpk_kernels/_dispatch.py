"""Which backend runs an op: by device, by the ``backend=`` argument, or by ``SFPK_BACKEND``."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, overload

from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("cpp", "triton", "cuda", "reference")

# Fastest first. A backend an op does not have is passed over.
_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}

_WHERE_PRESENT = "?"  # behind a backend's name

_said: set[str] = set()  # reasons, each once, whatever op meets it first


def preference(device_type: str) -> tuple[str, ...]:
    """Backends in the order they are tried on tensors of a device."""
    return _PREFERENCE.get(device_type, ("reference",))


def _always(tensor: Tensor) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op."""

    run: Callable[..., Any]
    # Why it cannot run on this tensor here (not built, dtype, strides, device), or None if it can.
    why_not: Callable[[Tensor], str | None] = _always

    def reason(self, *tensors: Tensor) -> str | None:
        """Why it cannot run on one of these tensors, or None."""
        return next((reason for tensor in tensors if (reason := self.why_not(tensor))), None)


@overload
def where_present(backend: str) -> str: ...
@overload
def where_present(backend: None) -> None: ...
def where_present(backend: str | None) -> str | None:
    """A choice of backend that holds for the ops that have it; the others choose automatically."""
    return None if backend is None else backend + _WHERE_PRESENT


def choose(
    op: str,  # for messages
    backend: str,  # the caller's explicit choice, "" for none; or :func:`where_present` of one
    available: Mapping[str, Backend],  # the op's backends by name
    tensor: Tensor,  # the op's main argument
    *others: Tensor,  # further ones that must suit the backend
) -> Callable[..., Any]:
    """The implementation to run.

    An explicit choice that cannot run raises. ``SFPK_BACKEND`` and the choice of a whole run hold where present:
    the ops without the backend choose automatically. The automatic choice takes the fastest one that
    can run, and says once why a faster one was passed over.

    Raises:
        ValueError: an unknown backend, one this op does not have, or one that cannot run on this tensor.
    """
    source = "backend"
    if not backend and os.environ.get("SFPK_BACKEND"):
        backend, source = where_present(os.environ["SFPK_BACKEND"]), "SFPK_BACKEND"
    lenient, backend = backend.endswith(_WHERE_PRESENT), backend.removesuffix(_WHERE_PRESENT)
    if backend and backend not in BACKENDS:
        raise ValueError(f"{op}: {source}: wanted one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend and not (lenient and backend not in available):
        if backend not in available:
            raise ValueError(f"{op}: {source}: {backend!r} is not available, only {', '.join(available)}")
        reason = available[backend].reason(tensor, *others)
        if reason:
            raise ValueError(f"{op}: {source}: {backend!r} cannot run here: {reason}")
        return available[backend].run
    for name in preference(tensor.device.type):
        if name in available:
            reason = available[name].reason(tensor, *others)
            if reason is None:
                return available[name].run
            if reason not in _said:
                _said.add(reason)
                logger.warning("%s (and what else needs it) runs on a slower backend than %s: %s", op, name, reason)
    return available["reference"].run
