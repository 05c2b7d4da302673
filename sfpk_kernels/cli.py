"""The command ``sfpk``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from ._dispatch import preference
from ._version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done, 1 failed, 2 wrong usage)."""
    parser = argparse.ArgumentParser(prog="sfpk", description="SFPK one-shot pruning for PyTorch models.")
    parser.add_argument("--version", action="version", version=f"sfpk_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo", help="train a small network on real digits, prune it, compare the methods (about two minutes)"
    )
    demo.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: demo-out")
    demo.add_argument(
        "--full", action="store_true", help="three seeds at every sparsity, and the presets paper and authors"
    )
    demo.add_argument("--quiet", action="store_true", help="no progress bar")
    demo.set_defaults(run=_demo)

    from .bench.command import add_command as add_bench

    add_bench(commands)

    info = commands.add_parser("info", help="versions, devices and backends of this installation")
    info.set_defaults(run=_info)

    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    return options.run(options)


def _demo(options: argparse.Namespace) -> int:
    missing = [name for name in ("sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"sfpk demo needs {' and '.join(missing)}: pip install 'sfpk_kernels[demo]'",
            file=sys.stderr,
        )
        return 1
    if options.out.exists() and not options.out.is_dir():
        print(f"sfpk demo: --out: wanted a folder, got the file {options.out}", file=sys.stderr)
        return 2
    from .demo.run import Demo

    Demo(options.out, full=options.full, progress=False if options.quiet else None).run()
    return 0


def _info(options: argparse.Namespace) -> int:
    """What is available, and of what is not, why not."""
    import torch

    from . import _build, _extension, _triton

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


if __name__ == "__main__":
    sys.exit(main())
