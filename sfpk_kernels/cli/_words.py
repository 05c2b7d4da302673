"""How commands say what is wrong."""

from __future__ import annotations

import sys

USAGE = 2
FAILED = 1
INTERRUPTED = 130


def refuse(command: str, message: object, code: int = USAGE) -> int:
    """Print to stderr, return the exit code."""
    print(f"sfpk {command}: {message}", file=sys.stderr)
    return code
