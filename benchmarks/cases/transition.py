"""The transition: naive, vectorised eager, torch.compile of it, KeOps for the RBF part, ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sfpk_kernels.ops import TransitionStats, transition_

from ..registry import NAIVE, RESNET50, Call, Case, Op, Provider, Seeded, Shape, at_most, compiled, ours
from ..rivals import transition as rivals

STEP, RADIUS, REPULSION = 1e-3, 2.0, 0.2
PLAIN = {"step": STEP, "radius": RADIUS, "repulsion": REPULSION}
# Relative error of the move, fp32 against the fp64 reference; the textbook forms lose more digits than ours.
GATE = 1e-3


@dataclass
class Inputs:
    """Particles near 1, gradients, and what each kind of step needs besides."""

    masks: Tensor  # (n, d) fp32
    grads: Tensor  # (n, d) fp32
    options: dict[str, Any]  # of transition_

    @cached_property
    def exact(self) -> Tensor:  # (n, d) fp64
        """The particles one step on, by the reference: seconds at a large d, so once for all providers."""
        moved = self.masks.double()
        transition_(moved, self.grads.double(), backend="reference", **self.options)
        return moved

    def forget(self) -> None:
        """Free what only the gate needs."""
        self.__dict__.pop("exact", None)


def build(options: Callable[[Seeded, int], dict[str, Any]]) -> Callable[[Shape, torch.device], Case]:
    """Makes cases of steps with these further arguments of ``transition_``."""

    def make(shape: Shape, device: torch.device) -> Case:
        n, d = shape["n"], shape["d"]
        random = Seeded(device)
        inputs = Inputs(1 - 0.05 * random.rand(n, d), random.randn(n, d), {**PLAIN, **options(random, d)})

        def check(result: Tensor) -> str | None:
            return wrong_move(inputs, result)

        # M and G are read twice, M is written once: nothing is known of a step's direction before all was seen.
        return Case(shape, inputs, 5 * 4 * n * d, check, 8 * n * d, inputs.forget)

    return make


def wrong_move(inputs: Inputs, result: Tensor) -> str | None:
    """What is wrong with particles that moved one step, by the fp64 reference."""
    exact = inputs.exact
    if result.shape != exact.shape:
        return f"shape {tuple(result.shape)} instead of {tuple(exact.shape)}"
    move = (exact - inputs.masks).norm()
    error = float((exact - result).norm() / move)
    return None if error < GATE else f"the move is off by {error:.1e} (relative), allowed is {GATE:.0e}"


def step_of_ours(case: Case, backend: str) -> Call:
    """In place on a copy made once, the state handed on as in a run."""
    inputs: Inputs = case.inputs
    masks = inputs.masks.clone()
    state: TransitionStats | None = None

    def run() -> Tensor:
        nonlocal state
        state = transition_(masks, inputs.grads, state=state, backend=backend, **inputs.options)
        return masks

    return run


def rival(function: Callable[..., Tensor]) -> Callable[[Case], Call]:
    """A provider's ``make`` from a function of (masks, grads, step, radius, repulsion)."""

    def make(case: Case) -> Call:
        inputs: Inputs = case.inputs
        return lambda: function(inputs.masks, inputs.grads, STEP, RADIUS, REPULSION)

    return make


def compiled_eager(case: Case) -> Call:
    """torch.compile for this one shape."""
    return rival(torch.compile(rivals.eager, dynamic=False))(case)


def no_keops(shape: Shape, device: torch.device) -> str | None:
    """Why KeOps cannot run here, or None."""
    return "pykeops is not installed (pip install pykeops)" if importlib.util.find_spec("pykeops") is None else None


RIVALS = (
    # On a CPU its time grows with n²·d and reaches minutes.
    Provider(NAIVE, rival(rivals.naive), lambda shape, device: (
        "takes minutes at this size" if device.type == "cpu" and shape["n"] ** 2 * shape["d"] > 500_000_000 else None)),
    Provider("eager", rival(rivals.eager), lambda shape, device: at_most(1e8)(shape, device) if device.type == "cpu"
             else None),
    compiled(compiled_eager),
    Provider("keops + eager", rival(rivals.keops), no_keops),
)  # fmt: skip

SHAPES = {
    "quick": ({"n": 4, "d": 100_000},),
    "default": ({"n": 10, "d": 1_000_000}, {"n": 10, "d": 4_000_000}),
    "full": tuple({"n": n, "d": d} for d in (10**5, 10**6, 10**7) for n in (1, 4, 10, 32)),
    "cuda default": ({"n": 10, "d": 1_000_000}, RESNET50),
    "cuda full": (*({"n": n, "d": d} for d in (10**5, 10**6, 10**7) for n in (1, 4, 10, 32)), RESNET50),
}
VARIANT_SHAPES = {
    "quick": ({"n": 4, "d": 100_000},),
    "default": ({"n": 10, "d": 1_000_000},),
    "full": ({"n": 10, "d": 4_000_000}, {"n": 32, "d": 1_000_000}),
    "cuda default": (RESNET50,),
    "cuda full": ({"n": 32, "d": 1_000_000}, RESNET50),
}

OPS = (
    Op("transition", "one step of all particles, kernel rbf", SHAPES, build(lambda random, d: {}),
       (*RIVALS, *ours("transition", step_of_ours, backends=("cpp", "triton", "reference")))),
    Op("transition_weighted", "one step, kernel weighted_rbf", VARIANT_SHAPES,
       build(lambda random, d: {"kernel": "weighted_rbf", "saliency": random.rand(d) + 0.1}),
       ours("transition", step_of_ours, backends=("cpp", "triton", "reference"))),
    Op("transition_full", "one step with retraction and consensus", VARIANT_SHAPES,
       build(lambda random, d: {"target_density": 0.9, "consensus": 0.3}),
       ours("transition", step_of_ours, backends=("cpp", "triton", "reference"))),
)  # fmt: skip
