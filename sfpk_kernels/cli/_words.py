"""What commands share: exit codes, words, JSON, the folder they write to."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from ..utils.files import check_writable
from ..utils.plain import plain

USAGE = 2
FAILED = 1
INTERRUPTED = 130


def refuse(command: str, message: object, code: int = USAGE) -> int:
    """Print to stderr, return the exit code."""
    say(f"sfpk {command}: {message}")
    return code


def say(text: str) -> None:
    """Print to stderr, if anybody still reads it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Aside(io.TextIOBase):
    """Writes to stderr; a reader that has gone is no error."""

    def write(self, text: str) -> int:
        """Pass it on."""
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Pass it on."""
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        """As stderr."""
        return sys.stderr.isatty()


def make_folder(path: Path) -> None:
    """The folder of --out, made if absent.

    Raises:
        OSError: it cannot be made, or takes no files; the message names the option.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        check_writable(path / "report.json", "--out")
    except OSError as error:
        raise OSError(f"--out: wanted a folder that can be written or made, got {str(path)!r}") from error


def to_json(value: Any) -> str:
    """As JSON, in which numbers that are not finite are null."""
    return json.dumps(plain(value), indent=1, allow_nan=False)
