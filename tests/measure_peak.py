"""Prunes a model in a process of its own; prints predicted and measured peak bytes: ``python -m tests.measure_peak``.

Arguments: a name of ``MODELS`` and a JSON object of SFPKConfig's fields.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch

from sfpk_kernels import SFPKConfig, SFPKPruner
from sfpk_kernels.batches import default_loss
from sfpk_kernels.bench.models import Gpt, Vit, images, mlp, resnet, texts

MODELS = {
    "mlp": (lambda: mlp((64, 2048, 2048, 10)), images(8, channels=1), 64),
    "resnet": (lambda: resnet(20, 64), images(32), 16),
    "vit": (lambda: Vit(256, 6, 4, image=64, patch=8), images(64), 16),
    "gpt": (lambda: Gpt(512, 6, 8, vocabulary=8000, tokens=64), texts(64, 8000), 8),
}


def main():
    kind, options = sys.argv[1], json.loads(sys.argv[2])
    torch.manual_seed(0)
    build, make, samples = MODELS[kind]
    config = SFPKConfig(0.9, **{"n_particles": 5, "n_steps": 2, **options})
    model, batches = build(), [make(samples) for _ in range(config.n_particles)]
    # What torch and the extension load once is none of the run's.
    default_loss(model, batches[0]).backward()
    model.zero_grad(set_to_none=True)
    SFPKPruner(mlp((64, 8, 10)), None, SFPKConfig(0.5, n_particles=2, n_steps=1)).run([images(8, 1)(4)])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    result = SFPKPruner(model, None, config).run(batches)
    measured = _status("VmHWM") - before
    plan = result.plan
    print(json.dumps({"predicted": plan.peak_bytes, "measured": measured, "mode": plan.choice.mode, **plan.parts}))


def _status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
