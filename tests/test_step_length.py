"""Moves by an angle: the tangential part does not depend on how far the density falls."""

import math

import pytest
import torch
from torch import nn

from sfpk_kernels import Coordinates, SFPKConfig, SFPKPruner
from sfpk_kernels.ops import transition_
from sfpk_kernels.search.records import StepRecord
from sfpk_kernels.search.schedule import density_schedule
from sfpk_kernels.search.step_length import StepLength
from tests import test_transition_backends as backends
from tests import test_transition_stages as stages
from tests.test_transition import density_of, slope_of

BY_ANGLE = {"radius": 2.0, "repulsion": 0.0, "angle": 0.3}


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def moved_by_hand(m, gradient, angle, density):
    """m ← ρ√D (m̂ + α û)/‖m̂ + α û‖, with u = g - (m̂·g) m̂ and g = -∂L/∂m."""
    unit = m / m.norm()
    u = -gradient + (unit @ gradient) * unit
    direction = unit + angle * u / u.norm()
    return density * math.sqrt(len(m)) * direction / direction.norm()


@pytest.mark.parametrize("step", [0.0, 0.1])
@pytest.mark.parametrize("density", ["l2", "l2_squared"])
def test_the_formula_by_hand(step, density):
    m, gradients = uniform(3, 40), uniform(3, 40, seed=1) - 1.0
    wanted = [moved_by_hand(row, g, 0.3, 0.8) for row, g in zip(m, gradients, strict=True)]
    target = 0.8 if density == "l2" else 0.8**2
    transition_(m, gradients, step=step, density=density, target_density=target, **BY_ANGLE)
    torch.testing.assert_close(m, torch.stack(wanted), rtol=1e-12, atol=0)


def test_two_dimensions_by_hand():
    # m = (0, 1): ρ = √½, ‖s‖ = 1/√2, ŝ = (0, -1), u/‖u‖ = (1, 0). Δt = 0.1: the radial part is 0.1·√2 (0, -1), the
    # tangential one 0.5·(1 - 0.1·√2) (1, 0).
    m = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    stats = transition_(m, torch.tensor([[-3.0, 4.0]]), step=0.1, radius=2.0, repulsion=0.0, angle=0.5)
    left = 1 - 0.1 * math.sqrt(2)
    assert m[0].tolist() == pytest.approx([0.5 * left, left])
    assert stats.cosines.item() == pytest.approx(
        (0.5 * left * 3 + 0.1 * math.sqrt(2) * 4) / 5 / math.hypot(0.5 * left, 0.1 * math.sqrt(2))
    )


@pytest.mark.parametrize("density", ["l2", "l2_squared"])
@pytest.mark.parametrize("step", [0.0, 0.05])
def test_with_sizes_and_repulsion_the_parts_have_their_lengths(density, step):
    m, gradients, sizes = uniform(3, 30), uniform(3, 30, seed=1) - 1.0, torch.randint(1, 9, (30,)).double()
    old, saliency = m.clone(), uniform(30, seed=2)
    transition_(
        m, gradients, step=step, density=density, sizes=sizes, kernel="weighted_rbf", saliency=saliency, radius=2.0,
        repulsion=0.2, angle=0.3,
    )  # fmt: skip
    s = slope_of(old, sizes, density)
    unit = s / s.norm(dim=1, keepdim=True)
    radial = ((m - old) * unit).sum(1, keepdim=True) * unit
    torch.testing.assert_close((s * (m - old)).sum(1), torch.full((3,), step, dtype=torch.float64))
    tangential = m - old - radial
    torch.testing.assert_close(tangential.norm(dim=1), 0.3 * (old + radial).norm(dim=1))


def test_no_angle_is_no_tangential_part_and_without_a_fall_no_move():
    m = uniform(2, 9)
    old = m.clone()
    transition_(m, uniform(2, 9, seed=1), step=0.0, radius=2.0, repulsion=0.0, angle=0.0)
    assert torch.equal(m, old)
    transition_(m, uniform(2, 9, seed=1), step=0.1, radius=2.0, repulsion=0.0, angle=0.0)
    torch.testing.assert_close(m / old, (m / old)[:, :1].expand(2, 9))
    torch.testing.assert_close(density_of(m), density_of(old) - 0.1)


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize(("n", "d", "sized"), [(1, 300, False), (5, 257, False), (4, 130, True), (16, 100, False)])
@pytest.mark.parametrize("options", [
    {}, {"step": 0.0}, {"target_density": 0.6, "consensus": 0.3}, {"step": 0.0, "target_density": 0.6, "eps": 1e-3},
    {"kernel": "weighted_rbf", "density": "l2_squared", "step": 0.01, "consensus": 0.3, "target_density": 0.5},
])  # fmt: skip
def test_backends(backend, n, d, sized, options):
    d = backends.fit(backend, 20 * d, d)
    masks, grads, vectors = backends.problem(n, d, device=backends.place(backend), sized=sized, theta=True)
    backends.compare(backend, masks, grads, vectors, angle=0.2, **options)


