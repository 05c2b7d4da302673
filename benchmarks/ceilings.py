"""What the machine can do at most, measured in the same run: copy, triad, and on GPUs bf16 matrix products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sfpk_kernels import _extension

from .clock import Effort, clock_of, interleave, quantiles
from .registry import Call, Seeded

# fp32 numbers of each buffer: past the caches of any machine.
NUMBERS = {"cpu": 1 << 26, "cuda": 1 << 28}
QUICK_NUMBERS = 1 << 22
MATMUL = 8192


@dataclass
class Ceiling:
    """One limit: a call and what it moves or computes."""

    call: Call
    amount: float  # bytes read and written, or floating-point operations
    unit: str  # "bytes/s" or "flop/s"


def copy_ceiling(device: torch.device, quick: bool) -> Ceiling:
    """A copy of random data, by the extension's kernel (it writes past the caches) or else by torch."""
    numbers = QUICK_NUMBERS if quick else NUMBERS[device.type]
    source = Seeded(device).rand(numbers)
    target = torch.empty_like(source)
    call: Call = lambda: target.copy_(source)  # noqa: E731
    if device.type == "cpu" and _extension.unavailable() is None:
        kernel: Callable[..., None] = torch.ops.sfpk_cpp.copy_
        call = lambda: kernel(target, source)  # noqa: E731
    call()
    return Ceiling(call, 8.0 * numbers, "bytes/s")


def ceilings(device: torch.device, quick: bool) -> dict[str, Ceiling]:
    """Every limit of a device by name."""
    found = {"copy": copy_ceiling(device, quick)}
    numbers = QUICK_NUMBERS if quick else NUMBERS[device.type]
    random = Seeded(device)
    b, c = random.rand(numbers), random.rand(numbers)
    out = torch.empty_like(b)
    found["triad"] = Ceiling(lambda: torch.add(b, c, alpha=0.5, out=out), 12.0 * numbers, "bytes/s")
    if device.type == "cuda":
        x, y = (random.randn(MATMUL, MATMUL).bfloat16() for _ in range(2))
        product = torch.empty_like(x)
        found["bf16 matmul"] = Ceiling(lambda: torch.matmul(x, y, out=product), 2.0 * MATMUL**3, "flop/s")
    return found


def measure(device: torch.device, quick: bool, effort: Effort) -> dict[str, dict[str, float | str]]:
    """Rate, p20 and p80 of every limit, ready to be recorded."""
    limits = ceilings(device, quick)
    times = interleave({name: limit.call for name, limit in limits.items()}, clock_of(device), effort)
    measured: dict[str, dict[str, float | str]] = {}
    for name, limit in limits.items():
        median, low, high = quantiles(times[name])
        rate, slow, fast = (limit.amount / seconds for seconds in (median, high, low))
        measured[name] = {"rate": rate, "p20": slow, "p80": fast, "unit": limit.unit}
    return measured
