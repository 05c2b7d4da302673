"""Masked weights from every form of mask, and the gradient by the mask; ours, plain PyTorch, torch.nn.utils.prune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from sfpk_kernels.ops import Cut, mask_gradient, masked_weights, pack_mask, topk_threshold

from ..registry import NAIVE, RESNET50, Call, Case, Op, Provider, Seeded, Shape, compiled, ours
from .selection import mask_of

KEPT, SCORE = 0.2, "abs_saliency"


@dataclass
class Inputs:
    """Weights, particles and their masks, and a buffer that all providers of a case write into."""

    theta: Tensor  # (d,) fp32
    saliency: Tensor  # (d,)
    particles: Tensor  # (n, d)
    k: int
    cut: Cut
    mask: Tensor  # (n, d) bool
    packed: Tensor  # (n, ceil(d / 8)) uint8
    out: Tensor  # (n, d) fp32


def inputs_of(shape: Shape, device: torch.device) -> Inputs:
    """Random inputs; 20 % of the weights kept, ranked by |m|·a."""
    n, d = shape["n"], shape["d"]
    random = Seeded(device)
    particles, theta = 1 - 0.5 * random.rand(n, d), random.randn(d)
    saliency, k = theta.abs(), round(KEPT * d)
    cut = topk_threshold(particles, k, score=SCORE, saliency=saliency, backend="reference")
    mask = mask_of(cut, particles.abs() * saliency)
    buffer = torch.empty(n, d, dtype=torch.float32, device=device)
    return Inputs(theta, saliency, particles, k, cut, mask, pack_mask(mask), buffer)


def _build(
    bytes_per_entry: float,  # of (n, d)
    vectors: int,  # fp32 (d,) read
    right: Callable[[Inputs], Tensor],
) -> Callable[[Shape, torch.device], Case]:
    def build(shape: Shape, device: torch.device) -> Case:
        inputs = inputs_of(shape, device)
        n, d = shape["n"], shape["d"]

        def check(result: Any) -> str | None:
            if isinstance(result, list):
                result = torch.stack(result)
            differs = result != right(inputs)
            return f"{int(differs.sum()):,} of {n * d:,} entries differ" if bool(differs.any()) else None

        return Case(shape, inputs, round(bytes_per_entry * n * d) + 4 * vectors * d, check, 9 * n * d + 8 * d)

    return build


def kept_weights(inputs: Inputs) -> Tensor:
    """What is right: θ where kept, 0 elsewhere."""
    return torch.where(inputs.mask, inputs.theta, 0.0)


def _packed_by_numpy(inputs: Inputs) -> Tensor:
    return torch.from_numpy(np.packbits(inputs.mask.cpu().numpy(), axis=1, bitorder="little")).to(inputs.mask.device)


def _rival(function: Callable[[Inputs], Any]) -> Callable[[Case], Call]:
    return lambda case: lambda: function(case.inputs)


def _ours(call: Callable[[Inputs, str], Any]) -> Callable[[Case, str], Call]:
    return lambda case, backend: lambda: call(case.inputs, backend)


def _multiply(inputs: Inputs) -> Tensor:
    return torch.mul(inputs.theta, inputs.mask.float(), out=inputs.out)


def _where(inputs: Inputs) -> Tensor:
    return torch.where(inputs.mask, inputs.theta, inputs.theta.new_zeros(()), out=inputs.out)


def _row_by_row(inputs: Inputs) -> Tensor:
    """As written in a loop over particles."""
    for i in range(len(inputs.mask)):
        inputs.out[i] = inputs.theta * inputs.mask[i].float()
    return inputs.out


def _where_compiled(case: Case) -> Call:
    inputs: Inputs = case.inputs
    run = torch.compile(lambda mask, theta: torch.where(mask, theta, 0.0), dynamic=False)
    return lambda: run(inputs.mask, inputs.theta)


def _torch_prune(case: Case) -> Call:
    """What a pruned module does before each forward pass, weight_orig * weight_mask; one module per particle."""
    inputs: Inputs = case.inputs
    weights = nn.Parameter(inputs.theta, requires_grad=False)  # one for all
    modules = []
    for mask in inputs.mask:
        module = nn.Module()
        module.weight = weights
        modules.append(prune.custom_from_mask(module, "weight", mask))

    def run() -> list[Tensor]:
        for module in modules:
            for hook in module._forward_pre_hooks.values():
                hook(module, ())
        return [module.weight for module in modules]

    return run


def _compare_and_multiply(inputs: Inputs) -> Tensor:
    """Per particle: score, compare with the threshold, multiply; ties are all kept."""
    for i, particle in enumerate(inputs.particles):
        score = particle.abs() * inputs.saliency
        inputs.out[i] = inputs.theta * (score >= inputs.cut.threshold[i]).float()
    return inputs.out


def _build_by_cut(shape: Shape, device: torch.device) -> Case:
    """From particle values and a cut; rivals keep every tie."""
    case = _build(8, 2, kept_weights)(shape, device)
    inputs: Inputs = case.inputs
    exact = case.check

    def check(result: Tensor) -> str | None:
        return exact(result) if exact(result) is None else exact(without_ties(inputs, result))

    case.check = check
    return case


def without_ties(inputs: Inputs, result: Tensor) -> Tensor:
    """A result with the right entries where the score equals the threshold."""
    ties = inputs.particles.abs() * inputs.saliency == inputs.cut.threshold
    return torch.where(ties, kept_weights(inputs), result)


def _by_cut(inputs: Inputs, backend: str) -> Tensor:
    return masked_weights(inputs.theta, inputs.particles, cut=inputs.cut, score=SCORE, saliency=inputs.saliency,
                          out=inputs.out, backend=backend)  # fmt: skip


SHAPES: dict[str, tuple[Shape, ...]] = {
    "quick": ({"n": 4, "d": 100_000},),
    "default": ({"n": 10, "d": 2_000_000},),
    "full": tuple({"n": n, "d": d} for d in (10**5, 10**6, 4_000_000) for n in (1, 10)),
    "cuda default": ({"n": 10, "d": 1_000_000}, RESNET50),
    "cuda full": (*({"n": n, "d": d} for d in (10**5, 10**6, 10**7) for n in (1, 10)), RESNET50),
}
OPS = (
    Op("apply", "θ ⊙ mask from a bool mask", SHAPES, _build(5, 1, kept_weights), (
        Provider(NAIVE, _rival(_row_by_row)),
        Provider("θ * mask.float()", _rival(_multiply)),
        Provider("torch.where", _rival(_where)),
        compiled(_where_compiled),
        Provider("torch.nn.utils.prune", _torch_prune),
        *ours("masking", _ours(lambda i, backend: masked_weights(i.theta, i.mask, out=i.out, backend=backend))),
    )),
    Op("apply_packed", "θ ⊙ mask from a bit-packed mask", SHAPES, _build(4.125, 1, kept_weights),
       ours("masking", _ours(lambda i, backend: masked_weights(i.theta, i.packed, out=i.out, backend=backend)))),
    Op("apply_cut", "θ ⊙ mask from particle values and a cut, no mask written", SHAPES, _build_by_cut, (
        Provider(NAIVE, _rival(_compare_and_multiply)),
        *ours("masking", _ours(_by_cut)),
    )),
    Op("mask_gradient", "gradient by the mask from that by the weights", SHAPES,
       _build(8, 1, lambda i: i.theta * i.particles), (
        Provider("θ * gradient", _rival(lambda i: torch.mul(i.theta, i.particles, out=i.out))),
        *ours("masking", _ours(lambda i, backend: mask_gradient(i.theta, i.particles, backend=backend))),
    )),
    Op("pack", "a bool mask as bits", SHAPES, _build(1.125, 0, lambda i: i.packed), (
        Provider("np.packbits", _rival(_packed_by_numpy),
                 lambda shape, device: "NumPy works in the host's memory" if device.type != "cpu" else None),
        *ours("bits.pack_mask", _ours(lambda i, backend: pack_mask(i.mask, backend=backend)),
              backends=("cpp", "reference")),
    )),
)  # fmt: skip
