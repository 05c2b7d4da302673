"""Interleaved timing: every provider once per round, in an order that turns, so that drift hits all alike.

pytest-benchmark times one function after the other, minutes apart on a machine that others use too, so ratios would
drift. The rounds are therefore run here, for ``python -m benchmarks`` and for ``pytest benchmarks`` alike; the latter
hands the seconds of each provider to pytest-benchmark's statistics (benchmarks/test_suite.py), which makes its tables,
comparisons and JSON from them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .registry import Call

FEWEST = 3  # rounds


@dataclass(frozen=True)
class Effort:
    """How often a call is repeated: as often as fits into ``seconds``, within limits."""

    rounds: int  # at most
    seconds: float  # per provider

    def rounds_for(self, seconds: float) -> int:
        """Rounds of a call that takes so long."""
        return max(min(FEWEST, self.rounds), min(self.rounds, int(self.seconds / max(seconds, 1e-9))))


def cpu_seconds(call: Call) -> float:
    """Wall-clock seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def cuda_seconds(call: Call) -> float:
    """Seconds between two CUDA events around one call."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def clock_of(device: torch.device) -> Callable[[Call], float]:
    """How calls are timed on a device."""
    return cuda_seconds if device.type == "cuda" else cpu_seconds


def rotating(calls: Sequence[Call]) -> Call:
    """One call that takes the next of several copies each time, so that no input is found in a cache."""
    if len(calls) == 1:
        return calls[0]
    position = 0

    def call() -> Any:
        nonlocal position
        position = (position + 1) % len(calls)
        return calls[position]()

    return call


def interleave(
    calls: Mapping[str, Call],
    clock: Callable[[Call], float],
    effort: Effort,
) -> dict[str, list[float]]:
    """Seconds of every round by provider.

    One untimed round first; it also says who is slow: such a provider takes part in fewer rounds, spread evenly. Round
    r starts with provider r, so that nobody always runs in the wake of the same neighbour.
    """
    names = list(calls)
    wanted = {name: effort.rounds_for(clock(calls[name])) for name in names}
    most = max(wanted.values(), default=0)
    times: dict[str, list[float]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for r in range(most):
            start = r % len(names)
            for name in names[start:] + names[:start]:
                # Bresenham's spread of `wanted` rounds over `most`.
                if (r + 1) * wanted[name] // most > r * wanted[name] // most:
                    times[name].append(clock(calls[name]))
    finally:
        if was_enabled:
            gc.enable()
    return times


def quantiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, p20, p80."""
    median, low, high = np.quantile(seconds, [0.5, 0.2, 0.8])
    return float(median), float(low), float(high)
