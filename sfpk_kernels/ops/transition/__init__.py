"""``transition_``: pairwise RBF repulsion and the projected transition of all particles, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dispatch import Backend, choose
from .. import _checks as check
from .. import _named
from .. import _transforms as transforms
from . import _arguments as arguments
from . import cpp, reference, stages, triton_backend
from .spec import DENSITIES, KERNELS, NONFINITE, Columns, Shard, Step, TransitionSpec, TransitionStats, part_of

_OP = "transition_"
BACKENDS = {
    "cpp": Backend(cpp.transition_, cpp.why_not),
    "triton": Backend(triton_backend.transition_, triton_backend.why_not),
    "reference": Backend(reference.transition_),
}


def transition_(
    masks: Tensor,  # (n, d) fp32, fp64, fp16, or bf16 with residual: the particles, moved in place
    grads: Tensor,  # (n, d) any float: ∂L/∂m, or ∂L/∂W when weights is given; (1, d) with row
    *,
    step: float,  # Δt > 0: how far the soft sparsity moves
    radius: float,  # r > 1: relative localization radius
    repulsion: float,  # λ ≥ 0
    kernel: str = "rbf",
    saliency: Tensor | None = None,  # (d,) a_e ≥ 0
    sizes: Tensor | None = None,  # (d,) c_e > 0: weights governed by each coordinate
    density: str = "l2",
    target_density: float | None = None,  # ρ in (0, 1]
    consensus: float = 0.0,  # η in [0, 1]
    weights: Tensor | None = None,  # (d,) θ
    state: TransitionStats | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,  # (n, d) bf16, changed in place
    seed: int = 0,
    step_index: int = 0,
    nonfinite: str = "raise",
    row: int | None = None,
    angle: float | None = None,  # α ≥ 0
    backend: str | None = None,
) -> TransitionStats:
    """Move every particle one step towards higher sparsity and lower energy (SFPK, Proposition 2, eq. 8).

    For every particle i, all read before any moves::

        g_i = -∂L/∂m_i + (λ/n) Σ_j (2 κ_ij / h_ij) · w ⊙ (m_i - m_j),   κ_ij = exp(-q_ij / h_ij)
        s   = ∇s(m_i) ∝ -c ⊙ m_i,   ŝ = s/‖s‖,   u = g_i - (ŝ·g_i) ŝ
        Δm  = (Δt/‖s‖) (ŝ + sqrt(r² - 1) u/‖u‖)

    so that ``s·Δm = Δt`` and ``‖Δm‖ = r Δt/‖s‖``; where ``‖u‖`` is below 1e-6 ``‖g‖`` the second term is 0.
    With ``angle`` the tangential part has another length, whatever Δt is (which may be 0 then)::

        Δm  = (Δt/‖s‖) ŝ + α ‖m_i + (Δt/‖s‖) ŝ‖ u/‖u‖

    Then, each only if asked for: scale row i so that ``ρ(m_i) = target_density``; pull all rows to their mean,
    ``m_i ← m_i + η (m̄ - m_i)``; scale again. A row of zeros has no direction and stays as it is, also where the others
    are pulled (it counts in their mean, like any row that does not move in this step).

    ``torch.compile(dynamic=True)`` keeps one graph while n, d, row, seed and step_index change; the floats (step,
    radius, repulsion, target_density, consensus, eps, angle) are compiled in, so each new value of one compiles again:
    where they follow a schedule, leave this call out of what is compiled. A step has no derivative, and vmap runs it
    once per entry.

    With ``row`` only that particle moves and the others are held, so that calls for one row after the other, each with
    the gradient of that particle alone, are the same step in Gauss-Seidel order, without an (n, d) array of gradients.

    Args:
        masks: particles, one per row; any row stride. The arithmetic is fp32 (fp64 for fp64 particles); fp16 ones are
            rounded stochastically (see ``seed``), bf16 ones leave their rounding error in ``residual``.
        grads: gradient of the loss by the mask, per particle; with ``weights`` the gradient by the masked
            weights, and θ is multiplied in here.
        step: Δt > 0, ``ρ_{k-1} - ρ_k`` of the schedule.
        radius: r > 1.
        repulsion: λ ≥ 0.
        kernel: ``"rbf"``: w = 1, h = d. ``"weighted_rbf"``: w = a², ``h_ij = sqrt(N_i N_j)``,
            ``N_i = Σ a m_i²``, h held constant under differentiation; needs ``saliency``.
        saliency: a_e, only read by ``"weighted_rbf"``.
        sizes: c_e; ``None`` means 1 for every coordinate (unstructured).
        density: ``"l2"``: ρ = sqrt(Σ c m² / Σ c); ``"l2_squared"``: ρ = Σ c m² / Σ c.
        target_density: retract every particle onto this soft density.
        consensus: η, 0 for no pull.
        weights: θ.
        state: the stats the previous call on these particles returned (same kernel, saliency, sizes, density,
            particles untouched since); spares the pass over ``masks`` that measures them.
        eps: added to ``(‖s‖‖u‖)²`` under the root, as the authors' code does. The 1e-6 rule holds beside it: below that
            share u is rounding noise, which a small eps would blow up beyond what the scaling can foresee.
        residual: what rounding took from bf16 particles, zeros at first: the particle is ``masks + residual``.
            Wanted for bf16 particles and for no others.
        seed, step_index: of the random bits that round fp16 particles; they depend on these, row and column alone.
            Give every step of a run its own index.
        nonfinite: what to do about gradients that are not finite: ``"raise"``, or ``"skip"``: such a particle stays
            where it is in this step, the others move, and its cosine is NaN; or ``"hold"``: no particle moves, and the
            cosines of those whose gradient is at fault are NaN. On a GPU ``"raise"`` waits for the step's end, the
            others never wait.
        row: the one particle that moves, ``None`` for all at once (Jacobi).
        angle: α, the tangent of the angle between a particle and where it is moved to on its sphere (exactly so without
            sizes); ``None``: the length that ``radius`` says, which is not read otherwise.
        backend: ``None`` for the fastest available.

    Returns:
        TransitionStats of the moved particles.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or range; masks and grads sharing memory; a non-finite gradient (the
            message names the particles); a tensor that records a gradient, as a step has no derivative. ``masks`` is
            untouched then.
    """
    arguments.check_particles(_OP, masks, residual)
    if row is not None:
        arguments.check_row(_OP, "row", row, masks.shape[0])
    arguments.check_gradients(_OP, masks, grads, row is not None)
    columns = Columns(weights, saliency, sizes)
    only = -1 if row is None else row
    # fmt: off
    spec = TransitionSpec(
        step, radius, repulsion, kernel, density, target_density, consensus, eps, seed, step_index, nonfinite, only,
        angle,
    ).checked(_OP)
    # fmt: on
    arguments.check_columns(_OP, masks, columns, kernel)
    if state is not None:
        arguments.check_state(_OP, state, masks.shape[0], masks.device, "TransitionStats or None")
    arguments.refuse_derivatives(_OP, columns, [("masks", masks), ("grads", grads)])
    known = [] if state is None else list(state)
    return TransitionStats(*torch.ops.sfpk.transition_(masks, grads, *columns, residual, known, *spec, backend or ""))


torch.library.define(
    "sfpk::transition_",
    f"(Tensor(a!) masks, Tensor grads, {_named.schema_of(Columns)}, Tensor(b!)? residual, Tensor[] state, "
    f"{_named.schema_of(TransitionSpec)}, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_columns_of, _spec_of = part_of(Columns), part_of(TransitionSpec)


def _transition_(given: Any) -> tuple[Tensor, ...]:
    masks, grads, residual = given.masks, given.grads, given.residual
    columns, spec = _columns_of(given), _spec_of(given)
    arguments.check_memory(_OP, masks, grads, residual)
    arguments.check_values(_OP, columns, spec)
    state = TransitionStats(*given.state) if given.state else None
    with check.writing(masks, residual):
        run = choose(_OP, given.backend, BACKENDS, masks)
        stats: TransitionStats = run(Step(masks, grads, spec, columns, residual, state))
    check.was_written(masks, *([] if residual is None else [residual]))
    if stats.norms.is_inference() and not torch.is_inference_mode_enabled():
        stats = TransitionStats(*(t.clone() for t in stats))
    if spec.nonfinite == "raise":
        arguments.check_finite(stats.cosines)
    return tuple(stats)


def _transition_fake(given: Any) -> tuple[Tensor, ...]:
    n = given.masks.shape[0]
    return (*arguments.new_statistics(given.masks, n), given.masks.new_empty(n, dtype=torch.float64))


_named.register("sfpk::transition_", _transition_, _transition_fake)
transforms.register_vmap("sfpk::transition_", torch.ops.sfpk.transition_, mutated={0: "masks", 5: "residual"})

__all__ = [
    "BACKENDS", "DENSITIES", "KERNELS", "NONFINITE", "Columns", "Shard", "Step", "TransitionSpec", "TransitionStats",
    "stages", "transition_",
]  # fmt: skip
