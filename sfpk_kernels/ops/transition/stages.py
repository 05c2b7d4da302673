"""The stages of a transition as ops of their own, with a seam behind each sum over coordinates.

Where the coordinates are split over shards (each holding all n particles, some of the d columns), every shard calls
the stages on what it holds, and what it gets from a sum is added over the shards (all-reduced) before it goes on::

    state = stats(add(measure(masks, spec, columns)), spec, shard)  # once, before the first step
    step = Step(masks, grads, spec, columns, state=state)
    lean = add(sample(step, shard))
    total = add(sums(step, shard, lean))
    move = plan(state, lean, total, spec, shard)                    # n × n numbers: the same on every shard
    state = stats(add(apply_(step, shard, move)), spec, shard, cosines=move.cosines)

With one shard that is :func:`sfpk_kernels.ops.transition_`, bit for bit in C++; over several the same within the
rounding of sums. A shard may have no columns at all. All stages of a step take the same spec and the same shard.

C++ runs the stages on the CPU, for fp32, fp16 and bf16 particles; on a GPU Triton runs those that read such particles,
and the n × n algebra of plan and stats is plain PyTorch there, which does not wait for the device unless
``nonfinite="raise"``. For fp64 particles all is plain PyTorch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks as check
from . import _arguments as arguments
from . import _stage_ops
from .spec import Columns, Shard, Step, TransitionSpec, TransitionStats, check_integer

BACKENDS = _stage_ops.BACKENDS
_NONE = Columns()


class Plan(NamedTuple):
    """What :func:`apply_` does with each particle: m' = m + keep m + radial s + tangential (g - slope s), s = c ⊙ m."""

    coefficients: Tensor  # (6, n) fp64: slope, keep, radial, tangential, what a pull takes (minus one), 1 if it stays
    cosines: Tensor  # (n,) fp64, as in TransitionStats


def measure(
    masks: Tensor,  # (n, d) fp32, fp64, fp16, or bf16 with residual
    spec: TransitionSpec,
    columns: Columns = _NONE,  # (d,) each
    *,
    residual: Tensor | None = None,  # (n, d) bf16
    backend: str | None = None,
) -> Tensor:
    """Sums over the columns of particles as they are, to be added over the shards.

    Returns:
        (4 + n, n) fp64: Σ m², Σ c m², Σ c² m² and Σ a m² (zeros for kernel "rbf") per particle; then (n, n) numbers p,
        of which the upper triangle counts, with p_ii + p_jj - 2 p_ij = q_ij, the squared distance of two particles.

    Raises:
        TypeError, ValueError: as :func:`sfpk_kernels.ops.transition_` for what is given.
    """
    op = "transition_measure"
    spec = spec.checked(op)
    arguments.check_particles(op, masks, residual, least=0)
    arguments.check_columns(op, masks, columns, spec.kernel)
    arguments.refuse_derivatives(op, columns, [("masks", masks)])
    sums: Tensor = torch.ops.sfpk.transition_measure(masks, *columns, residual, *spec, backend or "")
    return sums


def stats(
    sums: Tensor,  # (4 + n, n) fp64, of measure or apply_, over all shards
    spec: TransitionSpec,
    shard: Shard,
    *,
    cosines: Tensor | None = None,  # (n,) of the plan; None for zeros
    backend: str | None = None,
) -> TransitionStats:
    """The statistics of all particles, from sums over all coordinates.

    Raises:
        TypeError, ValueError: sums of another dtype or shape, or a shard that does not fit them.
    """
    op = "transition_stats"
    spec = spec.checked(op)
    n = _particles_of(op, "sums", sums)
    check.has_shape(op, "sums", sums, (4 + n, n))
    _check_shard(op, shard, sums.device)
    found = torch.ops.sfpk.transition_stats(sums, *spec, *shard, backend or "")
    return TransitionStats._make([*found, sums.new_zeros(n) if cosines is None else cosines])


def sample(step: Step, shard: Shard, *, backend: str | None = None) -> Tensor:
    """How far g leans on the slope s = c ⊙ m, from some columns; to be added over the shards.

    :func:`sums` subtracts that part of s from g, which keeps the digits of what is left where they are nearly parallel.

    Returns:
        (2, n) fp64: Σ c s g and Σ c s² per particle.

    Raises:
        TypeError, ValueError: as :func:`sfpk_kernels.ops.transition_` for what is given.
    """
    given = _given("transition_sample", step, shard)
    found: Tensor = torch.ops.sfpk.transition_sample(*given, backend or "")
    return found


