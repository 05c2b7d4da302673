"""Every fast backend of the transition against the fp64 reference: sizes, options, dtypes, strides, threads."""

import itertools
import threading
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfpk_kernels import _extension
from sfpk_kernels.ops import TransitionStats, transition_

from .processes import python

BACKENDS = ["cpp", "triton"]
HERE = BACKENDS if find_spec("triton") else ["cpp"]
GPU = torch.cuda.is_available()

# Relative error of Δm: rounding of the moved mask itself (2⁻²⁴ of values near 1) against moves of a few percent.
TOLERANCE = 1e-5


def place(backend):
    """Triton runs on the GPU where there is one, else in its interpreter."""
    return "cuda" if backend == "triton" and GPU else "cpu"


def fit(backend, d, most=300):
    """d, or few enough columns for the interpreter."""
    return d if backend == "cpp" or GPU else min(d, most)


def problem(n, d, *, device="cpu", seed=0, sized=False, theta=False, grad_dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    vectors = {
        "saliency": torch.rand(d, generator=generator) + 0.1,
        "sizes": torch.randint(1, 9, (d,), generator=generator).float() if sized else None,
        "weights": torch.randn(d, generator=generator) if theta else None,
    }
    masks = 0.5 + spread * torch.rand(n, d, generator=generator)
    grads = torch.randn(n, d, generator=generator).to(grad_dtype)
    vectors = {name: None if value is None else value.to(device) for name, value in vectors.items()}
    return masks.to(device), grads.to(device), vectors


def in_fp64(vectors):
    return {name: None if value is None else value.double() for name, value in vectors.items()}


def compare(backend, masks, grads, vectors, state=None, tolerance=TOLERANCE, **options):
    """Runs both; returns the fast stats. The move is compared, then every statistic."""
    options = {"step": 0.05, "radius": 2.0, "repulsion": 0.2, **options}
    start, exact = masks.double(), masks.double()
    fast = transition_(masks, grads, **vectors, **options, state=state, backend=backend)
    slow = transition_(exact, grads.double(), **in_fp64(vectors), **options, state=state, backend="reference")
    error = (masks - exact).norm() / (exact - start).norm()
    assert error <= tolerance, f"relative error of Δm {error:.1e}"
    for name, a, b in zip(TransitionStats._fields, fast, slow, strict=True):
        largest = b.abs().max().clamp_min(1e-12)
        # Squared distances inherit the rounding of the masks they are taken between.
        bound = 1e-4 * largest + 1e-12 * masks.shape[1] if name == "sq_distances" else 1e-5 * largest
        assert (a - b).abs().max() <= bound, name
    return fast


SIZES = list(itertools.product([1, 2, 3, 7, 10, 33], [2, 7, 31, 32, 33, 255, 256, 257, 1023, 1024, 1025, 4096, 70_001]))
# The tilings of the Triton kernels, one launch and several, ragged tails; interpreted, each takes its time.
FEW_SIZES = [(1, 2), (2, 7), (3, 127), (7, 128), (8, 129), (10, 400), (3, 5001), (12, 130), (13, 65), (33, 130)]


@pytest.mark.parametrize(
    ("backend", "n", "d"),
    [("cpp", *size) for size in SIZES] + [("triton", *size) for size in (SIZES if GPU else FEW_SIZES)],
)
def test_sizes(backend, n, d):
    compare(backend, *problem(n, d, device=place(backend)))


ALL_OPTIONS = list(itertools.product([False, True], [None, 0.5], [0.0, 0.3, 1.0], [0.0, 0.2, 30.0]))
FEW_OPTIONS = [(False, None, 0.0, 0.2), (True, 0.5, 0.0, 0.0), (True, 0.5, 0.3, 30.0), (True, None, 1.0, 0.2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d", [1, 3000])
@pytest.mark.parametrize(("kernel", "density", "sized"), list(itertools.product(
    ["rbf", "weighted_rbf"], ["l2", "l2_squared"], [False, True])))  # fmt: skip
def test_options(backend, kernel, density, sized, d):
    # Interpreted, half of the few: each meets every two of kernel, density and sizes.
    few = FEW_OPTIONS[(kernel == "rbf") ^ (density == "l2") ^ sized :: 2]
    for theta, target, consensus, repulsion in ALL_OPTIONS if backend == "cpp" or GPU else few:
        masks, grads, vectors = problem(5, fit(backend, d, 130), device=place(backend), sized=sized, theta=theta)
        options = {"kernel": kernel, "density": density, "target_density": target, "consensus": consensus}
        # One coordinate has no tangential part: the result is 1 + rounding, whatever the gradient.
        compare(backend, masks, grads, vectors, repulsion=repulsion, **options, tolerance=1e-4 if d == 1 else TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "d", "sized"), [(150, 2001, True), (16, 1001, False), (30, 501, True), (70, 401, False)])
def test_many_particles(backend, n, d, sized):
    """With the Gram matrices of a pull in one pass, or a scaling pass behind it."""
    masks, grads, vectors = problem(n, fit(backend, d, 100), device=place(backend), sized=sized, theta=True)
    compare(backend, masks, grads, vectors, consensus=0.3, target_density=0.6)


@settings(max_examples=60, deadline=None)
@given(
    backend=st.sampled_from(HERE), n=st.integers(1, 20), d=st.integers(2, 3000), seed=st.integers(0, 10**6),
    step=st.floats(0.01, 0.2), radius=st.floats(1.01, 8), repulsion=st.sampled_from([0.0, 0.2, 100.0]),
    consensus=st.sampled_from([0.0, 0.1]), target=st.none() | st.floats(0.1, 1),
)  # fmt: skip
def test_any_problem(backend, n, d, seed, step, radius, repulsion, consensus, target):
    masks, grads, vectors = problem(n, fit(backend, d, 40), device=place(backend), seed=seed, theta=bool(seed % 2))
    compare(
        backend, masks, grads, vectors, step=step, radius=radius, repulsion=repulsion, consensus=consensus,
        target_density=target,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradient_dtypes(backend, dtype):
    masks, grads, vectors = problem(4, fit(backend, 1500), device=place(backend), grad_dtype=dtype, theta=True)
    grads[0, :4] = torch.tensor([0.0, -0.0, 6e-8, -3e-5]).to(dtype)  # half-precision subnormals among them
    compare(backend, masks, grads, vectors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rows_and_poisoned_surroundings(backend):
    device = place(backend)
    masks, grads, vectors = problem(5, 1000, device=device)
    wide = torch.full((5, 1013), float("nan"), device=device)
    wide[:, 3:1003] = masks
    slow_grads = torch.full((5, 2000), float("nan"), device=device)
    slow_grads[:, ::2] = grads
    compare(backend, wide[:, 3:1003], slow_grads[:, ::2], vectors)
    assert wide[:, :3].isnan().all()
    assert wide[:, 1003:].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_spares_the_measuring_pass_and_changes_nothing(backend):
    masks, grads, vectors = problem(6, fit(backend, 5000), device=place(backend))
    state = compare(backend, masks, grads, vectors)
    other = masks.clone()
    compare(backend, masks, -grads, vectors, state=state)
    options = {"step": 0.05, "radius": 2.0, "repulsion": 0.2}
    transition_(other, -grads, **vectors, **options, backend=backend)
    assert (masks - other).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", ["rbf", "weighted_rbf"])
def test_distances_of_close_particles(backend, kernel):
    """Spread 1e-2 around 1: the textbook |a|² + |b|² - 2ab in fp32 is wrong by a quarter here."""
    masks, grads, vectors = problem(8, fit(backend, 100_000, 5000), device=place(backend), spread=1e-2)
    stats = transition_(
        masks, 1e-9 * grads, **vectors, step=1e-6, radius=1.0001, repulsion=0.2, kernel=kernel, backend=backend
    )
    exact, a = masks.double(), vectors["saliency"].double() if kernel == "weighted_rbf" else 1.0
    expected = torch.stack([((exact - row) * a).square().sum(1) for row in exact])
    assert (stats.sq_distances - expected).abs().max() <= 1e-6 * expected.max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sine", [1e-1, 1e-2, 1e-3])
def test_gradients_nearly_parallel_to_the_slope(backend, sine):
    """‖u‖ must keep its digits: the length of the move and the density on schedule depend on it."""
    masks, noise, _ = problem(3, fit(backend, 50_000, 5000), device=place(backend))
    grads = masks + sine * masks.norm() / noise.norm() * noise
    before = masks.double()
    stats = transition_(masks, grads, step=0.05, radius=2.0, repulsion=0.0, target_density=0.7, backend=backend)
    assert (stats.densities - 0.7).abs().max() < 1e-5 * (1e-3 / sine) + 1e-6
    exact = before.clone()
    transition_(exact, grads.double(), step=0.05, radius=2.0, repulsion=0.0, target_density=0.7, backend="reference")
    # g = -(m + …) rounds to 2⁻²⁴ of m, and only its sine-sized part counts.
    assert (masks - exact).norm() / (exact - before).norm() < 3e-7 / sine


@pytest.mark.parametrize("backend", BACKENDS)
def test_fifty_steps_stay_together(backend):
    n, d = (6, 4000) if backend == "cpp" or GPU else (3, 130)
    masks, _, vectors = problem(n, d, device=place(backend), theta=True, spread=1e-3)
    exact, state, exact_state = masks.double(), None, None
    for k in range(50):
        grads = torch.randn(n, d, device=place(backend))
        options = {"step": 0.01, "radius": 1.5, "repulsion": 5.0, "target_density": 0.98 - 0.015 * k}
        options["consensus"] = 0.3 if k > 25 else 0.0
        state = transition_(masks, grads, **vectors, **options, state=state, backend=backend)
        exact_state = transition_(
            exact, grads.double(), **in_fp64(vectors), **options, state=exact_state, backend="reference"
        )
        assert (masks - exact).norm() / exact.norm() < 1e-5, k
    assert (state.sq_distances - exact_state.sq_distances).abs().max() <= 1e-4 * exact_state.sq_distances.max()


def test_cpp_bits_do_not_depend_on_the_number_of_threads():
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            masks, grads, vectors = problem(10, 300_001, theta=True)
            stats = transition_(masks, grads, **vectors, step=0.05, radius=2.0, repulsion=0.2, backend="cpp")
            results.append((masks, *stats))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_cpp_from_two_threads_at_once():
    def run(results, slot):
        for seed in range(20):
            masks, grads, vectors = problem(3, 20_000, seed=seed)
            transition_(masks, grads, **vectors, step=0.05, radius=2.0, repulsion=0.2, backend="cpp")
            results[slot].append(masks)

    alone, together = {0: []}, {0: [], 1: []}
    run(alone, 0)
    workers = [threading.Thread(target=run, args=(together, slot)) for slot in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for slot in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(alone[0], together[slot], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing(backend, value):
    masks, grads, vectors = problem(4, fit(backend, 3000), device=place(backend))
    grads[2, -1] = value
    before = masks.clone()
    with pytest.raises(ValueError, match=r"grads: wanted finite gradients, got non-finite ones in particles \[2\]"):
        transition_(masks, grads, **vectors, step=0.05, radius=2.0, repulsion=0.2, backend=backend)
    assert torch.equal(masks, before)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize(
    ("n", "options"), [(5, {}), (5, {"consensus": 0.3, "target_density": 0.6}), (13, {"consensus": 0.3})]
)
def test_skipping_particles_whose_gradient_is_not_finite(backend, n, options):
    """The others move as they would if the skipped ones had only been there to repel, and to be averaged over."""
    options = {"step": 0.05, "radius": 2.0, "repulsion": 0.2, **options}
    masks, grads, vectors = problem(n, 200, device=place(backend), theta=True)
    grads[1, 7], grads[3, 0] = float("nan"), float("inf")
    before, exact = masks.clone(), masks.double()
    stats = transition_(masks, grads, **vectors, **options, nonfinite="skip", backend=backend)
    slow = transition_(
        exact, grads.double(), **in_fp64(vectors), **options, nonfinite="skip", backend="reference"
    )  # fmt: skip
    assert torch.equal(masks[[1, 3]], before[[1, 3]])
    assert stats.cosines.isnan().nonzero().flatten().tolist() == [1, 3]
    assert (masks - exact).abs().max() < 1e-5
    for name, a, b in zip(TransitionStats._fields, stats, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_cpp_on_every_instruction_set(isa):
    """Wider ones than the CPU has fall back to what it has."""
    code = (
        "import itertools, torch\n"
        "from tests.test_transition_backends import compare, problem\n"
        "for n, d, sized, consensus in itertools.product((1, 5, 10), (7, 3001), (False, True), (0.0, 0.3)):\n"
        "    compare('cpp', *problem(n, d, sized=sized, theta=True), consensus=consensus, target_density=0.5)\n"
        "print('agree')"
    )
    assert python(code, SFPK_CPU_ISA=isa).strip() == "agree"


def test_cpp_kernel_checks_its_arguments():
    _extension.load()
    options = (None, None, None, None, [], 0.1, 2.0, 0.2, False, False, None, 0.0, 0.0, 0, False, -1, None)
    for masks, grads, words in [
        (torch.ones(2, 3).double(), torch.ones(2, 3), "masks: wanted fp32, bf16 or fp16"),
        (torch.ones(3, 2).t(), torch.ones(2, 3), "masks: wanted rows without gaps"),
        (torch.ones(2, 3).bfloat16(), torch.ones(2, 3), "residual: wanted a bf16 tensor"),
        (torch.ones(3), torch.ones(3), "masks: wanted shape"),
        (torch.ones(2, 3), torch.ones(3, 2).t(), "grads: wanted rows without gaps"),
        (torch.ones(2, 3), torch.ones(2, 3).double(), "grads: wanted"),
        (torch.ones(2, 3), torch.ones(2, 4), "grads: wanted a row per particle"),
    ]:
        with pytest.raises(RuntimeError, match=f"transition_: {words}"):
            torch.ops.sfpk_cpp.transition_(masks, grads, *options)


def test_automatic_choice_takes_cpp_and_falls_back_for_fp64():
    masks, grads, vectors = problem(3, 100)
    options = {"step": 0.05, "radius": 2.0, "repulsion": 0.2}
    with pytest.raises(ValueError, match="masks: wanted memory of its own"):
        transition_(masks[0].expand(3, -1), grads, **vectors, **options, backend="cpp")
    automatic, explicit = masks.clone(), masks.clone()
    transition_(automatic, grads, **vectors, **options)
    transition_(explicit, grads, **vectors, **options, backend="cpp")
    assert torch.equal(automatic, explicit)
    wide, reference = masks.double(), masks.double()
    transition_(wide, grads, **vectors, **options)
    transition_(reference, grads, **vectors, **options, backend="reference")
    assert torch.equal(wide, reference)
