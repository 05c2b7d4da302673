"""Particles of two bytes: fp16 rounded stochastically, bf16 with the rounding error kept beside it."""

import pytest
import torch

from sfpk_kernels import prune
from sfpk_kernels.ops import transition_
from sfpk_kernels.ops.transition import rounding

from .settings import population
from .test_transition_backends import BACKENDS, fit, in_fp64, place, problem

EVERY = [*BACKENDS, "reference"]
OPTIONS = {"step": 0.05, "radius": 2.0, "repulsion": 0.2, "target_density": 0.8}


def test_rounding_takes_a_neighbour_and_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    # Around 1, subnormal in fp16, and across a power of two.
    for value in (1.0 + 2.0**-10 * 0.3, 0.7123456, -0.3141592, 3.3e-6, -(2.0**-24) * 0.25, 0.99999):
        values = torch.full((64, 4096), value)
        rounded = rounding.stochastic_half(values, rounding.rounding_key(3, 5)).double()
        neighbours = rounded.unique()
        assert len(neighbours) == 2
        gap = float(neighbours[1] - neighbours[0])
        assert neighbours[0] <= values[0, 0].double() <= neighbours[1]
        # The mean of 262,144 draws: six standard errors of a coin.
        assert abs(float(rounded.mean()) - float(values[0, 0])) < 6 * gap * 0.5 / 512
    exact = torch.randn(5, 999, generator=generator).half()
    assert torch.equal(rounding.stochastic_half(exact.float(), 1), exact)


def test_rounding_at_the_ends_of_the_range():
    values = torch.tensor([[0.0, -0.0, 65504.0, 65519.0, 1e30, -1e30, 6e-8, 2.0**-14]])
    for key in range(20):
        rounded = rounding.stochastic_half(values, key)
        assert rounded[0, :6].tolist() == [0.0, 0.0, 65504.0, 65504.0, 65504.0, -65504.0]
        assert torch.signbit(rounded[0, 1])
        assert rounded[0, 6].item() in (2.0**-24, 2.0**-23)
        assert rounded[0, 7].item() == 2.0**-14


def test_random_bits_differ_by_row_column_and_key():
    bits = rounding.random_bits(50, 2000, rounding.rounding_key(0, 1), torch.device("cpu"))
    assert int(bits.min()) >= 0
    assert int(bits.max()) < 2**32
    assert bits.unique().numel() > 0.9999 * bits.numel()
    ones = torch.stack([(bits >> b) & 1 for b in range(32)]).double().mean(dim=(1, 2))
    assert (ones - 0.5).abs().max() < 6 * 0.5 / bits.numel() ** 0.5
    rows = (bits & 1).double() - 0.5
    correlation = rows @ rows.T / (0.25 * bits.shape[1]) - torch.eye(50)
    assert correlation.abs().max() < 6 / bits.shape[1] ** 0.5
    other = rounding.random_bits(50, 2000, rounding.rounding_key(0, 2), torch.device("cpu"))
    assert (other == bits).double().mean() < 1e-3
    assert rounding.rounding_key(0, 1) != rounding.rounding_key(1, 0)


