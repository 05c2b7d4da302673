"""Averages of gradients and what is measured of them: every backend against fp64 by hand, and bad input."""

import math
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfpk_kernels import _extension
from sfpk_kernels.ops import average_gradients_

from .processes import python

BACKENDS = ["reference", "cpp", *(["triton"] if find_spec("triton") else [])]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ON_GPU = torch.cuda.is_available()  # else Triton's kernel is interpreted
NAN, INF = math.nan, math.inf


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(grads, averages, beta, weights, backend):
    """What is measured, and the gradients afterwards; on the CPU, wherever the backend needs its arguments."""
    place = (lambda t: t.cuda()) if ON_GPU and backend == "triton" else (lambda t: t)
    own = place(grads.clone())
    others = None if averages is None else place(averages)
    stats = average_gradients_(own, others, beta, weights=place(weights), backend=backend)
    assert stats.cosines.dtype == stats.effective_dimensions.dtype == torch.float64
    return stats.cosines.cpu(), stats.effective_dimensions.cpu(), own.cpu()


def by_hand(grads, averages, weights):
    """Cosines and effective dimensions in fp64, of numbers large enough not to vanish."""
    a = grads.double() * weights.double()
    a /= a.abs().amax(1, keepdim=True)
    dimensions = a.square().sum(1).square() / (grads.shape[1] * a.pow(4).sum(1))
    if averages is None:
        return torch.full_like(dimensions, NAN), dimensions
    b = averages.double() * weights.double()
    return torch.cosine_similarity(a, b / b.abs().amax(1, keepdim=True)), dimensions


def check(grads, averages, beta, weights, backend):
    cosines, dimensions, after = run(grads, averages, beta, weights, backend)
    wanted = by_hand(grads, averages, weights)
    # Weights in fp64 beside other gradients are rounded to fp32.
    exact = weights.dtype != torch.float64 or grads.dtype == torch.float64
    rounding = {"rtol": 1e-11, "atol": 1e-11} if exact else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(cosines, wanted[0], **rounding, equal_nan=True)
    torch.testing.assert_close(dimensions, wanted[1], **rounding)
    if beta == 0:
        assert torch.equal(after.view(torch.uint8), grads.view(torch.uint8))
        return
    average = beta * averages.double() + (1 - beta) * grads.double()
    # One rounding in fp32 of a difference, a product and a sum; then one to the dtype.
    unit = torch.finfo(grads.dtype).eps + (0 if grads.dtype == torch.float64 else 2**-23)
    size = grads.double().abs() + averages.double().abs()
    assert ((after.double() - average).abs() <= 2 * unit * size + torch.finfo(grads.dtype).tiny).all()


