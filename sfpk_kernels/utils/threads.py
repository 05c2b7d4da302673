"""OpenMP threads that spin while they wait, on a machine that others use, too."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)

# Any of them, and the user has said how threads wait.
_SAID = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "KMP_LIBRARY", "OMP_NUM_THREADS")

_warned = False


def warn_of_spinning() -> None:
    """Say once per process where waiting threads are likely to take the cores that others work on."""
    global _warned
    if _warned or torch.get_num_threads() < 2 or any(name in os.environ for name in _SAID):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = os.getloadavg()[0]
    if busy <= cores:
        return
    _warned = True
    logger.warning(
        "%.1f processes share %d cores: torch's waiting threads spin, which can make a run several times slower. Set "
        "GOMP_SPINCOUNT=1000 and KMP_BLOCKTIME=1 before Python starts, or call torch.set_num_threads(1)",
        busy, cores,
    )  # fmt: skip
