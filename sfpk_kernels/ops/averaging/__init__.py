"""``average_gradients_``: averages of gradients over steps, and what is measured of the gradients on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._dispatch import Backend, choose
from .. import _checks as check
from .. import _transforms as transforms
from .._named import register
from . import cpp, reference, triton_backend
from .spec import GradientStats

__all__ = ["BACKENDS", "GradientStats", "average_gradients_"]

_OP = "average_gradients_"
BACKENDS = {
    "cpp": Backend(cpp.average_gradients_, cpp.why_not),
    "triton": Backend(triton_backend.average_gradients_, triton_backend.why_not),
    "reference": Backend(reference.average_gradients_),
}


def average_gradients_(
    grads: Tensor,  # (rows, d) any float: ∂L/∂W, averaged in place
    averages: Tensor | None,  # (rows, d) of the same dtype: v, behind the step before
    beta: float = 0.0,  # β in [0, 1]
    *,
    weights: Tensor,  # (d,) any float: θ
    backend: str | None = None,
) -> GradientStats:
    """g ← β v + (1 - β) g for the gradients g of a step, which are measured before, in one pass over the memory.

    The averages are read alone: what was averaged can still be dropped, as after a loss that is not finite. Products
    and sums are fp64 (squares of gradients of 1e-25 do not vanish), the average is rounded once, from fp32 (fp64 for
    fp64 gradients). With β = 0, and without averages, not a bit of the gradients is written. Waits for nothing.

    A step has no derivative, and vmap runs it once per entry. ``torch.compile`` compiles β in.

    Args:
        grads: the gradients by the masked weights, one row per particle; any row stride.
        averages: ``None`` where there are none: gradients are measured then, and β has to be 0.
        beta: what stays of the averages.
        weights: the dense weights, by which gradients are multiplied where they are measured.
        backend: ``None`` for the fastest available.

    Returns:
        Cosines between gradients and averages, and effective dimensions of the gradients, row by row.

    Raises:
        TypeError: an argument that is no tensor of floats or no number, or averages of another dtype than grads.
        ValueError: a wrong shape, device or range; grads sharing memory with another argument or with itself; β above 0
            without averages; a tensor that records a gradient. ``grads`` is untouched then.
    """
    check.is_tensor(_OP, "grads", grads)
    if grads.dim() != 2:
        raise ValueError(f"{_OP}: grads: wanted shape (rows, d), got {tuple(grads.shape)}")
    if averages is not None:
        check.is_tensor(_OP, "averages", averages, (grads.dtype,))
        check.has_shape(_OP, "averages", averages, tuple(grads.shape))
        check.same_device(_OP, "averages", averages, grads.device)
    check.is_tensor(_OP, "weights", weights)
    check.has_shape(_OP, "weights", weights, (grads.shape[1],))
    check.same_device(_OP, "weights", weights, grads.device)
    beta = check.is_real(_OP, "beta", beta, "in [0, 1]", 0.0, 1.0, open_low=False)
    if beta > 0 and averages is None:
        raise ValueError(f"{_OP}: beta: wanted 0 without averages, got {beta:g}")
    named = [("grads", grads), ("averages", averages), ("weights", weights)]
    transforms.refuse_derivatives(_OP, "an average has no derivative", named)
    return GradientStats(*torch.ops.sfpk.average_gradients_(grads, averages, weights, beta, backend or ""))


torch.library.define(
    "sfpk::average_gradients_",
    "(Tensor(a!) grads, Tensor? averages, Tensor weights, float beta, str backend) -> (Tensor, Tensor)",
)


def _average_gradients_(call: Any) -> tuple[Tensor, ...]:
    grads = call.grads
    check.owns_memory(_OP, "grads", grads)
    for name in ("averages", "weights"):
        other = getattr(call, name)
        if other is not None and check.share_memory(grads, other):
            raise ValueError(f"{_OP}: {name}: wanted memory of its own, got memory shared with grads")
    run = choose(_OP, call.backend, BACKENDS, grads)
    with check.writing(grads):
        found: GradientStats = run(grads, call.averages, call.weights, call.beta)
    if call.averages is not None and call.beta > 0:
        check.was_written(grads)
    if found.cosines.is_inference() and not torch.is_inference_mode_enabled():
        found = GradientStats(*(t.clone() for t in found))
    return tuple(found)


def _average_gradients_fake(call: Any) -> tuple[Tensor, Tensor]:
    n = call.grads.shape[0]
    return call.grads.new_empty(n, dtype=torch.float64), call.grads.new_empty(n, dtype=torch.float64)


register("sfpk::average_gradients_", _average_gradients_, _average_gradients_fake)
transforms.register_vmap("sfpk::average_gradients_", torch.ops.sfpk.average_gradients_, mutated={0: "grads"})
