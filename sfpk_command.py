"""The command ``sfpk``, as it is started: what has to be set before torch is loaded, then the command itself.

A module beside the package, because importing anything of the package imports torch, whose OpenMP runtime reads its
environment once, when it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping, Sequence

# How long threads that wait for work keep a core busy before they sleep. By default that is long enough for a machine
# with more runnable threads than cores to spend most of its time on it: a small run beside four busy processes took
# several times its share. Sleeping earlier costs nothing that can be measured on an idle one.
SHORT_SPIN = {
    "GOMP_SPINCOUNT": "1000",  # rounds; GNU
    "KMP_BLOCKTIME": "1",  # milliseconds; LLVM and Intel
}
_SAID_BY_THE_USER = {*SHORT_SPIN, "OMP_WAIT_POLICY", "KMP_LIBRARY"}


def spin_shortly(environment: MutableMapping[str, str]) -> None:
    """Set a short spin, unless the user has said anything about waiting."""
    if not _SAID_BY_THE_USER & set(environment):
        environment.update(SHORT_SPIN)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    spin_shortly(os.environ)
    from sfpk_kernels.cli import main as command

    return command(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
