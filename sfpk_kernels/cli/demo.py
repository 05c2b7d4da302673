"""``sfpk demo``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..utils.extras import require
from ._words import FAILED, make_folder, refuse


def add_command(commands: Any) -> None:
    """Add ``demo``."""
    demo = commands.add_parser(
        "demo", help="train a small network on real digits, prune it, compare the methods (about two minutes)"
    )
    demo.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: demo-out")
    demo.add_argument(
        "--full", action="store_true", help="three seeds at every sparsity, and the presets paper and authors"
    )
    demo.add_argument("--quiet", action="store_true", help="no progress, no text")
    demo.add_argument("--json", action="store_true", help="only the report, as JSON on stdout")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    try:
        require("it", "sklearn", "matplotlib")
    except ImportError as error:
        return refuse("demo", error, FAILED)
    try:
        make_folder(options.out)
    except OSError as error:
        return refuse("demo", error)
    from ..demo.run import Demo

    silent: dict[str, Any] = {"say": lambda text: None} if options.json or options.quiet else {}
    report = Demo(options.out, full=options.full, progress=False if options.quiet else None, **silent).run()
    if options.json:
        print(json.dumps(report, indent=1))
    return 0
