"""``sfpk report``: draw a report again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ._words import FAILED, refuse


def add_command(commands: Any) -> None:
    """Add ``report``."""
    report = commands.add_parser("report", help="draw pictures and page of a folder again from its report.json")
    report.add_argument("folder", type=Path, metavar="DIR")
    report.add_argument("--json", action="store_true", help="the outcome of the run as JSON on stdout")
    report.add_argument("--quiet", action="store_true", help="no text")
    report.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from ..report import render

    try:
        page = render(options.folder)
    except (FileNotFoundError, ValueError) as error:
        return refuse("report", error)
    except ImportError as error:
        return refuse("report", error, FAILED)
    if options.json:
        summary = json.loads((options.folder / "report.json").read_text())["summary"]
        print(json.dumps({**summary, "files": [str(page)]}, indent=1))
    elif not options.quiet:
        print(page)
    return 0