@pytest.mark.parametrize("backend", [*backends.BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_byte_particles_in_gauss_seidel_order(backend, dtype):
    """One row after the other, as fp32 particles within the rounding of what is stored."""
    masks, grads, vectors = backends.problem(3, 200, device=backends.place(backend))
    residual = torch.zeros_like(masks, dtype=dtype) if dtype == torch.bfloat16 else None
    stored, exact = masks.to(dtype), masks.to(dtype).float()
    options = {"step": 0.0, "radius": 2.0, "repulsion": 0.2, "angle": 0.2, "target_density": 0.8}
    for row in range(3):
        gradient = grads[row : row + 1]
        transition_(stored, gradient, **vectors, **options, residual=residual, row=row, backend=backend)
        transition_(exact, gradient, **vectors, **options, row=row, backend="reference")
    found = stored.float() if residual is None else stored.float() + residual.float()
    torch.testing.assert_close(found, exact, rtol=2e-3 if dtype == torch.float16 else 1e-4, atol=2e-4)


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stages(dtype, sized):
    options = {"angle": 0.2, "step": 0.0, "target_density": 0.6, "consensus": 0.3}
    stages.assert_equal(*stages.compare(4, 700, dtype, sized, options, 1, backend="cpp"))
    reference = stages.compare(4, 300, torch.float64, sized, options, 2, backend="reference")
    stages.assert_close(*reference, 1e-12, 1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"angle": -0.1}, "angle: wanted a number ≥ 0, got -0.1"),
        ({"angle": math.nan}, "angle: wanted a number ≥ 0, got nan"),
        ({"angle": 0.1, "step": -0.1}, "step: wanted a number ≥ 0, got -0.1"),
        ({"step": 0.0}, "step: wanted a number > 0, got 0.0"),
    ],
)
def test_bad_values(options, words):
    m = uniform(1, 5)
    with pytest.raises(ValueError, match=f"transition_: {words}"):
        transition_(m, uniform(1, 5), **{"step": 0.1, "radius": 2.0, "repulsion": 0.0, **options})
    assert torch.equal(m, uniform(1, 5))