def start(backend, dtype, n=5, d=900, **options):
    masks, grads, vectors = problem(n, fit(backend, d, 200), device=place(backend), theta=True, **options)
    masks = masks.to(dtype)
    residual = None
    if dtype == torch.bfloat16:
        residual = (1e-3 * torch.rand_like(masks, dtype=torch.float32)).bfloat16()
    return masks, grads, vectors, residual


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "consensus"), [(5, 0.0), (5, 0.3), (13, 0.3), (10, 0.3)])
def test_a_step_is_the_exact_one_rounded(backend, dtype, n, consensus):
    masks, grads, vectors, residual = start(backend, dtype, n)
    exact = rounding.read(masks, residual).double()
    options = {**OPTIONS, "consensus": consensus, "kernel": "weighted_rbf"}
    stats = transition_(masks, grads, **vectors, **options, residual=residual, seed=1, step_index=2, backend=backend)
    slow = transition_(exact, grads.double(), **in_fp64(vectors), **options, backend="reference")
    roundings = 2 if backend == "triton" and consensus > 0 else 1  # a scaling pass of its own may follow
    error = (rounding.read(masks, residual) - exact).abs()
    if dtype == torch.float16:
        # A neighbour, at most a unit off.
        assert (error <= roundings * (exact.abs() * 2.0**-10 + 2.0**-24)).all()
        assert error.max() > 1e-5  # and rounded it was
    else:
        assert (error <= roundings * exact.abs() * 2.0**-16).all()  # two times 8 bits
    for name, a, b in zip(stats._fields, stats, slow, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2 if name == "sq_distances" else 2e-3, atol=1e-4, msg=name)
    read = rounding.read(masks, residual).double()
    torch.testing.assert_close(stats.norms, read.norm(dim=1), rtol=1e-6, atol=0)  # of what is stored


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_rounds_with_the_same_bits(backend):
    masks, grads, vectors, _ = start(backend, torch.float16)
    reference = masks.clone()
    for k in range(3):
        options = {**OPTIONS, "seed": 7, "step_index": k, "target_density": 0.9 - 0.1 * k}
        transition_(masks, grads, **vectors, **options, backend=backend)
        transition_(reference, grads, **vectors, **options, backend="reference")
    # A last bit of fp32 moves the value past its random threshold in one of some thousand cases.
    assert (masks != reference).double().mean() < 0.02
    again, _, _, _ = start(backend, torch.float16)
    for k in range(3):
        options = {**OPTIONS, "seed": 7, "step_index": k, "target_density": 0.9 - 0.1 * k}
        transition_(again, grads, **vectors, **options, backend=backend)
    assert torch.equal(masks, again)
    other, _, _, _ = start(backend, torch.float16)
    transition_(other, grads, **vectors, **{**options, "seed": 8}, backend=backend)
    assert (masks != other).double().mean() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_moves_add_up(backend):
    """Moves of a tenth of a unit in the last place: rounding to nearest would lose every one of them."""
    d = fit(backend, 4000, 120)
    results = {}
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        masks = torch.full((2, d), 0.75, dtype=dtype, device=place(backend))
        residual = torch.zeros_like(masks) if dtype == torch.bfloat16 else None
        for k in range(30):
            grads = torch.zeros(2, d, device=place(backend))
            transition_(
                masks, grads, step=5e-5, radius=1.5, repulsion=0.0, residual=residual, step_index=k,
                backend="reference" if dtype == torch.float64 else backend,
            )  # fmt: skip
        results[dtype] = float(rounding.read(masks, residual).double().mean())
    moved = 0.75 - results[torch.float64]
    assert moved == pytest.approx(30 * 5e-5)
    unit = 2.0**-11
    assert abs(results[torch.float16] - results[torch.float64]) < 6 * 0.5 * unit * (30 / (2 * d)) ** 0.5
    assert abs(results[torch.bfloat16] - results[torch.float64]) < 0.1 * moved  # 16 bits of mantissa


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_particles_that_stay_keep_every_bit(backend, dtype, policy):
    masks, grads, vectors, residual = start(backend, dtype)
    grads[1, 3] = float("nan")
    before = masks.clone(), None if residual is None else residual.clone()
    if policy == "raise":
        with pytest.raises(ValueError, match=r"particles \[1\]"):
            transition_(masks, grads, **vectors, **OPTIONS, residual=residual, backend=backend)
        rows = slice(None)
    else:
        transition_(masks, grads, **vectors, **OPTIONS, residual=residual, nonfinite="skip", backend=backend)
        rows = slice(1, 2)
        assert not torch.equal(masks[0], before[0][0])
    assert torch.equal(masks[rows], before[0][rows])
    if residual is not None:
        assert torch.equal(residual[rows], before[1][rows])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_run_with_particles_of_each_dtype(mlp, vectors, dtype):
    config = population(sparsity=0.8, n_particles=3, n_steps=8, particle_dtype=dtype)
    result = prune(mlp, vectors, config=config, progress=False)
    assert result.particles.dtype == getattr(torch, dtype)
    assert result.mask.kept == round(0.2 * 144)
    again = prune(mlp, vectors, config=config, progress=False)
    assert torch.equal(result.particles, again.particles)
    assert result.mask.fingerprint() == again.mask.fingerprint()
