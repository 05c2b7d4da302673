"""``transition_(row=i)``: one particle moves, the others are held (Gauss-Seidel order)."""

import pytest
import torch

from sfpk_kernels.ops import TransitionStats, transition_

from .test_transition_backends import BACKENDS, fit, in_fp64, place, problem

OPTIONS = {"step": 0.05, "radius": 2.0, "repulsion": 0.2}


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("extra", [{}, {"kernel": "weighted_rbf"}, {"consensus": 0.3, "target_density": 0.6}])
@pytest.mark.parametrize(("n", "d", "sized"), [(1, 9, False), (5, 257, True), (5, 257, False), (14, 300, False)])
def test_the_row_moves_as_if_the_others_could_not(backend, n, d, sized, extra):
    d = fit(backend, d)
    masks, grads, vectors = problem(n, d, device=place(backend), sized=sized, theta=True)
    row = n // 2
    exact, start = masks.double(), masks.clone()
    lonely = torch.full_like(grads, float("nan")).double()
    lonely[row] = grads[row].double()
    slow = transition_(exact, lonely, **in_fp64(vectors), **OPTIONS, **extra, nonfinite="skip", backend="reference")
    fast = transition_(masks, grads[row : row + 1], **vectors, **OPTIONS, **extra, row=row, backend=backend)
    held = torch.arange(n) != row
    assert torch.equal(masks[held], start[held])
    assert not torch.equal(masks[row], start[row])
    assert (masks[row] - exact[row]).abs().max() < 1e-5
    slow = slow._replace(cosines=slow.cosines.nan_to_num())
    for name, a, b in zip(TransitionStats._fields, fast, slow, strict=True):
        torch.testing.assert_close(a, b.to(a.device), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_without_consensus_the_row_moves_as_in_a_whole_step(backend):
    masks, grads, vectors = problem(4, 123, device=place(backend), theta=True)
    whole, alone = masks.clone(), masks.clone()
    transition_(whole, grads, **vectors, **OPTIONS, target_density=0.6, backend=backend)
    transition_(alone, grads[2:3], **vectors, **OPTIONS, target_density=0.6, row=2, backend=backend)
    torch.testing.assert_close(alone[2], whole[2], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_byte_particles(backend, dtype):
    masks, grads, vectors = problem(3, 200, device=place(backend), theta=True)
    masks = masks.to(dtype)
    residual = torch.zeros_like(masks) if dtype == torch.bfloat16 else None
    exact, before = masks.double(), masks.clone()
    transition_(exact, grads[1:2].double(), **in_fp64(vectors), **OPTIONS, row=1, backend="reference")
    transition_(masks, grads[1:2], **vectors, **OPTIONS, row=1, residual=residual, backend=backend)
    assert torch.equal(masks[[0, 2]], before[[0, 2]])
    moved = masks.double() if residual is None else masks.double() + residual.double()
    assert (moved - exact)[1].abs().max() < (2e-3 if residual is None else 1e-4)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_gradient_that_is_not_finite_moves_nothing(backend):
    masks, grads, vectors = problem(3, 50, device=place(backend))
    before = masks.clone()
    grads[1, 4] = float("inf")
    with pytest.raises(ValueError, match=r"in particles \[1\]"):
        transition_(masks, grads[1:2], **vectors, **OPTIONS, row=1, backend=backend)
    assert torch.equal(masks, before)
    stats = transition_(masks, grads[1:2], **vectors, **OPTIONS, row=1, nonfinite="skip", backend=backend)
    assert torch.equal(masks, before)
    assert stats.cosines.isnan().tolist() == [False, True, False]


def test_bad_rows():
    masks, grads = torch.rand(3, 5), torch.randn(1, 5)
    for row, error, message in (
        (3, ValueError, "row: wanted 0 … 2, got 3"),
        (-1, ValueError, "row: wanted 0 … 2"),
        (1.0, TypeError, "row: wanted an integer or None"),
    ):
        with pytest.raises(error, match=message):
            transition_(masks, grads, **OPTIONS, row=row)
    with pytest.raises(ValueError, match=r"grads: wanted shape \(1, 5\), got \(3, 5\)"):
        transition_(masks, torch.randn(3, 5), **OPTIONS, row=1)