def sums(
    step: Step,
    shard: Shard,
    sample: Tensor,  # (2, n) fp64, over all shards
    *,
    backend: str | None = None,
) -> Tensor:
    """The one pass over particles and gradients that a step needs before it can move; to be added over the shards.

    Returns:
        (8, n) fp64, per particle: e·e, e·s, e·u, u·u, u·s, c u·u, c s·u, c s·s of e = -∂L/∂m, s = c ⊙ m and
        u = e + repulsion - lean s; the last three count with sizes. Where particles are scaled again behind a pull
        (consensus and a target density) (8 + 6n, n): behind them the (n, n) products of particles i and j, m·cm, cm·u,
        u·cu, cm·cm, ccm·u, ccm·cm, the last three only with sizes; of all but cm·u and ccm·u the upper triangle counts.

    Raises:
        TypeError, ValueError: as :func:`sfpk_kernels.ops.transition_` for what is given.
    """
    op = "transition_sums"
    given = _given(op, step, shard)
    _check_numbers(op, "sample", sample, (2, step.masks.shape[0]), step.masks.device)
    found: Tensor = torch.ops.sfpk.transition_sums(*given, sample, backend or "")
    return found


def plan(
    state: TransitionStats,
    sample: Tensor,  # (2, n) fp64, over all shards
    sums: Tensor,  # (8, n) or (8 + 6n, n) fp64, over all shards
    spec: TransitionSpec,
    shard: Shard,
    *,
    backend: str | None = None,
) -> Plan:
    """What the step does with each particle, from n × n numbers alone: eq. 8, the retraction, the pull to the mean.

    A gradient that is not finite shows in the sums, on every shard alike: with ``nonfinite="skip"`` its particle stays,
    with ``"hold"`` all stay, its cosine is NaN.

    Raises:
        TypeError, ValueError: sums of another dtype or shape; with ``nonfinite="raise"`` a gradient that is not finite,
            before anything has moved.
    """
    op = "transition_plan"
    spec = spec.checked(op)
    n = _particles_of(op, "sample", sample)
    arguments.check_state(op, state, n, sums.device)
    _check_numbers(op, "sample", sample, (2, n), sums.device)
    _check_numbers(op, "sums", sums, (8 + 6 * n if spec.retracts_after_pull(n) else 8, n), sums.device)
    _check_shard(op, shard, sums.device)
    return Plan(*torch.ops.sfpk.transition_plan(list(state), sample, sums, *spec, *shard, backend or ""))


def apply_(
    step: Step,  # its masks and residual are changed in place
    shard: Shard,
    plan: Plan,
    *,
    backend: str | None = None,
) -> Tensor:
    """Move the particles of this shard as planned, reading them and their gradients a second time.

    fp16 particles are rounded by random bits of row and column among all coordinates (``shard.first_column``), so that
    they do not depend on where the shards begin.

    Returns:
        (4 + n, n) fp64: the sums of :func:`measure` of the moved particles; to be added over the shards.

    Raises:
        TypeError, ValueError: as :func:`sfpk_kernels.ops.transition_` for what is given.
    """
    op = "transition_apply_"
    given = _given(op, step, shard)
    _check_numbers(op, "plan", plan.coefficients, (6, step.masks.shape[0]), step.masks.device)
    found: Tensor = torch.ops.sfpk.transition_apply_(*given, plan.coefficients, backend or "")
    return found


def _given(op: str, step: Step, shard: Shard) -> tuple[object, ...]:
    """A step of a shard, checked, as the ops of the stages take it."""
    masks, grads, spec, columns, residual, state = step
    spec = spec.checked(op)
    arguments.check_particles(op, masks, residual, least=0)
    if spec.only != -1:
        arguments.check_row(op, "spec.only", spec.only, masks.shape[0])
    arguments.check_gradients(op, masks, grads, spec.only >= 0)
    arguments.check_columns(op, masks, columns, spec.kernel)
    arguments.check_state(op, state, masks.shape[0], masks.device)
    _check_shard(op, shard, masks.device)
    if (columns.sizes is None) != (shard.total is None):
        wanted = "None without sizes" if columns.sizes is None else "the sum of all sizes"
        raise ValueError(f"{op}: shard.total: wanted {wanted}, got {shard.total!r:.80}")
    here, last = masks.shape[1], shard.d - masks.shape[1]
    if not 0 <= shard.first_column <= last:
        wanted = f"0 … {last}, as {here} of {shard.d} columns are here"
        raise ValueError(f"{op}: shard.first_column: wanted {wanted}, got {shard.first_column}")
    arguments.refuse_derivatives(op, columns, [("masks", masks), ("grads", grads)])
    return (masks, grads, *columns, residual, list(step.state or []), *spec, *shard)


def _particles_of(op: str, name: str, sums: Tensor) -> int:
    """n, from the last dimension of fp64 sums."""
    check.is_tensor(op, name, sums, (torch.float64,))
    if sums.dim() != 2 or sums.shape[1] < 1:
        raise ValueError(f"{op}: {name}: wanted a column per particle, got shape {tuple(sums.shape)}")
    return sums.shape[1]


def _check_numbers(op: str, name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    check.is_tensor(op, name, value, (torch.float64,))
    check.has_shape(op, name, value, shape)
    check.same_device(op, name, value, device)


def _check_shard(op: str, shard: Shard, device: torch.device) -> None:
    check_integer(op, "shard.d", shard.d)
    check_integer(op, "shard.first_column", shard.first_column)
    if shard.d < 1:
        raise ValueError(f"{op}: shard.d: wanted at least 1 coordinate, got {shard.d}")
    if shard.total is not None:
        _check_numbers(op, "shard.total", shard.total, (1,), device)
