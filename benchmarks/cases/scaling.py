"""How times grow: the arithmetic of a step with d and with n, a whole run with its steps K."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfpk_kernels.config import SFPKConfig
from sfpk_kernels.execution import Execution
from sfpk_kernels.naive import naive_sfpk
from sfpk_kernels.search.pruner import SFPKPruner

from ..models import mlp
from ..registry import NAIVE, Call, Case, Op, Provider, Shape
from . import step as cases_step

STEP = next(op for op in cases_step.OPS if op.name == "step")
STEP_PROVIDERS = tuple(p for p in STEP.providers if p.name == NAIVE or "warm" in p.name)
SPARSITY, PARTICLES, BATCH = 0.9, 4, 16


def _not_naive_beyond(most: float) -> tuple[Provider, ...]:
    """The step's providers; the naive one, whose time grows with n²·d, up to a size."""

    def why_not(shape: Shape, device: torch.device) -> str | None:
        too_long = device.type == "cpu" and shape["n"] ** 2 * shape["d"] > most
        return "takes too long at this size" if too_long else None

    return tuple(Provider(p.name, p.make, why_not) if p.name == NAIVE else p for p in STEP_PROVIDERS)


@dataclass
class Run:
    """A model to prune, and its batches."""

    model: nn.Module
    batches: list[Any]  # n · K
    config: SFPKConfig


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(model(batch[0]), batch[1])


def build_run(shape: Shape, device: torch.device) -> Case:
    """A run of K steps on a small MLP; it should keep exactly the count asked for."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = mlp((64, 256, 64, 10)).to(device)
    steps = shape["steps"]
    batches = [
        (torch.randn(BATCH, 64, generator=generator, dtype=torch.float32, device="cpu").to(device),
         torch.randint(10, (BATCH,), generator=generator, dtype=torch.int64, device="cpu").to(device))
        for _ in range(PARTICLES * steps)
    ]  # fmt: skip
    config = SFPKConfig.preset("paper", sparsity=SPARSITY, n_particles=PARTICLES, n_steps=steps)
    d = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    wanted = round((1 - SPARSITY) * d)

    def check(kept: int) -> str | None:
        return None if kept == wanted else f"{kept:,} weights kept instead of {wanted:,}"

    # 8 passes over n·d in each step, as for the op "step"; forward and backward are not counted.
    return Case({**shape, "n": PARTICLES, "d": d}, Run(model, batches, config), 32 * PARTICLES * d * steps, check, 0)


def _our_run(case: Case) -> Call:
    run: Run = case.inputs

    def prune() -> int:
        pruner = SFPKPruner(
            run.model, loss_fn=loss_fn, config=run.config, execution=Execution(energy_mode="sequential")
        )
        n = run.config.n_particles
        for k in range(run.config.n_steps):
            pruner.step(run.batches[k * n : (k + 1) * n])
        return pruner.result().mask.kept

    return prune


def _naive_run(case: Case) -> Call:
    run: Run = case.inputs
    names = [name for name, p in run.model.named_parameters() if p.dim() > 1]
    config = run.config

    def prune() -> int:
        done = naive_sfpk(run.model, loss_fn, run.batches, names, sparsity=config.sparsity,
                          n_particles=config.n_particles, n_steps=config.n_steps)  # fmt: skip
        return int(done.mask.sum())

    return prune


def _along(axis: str, fixed: Shape, values: Callable[[str], tuple[int, ...]]) -> dict[str, tuple[Shape, ...]]:
    sizes = ("quick", "default", "full")
    return {size: tuple({**fixed, axis: value} for value in values(size)) for size in sizes}


D = {"quick": (10_000, 30_000, 100_000), "default": (100_000, 300_000, 1_000_000, 3_000_000),
     "full": (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)}  # fmt: skip
N = {"quick": (1, 2, 4), "default": (1, 2, 4, 8, 16), "full": (1, 2, 4, 8, 16, 32, 64)}
K = {"quick": (1, 2, 4), "default": (5, 10, 20, 40), "full": (5, 10, 20, 40, 80, 160)}

OPS = (
    Op("step_over_d", "all arithmetic of one step over d", _along("d", {"n": 10}, D.__getitem__),
       cases_step.build_step, _not_naive_beyond(1.1e8), "scaling", "d"),
    Op("step_over_n", "all arithmetic of one step over n",
       {**_along("n", {"d": 1_000_000}, N.__getitem__), "quick": tuple({"n": n, "d": 30_000} for n in N["quick"])},
       cases_step.build_step, _not_naive_beyond(1.1e8), "scaling", "n"),
    Op("run_over_steps", "a whole run (small MLP, 4 particles, batch 16) over its steps",
       _along("steps", {}, K.__getitem__), build_run,
       (Provider(NAIVE, _naive_run), Provider("ours", _our_run)), "scaling", "steps"),
)  # fmt: skip
