"""The transition in C++: fused (csrc/cpu/transition.cpp), in two passes over the particles, and in stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _extension
from .spec import Columns, Shard, Step, TransitionSpec, TransitionStats

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def why_not(masks: Tensor) -> str | None:
    """Why the kernel cannot run on these particles."""
    if masks.device.type != "cpu":
        return f"it runs on the CPU, the particles are on {masks.device}"
    if masks.dtype not in _FLOATS:
        return f"it takes fp32, fp16 and bf16 particles, these are {str(masks.dtype).removeprefix('torch.')}"
    if masks.shape[1] > 1 and masks.stride(1) != 1:
        return f"it takes rows without gaps, these have a column stride of {masks.stride(1)}"
    if masks.shape[0] > 1 and abs(masks.stride(0)) < masks.shape[1]:
        return f"it takes rows that do not overlap, these have a row stride of {masks.stride(0)}"
    return _extension.unavailable()


def no_extension(sums: Tensor) -> str | None:
    """Why the algebra of n particles cannot run on these sums."""
    if sums.device.type != "cpu":
        return f"it runs on the CPU, the sums are on {sums.device}"
    return _extension.unavailable()


def transition_(step: Step) -> TransitionStats:
    """As :func:`.reference.transition_`."""
    masks, grads, spec, columns, residual, state = step
    _check_residual(residual)
    # fmt: off
    stats = torch.ops.sfpk_cpp.transition_(
        masks, _rows(grads), *_vectors(columns, spec), residual, [] if state is None else list(state), spec.step,
        spec.radius, spec.repulsion, spec.weighted, spec.squared, spec.target_density, spec.consensus, spec.eps,
        spec.key, spec.skip, spec.only, spec.angle,
    )
    # fmt: on
    return TransitionStats(*stats)


def measure(masks: Tensor, columns: Columns, residual: Tensor | None, spec: TransitionSpec) -> Tensor:
    """As :func:`.reference_stages.measure`."""
    _check_residual(residual)
    sums: Tensor = torch.ops.sfpk_cpp.transition_measure(masks, residual, *_vectors(columns, spec)[1:])
    return sums


def sample(step: Step, shard: Shard) -> Tensor:
    """As :func:`.reference_stages.sample`."""
    result: Tensor = torch.ops.sfpk_cpp.transition_sample(*_gradients(step, shard))
    return result


def sums(step: Step, shard: Shard, sample: Tensor) -> Tensor:
    """As :func:`.reference_stages.sums`."""
    grams = step.spec.retracts_after_pull(step.masks.shape[0])
    result: Tensor = torch.ops.sfpk_cpp.transition_sums(*_gradients(step, shard), sample, grams)
    return result


def plan(
    state: TransitionStats, sample: Tensor, sums: Tensor, spec: TransitionSpec, shard: Shard
) -> tuple[Tensor, Tensor]:
    """As :func:`.reference_stages.plan`."""
    # fmt: off
    coefficients, cosines = torch.ops.sfpk_cpp.transition_plan(
        list(state), sample, sums, _total(shard), shard.total is not None, spec.step, spec.radius, spec.weighted,
        spec.squared, spec.target_density, spec.consensus, spec.eps, spec.skip, spec.only, spec.angle,
    )
    # fmt: on
    return coefficients, cosines


def apply_(step: Step, shard: Shard, coefficients: Tensor) -> Tensor:
    """As :func:`.reference_stages.apply_`."""
    spec = step.spec
    result: Tensor = torch.ops.sfpk_cpp.transition_apply_(
        *_gradients(step, shard), coefficients, spec.consensus, spec.key, shard.first_column
    )
    return result


def stats(sums: Tensor, spec: TransitionSpec, shard: Shard) -> tuple[Tensor, ...]:
    """As :func:`.reference_stages.stats`."""
    return tuple(torch.ops.sfpk_cpp.transition_stats(sums, _total(shard), spec.weighted, spec.squared))


def _gradients(step: Step, shard: Shard) -> tuple[Any, ...]:
    """What the C++ stages of particles and gradients take first."""
    masks, grads, spec, columns, residual, state = step
    _check_residual(residual)
    mix = None
    if spec.repels(masks.shape[0]):
        assert state is not None
        mix = torch.ops.sfpk_cpp.transition_mix(
            state.saliency_norms, state.sq_distances, shard.d, spec.repulsion, spec.weighted
        )
    return (masks, residual, _rows(grads), *_vectors(columns, spec), mix, spec.only)


def _total(shard: Shard) -> float:
    """D, the governed weights of all shards."""
    return float(shard.d if shard.total is None else shard.total)


def _rows(grads: Tensor) -> Tensor:
    """Gradients as the kernels read them: rows without gaps, at most four bytes."""
    if grads.dtype not in _FLOATS:
        grads = grads.float()
    return grads.contiguous() if grads.shape[1] > 1 and grads.stride(1) != 1 else grads


def _vectors(columns: Columns, spec: TransitionSpec) -> tuple[Tensor | None, ...]:
    """weights, saliency and sizes in fp32, those that are read."""
    weights, saliency, sizes = (t if t is None else t.float().contiguous() for t in columns)
    return weights, saliency if spec.weighted else None, sizes


def _check_residual(residual: Tensor | None) -> None:
    if residual is not None and residual.shape[1] > 1 and residual.stride(1) != 1:
        raise ValueError("transition_: residual: wanted rows without gaps for backend 'cpp', got a column stride")
