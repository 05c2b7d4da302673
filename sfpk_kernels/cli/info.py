"""``sfpk info``: what is available, and of what is not, why not."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
from typing import Any

from .._dispatch import preference
from .._version import __version__


def add_command(commands: Any) -> None:
    """Add ``info``."""
    info = commands.add_parser("info", help="versions, devices and backends of this installation")
    info.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> int:
    """What is available, and of what is not, why not."""
    import torch

    from .. import _build, _extension, _triton

    def line(name: str, text: str) -> None:
        print(f"{name:<13}" + text.replace("\n", "\n" + 13 * " "))

    line("sfpk_kernels", __version__)
    line("python", platform.python_version())
    line(
        "torch",
        f"{torch.__version__}, {torch.get_num_threads()} threads, CPU up to {torch.backends.cpu.get_cpu_capability()}",
    )
    line("cuda device", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    why_no_extension = _extension.unavailable()
    if why_no_extension:
        line("extension", f"no: {why_no_extension}")
    else:
        line("extension", ", ".join(f"{key} {value}" for key, value in _extension.load().build_config().items()))
    line("triton", _triton.unavailable() or "available")
    line("SFPK_BACKEND", os.environ.get("SFPK_BACKEND") or "not set: the fastest available")
    line("SFPK_BUILD", _build.build_mode())
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for op in ("transition", "selection", "masking"):
        backends = importlib.import_module(f"sfpk_kernels.ops.{op}")._BACKENDS
        for device in devices:
            sample = torch.ones(1, 1, device=device)
            chosen = next(
                name for name in preference(device) if name in backends and not backends[name].why_not(sample)
            )
            line(op, f"on {device}: {chosen}")
            for name, backend in backends.items():
                why = backend.why_not(sample)
                if why:
                    line("", f"not {name}: {why.splitlines()[0]}")
    return 0
