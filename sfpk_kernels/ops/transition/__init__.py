"""``transition_``: pairwise RBF repulsion and the projected transition of all particles, in place."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from ..._dispatch import Backend, choose
from .. import _checks as check
from .. import _transforms as transforms
from . import cpp, reference, triton_backend
from .reference import TransitionStats, check_finite
from .rounding import rounding_key

KERNELS = ("rbf", "weighted_rbf")
DENSITIES = ("l2", "l2_squared")
NONFINITE = ("raise", "skip", "hold")

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
    backend: str | None = None,
) -> TransitionStats:
    """Move every particle one step towards higher sparsity and lower energy (SFPK, Proposition 2, eq. 8).

    For every particle i, all read before any moves::

        g_i = -∂L/∂m_i + (λ/n) Σ_j (2 κ_ij / h_ij) · w ⊙ (m_i - m_j),   κ_ij = exp(-q_ij / h_ij)
        s   = ∇s(m_i) ∝ -c ⊙ m_i,   ŝ = s/‖s‖,   u = g_i - (ŝ·g_i) ŝ
        Δm  = (Δt/‖s‖) (ŝ + sqrt(r² - 1) u/‖u‖)

    so that ``s·Δm = Δt`` and ``‖Δm‖ = r Δt/‖s‖``; where ``‖u‖`` is below 1e-6 ``‖g‖`` the second term is 0.
    Then, each only if asked for: scale row i so that ``ρ(m_i) = target_density``; pull all rows to their mean,
    ``m_i ← m_i + η (m̄ - m_i)``; scale again. A row of zeros has no direction and stays as it is, also where the others
    are pulled (it counts in their mean, like any row that does not move in this step).

    ``torch.compile(dynamic=True)`` keeps one graph while n, d, row, seed and step_index change; the floats (step,
    radius, repulsion, target_density, consensus, eps) are compiled in, so each new value of one compiles again: where
    they follow a schedule, leave this call out of what is compiled. A step has no derivative, and vmap runs it once per
    entry.

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
        backend: ``None`` for the fastest available.

    Returns:
        TransitionStats of the moved particles.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or range; masks and grads sharing memory; a non-finite gradient (the
            message names the particles); a tensor that records a gradient, as a step has no derivative. ``masks`` is
            untouched then.
    """
    op = _OP
    check.is_tensor(op, "masks", masks)
    if masks.dim() != 2 or masks.shape[0] < 1 or masks.shape[1] < 1:
        raise ValueError(f"{op}: masks: wanted shape (n ≥ 1, d ≥ 1), got {tuple(masks.shape)}")
    check.is_tensor(op, "grads", grads)
    if row is not None:
        if isinstance(row, bool) or not isinstance(row, numbers.Integral):
            raise TypeError(f"{op}: row: wanted an integer or None, got {row!r}")
        if not 0 <= row < masks.shape[0]:
            raise ValueError(f"{op}: row: wanted 0 … {masks.shape[0] - 1}, got {row}")
    check.has_shape(op, "grads", grads, (masks.shape[0] if row is None else 1, masks.shape[1]))
    check.same_device(op, "grads", grads, masks.device)
    for name, vector in (("saliency", saliency), ("sizes", sizes), ("weights", weights)):
        if vector is not None:
            check.is_tensor(op, name, vector)
            check.has_shape(op, name, vector, (masks.shape[1],))
            check.same_device(op, name, vector, masks.device)
    if (masks.dtype == torch.bfloat16) != (residual is not None):
        wanted = "a bf16 tensor with bf16 masks" if residual is None else f"None with {masks.dtype} masks"
        raise ValueError(f"{op}: residual: wanted {wanted}, got {'None' if residual is None else 'a tensor'}")
    if residual is not None:
        check.is_tensor(op, "residual", residual, (torch.bfloat16,))
        check.has_shape(op, "residual", residual, tuple(masks.shape))
        check.same_device(op, "residual", residual, masks.device)
    for name, value in (("seed", seed), ("step_index", step_index)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{op}: {name}: wanted an integer, got {value!r}")
    check.is_one_of(op, "nonfinite", nonfinite, NONFINITE)
    check.is_one_of(op, "kernel", kernel, KERNELS)
    check.is_one_of(op, "density", density, DENSITIES)
    if kernel == "weighted_rbf" and saliency is None:
        raise ValueError(f"{op}: saliency: wanted shape ({masks.shape[1]},) with kernel='weighted_rbf', got None")
    step = check.is_real(op, "step", step, "> 0", 0.0, float("inf"))
    radius = check.is_real(op, "radius", radius, "> 1", 1.0, float("inf"))
    repulsion = check.is_real(op, "repulsion", repulsion, "≥ 0", 0.0, float("inf"), open_low=False)
    consensus = check.is_real(op, "consensus", consensus, "in [0, 1]", 0.0, 1.0, open_low=False)
    eps = check.is_real(op, "eps", eps, "≥ 0", 0.0, float("inf"), open_low=False)
    if target_density is not None:
        target_density = check.is_real(op, "target_density", target_density, "in (0, 1]", 0.0, 1.0)
    if state is not None and not isinstance(state, TransitionStats):
        raise TypeError(f"{op}: state: wanted TransitionStats or None, got {type(state).__name__}")
    if state is not None:
        check.has_shape(op, "state", state.sq_distances, (masks.shape[0], masks.shape[0]))
        check.same_device(op, "state", state.sq_distances, masks.device)
    named = [("masks", masks), ("grads", grads), ("weights", weights), ("saliency", saliency), ("sizes", sizes)]
    transforms.refuse_derivatives(op, "a step has no derivative", named)
    # fmt: off
    results = torch.ops.sfpk.transition_(
        masks, grads, weights, saliency, sizes, residual, list(state) if state is not None else [],
        step, radius, repulsion, kernel, density, target_density, consensus, eps,
        _word(seed), _word(step_index), nonfinite, -1 if row is None else row, backend or "",
    )
    # fmt: on
    return TransitionStats(*results)


def _word(value: Any) -> Any:
    """Any integer as a signed one of 64 bits, which is all that the random bits depend on."""
    number: Any = value if isinstance(value, int | torch.SymInt) else int(value)
    return number if -(1 << 63) <= number < 1 << 63 else (number + (1 << 63)) % (1 << 64) - (1 << 63)


torch.library.define(
    "sfpk::transition_",
    "(Tensor(a!) masks, Tensor grads, Tensor? weights, Tensor? saliency, Tensor? sizes, "
    "Tensor(b!)? residual, Tensor[] state, float step, float radius, float repulsion, str kernel, str density, "
    "float? target_density, float consensus, float eps, SymInt seed, SymInt step_index, str nonfinite, SymInt only, "
    "str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _transition_(
    masks: Tensor,
    grads: Tensor,
    weights: Tensor | None,
    saliency: Tensor | None,
    sizes: Tensor | None,
    residual: Tensor | None,
    state: list[Tensor],
    step: float,
    radius: float,
    repulsion: float,
    kernel: str,
    density: str,
    target_density: float | None,
    consensus: float,
    eps: float,
    seed: int,
    step_index: int,
    nonfinite: str,
    only: int,
    backend: str,
) -> tuple[Tensor, ...]:
    check.owns_memory(_OP, "masks", masks)
    if residual is not None:
        check.owns_memory(_OP, "residual", residual)
    if check.share_memory(masks, grads):
        raise ValueError("transition_: grads: wanted memory of its own, got memory shared with masks")
    if residual is not None and (check.share_memory(masks, residual) or check.share_memory(grads, residual)):
        raise ValueError("transition_: residual: wanted memory of its own, got memory shared with masks or grads")
    if sizes is not None:
        check.at_least(_OP, "sizes", sizes, 0.0, strictly=True)
    if kernel == "weighted_rbf" and saliency is not None:
        check.at_least(_OP, "saliency", saliency, 0.0)
    with check.writing(masks, residual):
        stats: TransitionStats = choose(_OP, backend, BACKENDS, masks)(
            masks,
            grads,
            weights,
            saliency,
            sizes,
            residual,
            TransitionStats(*state) if state else None,
            step=step,
            radius=radius,
            repulsion=repulsion,
            kernel=kernel,
            density=density,
            target_density=target_density,
            consensus=consensus,
            eps=eps,
            key=rounding_key(seed, step_index),
            skip=nonfinite == "skip",
            only=only,
        )
    check.was_written(masks, *([] if residual is None else [residual]))
    if stats.norms.is_inference() and not torch.is_inference_mode_enabled():
        stats = TransitionStats(*(t.clone() for t in stats))
    if nonfinite == "raise":
        check_finite(stats.cosines)
    return tuple(stats)


torch.library.impl("sfpk::transition_", ("cpu", "cuda"))(_transition_)


@torch.library.register_fake("sfpk::transition_")
def _transition_fake(
    masks: Tensor,
    grads: Tensor,
    weights: Tensor | None,
    saliency: Tensor | None,
    sizes: Tensor | None,
    residual: Tensor | None,
    state: list[Tensor],
    step: float,
    radius: float,
    repulsion: float,
    kernel: str,
    density: str,
    target_density: float | None,
    consensus: float,
    eps: float,
    seed: int,
    step_index: int,
    nonfinite: str,
    only: int,
    backend: str,
) -> tuple[Tensor, ...]:
    n = masks.shape[0]
    vectors = [masks.new_empty(n, dtype=torch.float64) for _ in range(5)]
    distances = masks.new_empty((n, n), dtype=torch.float64)
    return (*vectors[:4], distances, vectors[4])


transforms.register_vmap("sfpk::transition_", torch.ops.sfpk.transition_, mutated={0: "masks", 5: "residual"})
