"""Whether Triton can run here, without importing it before it is asked for; and the launch of its kernels."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from . import _build


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1``): on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    import triton

    return _build.too_old("triton", triton.__version__)


def why_not(tensor: Tensor) -> str | None:
    """Why Triton kernels cannot run on this tensor, or None if they can."""
    if tensor.device.type == "cpu" and not interpreted():
        return "it runs on GPUs, the tensor is on the CPU (TRITON_INTERPRET=1 interprets it there, for tests)"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"it runs on CUDA devices, the tensor is on {tensor.device}"
    return _missing()


def unavailable() -> str | None:
    """Why Triton kernels cannot run on any tensor of this machine, or None."""
    missing = _missing()
    if missing:
        return missing
    if not torch.cuda.is_available() and not interpreted():
        return "there is no CUDA device"
    return None


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Run ``kernel[grid]`` on ``device`` (that of its tensors), whichever one is current: Triton launches there.

    Every launch goes through here, so that tests can record what the host does without a GPU.
    """
    if device.type != "cuda":
        kernel[grid](*arguments, **constants)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, **constants)
