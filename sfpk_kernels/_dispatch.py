"""Which backend runs an op: by device, by the ``backend=`` argument, or by ``SFPK_BACKEND``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

BACKENDS = ("cpp", "triton", "cuda", "reference")

# Fastest first. A backend an op does not have is passed over.
_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}


def choose(
    op: str,  # for messages
    backend: str | None,  # the caller's explicit choice
    available: Mapping[str, Any],  # the op's backends by name
    device_type: str,
) -> str:
    """The name of the backend to run.

    An explicit choice (argument first, then ``SFPK_BACKEND``) that the op does not have raises; the automatic
    choice takes the fastest one available.

    Raises:
        ValueError: an unknown backend, or one this op does not have.
    """
    source = "backend"
    if backend is None:
        backend, source = os.environ.get("SFPK_BACKEND") or None, "SFPK_BACKEND"
    if backend is None:
        preferred = _PREFERENCE.get(device_type, ("reference",))
        return next(name for name in preferred if name in available)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: {source}: wanted one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend not in available:
        raise ValueError(f"{op}: {source}: {backend!r} is not available, only {', '.join(available)}")
    return backend
