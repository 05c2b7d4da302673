"""Peak memory of pruning, in a process of its own: ``python -m benchmarks.peak MODEL PROVIDER OPTIONS``.

MODEL is a name of :data:`.models.WORKLOADS`, PROVIDER ``"naive"`` or ``"ours"``, OPTIONS a JSON object of SFPKConfig's
fields (and ``device``). Prints JSON: ``measured`` bytes beyond what was there before, of ours also the plan's
``predicted`` ones.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sfpk_kernels.compat.fields import separated
from sfpk_kernels.config import SFPKConfig
from sfpk_kernels.modeling.batches import default_loss
from sfpk_kernels.modeling.state import guarded
from sfpk_kernels.naive import naive_sfpk
from sfpk_kernels.search.pruner import SFPKPruner

from .models import WORKLOADS, images, mlp

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def can_measure() -> bool:
    """Whether the system lets a process set back its peak."""
    return _CLEAR.exists()


def measure(model: str, provider: str, **options: Any) -> dict[str, Any]:
    """Run it in a new process.

    Raises:
        RuntimeError: that failed; the message holds its error.
    """
    command = [sys.executable, "-m", "benchmarks.peak", model, provider, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """What the new process does."""
    name, provider, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    device = torch.device(options.pop("device", "cpu"))
    method, execution = separated(options)
    config = SFPKConfig.preset("paper", **{"sparsity": 0.9, "n_particles": 10, "n_steps": 1, **method})
    torch.manual_seed(0)
    work = WORKLOADS[name]
    model = work.build().to(device)
    batches = [
        work.make_batch(work.gpu_batch if device.type == "cuda" else work.batch)
        for _ in range(config.n_particles * config.n_steps)
    ]
    # What torch and the extension load once is none of the run's.
    tiny = mlp((64, 8, 10)).to(device)
    SFPKPruner(tiny, config=SFPKConfig(0.5, n_particles=2, n_steps=1)).run([images(8, 1)(4)])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # forgets the peak so far
        before = _status("VmRSS")
    found: dict[str, Any] = {}
    if provider == "naive":
        run_naive(model, batches, config)
    else:
        plan = SFPKPruner(model, config=config, execution=execution).run(batches).plan
        found = {"predicted": plan.peak_bytes, "mode": plan.choice.mode, "update": plan.update, "parts": plan.parts}
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _status("VmHWM")
    print(json.dumps({"measured": peak - before, **found}))


def run_naive(model: torch.nn.Module, batches: list[Any], config: SFPKConfig) -> torch.Tensor:
    """Algorithm 3 as printed, with the settings of a paper preset; returns the last particles (n, d)."""
    from sfpk_kernels.coordinates.flat import Coordinates

    names = [tensor.name for tensor in Coordinates(model).tensors]
    with guarded(model, bn=config.bn, training=config.model_mode == "train"):
        run = naive_sfpk(
            model,
            default_loss,
            batches,
            names,
            sparsity=config.sparsity,
            n_particles=config.n_particles,
            n_steps=config.n_steps,
            radius=config.radius,
            repulsion=config.repulsion,
        )
    return run.trajectory[-1]


def _status(name: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
