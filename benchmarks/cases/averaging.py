"""Averages of gradients over steps, with cosines and effective dimensions; ours, and torch operator by operator."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sfpk_kernels.ops import average_gradients_

from ..registry import NAIVE, RESNET50, Call, Case, Op, Provider, Seeded, Shape, ours

BETA = 0.8
GATE = 1e-5


@dataclass
class Inputs:
    """Gradients, their averages behind the step before, and the weights they are measured with."""

    grads: Tensor  # (n, d) fp32
    averages: Tensor  # (n, d) fp32
    theta: Tensor  # (d,) fp32

    @cached_property
    def right(self) -> tuple[Tensor, Tensor]:  # (n, d) fp32, (2, n) fp64
        """The averages, and what is measured, by the reference."""
        after = self.grads.clone()
        stats = average_gradients_(after, self.averages, BETA, weights=self.theta, backend="reference")
        return after, torch.stack(list(stats))

    def forget(self) -> None:
        """Free what only the gate needs."""
        self.__dict__.pop("right", None)


def build(shape: Shape, device: torch.device) -> Case:
    """Gradients that agree with their averages in part."""
    n, d = shape["n"], shape["d"]
    random = Seeded(device)
    averages = random.randn(n, d)
    inputs = Inputs(random.randn(n, d) - 0.3 * averages, averages, random.randn(d))

    def check(result: tuple[Tensor, Tensor]) -> str | None:
        for name, found, right in zip(("averages", "measures"), result, inputs.right, strict=True):
            error = float((found - right).norm() / right.norm())
            if not error < GATE:
                return f"the {name} are off by {error:.1e} (relative), allowed is {GATE:.0e}"
        return None

    # Gradients and averages are read, the gradients written.
    return Case(shape, inputs, 3 * 4 * n * d + 4 * d, check, 8 * n * d + 4 * d, inputs.forget)


def _of_ours(case: Case, backend: str) -> Call:
    """In place on a copy made once: from call to call the gradients come closer to the averages."""
    inputs: Inputs = case.inputs
    grads = inputs.grads.clone()

    def run() -> Any:
        stats = average_gradients_(grads, inputs.averages, BETA, weights=inputs.theta, backend=backend)
        return grads, torch.stack(list(stats))

    return run


def _operators(case: Case) -> Call:
    """Each sum on its own, in fp64; in place as ours."""
    inputs: Inputs = case.inputs
    grads = inputs.grads.clone()

    def run() -> Any:
        a, b = grads.double() * inputs.theta, inputs.averages.double() * inputs.theta
        cosines = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
        dimensions = a.square().sum(1).square() / (a.shape[1] * a.pow(4).sum(1))
        grads.lerp_(inputs.averages, BETA)
        return grads, torch.stack([cosines, dimensions])

    return run


SHAPES: dict[str, tuple[Shape, ...]] = {
    "quick": ({"n": 1, "d": 100_000},),
    "default": ({"n": 1, "d": 10_000_000},),
    "full": tuple({"n": n, "d": 10**6} for n in (1, 10)),
    "cuda default": (RESNET50,),
    "cuda full": ({"n": 1, "d": 10**7},),
}
OPS = (
    Op("average_gradients", "averages of gradients, cosines and effective dimensions", SHAPES, build, (
        Provider(NAIVE, _operators),
        *ours("averaging", _of_ours, backends=("cpp", "triton", "reference"), largest_reference=10_000_000),
    )),
)  # fmt: skip