@pytest.mark.parametrize(
    ("backend", "n", "d"),
    [(backend, n, d) for backend in ("reference", "cpp") for n, d in ((1, 1), (3, 33), (2, 1025), (1, 40_001))]
    + [("triton", n, d) for n, d in ((1, 1), (3, 33), (2, 1025))],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_size_and_dtype(backend, n, d, dtype):
    if backend == "triton" and (dtype == torch.float64 or backend not in BACKENDS):
        pytest.skip("Triton takes up to four bytes")
    grads, averages, weights = random(n, d, dtype=dtype), random(n, d, seed=1, dtype=dtype), random(d, seed=2)
    for beta in (0.0, 0.3, 0.5, 0.9, 1.0):
        check(grads, averages, beta, weights.to(dtype), backend)
    check(grads, averages, 0.0, weights, backend)
    check(grads, averages, 0.4, weights.double(), backend)
    check(grads, None, 0.0, weights.half(), backend)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 4), d=st.integers(1, 3000), seed=st.integers(0, 2**31), beta=st.floats(0, 1),
    dtype=st.sampled_from(FLOATS),
)  # fmt: skip
def test_any_problem(n, d, seed, beta, dtype):
    grads, averages, weights = random(n, d, seed=seed, dtype=dtype), random(n, d, seed=seed + 1, dtype=dtype), random(d)
    for backend in ("reference", "cpp"):
        check(grads, averages, beta, weights, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_squares_that_fp32_cannot_hold(backend):
    for small, large in ((1e-25, 1.0), (1e-30, 1e20), (1.0, 1e-25)):
        grads, averages, weights = random(2, 300) * small, random(2, 300, seed=1) * large, random(300, seed=2) * 1e-3
        check(grads, averages, 0.0, weights, backend)
    check(grads, averages, 0.7, weights, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_dimensions(backend):
    grads = torch.zeros(3, 100)
    grads[0] = 3e-5
    grads[1, :25] = -2.0
    grads[2, 7] = 5.0
    weights = torch.full((100,), 0.5)
    weights[99] = -0.5
    _, dimensions, _ = run(grads, None, 0.0, weights, backend)
    assert dimensions.tolist() == pytest.approx([1.0, 0.25, 0.01])
    cosines, _, after = run(grads, 3 * grads, 0.5, weights, backend)
    assert cosines.tolist() == pytest.approx([1.0] * 3)
    torch.testing.assert_close(after, 2 * grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_zero_or_not_finite(backend, value):
    grads, averages, weights = random(4, 50), random(4, 50, seed=1), random(50, seed=2)
    grads[1], averages[2] = 0.0, 0.0
    grads[3, 9] = value
    for beta in (0.0, 0.6):
        cosines, dimensions, after = run(grads, averages, beta, weights, backend)
        assert cosines.isnan().tolist() == [False, True, True, True]
        assert dimensions.isnan().tolist() == [False, True, False, True]
        assert after.isfinite().all(1).tolist() == [True, True, True, False]
        assert not after[3, 9].isfinite()
        assert bool(after[3].isfinite().sum() == 49)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows_and_what_lies_between_them(backend):
    for dtype in (torch.float32, torch.bfloat16):
        wide, others = random(3, 200, dtype=dtype), random(3, 90, seed=1, dtype=dtype)
        theta = random(140, seed=2)
        for grads, averages, weights in (
            (wide[:, 30:100], others[:, 5:75], theta[::2]),
            (wide[:, 1:140:2], others.t().contiguous().t()[:, :70], theta[:70]),
        ):
            inside = torch.zeros_like(wide, dtype=torch.bool)
            inside.as_strided(grads.shape, grads.stride(), grads.storage_offset()).fill_(True)
            before = wide.clone()
            expected = run(grads, averages, 0.3, weights.contiguous(), "reference")
            stats = average_gradients_(grads, averages, 0.3, weights=weights, backend=backend) if not ON_GPU else None
            if stats is not None:
                torch.testing.assert_close(grads, expected[2])
                torch.testing.assert_close(stats.cosines, expected[0])
                torch.testing.assert_close(stats.effective_dimensions, expected[1])
                assert torch.equal(wide[~inside], before[~inside])
            wide.copy_(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "d"), [(0, 5), (2, 0), (0, 0)])
def test_nothing(backend, n, d):
    cosines, dimensions, after = run(torch.zeros(n, d), torch.zeros(n, d), 0.5, torch.zeros(d), backend)
    assert cosines.shape == dimensions.shape == (n,)
    assert cosines.isnan().all()
    assert dimensions.isnan().all()
    assert after.shape == (n, d)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_cpp_on_every_instruction_set(isa):
    """The average is torch's lerp, bit for bit where both fuse multiplication and addition."""
    fused = isa != "baseline" and "AVX" in torch.backends.cpu.get_cpu_capability()
    code = (
        "import itertools, torch\n"
        "from tests.test_average_gradients import FLOATS, check, random, run\n"
        "for d, dtype, beta in itertools.product((7, 3001), FLOATS, (0.0, 0.2, 0.5, 29 / 30)):\n"
        "    g, v, w = random(2, d, dtype=dtype), random(2, d, seed=1, dtype=dtype), random(d, seed=2, dtype=dtype)\n"
        "    check(g, v, beta, w, 'cpp')\n"
        f"    assert not {fused} or torch.equal(run(g, v, beta, w, 'cpp')[2], g.lerp(v, beta))\n"
        "print('agree')"
    )
    assert python(code, SFPK_CPU_ISA=isa).strip() == "agree"


def test_cpp_bits_do_not_depend_on_the_number_of_threads():
    grads, averages, weights = random(3, 200_003), random(3, 200_003, seed=1), random(200_003, seed=2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(grads, averages, 0.8, weights, "cpp"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_the_reference_goes_through_columns_in_parts(monkeypatch):
    grads, averages, weights = random(3, 100), random(3, 100, seed=1), random(100, seed=2)
    whole = run(grads, averages, 0.8, weights, "reference")
    monkeypatch.setattr("sfpk_kernels.ops.averaging.reference._PART", 50)
    for a, b in zip(whole, run(grads, averages, 0.8, weights, "reference"), strict=True):
        torch.testing.assert_close(a, b)


G, V, W = torch.ones(2, 5), torch.ones(2, 5), torch.ones(5)
SHARED = torch.ones(3, 5)


@pytest.mark.parametrize(
    ("grads", "averages", "beta", "weights", "error", "words"),
    [
        ([1.0], V, 0.5, W, TypeError, "grads: wanted a tensor, got list"),
        (G.long(), V, 0.5, W, TypeError, "grads: wanted float32"),
        (G[0], V, 0.5, W, ValueError, r"grads: wanted shape \(rows, d\), got \(5,\)"),
        (G, V.half(), 0.5, W, TypeError, "averages: wanted float32, got float16"),
        (G, V[:1], 0.5, W, ValueError, r"averages: wanted shape \(2, 5\), got \(1, 5\)"),
        (G, V.to("meta"), 0.5, W, ValueError, "averages: wanted device cpu, got meta"),
        (G, V, 0.5, W[:4], ValueError, r"weights: wanted shape \(5,\), got \(4,\)"),
        (G, V, 0.5, None, TypeError, "weights: wanted a tensor, got NoneType"),
        (G, V, 1.5, W, ValueError, r"beta: wanted a number in \[0, 1\], got 1.5"),
        (G, V, -0.1, W, ValueError, r"beta: wanted a number in \[0, 1\]"),
        (G, V, NAN, W, ValueError, r"beta: wanted a number in \[0, 1\], got nan"),
        (G, V, "0.5", W, TypeError, "beta: wanted a number"),
        (G, None, 0.5, W, ValueError, "beta: wanted 0 without averages, got 0.5"),
        (SHARED[:2], SHARED[1:], 0.5, W, ValueError, "averages: wanted memory of its own, got memory shared"),
        (SHARED[:2], V, 0.5, SHARED[0], ValueError, "weights: wanted memory of its own, got memory shared"),
        (torch.ones(1, 5).expand(2, 5), V, 0.5, W, ValueError, "grads: wanted memory of its own for every entry"),
        (G, V, 0.5, torch.ones(5, requires_grad=True), ValueError, "weights: wanted a tensor without gradient"),
    ],
)  # fmt: skip
def test_bad_arguments(grads, averages, beta, weights, error, words):
    with pytest.raises(error, match=f"average_gradients_: {words}"):
        average_gradients_(grads, averages, beta, weights=weights)
    assert torch.equal(G, torch.ones(2, 5))
    assert torch.equal(SHARED, torch.ones(3, 5))


def test_the_kernel_checks_its_arguments():
    _extension.load()
    average = torch.ops.sfpk_cpp.average_gradients_
    for grads, averages, weights, words in (
        (G[0], None, W, "grads: wanted shape"),
        (G.t(), None, torch.ones(2), "grads: wanted"),
        (G, V.double(), W, "averages: wanted"),
        (G, V[:1], W, "averages: wanted"),
        (G, V, W.double(), "weights: wanted"),
        (G, V, torch.ones(10)[::2], "weights: wanted"),
        (G.long(), None, W, "grads: wanted fp32, bf16 or fp16"),
    ):
        with pytest.raises(RuntimeError, match=f"average_gradients_: {words}"):
            average(grads, averages, weights, 0.0)


def test_the_automatic_choice(monkeypatch):
    grads, averages, weights = random(2, 30), random(2, 30, seed=1), random(30, seed=2)
    chosen = run(grads, averages, 0.3, weights, None)
    for a, b in zip(chosen, run(grads, averages, 0.3, weights, "cpp"), strict=True):
        assert torch.equal(a, b)
    if "triton" in BACKENDS:
        with pytest.raises(ValueError, match="'triton' cannot run here: it takes fp32, bf16 or fp16"):
            run(grads.double(), averages.double(), 0.3, weights, "triton")


def test_under_inference_mode_and_vmap():
    grads, averages, weights = random(4, 2, 30), random(4, 2, 30, seed=1), random(30, seed=2)
    with torch.inference_mode():
        frozen = grads.clone()
    stats = [average_gradients_(g, v, 0.3, weights=weights) for g, v in zip(frozen, averages, strict=True)]
    assert not any(t.is_inference() for one in stats for t in one)
    own = grads.clone()
    batched = torch.func.vmap(lambda g, v: tuple(average_gradients_(g, v, 0.3, weights=weights)))(own, averages)
    assert torch.equal(own, frozen)
    assert torch.equal(batched[0], torch.stack([one.cosines for one in stats]))
    assert torch.equal(batched[1], torch.stack([one.effective_dimensions for one in stats]))
