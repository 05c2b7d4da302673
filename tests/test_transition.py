"""The transition op: hand-computed numbers, its own constraints, options, registration, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfpk_kernels.ops import TransitionStats, transition_

STEP = {"step": 0.1, "radius": 2.0, "repulsion": 0.0}


def density_of(m, sizes=None, kind="l2"):
    c = torch.ones(m.shape[-1], dtype=m.dtype) if sizes is None else sizes
    share = (c * m**2).sum(-1) / c.sum()
    return share.sqrt() if kind == "l2" else share


def slope_of(m, sizes, kind):
    """∇s by autograd, row by row."""
    m = m.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((1 - density_of(m, sizes, kind)).sum(), m)
    return gradient


def test_two_dimensional_step_by_hand():
    # m = (3, 4)/5·√2 has ρ = sqrt(Σm²/2) = 1 and ‖m‖ = √2. ∇s = -m/(√2 ‖m‖) = -(0.6, 0.8)/√2, ‖s‖ = 1/√2,
    # ŝ = (-0.6, -0.8). With g = -∂L/∂m = (1, 0): ŝ·g = -0.6, u = (1, 0) - (-0.6)(-0.6, -0.8) = (0.64, -0.48),
    # u/‖u‖ = (0.8, -0.6). r² - 1 = 0.5625, root 0.75. Δt = 0.1:
    # Δm = 0.1·√2·((-0.6, -0.8) + 0.75·(0.8, -0.6)) = 0.1·√2·(0, -1.25).
    root2 = math.sqrt(2)
    m = torch.tensor([[0.6 * root2, 0.8 * root2]], dtype=torch.float64)
    stats = transition_(m, torch.tensor([[-1.0, 0.0]]), step=0.1, radius=1.25, repulsion=0.0)
    assert m[0].tolist() == pytest.approx([0.6 * root2, 0.8 * root2 - 0.125 * root2], abs=1e-15)
    assert stats.norms.item() == pytest.approx(root2 * math.hypot(0.6, 0.675))
    assert stats.densities.item() == pytest.approx(math.hypot(0.6, 0.675))
    assert stats.cosines.item() == pytest.approx(0.0, abs=1e-15)


def test_repulsion_by_hand():
    # Particles (1, 0) and (0, 1): d = 2, q = 2, κ = exp(-1), C = 2κ/2 = κ; force on the first, with λ/n = 1/2:
    # ½κ (1, -1). Its unit slope is (-1, 0), so only the second component is tangential: u/‖u‖ = (0, -1).
    # ρ = √½, ‖s‖ = ‖m‖/(d ρ) = 1/√2. Δm = Δt √2 ((-1, 0) + √3 (0, -1)).
    m = torch.eye(2, dtype=torch.float64)
    stats = transition_(m, torch.zeros(2, 2), step=0.1, radius=2.0, repulsion=1.0)
    assert m[0].tolist() == pytest.approx([1 - 0.1 * math.sqrt(2), -0.1 * math.sqrt(6)])
    assert m[1].tolist() == pytest.approx([-0.1 * math.sqrt(6), 1 - 0.1 * math.sqrt(2)])
    assert stats.sq_distances[0, 1].item() == pytest.approx(((m[0] - m[1]) ** 2).sum().item())


def autograd_descent(m, grads, i, repulsion, kernel, saliency):
    """-∂/∂m_i (L + λ mean_j κ_ij), the kernel differentiated by autograd with h held constant."""
    mi = m[i].clone().requires_grad_()
    total = 0.0
    for other in m:
        if kernel == "rbf":
            total = total + torch.exp(-((mi - other) ** 2).sum() / m.shape[1])
        else:
            h = ((saliency * m[i] ** 2).sum() * (saliency * other**2).sum()).sqrt()
            total = total + torch.exp(-(saliency**2 * (mi - other) ** 2).sum() / h)
    (gradient,) = torch.autograd.grad(total / len(m), mi)
    return -grads[i] - repulsion * gradient


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 6),
    d=st.integers(2, 40),
    radius=st.floats(1.001, 6),
    step=st.floats(1e-4, 0.2),
    repulsion=st.sampled_from([0.0, 0.2, 50.0]),
    kernel=st.sampled_from(["rbf", "weighted_rbf"]),
    density=st.sampled_from(["l2", "l2_squared"]),
    sized=st.booleans(),
    weighted_gradient=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_move_satisfies_its_constraints(
    n, d, radius, step, repulsion, kernel, density, sized, weighted_gradient, seed
):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.1

    m, grads, saliency = uniform(n, d), uniform(n, d) - 0.6, uniform(d)
    sizes = torch.randint(1, 9, (d,), generator=generator).double() if sized else None
    theta = uniform(d) - 0.6 if weighted_gradient else None
    old = m.clone()
    transition_(
        m, grads, step=step, radius=radius, repulsion=repulsion, kernel=kernel, saliency=saliency, sizes=sizes,
        density=density, weights=theta,
    )  # fmt: skip
    move, s = m - old, slope_of(old, sizes, density)
    energy_grad = grads if theta is None else grads * theta
    # s·Δm = Δt: the soft sparsity rises by Δt to first order.
    torch.testing.assert_close((s * move).sum(1), torch.full((n,), step, dtype=torch.float64), rtol=1e-9, atol=0)
    # ‖Δm‖ = r Δt / ‖s‖.
    torch.testing.assert_close(move.norm(dim=1), radius * step / s.norm(dim=1), rtol=1e-7, atol=0)
    # Among all such moves it follows g best: its tangential part is parallel to that of g.
    for i in range(n):
        g = autograd_descent(old, energy_grad, i, repulsion, kernel, saliency)
        unit = s[i] / s[i].norm()
        u, v = g - (unit @ g) * unit, move[i] - (unit @ move[i]) * unit
        assert torch.nn.functional.cosine_similarity(u, v, dim=0) > 1 - 1e-9


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 5),
    d=st.integers(1, 30),
    target=st.floats(0.05, 1),
    density=st.sampled_from(["l2", "l2_squared"]),
    consensus=st.sampled_from([0.0, 0.3, 1.0]),
    sized=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_retraction_is_exact(n, d, target, density, consensus, sized, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    m = torch.rand(n, d, generator=generator, dtype=dtype) + 0.5  # a step longer than a row would turn it round
    sizes = torch.randint(1, 9, (d,), generator=generator).to(dtype) if sized else None
    grads = torch.randn(n, d, generator=generator, dtype=dtype)
    stats = transition_(m, grads, **STEP, sizes=sizes, density=density, target_density=target, consensus=consensus)
    # A few roundings of the rows' own dtype; what a move takes away is rounded, too, and more than what stays.
    tolerance = 1e-12 if dtype == torch.float64 else max(1e-6, 3e-7 / target)
    expected = torch.full((n,), target, dtype=torch.float64)
    torch.testing.assert_close(stats.densities, expected, rtol=tolerance, atol=0)
    measured = density_of(m.double(), None if sizes is None else sizes.double(), density)
    torch.testing.assert_close(measured, expected, rtol=tolerance, atol=0)


def test_consensus_pulls_towards_the_mean():
    m = torch.rand(4, 20, dtype=torch.float64) + 0.5
    grads = torch.randn(4, 20, dtype=torch.float64)
    free, pulled, merged = m.clone(), m.clone(), m.clone()
    transition_(free, grads, **STEP)
    transition_(pulled, grads, **STEP, consensus=0.3)
    transition_(merged, grads, **STEP, consensus=1.0)
    torch.testing.assert_close(pulled, free + 0.3 * (free.mean(0) - free))
    torch.testing.assert_close(merged, free.mean(0).expand(4, -1))


def test_all_particles_read_the_old_positions():
    """Jacobi: the result does not depend on the order of the particles."""
    m, grads = torch.rand(5, 30, dtype=torch.float64) + 0.2, torch.randn(5, 30, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 1, 2])
    straight, permuted = m.clone(), m[order].clone()
    transition_(straight, grads, step=0.1, radius=2, repulsion=30.0)
    transition_(permuted, grads[order], step=0.1, radius=2, repulsion=30.0)
    torch.testing.assert_close(permuted, straight[order], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kernel", ["rbf", "weighted_rbf"])
def test_handing_on_the_state_changes_nothing(kernel):
    start, saliency = torch.rand(3, 50) + 0.5, torch.rand(50)
    with_state, without = start.clone(), start.clone()
    state = None
    for k in range(5):
        grads = torch.randn(3, 50)
        options = {"step": 0.05, "radius": 2, "repulsion": 5.0, "kernel": kernel, "saliency": saliency}
        options["target_density"] = 0.9 - 0.1 * k
        state = transition_(with_state, grads, **options, state=state)
        transition_(without, grads, **options)
    assert torch.equal(with_state, without)


def test_fp32_stays_with_fp64():
    m64 = torch.rand(10, 5000, dtype=torch.float64) + 0.5
    m32 = m64.float()
    start = m64.clone()
    grads = torch.randn(10, 5000)
    options = {"step": 0.05, "radius": 2, "repulsion": 0.2}
    transition_(m64, grads.double(), **options)
    transition_(m32, grads, **options)
    # Rounding of m itself (2⁻²⁴ of values near 1) against a move of 0.05·r.
    assert (m32 - m64).norm() / (m64 - start).norm() < 3e-6


def test_strided_rows_and_half_precision_gradients():
    buffer = torch.rand(3, 40) + 0.5
    m, grads = buffer[:, :25], torch.randn(3, 25)
    untouched, expected = buffer[:, 25:].clone(), m.clone()
    transition_(expected, grads.bfloat16().float(), **STEP)
    transition_(m, grads.bfloat16(), **STEP)
    assert torch.equal(m, expected)
    assert torch.equal(buffer[:, 25:], untouched)


def test_gradient_along_the_slope_gives_the_radial_step_alone():
    m = torch.rand(2, 30, dtype=torch.float64) + 0.5
    old = m.clone()
    transition_(m, 3.0 * old, **STEP)  # ∂L/∂m ∝ m: nothing tangential
    torch.testing.assert_close(m, old * (1 - 0.1 / density_of(old))[:, None])
    m = old.clone()
    transition_(m, torch.zeros_like(m), **STEP)
    torch.testing.assert_close(m, old * (1 - 0.1 / density_of(old))[:, None])


def test_a_row_of_zeros_stays_and_disturbs_nobody():
    m = torch.rand(3, 10) + 0.5
    m[1] = 0
    alone = m[[0, 2]].clone()
    grads = torch.randn(3, 10)
    transition_(m, grads, **STEP, target_density=0.5)
    transition_(alone, grads[[0, 2]], **STEP, target_density=0.5)
    assert torch.equal(m[1], torch.zeros(10))
    assert torch.equal(m[[0, 2]], alone)


def test_eps_damps_a_vanishing_tangential_part():
    m = torch.ones(1, 100, dtype=torch.float64)
    grads = 1e-9 * torch.randn(1, 100, dtype=torch.float64)
    plain, damped = m.clone(), m.clone()
    transition_(plain, grads, **STEP)
    transition_(damped, grads, **STEP, eps=1e-12)
    radial = (1 - 0.1) * m
    assert (plain - radial).norm() > 1.0
    assert (damped - radial).norm() < 0.1 * (plain - radial).norm()


def sample(n=3, d=7, **changes):
    return {"masks": torch.rand(n, d) + 0.5, "grads": torch.randn(n, d), **STEP, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"masks": [1.0]}, TypeError, "masks: wanted a tensor, got list"),
        ({"masks": torch.ones(3, 7).int()}, TypeError, "masks: wanted float32 or .*, got int32"),
        (
            {"masks": torch.ones(3, 7).bfloat16()},
            ValueError,
            "residual: wanted a bf16 tensor with bf16 masks, got None",
        ),
        ({"residual": torch.ones(3, 7).bfloat16()}, ValueError, "residual: wanted None with torch.float32 masks"),
        ({"seed": 0.5}, TypeError, "seed: wanted an integer, got 0.5"),
        ({"nonfinite": "ignore"}, ValueError, "nonfinite: wanted one of 'raise', 'skip', 'hold', got 'ignore'"),
        ({"masks": torch.ones(7)}, ValueError, "masks: wanted shape"),
        ({"masks": torch.ones(3, 0), "grads": torch.ones(3, 0)}, ValueError, "masks: wanted shape"),
        ({"grads": torch.ones(3, 8)}, ValueError, r"grads: wanted shape \(3, 7\), got \(3, 8\)"),
        ({"grads": torch.ones(3, 7).int()}, TypeError, "grads: wanted"),
        ({"grads": torch.ones(3, 7, device="meta")}, ValueError, "grads: wanted device cpu, got meta"),
        ({"grads": torch.tensor([[1.0] * 7, [float("nan")] * 7, [1.0] * 7])}, ValueError, r"particles \[1\]"),
        ({"step": 0.0}, ValueError, "step: wanted a number > 0"),
        ({"step": "1"}, TypeError, "step"),
        ({"radius": 1.0}, ValueError, "radius: wanted a number > 1, got 1.0"),
        ({"radius": float("inf")}, ValueError, "radius"),
        ({"repulsion": -1.0}, ValueError, "repulsion"),
        ({"consensus": 1.5}, ValueError, "consensus"),
        ({"eps": -1.0}, ValueError, "eps"),
        ({"target_density": 0.0}, ValueError, "target_density"),
        ({"target_density": 1.1}, ValueError, "target_density"),
        ({"kernel": "cosine"}, ValueError, "kernel: wanted one of 'rbf', 'weighted_rbf', got 'cosine'"),
        ({"kernel": "weighted_rbf"}, ValueError, "saliency"),
        ({"density": "l1"}, ValueError, "density"),
        ({"saliency": torch.ones(8)}, ValueError, "saliency"),
        ({"sizes": torch.ones(3, 7)}, ValueError, "sizes"),
        ({"sizes": torch.zeros(7)}, ValueError, "sizes: wanted all > 0, got 0.0"),
        ({"kernel": "weighted_rbf", "saliency": torch.full((7,), float("nan"))}, ValueError, "saliency: wanted all"),
        ({"weights": torch.ones(7).long()}, TypeError, "weights"),
        ({"state": "x"}, TypeError, "state"),
        ({"backend": "fortran"}, ValueError, "backend: wanted one of"),
        ({"backend": "cuda"}, ValueError, "'cuda' is not available"),
        (
            {"masks": torch.ones(3, 7).double(), "backend": "cpp"},
            ValueError,
            "cpp.*takes fp32, fp16 and bf16 particles",
        ),
        ({"masks": torch.ones(7, 3).t(), "backend": "cpp"}, ValueError, "cpp.*rows without gaps"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(changes, error, words):
    arguments = sample(**changes)
    masks = arguments["masks"]
    before = masks.clone() if isinstance(masks, torch.Tensor) else None
    with pytest.raises(error, match=words) as caught:
        transition_(arguments.pop("masks"), arguments.pop("grads"), **arguments)
    assert "transition_" in str(caught.value)
    if before is not None:
        assert torch.equal(masks, before)


def test_shared_memory_and_foreign_state_are_refused():
    m = torch.rand(3, 7)
    with pytest.raises(ValueError, match="memory shared with masks"):
        transition_(m, m, **STEP)
    state = transition_(m, torch.randn(3, 7), **STEP)
    assert isinstance(state, TransitionStats)
    with pytest.raises(ValueError, match="state"):
        transition_(torch.rand(2, 7), torch.randn(2, 7), **STEP, state=state)


def test_environment_variable_chooses_the_backend(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("SFPK_BACKEND", "triton")
    transition_(torch.rand(2, 7), torch.randn(2, 7), **STEP)  # holds for the ops that have it
    monkeypatch.setenv("SFPK_BACKEND", "fortran")
    with pytest.raises(ValueError, match="SFPK_BACKEND: wanted one of .* got 'fortran'"):
        transition_(torch.rand(2, 7), torch.randn(2, 7), **STEP)
    monkeypatch.setenv("SFPK_BACKEND", "cpp")
    with pytest.raises(ValueError, match="SFPK_BACKEND: 'cpp' cannot run here: it takes fp32"):
        transition_(torch.rand(2, 7).double(), torch.randn(2, 7), **STEP)
    transition_(torch.rand(2, 7), torch.randn(2, 7), **STEP, backend="reference")
