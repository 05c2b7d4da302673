"""The command ``sfpk``: one file per subcommand."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from . import demo, info, init, masks, prune, report
from ._words import FAILED, INTERRUPTED, refuse


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done, 1 failed, 2 wrong usage, 130 interrupted)."""
    parser = argparse.ArgumentParser(prog="sfpk", description="SFPK one-shot pruning for PyTorch models.")
    parser.add_argument("--version", action="version", version=f"sfpk_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for add_command in (
        demo.add_command, prune.add_command, masks.add_command, report.add_command, info.add_command,
        init.add_command,
    ):  # fmt: skip
        add_command(commands)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s", stream=sys.stderr)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return refuse(options.command, "interrupted", INTERRUPTED)
    except OSError as error:
        code = 0 if isinstance(error, BrokenPipeError) else refuse(options.command, error, FAILED)
        _drop_what_cannot_be_written()  # where the reader has gone, as of `| head`, it has seen enough
    return code


def _drop_what_cannot_be_written() -> None:
    """What stdout still holds would fail again when Python exits."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
