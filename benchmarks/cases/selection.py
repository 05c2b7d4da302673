"""Exact selection: the threshold of the k largest, and its mask; ours, topk, kthvalue, NumPy's partition, sort."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sfpk_kernels.ops import Cut, topk_mask, topk_threshold

from ..registry import NAIVE, Call, Case, Op, Provider, Seeded, Shape, ours

WARM_ERROR = 1.02  # the guess of warm calls is 2 % off: what a threshold moves in a step late in a run

KINDS = {
    "random": lambda random, d: random.randn(d),
    "nearly sorted": lambda random, d: (
        torch.arange(d, dtype=torch.float32, device=random.device) / d + 1e-4 * random.randn(d)
    ),
    "few distinct": lambda random, d: (5 * random.rand(d)).floor(),
    "all equal": lambda random, d: torch.full((d,), 0.5, dtype=torch.float32, device=random.device),
}


class UpToTies(NamedTuple):
    """A mask by somebody who breaks ties in another way, or keeps all of them."""

    mask: Tensor


@dataclass
class Inputs:
    """Rows of scores."""

    values: Tensor  # (n, d) fp32
    k: int
    right: Cut  # the reference's

    @property
    def guess(self) -> Tensor:  # (n,)
        """Thresholds not far from the right ones."""
        return self.right.threshold[:, 0] * WARM_ERROR

    @property
    def rank(self) -> int:
        """Of the threshold among the values in ascending order, from 1."""
        return self.values.shape[1] - self.k + 1


def _inputs(shape: Shape, device: torch.device) -> Inputs:
    n, d = shape.get("n", 1), shape["d"]
    random = Seeded(device)
    values = torch.stack([KINDS[shape["kind"]](random, d) for _ in range(n)])
    k = round(shape["kept"] * d)
    return Inputs(values, k, topk_threshold(values, k, backend="reference"))


def mask_of(
    cut: Cut,  # one segment
    scores: Tensor,  # (n, d)
) -> Tensor:  # (n, d) bool
    """The mask a cut describes."""
    places = torch.arange(scores.shape[1], dtype=torch.int64, device=scores.device)
    return (scores > cut.threshold) | ((scores == cut.threshold) & (places < cut.tie_end))


def build(shape: Shape, device: torch.device) -> Case:
    """The threshold alone: the values are read once."""
    inputs = _inputs(shape, device)

    def check(result: Any) -> str | None:
        right = inputs.right
        if isinstance(result, Cut):  # ours: the tie cut must be right, too
            same = torch.equal(result.threshold, right.threshold) and torch.equal(result.tie_end, right.tie_end)
            return None if same else f"the cut {result} instead of {right}"
        result = torch.as_tensor(result)
        if result.shape == (len(inputs.values), inputs.k):
            result = result.min(dim=1).values
        same = torch.equal(result.reshape(-1), right.threshold[:, 0])
        return None if same else f"the threshold {result} instead of {right.threshold}"

    numel = inputs.values.numel()
    return Case(shape, inputs, 4 * numel, check, 4 * numel)


def build_mask(shape: Shape, device: torch.device) -> Case:
    """The bool mask: values read, mask written."""
    inputs = _inputs(shape, device)
    mask = mask_of(inputs.right, inputs.values)

    def check(result: Any) -> str | None:
        differs = (result.mask if isinstance(result, UpToTies) else result) != mask
        if isinstance(result, UpToTies):
            differs &= inputs.values != inputs.right.threshold
        return f"{int(differs.sum()):,} of {differs.numel():,} entries differ" if bool(differs.any()) else None

    numel = inputs.values.numel()
    return Case(shape, inputs, 5 * numel, check, 4 * numel)


def _select(function: Callable[..., Any], warm: bool) -> Callable[[Case, str], Call]:
    def make(case: Case, backend: str) -> Call:
        inputs: Inputs = case.inputs
        guess = inputs.guess if warm else None
        return lambda: function(inputs.values, inputs.k, guess=guess, backend=backend)

    return make


def _rival(function: Callable[[Inputs], Any]) -> Callable[[Case], Call]:
    return lambda case: lambda: function(case.inputs)


def _kthvalue(inputs: Inputs) -> Tensor:
    return inputs.values.kthvalue(inputs.rank, dim=1).values


def _topk(inputs: Inputs) -> Tensor:
    return inputs.values.topk(inputs.k, sorted=False).values


def _sort(inputs: Inputs) -> Tensor:
    return inputs.values.sort(dim=1).values[:, inputs.rank - 1]


def _partition(inputs: Inputs) -> Any:
    return np.partition(inputs.values.numpy(), inputs.rank - 1, axis=1)[:, inputs.rank - 1]


def _kthvalue_mask(inputs: Inputs) -> UpToTies:
    return UpToTies(inputs.values >= _kthvalue(inputs)[:, None])


def _topk_mask(inputs: Inputs) -> UpToTies:
    best = inputs.values.topk(inputs.k, sorted=False).indices
    return UpToTies(torch.zeros_like(inputs.values, dtype=torch.bool).scatter_(1, best, True))


def _too_long_to_sort(shape: Shape, device: torch.device) -> str | None:
    # 1e8 values: 15 s on two cores.
    return "takes minutes at this size" if device.type == "cpu" and shape["d"] > 20_000_000 else None


def _on_the_host(shape: Shape, device: torch.device) -> str | None:
    return "NumPy works in the host's memory" if device.type != "cpu" else None


RANDOM = {"kind": "random", "kept": 0.1}
SHAPES = {
    "quick": ({"d": 100_000, **RANDOM},),
    "default": (
        {"d": 1_000_000, **RANDOM},
        {"d": 10_000_000, **RANDOM},
        {"d": 10_000_000, "kind": "few distinct", "kept": 0.1},
    ),
    "full": (
        *({"d": 10**7, "kind": kind, "kept": kept} for kind in KINDS for kept in (0.02, 0.1, 0.5, 0.95)),
        *({"d": d, **RANDOM} for d in (10**5, 10**6, 10**8)),
    ),
    "cuda default": (
        {"d": 1_000_000, **RANDOM},
        {"n": 10, "d": 25_600_000, **RANDOM},
        {"d": 25_600_000, "kind": "few distinct", "kept": 0.1},
    ),
}
MASK_SHAPES = {
    "quick": ({"d": 100_000, **RANDOM},),
    "default": ({"d": 10_000_000, **RANDOM},),
    "full": ({"d": 10_000_000, **RANDOM}, {"d": 50_000_000, **RANDOM}),
    "cuda default": ({"d": 25_600_000, **RANDOM},),
}
OPS = (
    Op("selection", "threshold of the k largest", SHAPES, build, (
        Provider(NAIVE, _rival(_kthvalue)),
        Provider("torch.topk", _rival(_topk)),
        Provider("torch.sort", _rival(_sort), _too_long_to_sort),
        Provider("np.partition", _rival(_partition), _on_the_host),
        *ours("selection", _select(topk_threshold, warm=False)),
        *ours("selection", _select(topk_threshold, warm=True), "warm", ("cpp", "cuda", "triton")),
    )),
    Op("selection_mask", "bool mask of the k largest", MASK_SHAPES, build_mask, (
        Provider(NAIVE, _rival(_kthvalue_mask)),
        Provider("topk and scatter", _rival(_topk_mask)),
        *ours("selection", _select(topk_mask, warm=False)),
        *ours("selection", _select(topk_mask, warm=True), "warm", ("cpp", "cuda", "triton")),
    )),
)  # fmt: skip
