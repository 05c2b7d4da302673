"""Refuses a torch that is too old, before anything else meets what it lacks."""

import torch

from . import _build

_reason = _build.too_old("torch", torch.__version__)
if _reason is not None:
    raise ImportError(f"{_reason}: pip install --upgrade torch")
