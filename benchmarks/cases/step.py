"""Polarize + apply, and all arithmetic of one step: everything a step does but forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sfpk_kernels._dispatch import where_present
from sfpk_kernels.ops import Cut, TransitionStats, masked_weights, topk_threshold, transition_

from ..registry import NAIVE, RESNET50, Call, Case, Op, Provider, Seeded, Shape, ours
from ..rivals import transition as rivals
from .masking import SCORE, kept_weights, without_ties
from .masking import Inputs as Masks
from .masking import inputs_of as masks_of
from .transition import PLAIN, RADIUS, REPULSION, STEP, wrong_move
from .transition import Inputs as Moves

LAYERS = 20


def build_polarize(shape: Shape, device: torch.device) -> Case:
    """Particles in, masked weights out: values read for the selection and for the result, which is written."""
    inputs, n, d = masks_of(shape, device), shape["n"], shape["d"]
    right = kept_weights(inputs)

    def check(result: Tensor) -> str | None:
        differs = without_ties(inputs, result) != right
        return f"{int(differs.sum()):,} of {n * d:,} entries differ" if bool(differs.any()) else None

    return Case(shape, inputs, 12 * n * d + 12 * d, check, 9 * n * d + 8 * d)


def authors_way(masks: Masks, particles: Tensor) -> Tensor:
    """Per particle: score and k-th value; per layer: compare, multiply."""
    d = particles.shape[1]
    borders = [d * i // LAYERS for i in range(LAYERS + 1)]
    for i, particle in enumerate(particles):
        score = particle.abs() * masks.saliency
        threshold = score.kthvalue(d - masks.k + 1).values
        for a, b in pairwise(borders):
            masks.out[i, a:b] = masks.theta[a:b] * (score[a:b] >= threshold).to(torch.float32)
    return masks.out


def _topk_and_scatter(masks: Masks) -> Tensor:
    """Algorithm 3's polarizer: ``torch.topk`` per particle."""
    for i, particle in enumerate(masks.particles):
        best = (particle.abs() * masks.saliency).topk(masks.k, sorted=False).indices
        mask = torch.zeros_like(particle).scatter_(0, best, 1.0)
        torch.mul(masks.theta, mask, out=masks.out[i])
    return masks.out


def _polarize(warm: bool) -> Callable[[Case, str], Call]:
    def make(case: Case, backend: str) -> Call:
        masks: Masks = case.inputs
        guess = masks.cut.threshold[:, 0] * 1.02 if warm else None
        return lambda: select_and_apply(masks, masks.particles, guess, backend)[0]

    return make


def select_and_apply(masks: Masks, particles: Tensor, guess: Cut | Tensor | None, backend: str) -> tuple[Tensor, Cut]:
    """What the pruner does before the energies."""
    ranking: dict[str, Any] = {"score": SCORE, "saliency": masks.saliency}
    cut = topk_threshold(particles, masks.k, guess=guess, backend=backend, **ranking)
    return masked_weights(masks.theta, particles, cut=cut, out=masks.out, backend=backend, **ranking), cut


@dataclass
class Step:
    """Inputs of a whole step."""

    moves: Moves
    masks: Masks


def build_step(shape: Shape, device: torch.device) -> Case:
    """Transition, selection and masked weights: 8 passes of n·d·4 bytes and θ twice."""
    n, d = shape["n"], shape["d"]
    masks = masks_of(shape, device)
    grads = Seeded(device).randn(n, d)
    inputs = Step(Moves(masks.particles, grads, dict(PLAIN)), masks)
    expected = kept_weights(masks)

    def check(result: tuple[Tensor, Tensor]) -> str | None:
        weights, moved = result
        differs = without_ties(masks, weights) != expected
        if bool(differs.any()):
            return f"{int(differs.sum()):,} of {n * d:,} masked weights differ"
        return wrong_move(inputs.moves, moved)

    return Case(shape, inputs, 32 * n * d + 8 * d, check, 13 * n * d + 8 * d, inputs.moves.forget)


def _step(warm: bool) -> Callable[[Case, str], Call]:
    def make(case: Case, backend: str) -> Call:
        inputs: Step = case.inputs
        particles = inputs.masks.particles.clone()
        state: TransitionStats | None = None
        cut: Cut | None = None
        moves = where_present(backend)  # on GPUs the transition is Triton's alone

        def run() -> tuple[Tensor, Tensor]:
            nonlocal state, cut
            weights, found = select_and_apply(inputs.masks, particles, cut, backend)
            cut = found if warm else None
            state = transition_(particles, inputs.moves.grads, state=state, backend=moves, **inputs.moves.options)
            return weights, particles

        return run

    return make


def _naive_step(case: Case) -> Call:
    inputs: Step = case.inputs

    def run() -> tuple[Tensor, Tensor]:
        weights = authors_way(inputs.masks, inputs.masks.particles)
        return weights, rivals.naive(inputs.moves.masks, inputs.moves.grads, STEP, RADIUS, REPULSION)

    return run


SHAPES: dict[str, tuple[Shape, ...]] = {
    "quick": ({"n": 4, "d": 100_000},),
    "default": ({"n": 10, "d": 2_000_000},),
    "full": ({"n": 10, "d": 1_000_000}, {"n": 10, "d": 4_000_000}, {"n": 32, "d": 1_000_000}),
    "cuda default": (RESNET50,),
    "cuda full": ({"n": 10, "d": 1_000_000}, RESNET50),
}
OPS = (
    Op("polarize_apply", "selection and masked weights together", SHAPES, build_polarize, (
        Provider(NAIVE, lambda case: lambda: authors_way(case.inputs, case.inputs.particles)),
        Provider("topk and scatter", lambda case: lambda: _topk_and_scatter(case.inputs)),
        *ours("selection", _polarize(warm=False)),
        *ours("selection", _polarize(warm=True), "warm", ("cpp", "cuda", "triton")),
    )),
    Op("step", "all arithmetic of one step: transition, selection, masked weights", SHAPES, build_step, (
        Provider(NAIVE, _naive_step),
        *ours("selection", _step(warm=False)),
        *ours("selection", _step(warm=True), "warm", ("cpp", "cuda", "triton")),
    )),
)  # fmt: skip
