"""The command ``sfpk``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

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
    import torch

    from . import _extension

    print(f"sfpk_kernels {__version__}")
    print(f"python       {platform.python_version()}")
    print(f"torch        {torch.__version__}, {torch.get_num_threads()} threads")
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    print(f"cuda device  {cuda}")
    try:
        config = _extension.load().build_config()
        print("extension    " + ", ".join(f"{key} {value}" for key, value in config.items()))
    except _extension.ExtensionUnavailableError as error:
        print(f"extension    {error}")
    for op in ("transition", "selection", "masking"):
        backends = importlib.import_module(f"sfpk_kernels.ops.{op}")._BACKENDS
        states = {name: backend.why_not(torch.ones(1, 1)) for name, backend in backends.items()}
        print(f"{op:<12} " + ", ".join(name if why is None else f"{name} (no)" for name, why in states.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