def setting(n_steps=6, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    data = [(torch.randn(16, 6), torch.randint(0, 4, (16,))) for _ in range(n_steps)]
    base = {"sparsity": 0.6, "n_particles": 1, "n_steps": n_steps, "step_length": "angle", "hold": 1.0,
            "signed_score": False}  # fmt: skip
    return model, data, SFPKConfig(**{**base, **options})


def by_angle(k, steps, target, shares):
    """α of step k + 1; what is known of the effective dimension does not matter."""
    return 0.035 * math.log(1 / target) ** 1.5 * (1 - k / steps)


def by_effective_dimension(k, steps, target, shares):
    """By the geometric mean of the effective dimensions before the step; in the first, by its own."""
    seen = shares[: min(max(k, 1), math.ceil(0.15 * steps))]
    grown = min(1, (k + 1) / (0.15 * steps))
    return 0.33 * math.log(1 / target) ** 2 * math.prod(seen) ** (0.5 / len(seen)) * (1 - k / steps) * grown


def plain_run(model, data, density, score, length=by_angle, m=None, first=0, last=None, most=0.0):
    """One particle in fp64: polarize, gradient by the masked weights, move; and the normalized saliency.

    From all ones, or from what it was after ``first`` steps. Gradients are averaged where ``most`` is above 0.
    """
    steps, target = len(density) - 1, density[-1]
    theta = Coordinates(model).flatten(model).double()
    parts = [p.detach().abs() / p.detach().abs().mean() for p in (model[0].weight, model[2].weight)]
    saliency = torch.cat([part.flatten() for part in parts]).double()
    m, shares = torch.ones(80, dtype=torch.float64) if m is None else m, []
    average, agreements = torch.zeros(80, dtype=torch.float64), []
    for k, (x, y) in list(enumerate(data[:steps]))[first:last]:
        kept = torch.zeros(80, dtype=torch.float64)
        kept[score(m, saliency).argsort(descending=True, stable=True)[: round(density[k] * 80)]] = 1
        w = (kept * theta).requires_grad_()
        hidden = torch.tanh(x.double() @ w[:48].view(8, 6).T + model[0].bias.double())
        loss = nn.functional.cross_entropy(hidden @ w[48:].view(4, 8).T + model[2].bias.double(), y)
        (gradient,) = torch.autograd.grad(loss, w)
        shares.append(float((gradient * theta).square().sum() ** 2 / (80 * (gradient * theta).pow(4).sum())))
        looked_at = agreements[-round(0.15 * steps) or -1 :]
        beta = min(most, max(0.0, -2 * sum(looked_at) / len(looked_at))) if looked_at else 0.0
        angle = length(k, steps, target, shares) * ((1 - beta) / (1 + beta)) ** 0.6
        if average.any():
            agreements.append(float(torch.cosine_similarity(gradient * theta, average * theta, dim=0)))
        average = beta * average + (1 - beta) * gradient
        m = moved_by_hand(m, average * theta, angle, density[k + 1])
    return m, saliency


def test_a_run_follows_the_plain_loop():
    model, data, config = setting()
    m, _ = plain_run(model, data, density_schedule("cubic", 0.4, 6), lambda m, saliency: m.abs() * saliency)
    result = SFPKPruner(model, config=config).run(data)
    torch.testing.assert_close(result.particles[0].double(), m, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n_steps", [1, 6, 14])
def test_a_run_by_effective_dimension_follows_the_plain_loop(n_steps):
    """Three of 14 steps are looked at, one of 6."""
    model, data, config = setting(n_steps, step_length="effective_dimension")
    density = density_schedule("cubic", 0.4, n_steps)
    m, _ = plain_run(model, data, density, lambda m, saliency: m.abs() * saliency, by_effective_dimension)
    result = SFPKPruner(model, config=config).run(data)
    torch.testing.assert_close(result.particles[0].double(), m, rtol=1e-5, atol=1e-6)
    looked_at = [len(record.effective_dimensions) for record in result.history]
    assert looked_at == ([1] * math.ceil(0.15 * n_steps) + [0] * n_steps)[:n_steps]


@pytest.mark.parametrize("length", ["angle", "effective_dimension"])
def test_the_scale_is_a_factor_on_the_angle(length):
    config = setting(20, step_length=length)[2]
    history = [step_record([0.25, math.nan]), step_record([0.01, 0.04]), step_record([math.nan, math.nan])]
    once, twice = (StepLength(config.replace(step_scale=scale), history) for scale in (1.0, 2.0))
    assert twice.angle(7, 0.9) == 2 * once.angle(7, 0.9)
    share = math.sqrt(0.25 * math.sqrt(0.01 * 0.04))  # every step counts alike
    fall = math.log(0.9 / 0.4)
    wanted = 0.035 * fall**1.5 if length == "angle" else 0.33 * fall**2 * math.sqrt(share)
    assert once.angle(7, 0.9) == pytest.approx(wanted * (1 - 7 / 20))
    grown = 1 if length == "angle" else 2 / 3
    assert once.angle(1, 0.9) == pytest.approx(wanted * (1 - 1 / 20) * grown)


def step_record(shares):
    return StepRecord(1, 0.5, [0.5] * 2, [1.0] * 2, [0.1] * 2, 0.1, effective_dimensions=shares)


@pytest.mark.parametrize("length", ["angle", "effective_dimension"])
@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
def test_a_resumed_run_goes_on_bit_for_bit(update, length):
    """Saved while gradients are looked at, and later."""
    steps = 14
    model, data, config = setting(steps, n_particles=3, update=update, step_length=length)
    batches = [[data[(k + i) % steps] for i in range(3)] for k in range(steps)]
    whole, first = (SFPKPruner(model, config=config) for _ in range(2))
    for k in range(steps):
        whole.step(batches[k])
    for saved in range(5):
        if saved:
            first.step(batches[saved - 1])
        second = SFPKPruner(model, config=config)
        second.load_state_dict(first.state_dict())
        for k in range(saved, steps):
            second.step(batches[k])
        assert torch.equal(whole.particles, second.particles)
        assert torch.equal(whole.result().score, second.result().score)


def test_a_particle_without_a_gradient_has_no_effective_dimension():
    model, data, config = setting(14, n_particles=2, step_length="effective_dimension", nonfinite="skip_particle")
    bad = (data[0][0] * math.nan, data[0][1])
    pruner = SFPKPruner(model, config=config)
    record = pruner.step([bad, data[1]])
    assert math.isnan(record.effective_dimensions[0])
    assert 1 / 80 < record.effective_dimensions[1] < 1
    fresh = SFPKPruner(model, config=config)
    fresh.load_state_dict(pruner.state_dict())
    for other in (pruner, fresh):
        other.step(data[2:4])
    assert torch.equal(pruner.particles, fresh.particles)


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ([], "wanted 1 entries, got 0"),
        ([0.1, 0.2], "wanted 1 entries, got 2"),
        ([0.0], "wanted shares in"),
        ([1.5], "wanted shares in"),
        ([-0.1], "wanted a number"),
    ],
)
def test_damaged_effective_dimensions_are_named(shares, words):
    model, data, config = setting(14, step_length="effective_dimension")
    pruner = SFPKPruner(model, config=config)
    pruner.step(data[:1])
    state = pruner.state_dict()
    state["history"][0]["effective_dimensions"] = shares
    with pytest.raises(ValueError, match=rf"state: history\[0\].effective_dimensions.*: {words}"):
        pruner.load_state_dict(state)


def test_a_factor_on_nothing_is_refused():
    model, _, config = setting(step_length="radius", step_scale=0.5)
    with pytest.raises(ValueError, match=r"step_scale: wanted 1 with step_length='radius', .* got 0\.5"):
        SFPKPruner(model, config=config)
