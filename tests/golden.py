"""Masks of twenty runs, to be the same before and after a change that must not change any.

    python -m tests.golden record FILE    before it
    python -m tests.golden compare FILE   after it: exit code 1 where one differs

Another machine, thread count or torch rounds differently, so FILE belongs to one of each.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks import models
from sfpk_kernels import GradualPruner, RetrainConfig, SFPKConfig, SFPKPruner, baselines, prune

from .settings import both

Batches = list[Any]


def mlp() -> tuple[nn.Module, Batches]:
    return models.mlp((64, 96, 32, 10), dropout=0.2), [models.images(8, 1)(16) for _ in range(6)]


def convnet() -> tuple[nn.Module, Batches]:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3, groups=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip
    return model, [models.images(8)(16) for _ in range(6)]


def transformer() -> tuple[nn.Module, Batches]:
    model = nn.Sequential(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(16 * 5, 4)
    )
    return model, [(torch.randn(8, 5, 16), torch.randint(4, (8,))) for _ in range(6)]


MODELS: dict[str, Callable[[], tuple[nn.Module, Batches]]] = {
    "mlp": mlp, "convnet": convnet, "transformer": transformer,
}  # fmt: skip

RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {  # model, preset, settings
    **{f"{preset} {model}": (model, preset, {}) for preset in ("population", "paper", "authors") for model in MODELS},
    "authors, all kept": ("mlp", "authors", {"early_stop": False, "sparsity": 0.95}),
    "hard vote": ("mlp", "population", {"momentum": 0.3, "vote": "hard", "vote_ratio": 0.5}),
    "masked vote": ("convnet", "population", {"momentum": 0.3, "vote": "masked"}),
    "soft vote": ("transformer", "population", {"momentum": 0.3, "vote_ratio": 0.5}),
    "lean": ("mlp", "population", {"update": "gauss_seidel"}),
    "weighted kernel": ("convnet", "population", {"kernel": "weighted_rbf", "polarizer": "mask_normalized"}),
    "fp16 particles": ("mlp", "population", {"particle_dtype": "float16"}),
    "bf16 particles": ("convnet", "population", {"particle_dtype": "bfloat16", "momentum": 0.1}),
    "bf16 model": ("transformer", "population", {"dtype": "bf16"}),
    "train mode": ("mlp", "population", {"model_mode": "train"}),
    "running statistics": ("convnet", "population", {"bn": "running", "microbatch": 8}),
    "vmap": ("mlp", "population", {"energy_mode": "vmap", "chunk_size": 3}),
    "one particle": ("transformer", "population", {"n_particles": 1}),
    "linear schedule": ("mlp", "paper", {"schedule": "linear", "density": "l2_squared", "radius": 3.0}),
}


def made(name: str) -> tuple[nn.Module, Batches]:
    torch.manual_seed(0)
    return MODELS[name]()


def settings_of(preset: str, **settings: Any) -> dict[str, Any]:
    settings = {
        "sparsity": 0.8,
        "n_particles": 4,
        "n_steps": 12,
        "energy_mode": "sequential",
        "update": "jacobi",
        **settings,
    }
    return both(SFPKConfig.preset, preset, **settings)


def digest(*tensors: torch.Tensor) -> str:
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def fingerprints() -> Iterator[tuple[str, str]]:
    """(run, mask and particles in one word), one after the other."""
    for name, (model_name, preset, settings) in RUNS.items():
        model, batches = made(model_name)
        result = prune(model, batches, **settings_of(preset, **settings))
        yield name, f"{result.mask.fingerprint()[:16]} {digest(result.particles.float())}"
    model, batches = made("convnet")
    chosen = settings_of("population", momentum=0.2)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "run")
        result = prune(model, batches, **chosen, waypoints=[0.3, 0.6], save_every=5, save_path=path)
        steps = SFPKPruner(model, **chosen)
        for k in range(5):
            steps.step([batches[(4 * k + i) % len(batches)] for i in range(4)])
        steps.save(path)
        resumed = prune(model, batches, **chosen, resume=path)
    masks = [waypoint.mask.fingerprint()[:8] for waypoint in result.waypoints]
    yield "waypoints", f"{result.mask.fingerprint()[:16]} {' '.join(masks)}"
    yield "resumed", f"{resumed.mask.fingerprint()[:16]} {digest(resumed.particles)}"
    yield (
        "further",
        prune(model, batches, **settings_of("population", sparsity=0.95), start=result.particles).mask.fingerprint()[
            :16
        ],
    )
    model, batches = made("mlp")
    gradual = GradualPruner(
        model, batches, **settings_of("population"), shots=3, retrain=RetrainConfig(3, lr=0.02)
    ).run()
    yield "gradual", f"{gradual.mask.fingerprint()[:16]} {digest(*model.state_dict().values())}"
    model, batches = made("convnet")
    yield "magnitude", baselines.magnitude(model, 0.8).fingerprint()[:16]
    yield "snip", baselines.snip(model, batches, 0.8).fingerprint()[:16]


def main(words: list[str]) -> int:
    if len(words) != 2 or words[0] not in ("record", "compare"):
        print(__doc__, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = dict(fingerprints())
    if words[0] == "record":
        with open(words[1], "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
        print(f"{len(found)} runs recorded")
        return 0
    with open(words[1], encoding="utf-8") as file:
        before = json.load(file)
    differing = [name for name in before.keys() | found.keys() if before.get(name) != found.get(name)]
    for name in sorted(differing):
        print(f"{name}: {before.get(name)} before, {found.get(name)} now")
    print(f"{len(found) - len(differing)} of {len(found)} runs are the same")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
