"""Triton kernels in the interpreter at sizes beyond 32 bits, over memory of which only a few pages are ever touched.

    TRITON_INTERPRET=1 python -m tests.huge_sizes NAME

A process of its own, because a size that has overflowed may loop for ever. Exit code 0 if all is right.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import interpreter

from sfpk_kernels import _triton
from sfpk_kernels.ops import Blocks, mask_gradient, masked_weights, topk_mask, topk_threshold, transition_
from sfpk_kernels.ops.transition import Step, TransitionSpec, TransitionStats, triton_backend, triton_kernels

from .interpreter import patch_once
from .sparse import sparse

SIZES = (2**26, 85_000_000, 2**30, 2**32)


def far_apart(rows: Tensor, stride: int = 2**30 + 64) -> Tensor:
    """A copy whose rows lie so far apart that their offsets need more than 32 bits."""
    n, d = rows.shape
    wide = sparse((n - 1) * stride + d, dtype=rows.dtype).as_strided((n, d), (stride, 1))
    return wide.copy_(rows)


def state_of(n: int) -> TransitionStats:
    vectors = [torch.ones(n, dtype=torch.float64) for _ in range(4)]
    return TransitionStats(*vectors, torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64))


def step(masks: Tensor, grads: Tensor, launch: Any) -> None:
    """The host's side of a transition, each launch handed to ``launch(stage, grid, arguments by name, constants)``."""

    def replaced(kernel: Any, grid: tuple[int, ...], device: torch.device, *values: Any, **constants: Any) -> None:
        if kernel is triton_kernels.transition:
            names = [name for name in kernel.arg_names if name not in constants]
            launch(constants["STAGE"], grid, dict(zip(names, values, strict=True)), constants)

    with mock.patch.object(_triton, "launch", replaced):
        triton_backend.transition_(
            Step(masks, grads, TransitionSpec(0.01, 2.0, 0.2, nonfinite="skip"), state=state_of(len(masks)))
        )  # fmt: skip


def sample(n: int, d: int) -> None:
    """The stage "prepare" looks at 16 tiles all over the columns: each, and none twice."""
    masks, grads = sparse(n, d), sparse(n, d)
    done = []

    def launch(stage: str, grid: tuple[int, ...], given: dict[str, Any], constants: dict[str, Any]) -> None:
        if stage != "prepare":
            return
        for tile in range(16):
            columns = slice(tile * given["hop"], tile * given["hop"] + constants["B"])
            masks[:, columns] = 1.0
            grads[:, columns] = float(tile)
        triton_kernels.transition[grid](*given.values(), **constants)
        done.append(given["guess"][:n].tolist())

    step(masks, grads, launch)
    assert done == [[-7.5] * n], (n, d, done)  # the mean of 0 … 15


def last_slot(n: int, d: int) -> None:
    """The last columns, by a program whose slot begins near d: sums of "reduce", particles of "update"."""
    masks, grads = sparse(n, d), sparse(n, d)
    torch.manual_seed(0)
    masks[:, -700:], grads[:, -700:] = torch.rand(n, 700) + 0.5, torch.randn(n, 700)
    before, gradient = masks[:, -700:].double(), grads[:, -700:].double()
    seen = []

    def launch(stage: str, grid: tuple[int, ...], given: dict[str, Any], constants: dict[str, Any]) -> None:
        if stage not in ("reduce", "update"):
            return
        chunk = 8 * constants["B"]
        program = (d - 1) // chunk
        given = {**given, "chunk": chunk, "slots": sparse((program + 1) * constants["SIZE"], dtype=torch.float64)}
        given["mix"].zero_(), given["guess"].zero_()
        given["moves"].zero_()
        given["moves"][2] = -0.5  # keep: m' = m + keep · m
        with as_program(program):
            triton_kernels.transition[(1,)](*given.values(), **constants)
        seen.append((stage, given["slots"][-constants["SIZE"] :].clone(), constants["N"], chunk))

    step(masks, grads, launch)
    (_, reduced, padded, chunk), (_, updated, _, _) = seen
    inside = min(700, d - (d - 1) // chunk * chunk)  # columns of that slot that hold anything
    m, g = before[:, -inside:], gradient[:, -inside:]
    torch.testing.assert_close(reduced[:n], g.square().sum(dim=1), rtol=1e-5, atol=1e-6)  # ee
    torch.testing.assert_close(reduced[padded : padded + n], -(g * m).sum(dim=1), rtol=1e-5, atol=1e-4)  # es
    torch.testing.assert_close(masks[:, -inside:].double(), m / 2, rtol=1e-6, atol=0)
    torch.testing.assert_close(updated[:n], (m / 2).square().sum(dim=1), rtol=1e-5, atol=1e-6)


class as_program:
    """The interpreter runs its one program under another number."""

    def __init__(self, number: int):
        builder = interpreter.interpreter_builder
        index, dim = builder.set_grid_idx, builder.set_grid_dim
        self.patches = [
            mock.patch.object(builder, "set_grid_dim", lambda x, y, z: dim(number + 1, y, z)),
            mock.patch.object(builder, "set_grid_idx", lambda x, y, z: index(number, y, z)),
        ]

    def __enter__(self) -> None:
        for patch in self.patches:
            patch.start()

    def __exit__(self, *error: object) -> None:
        for patch in self.patches:
            patch.stop()


def far_rows() -> None:
    """Every op on rows whose offsets exceed 32 bits, against the same on rows side by side."""
    torch.manual_seed(0)
    n, d = 5, 3000
    values, saliency, theta = torch.randn(n, d), torch.rand(d), torch.randn(d)
    apart = far_apart(values)
    for options in ({"score": "abs"}, {"score": "mean_abs_saliency", "saliency": saliency}):
        near, far = (topk_mask(v, 700, backend=b, **options) for v, b in ((values, "reference"), (apart, "triton")))
        assert torch.equal(near, far), options
    cut = topk_threshold(apart, 700, backend="triton")
    out = far_apart(torch.zeros(n, d))
    masked_weights(theta, apart, cut=cut, score="value", out=out, backend="triton")
    assert torch.equal(out, masked_weights(theta, values, cut=cut, score="value", backend="reference"))
    for layout in (None, Blocks(2, d // 10, 5)):
        near, far = (
            mask_gradient(theta, v, layout=layout, backend=b) for v, b in ((values, "reference"), (apart, "triton"))
        )
        torch.testing.assert_close(far, near, rtol=1e-6, atol=1e-6)
    for count in (5, 13):
        masks, grads = torch.rand(count, 1300) + 0.5, torch.randn(count, 1300)  # several tiles
        moved, options = far_apart(masks), {"step": 0.05, "radius": 2.0, "repulsion": 0.2, "backend": "triton"}
        stats = transition_(moved, far_apart(grads), **options)
        expected = transition_(masks, grads, **options)
        assert torch.equal(moved, masks)
        assert all(torch.equal(a, b) for a, b in zip(stats, expected, strict=True))


CHECKS = {
    **{f"sample {n} {d}": (sample, n, d) for n in (2, 13) for d in SIZES},
    **{f"last slot {n} {d}": (last_slot, n, d) for n in (2, 13) for d in SIZES},
    "far rows": (far_rows,),
}

if __name__ == "__main__":
    patch_once()
    for name, (check, *arguments) in CHECKS.items():
        if name.startswith(sys.argv[1]):
            check(*arguments)
            print(name, flush=True)
