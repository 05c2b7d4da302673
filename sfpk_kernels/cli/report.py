"""``sfpk report``: draw a report again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ._words import FAILED, refuse


def add_command(commands: Any) -> None:
    """Add ``report``."""
    report = commands.add_parser("report", help="draw pictures and page of a folder again from its report.json")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from ..report import render

    try:
        print(render(options.folder))
    except (FileNotFoundError, ValueError) as error:
        return refuse("report", error)
    except ImportError as error:
        return refuse("report", f"{error}: pip install 'sfpk_kernels[demo]'", FAILED)
    return 0
