"""Calls that the suite's shapes do not make: lists, segments, layouts, rows that lie apart, two-byte particles."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sfpk_kernels import _triton
from sfpk_kernels.ops import Blocks, mask_gradient, masked_weights, pack_mask, topk_mask, topk_threshold, transition_

from .gate import Verdict
from .registry import Seeded

D = 20_011  # beyond one program or block


def _apart(rows: Tensor) -> Tensor:
    """The same rows with gaps between them."""
    wide = rows.new_zeros(rows.shape[0], rows.shape[1] + 77)
    return wide[:, : rows.shape[1]].copy_(rows)


def _lists(random: Seeded, backend: str) -> Any:
    values = [(3 * random.randn(60, 70)).round(), (3 * random.randn(5)).round(), (3 * random.randn(17_001)).round()]
    return topk_mask(values, 9_000, backend=backend)


def _packed_rows(random: Seeded, backend: str) -> Any:
    values, saliency = _apart(random.randn(3, D)), random.rand(D)
    return [
        topk_mask(values, [0, D // 3, D], score="abs_saliency", saliency=saliency, packed=kind, backend=backend)
        for kind in ("uint8", "int32")
    ]


def _consensus(random: Seeded, backend: str) -> Any:
    return topk_mask(random.randn(10, D), D // 5, score="mean_abs_saliency", saliency=random.rand(D), backend=backend)


def _half_values(random: Seeded, backend: str) -> Any:
    return [
        tuple(topk_threshold(random.randn(2, D).to(t), D // 4, backend=backend)) for t in (torch.half, torch.bfloat16)
    ]


def _segments(random: Seeded, backend: str) -> Any:
    values, theta, borders = _apart(random.randn(3, D)), random.randn(D), [0, 777, D // 2, D]
    cut = topk_threshold(values, D // 3, segments=borders, backend="reference")
    return masked_weights(theta, values, cut=cut, score="value", segments=borders, backend=backend)


def _layouts(random: Seeded, backend: str) -> Any:
    theta = [random.randn(30, 40), random.randn(2, 50, 9)]
    keep = random.rand(4, 90) > 0.5
    layout = [Blocks(30, 40, 1), Blocks(2, 50, 9)]
    return [
        masked_weights(theta, mask, layout=layout, dtype=dtype, backend=backend)
        for mask in (keep, pack_mask(keep), pack_mask(keep, "int32"), keep.to(torch.bfloat16))
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _group_gradients(random: Seeded, backend: str) -> Any:
    theta, grads = random.randn(6_000), random.randn(3, 6_000)
    return [
        mask_gradient(theta, grads, layout=layout, backend=backend)
        for layout in (Blocks(2, 30, 100), Blocks(1, 6, 1000))
    ]


def _particles(dtype: torch.dtype, n: int, **options: Any) -> Callable[[Seeded, str], Any]:
    def run(random: Seeded, backend: str) -> Any:
        masks = (1 - 0.05 * random.rand(n, D)).to(dtype)
        residual = torch.zeros_like(masks) if dtype == torch.bfloat16 else None
        grads, theta, saliency = random.randn(n, D), random.randn(D), random.rand(D)
        weighted, row = "weighted" in options, options.get("row")
        sizes = torch.ones(D, dtype=torch.float32, device=masks.device) if "sized" in options else None
        transition_(
            masks, grads if row is None else grads[row : row + 1], step=1e-3, radius=2.0, repulsion=0.2, weights=theta,
            residual=residual, target_density=0.9, consensus=0.1, row=row, backend=backend, sizes=sizes,
            kernel="weighted_rbf" if weighted else "rbf", saliency=saliency if weighted else None,
        )  # fmt: skip
        return masks.float() if residual is None else masks.float() + residual.float()

    return run


def _case(op: str, run: Callable[[Seeded, str], Any], tolerance: float = 0.0) -> Any:
    def judged(device: torch.device, backend: str) -> Verdict | None:
        """None where the op has no such backend."""
        backends = importlib.import_module(f"sfpk_kernels.ops.{op}").BACKENDS
        if backend == "reference" or backend not in backends:
            return None
        interpreted = backend == "triton" and _triton.interpreted()
        reason = (
            None if interpreted else backends[backend].why_not(torch.ones(1, 1, dtype=torch.float32, device=device))
        )
        if reason:
            return Verdict("missing", reason.splitlines()[0])
        try:
            found, right = (_tensors(run(Seeded(device), name)) for name in (backend, "reference"))
        except Exception as error:
            return Verdict("wrong", f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}")
        off = max(float((a.double() - b.double()).abs().max()) for a, b in zip(found, right, strict=True))
        return Verdict("ok") if off <= tolerance else Verdict("wrong", f"off by {off:.1e}, allowed is {tolerance:.0e}")

    return judged


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in _tensors(part)]


CASES: dict[str, Callable[[torch.device, str], Verdict | None]] = {
    "selection of a list": _case("selection", _lists),
    "selection, packed rows that lie apart": _case("selection", _packed_rows),
    "selection by the mean": _case("selection", _consensus),
    "selection of two-byte values": _case("selection", _half_values),
    "masking by segments": _case("masking", _segments),
    "masking by layouts": _case("masking", _layouts),
    "gradients of groups": _case("masking", _group_gradients, 1e-4),
    "transition of one row": _case("transition", _particles(torch.float32, 5, row=3), 1e-5),
    "transition with sizes": _case("transition", _particles(torch.float32, 20, sized=True), 1e-5),
    "transition, weighted, many": _case("transition", _particles(torch.float32, 70, weighted=True), 1e-5),
    "transition of bf16 particles": _case("transition", _particles(torch.bfloat16, 10), 2e-4),
    "transition of fp16 particles": _case("transition", _particles(torch.float16, 10), 2e-3),
}
