"""``sfpk info``: what is available, and of what is not, why not."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
from typing import Any

from .._dispatch import preference
from .._version import __version__


def add_command(commands: Any) -> None:
    """Add ``info``."""
    info = commands.add_parser("info", help="versions, devices and backends of this installation")
    info.add_argument("--json", action="store_true", help="the same as JSON")
    info.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> int:
    facts = _facts()
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0

    def line(name: str, text: str) -> None:
        print(f"{name:<13}" + text.replace("\n", "\n" + 13 * " "))

    line("sfpk_kernels", facts["sfpk_kernels"])
    line("python", facts["python"])
    line("torch", f"{facts['torch']}, {facts['threads']} threads, CPU up to {facts['cpu']}")
    line("cuda device", facts["cuda_device"] or "none")
    built = facts["extension"]
    line("extension", built if isinstance(built, str) else ", ".join(f"{key} {value}" for key, value in built.items()))
    if facts["extension_built"]:
        line("", f"built {facts['extension_built']}")
    line("triton", facts["triton"])
    line("SFPK_BACKEND", facts["SFPK_BACKEND"] or "not set: the fastest available")
    line("SFPK_BUILD", facts["SFPK_BUILD"])
    for op, devices in facts["ops"].items():
        for device, backends in devices.items():
            line(op, f"on {device}: {backends['chosen']}")
            for name, why in backends["not"].items():
                line("", f"not {name}: {why}")
    return 0


def _facts() -> dict[str, Any]:
    """Plain values; where extension or Triton are missing, the reason in their place."""
    import torch

    from .. import _build, _extension, _triton

    cuda = torch.cuda.is_available()
    why_no_extension = _extension.unavailable()
    return {
        "sfpk_kernels": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cuda_device": torch.cuda.get_device_name() if cuda else None,
        "extension": f"no: {why_no_extension}" if why_no_extension else dict(_extension.load().build_config()),
        "extension_built": None if why_no_extension else _extension.how(),
        "triton": _triton.unavailable() or "available",
        "SFPK_BACKEND": os.environ.get("SFPK_BACKEND") or None,
        "SFPK_BUILD": _build.build_mode(),
        "ops": {
            op: {device: _backends(op, device) for device in (["cpu", "cuda"] if cuda else ["cpu"])}
            for op in ("transition", "selection", "masking")
        },
    }


def _backends(op: str, device: str) -> dict[str, Any]:
    """The backend an op takes on a device, and why not another."""
    import torch

    backends = importlib.import_module(f"sfpk_kernels.ops.{op}").BACKENDS
    sample = torch.ones(1, 1, dtype=torch.float32, device=device)
    reasons = {name: backend.why_not(sample) for name, backend in backends.items()}
    chosen = next(name for name in preference(device) if name in backends and not reasons[name])
    return {"chosen": chosen, "not": {name: why.splitlines()[0] for name, why in reasons.items() if why}}
