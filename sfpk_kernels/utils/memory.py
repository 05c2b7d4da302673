"""How much memory there is, and how much a piece of work takes at its peak."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .modes import within


def available_bytes(device: torch.device) -> int | None:
    """Bytes a process may still take on ``device``; ``None`` where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds without using it can be used.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = [limit for limit in (_system_bytes(), _cgroup_bytes()) if limit is not None]
    return min(known) if known else None


def _system_bytes() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None


def _cgroup_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Of a container with a limit."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most = (root / limit).read_text().strip()
            if most != "max" and int(most) < 1 << 60:
                return max(0, int(most) - int((root / usage).read_text()))
        except (OSError, ValueError):
            continue
    return None


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes of tensors that ``work`` holds at its peak beyond those there before.

    On a GPU from the allocator, whose peak statistics start anew; on the CPU by following every storage that an
    operator returns, which sees no scratch memory inside operators.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with within(_Following()) as mode:
        work()
    return mode.peak


class _Following(TorchDispatchMode):
    """Counts the bytes of living storages made by operators while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = pytree.arg_tree_leaves(*args, **kwargs)
        given = {s._cdata for leaf in inputs if (s := _storage(leaf)) is not None}
        for leaf in pytree.tree_leaves(out):
            storage = _storage(leaf)
            if storage is not None:
                self._count(storage, given)
        return out

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in given:  # a view of what was there
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storage(leaf: Any) -> torch.UntypedStorage | None:
    """Where a tensor lies, or None: sparse, nested and other special ones have no memory of their own to count."""
    if not isinstance(leaf, Tensor) or leaf.layout != torch.strided:
        return None
    try:
        return leaf.untyped_storage()
    except (RuntimeError, NotImplementedError):
        return None


def format_bytes(size: float) -> str:
    """1,234,567 → "1.2 MB" (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
