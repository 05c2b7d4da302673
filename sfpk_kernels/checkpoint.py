"""The file a run is resumed from: which model, which settings, and everything that decides what follows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .config import SFPKConfig
from .coordinates import unwrapped
from .files import check_writable

KIND = "sfpk-run-2"  # format and version

# Settings that may change between parts of a run: a new seed makes a branch; a limit decides nothing but refusal.
_FREE = ("seed", "memory_limit")

_PARTS = {
    "model", "config", "names", "step", "particles", "vote", "energies", "history", "waypoints", "alarms", "taken",
    "scale", "plan",
}  # fmt: skip


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of all parameters and buffers, the same inside a wrapper."""
    digest = hashlib.sha256()
    for name, value in unwrapped(model).state_dict().items():
        if not isinstance(value, torch.Tensor):
            continue
        value = value.detach().cpu()
        digest.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode())
        for part in _dense_parts(value):
            digest.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dense_parts(value: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor is made of: itself, or indices and values of a sparse one."""
    if value.layout == torch.strided:
        return [value]
    if value.layout == torch.sparse_coo:
        value = value.coalesce()
        return [value.indices(), value.values()]
    if value.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [value.crow_indices(), value.col_indices(), value.values()]
    if value.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [value.ccol_indices(), value.row_indices(), value.values()]
    return [value.to_dense()]


def check_same(state: Mapping[str, Any], config: SFPKConfig, fingerprint: str, names: list[str]) -> None:
    """That a state belongs to this model and this run.

    Raises:
        TypeError: no dict.
        ValueError: it does not; the message says what differs.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"state: wanted what SFPKPruner.state_dict() returns, got {type(state).__name__}; a file: load()"
        )
    missing = _PARTS - state.keys()
    if missing:
        raise ValueError(f"state: wanted what SFPKPruner.state_dict() returns, got one without {sorted(missing)}")
    if state["names"] != names:
        other = sorted(set(state["names"]) ^ set(names))
        raise ValueError(
            f"state: wanted one over the same prunable tensors, got one that differs in {other[:5] or 'order'}"
        )
    if state["model"] != fingerprint:
        raise ValueError(
            f"state: wanted one of this model (fingerprint {fingerprint[:12]}), got one of another or of other weights "
            f"({state['model'][:12]})"
        )
    saved, now = json.loads(state["config"]), json.loads(config.to_json())
    different = [name for name in {**saved, **now} if name not in _FREE and saved.get(name) != now.get(name)]
    if different:
        words = ", ".join(f"{name} {saved.get(name)!r} (now {now.get(name)!r})" for name in different)
        raise ValueError(
            f"config: wanted that of the saved run, got a difference in {words}; to go on with other settings, start a "
            "run from its particles: start=result.particles"
        )


def save_path(
    every: int | None,
    path: str | os.PathLike[str] | None,
    resume: str | os.PathLike[str] | bool | None,
) -> str | os.PathLike[str] | None:
    """Where a run is saved: the arguments of :meth:`~sfpk_kernels.SFPKPruner.run`, checked.

    Raises:
        TypeError, ValueError: a bad ``every``, nothing to write to, or a file that would never be written.
        OSError: the file cannot be written there.
    """
    if every is not None and (isinstance(every, bool) or not isinstance(every, int)):
        raise TypeError(f"save_every: wanted a number of steps or None, got {every!r}")
    if every is not None and every < 1:
        raise ValueError(f"save_every: wanted ≥ 1, got {every}")
    if path is None and not isinstance(resume, bool):
        path = resume
    if path is None and (every is not None or resume is True):
        raise ValueError("save_path: wanted a file to write, got None")
    if path is not None and every is None and not resume:
        raise ValueError(f"save_every: wanted a number of steps beside save_path={os.fspath(path)!r}, got None")
    if path is not None and every is not None:
        check_writable(path, "save_path")
    return path
