"""The loop: exact counts, determinism, the model as it was, options, errors."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sfpk_kernels import Execution, SFPKConfig, SFPKPruner, plan, prune
from sfpk_kernels.baselines import snip
from sfpk_kernels.modeling.state import guarded
from sfpk_kernels.ops import topk_mask
from sfpk_kernels.search.particles import ParticleSystem
from sfpk_kernels.search.vote import Vote

from .settings import both
from .snapshot import Snapshot


def quick(preset="population", sparsity=0.8, **overrides):
    options = {"n_particles": 3, "n_steps": 8, **overrides}
    return SFPKConfig.preset(preset, sparsity=sparsity, **options)


TRIAL_PASSES = 4  # one to measure memory, three timed


@pytest.mark.parametrize("preset", ["default", "population", "paper", "authors"])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_it_was(convnet, images, preset, training):
    convnet.train(training)
    convnet[1].eval()
    convnet[0].weight.requires_grad_(False)
    snapshot = Snapshot(convnet)
    prune(convnet, images, config=quick(preset))
    snapshot.check()


def failing_loss(after):
    """Fails in the pass of that number, those of the trial before the first step not counted."""
    calls = iter(range(-TRIAL_PASSES, 10**6))

    def loss_fn(model, batch):
        model.train()
        model[1].running_mean.add_(1.0)
        if next(calls) == after:
            raise KeyboardInterrupt if after % 2 else RuntimeError("boom")
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    return loss_fn


@pytest.mark.parametrize("after", [0, 4, 7])
def test_the_model_is_as_it_was_after_an_exception(convnet, images, after):
    snapshot = Snapshot(convnet)
    pruner = SFPKPruner(convnet, loss_fn=failing_loss(after), config=quick())
    before = pruner.particles.clone()
    with pytest.raises((RuntimeError, KeyboardInterrupt)) as caught:
        pruner.run(images)
    snapshot.check()
    if after < 3:
        assert torch.equal(pruner.particles, before)
    if hasattr(caught.value, "__notes__"):
        notes = " ".join(caught.value.__notes__)
        assert f"particle {after % 3}" in notes
        assert f"step {after // 3 + 1} of 8" in notes
        # Whoever pressed Ctrl-C has no question about the model's mode.
        assert ("model_mode=" in notes) == isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.8, 0.99])
def test_exact_count(mlp, vectors, preset, sparsity):
    result = prune(mlp, vectors, config=quick(preset, sparsity))
    assert result.mask.kept == round((1 - sparsity) * 144)
    assert result.mask.flat().sum() == result.mask.kept
    assert result.particles.shape == (3, 144)
    assert [record.step for record in result.history] == list(range(1, 9))
    assert all(len(record.energies) == 3 for record in result.history)
    assert torch.equal(topk_mask(result.score, result.mask.kept), result.mask.flat())


def test_default_preset_stays_on_schedule(mlp, vectors):
    result = prune(mlp, vectors, config=quick())
    for record in result.history:
        assert record.densities == pytest.approx([record.scheduled_density] * 3, rel=1e-6)
    assert result.history[-1].scheduled_density == pytest.approx(0.2)


def test_without_retraction_the_density_drifts(mlp, vectors):
    result = prune(mlp, vectors, config=quick(retract=False, consensus=0.0, radius=3))
    assert result.history[-1].density > result.history[-1].scheduled_density + 0.02


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "weighted_rbf"}, {"density": "l2_squared"}, {"schedule": "linear"}, {"schedule": "exponential"},
        {"polarizer": "mask"}, {"polarizer": "mask_weight"}, {"final_score": "mask_weight"}, {"final_score": "mask"},
        {"retract": False}, {"consensus": 0.0}, {"consensus_start": 0.0}, {"momentum": 0.5}, {"vote": "hard"},
        {"vote_ratio": 0.4}, {"selection": "threshold"}, {"repulsion": 500.0}, {"radius": 1.2}, {"seed": 5},
        {"model_mode": "train"}, {"bn": "running"},
    ],
)  # fmt: skip
def test_every_option_acts(convnet, images, options):
    """Each changes the outcome: the particles, or, for the options of the vote, the score."""
    loader = DataLoader(
        TensorDataset(torch.cat([x for x, _ in images]), torch.cat([y for _, y in images])), 16, shuffle=True
    )
    plain = prune(convnet, loader, config=quick())
    changed = prune(convnet, loader, config=quick(**options))
    if set(options) <= {"final_score", "momentum", "vote", "vote_ratio"}:
        assert torch.equal(plain.particles, changed.particles)
        assert not torch.equal(plain.score, changed.score)
    else:
        assert not torch.equal(plain.particles, changed.particles)


def test_consensus_starts_when_it_should(mlp, vectors):
    early = prune(mlp, vectors, config=quick(consensus=0.0))
    pulled = prune(mlp, vectors, config=quick(consensus=0.9, consensus_start=0.5))
    for free, held in zip(early.history[:4], pulled.history[:4], strict=True):
        assert free.energies == held.energies
        assert free.densities == held.densities
    assert pulled.particles.std(0).mean() < 0.5 * early.particles.std(0).mean()


def test_hard_vote_counts_binary_masks(mlp, vectors):
    result = prune(mlp, vectors, config=quick(vote="hard", consensus=0.0))
    votes = result.score.floor()
    assert set(votes.tolist()) <= {0.0, 1.0, 2.0, 3.0}
    # Three masks of about 29 kept coordinates each.
    assert 3 * 28 <= int(votes.sum()) <= 3 * 30
    kept, dropped = votes[result.mask.flat()], votes[~result.mask.flat()]
    assert kept.min() >= dropped.max()


def test_vote_ratio_takes_the_particles_of_lowest_energy(mlp, vectors):
    pruner = SFPKPruner(mlp, config=quick(vote_ratio=0.01, polarizer="mask"))
    for _ in range(8):
        record = pruner.step(vectors[:3])
    best = min(range(3), key=record.energies.__getitem__)
    assert torch.equal(pruner.result().score, pruner.particles[best])


def test_vote_ratio_rounds_up(mlp, vectors):
    pruner = SFPKPruner(mlp, config=quick(vote_ratio=0.34, polarizer="mask"))  # 1.02 of 3 particles: two vote
    for _ in range(8):
        record = pruner.step(vectors[:3])
    best = sorted(range(3), key=record.energies.__getitem__)[:2]
    assert torch.equal(pruner.result().score, pruner.particles[sorted(best)].mean(0))


def test_hard_vote_ranks_equal_counts_by_the_soft_score():
    class Scores:
        def mean_score(self, masks, rows, kind):
            return masks.mean(dim=0)

        def keeps(self, masks, densities, kind, rows):
            return torch.ones(masks.shape[1])

    vote = Vote(Scores(), "mask", "hard", 1.0, 0.0, 0.5)
    score = vote.update(torch.tensor([[1e6, 1.0, 1.2, 1.1, 1.3]]), [1.0], [1.0])
    assert torch.argsort(score, descending=True).tolist() == [0, 4, 2, 3, 1]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 5), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_few_particles_few_steps_any_dtype(mlp, vectors, n, k, dtype):
    batches = [(x.to(dtype), y) for x, y in vectors]
    result = prune(mlp.to(dtype), batches, config=quick(n_particles=n, n_steps=k))
    assert result.mask.kept == 29
    assert result.particles.isfinite().all()


@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("dropout", [False, True])
def test_guard_sets_the_modes(convnet, bn, dropout):
    with guarded(convnet, bn=bn, training=dropout):
        assert convnet[1].training == (bn == "batch")
        assert convnet[3].training == dropout


def test_early_stop(mlp, vectors):
    pruner = SFPKPruner(mlp, config=quick(early_stop=True))
    pruner.step(vectors[:3])
    assert not pruner.done
    pruner.particles.mul_(0.1)
    assert pruner.done
    with pytest.raises(RuntimeError, match="the run is over"):
        pruner.step(vectors[:3])
    assert SFPKPruner(mlp, config=quick(early_stop=False)).done is False


@pytest.mark.parametrize("energy_mode", ["vmap", "sequential"])
def test_same_seed_same_mask(convnet, images, energy_mode):
    x, y = torch.cat([x for x, _ in images]), torch.cat([y for _, y in images])
    loader = DataLoader(TensorDataset(x, y), 16, shuffle=True, drop_last=True)
    settings = both(quick, model_mode="train", energy_mode=energy_mode)
    state = torch.random.get_rng_state()
    torch.manual_seed(11)
    first = prune(convnet, loader, **settings)
    torch.manual_seed(22)
    before = torch.random.get_rng_state()
    second = prune(convnet, loader, **settings)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random state is left alone"
    torch.random.set_rng_state(state)
    assert torch.equal(first.particles, second.particles)
    assert first.mask.fingerprint() == second.mask.fingerprint()
    other = prune(convnet, loader, **both(quick, model_mode="train", energy_mode=energy_mode, seed=1))
    assert not torch.equal(first.particles, other.particles)


def test_step_by_step_equals_run(mlp, vectors):
    config = quick(n_particles=2)
    whole = prune(mlp, vectors, config=config)
    pruner = SFPKPruner(mlp, config=config)
    for k in range(config.n_steps):
        pruner.step([vectors[(2 * k + i) % 10] for i in range(2)])
    assert torch.equal(pruner.particles, whole.particles)
    assert pruner.result().mask == whole.mask
    halves = SFPKPruner(mlp, config=config)
    for k in range(5):
        halves.step([vectors[(2 * k + i) % 10] for i in range(2)])
    assert len(halves.run(vectors).history) == 8


def test_loaders(mlp, vectors):
    config = quick(n_particles=3, n_steps=2)
    expected = prune(mlp, vectors[:6], config=config)
    assert prune(mlp, iter(vectors), config=config).mask == expected.mask, "a long enough generator works"
    assert prune(mlp, tuple(vectors), config=config).mask == expected.mask
    prune(mlp, vectors[:1], config=config)  # cycled
    with pytest.raises(ValueError, match="loader: wanted batches, got an empty iterable"):
        prune(mlp, [], config=config)
    with pytest.raises(ValueError, match=r"loader: wanted 6 batches .* ended after 4"):
        prune(mlp, iter(vectors[:4]), config=config)
    with pytest.raises(TypeError, match="loader: wanted an iterable of batches, got int"):
        prune(mlp, 3, config=config)
    with pytest.raises(TypeError, match="put a single batch in a list"):
        prune(mlp, {"x": 1}, config=config)

    class Once:
        used = False

        def __iter__(self):
            return iter([]) if self.used else (setattr(self, "used", True), iter(vectors[:4]))[1]

    with pytest.raises(ValueError, match="wanted 6 batches .* got 4: a second pass over the loader yields nothing"):
        prune(mlp, Once(), config=config)


@pytest.mark.parametrize(
    ("make_bad", "words"),
    [
        (lambda x: x * float("nan"), "wanted a finite loss, got nan in step 2, particle 1"),
        (lambda x: x * float("inf"), "wanted a finite loss, got nan in step 2, particle 1"),
    ],
)
@pytest.mark.parametrize("energy_mode", ["vmap", "sequential"])
def test_a_loss_that_is_not_finite_names_step_and_particle(mlp, vectors, make_bad, words, energy_mode):
    batches = list(vectors)
    batches[4] = (make_bad(batches[4][0]), batches[4][1])
    snapshot = Snapshot(mlp)
    pruner = SFPKPruner(mlp, config=quick(), execution=Execution(energy_mode=energy_mode))
    with pytest.raises(FloatingPointError, match=words):
        pruner.run(batches)
    assert len(pruner.history) == 1
    snapshot.check()


def test_a_gradient_that_is_not_finite_names_step_and_particle(mlp, vectors):
    def loss_fn(model, batch):
        return model(batch[0]).square().sum().sub(model(batch[0]).square().sum()).abs().sqrt()  # √0: slope inf

    pruner = SFPKPruner(mlp, loss_fn=loss_fn, config=quick(), execution=Execution(energy_mode="sequential"))
    before = pruner.particles.clone()
    with pytest.raises(FloatingPointError, match="a finite gradient, got NaN, infinity or .* in step 1, particle 0"):
        pruner.step(vectors[:3])
    assert torch.equal(pruner.particles, before)


def test_bad_arguments(mlp, vectors):
    with pytest.raises(TypeError, match="config: wanted an SFPKConfig, got dict"):
        SFPKPruner(mlp, config={"sparsity": 0.5})
    with pytest.raises(TypeError, match="loss_fn: wanted a function"):
        SFPKPruner(mlp, loss_fn="cross_entropy", config=quick())
    with pytest.raises(ValueError, match="sparsity: wanted one that keeps at least one of 144 weights"):
        SFPKPruner(mlp, config=quick(sparsity=0.9999))
    with pytest.raises(ValueError, match="batches: wanted a list of 3, one per particle, got 2"):
        SFPKPruner(mlp, config=quick()).step(vectors[:2])
    with pytest.raises(ValueError, match="batches: wanted a list of 3"):
        SFPKPruner(mlp, config=quick()).step(iter(vectors))
    with pytest.raises(RuntimeError, match="at least one step"):
        SFPKPruner(mlp, config=quick()).result()
    mlp[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model: wanted finite weights, got NaN or infinite ones in 2.weight"):
        SFPKPruner(mlp, config=quick())


def test_the_backend_of_a_run_holds_for_the_ops_that_have_it(mlp, vectors):
    automatic = prune(mlp, vectors, config=quick())
    assert torch.equal(
        prune(mlp, vectors, config=quick(), execution=Execution(backend="cpp")).particles, automatic.particles
    )
    assert not torch.equal(
        prune(mlp, vectors, config=quick(), execution=Execution(backend="reference")).particles, automatic.particles
    )


class Stateful(nn.Module):
    """Everything a forward pass may do to its module."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("empty", None)
        self.register_buffer("wide", torch.ones(1, 8).expand(3, 8))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        h = self.body(x)
        self.mean = 0.9 * self.mean + h.mean(0).detach()
        self.empty = h.detach().sum()
        self.last = h
        if not torch._C._functorch.is_functorch_wrapped_tensor(h):
            self.count += 1
            self.register_buffer("new", h.detach())
        return self.head(h * self.wide[0])


@pytest.mark.parametrize("energy_mode", ["auto", "sequential"])
def test_a_model_that_writes_its_own_state_is_as_it_was(vectors, energy_mode):
    model = Stateful()
    snapshot = Snapshot(model)
    prune(model, vectors, config=quick(), execution=Execution(energy_mode=energy_mode))
    snapshot.check()
    assert set(model.state_dict()) == set(snapshot.values)
    assert model.empty is None
    model.last = None
    copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="keeps tensors of its forward pass"):
        prune(model, vectors, config=quick(), execution=Execution(energy_mode="vmap"))


def test_neighbouring_seeds_share_no_dropout(mlp, vectors):
    def noises(seed):
        drawn = []

        def loss_fn(model, batch):
            drawn.append(float(torch.rand(())))
            return model(batch[0]).square().mean()

        pruner = SFPKPruner(mlp, loss_fn=loss_fn, config=quick(seed=seed))
        pruner.step(vectors[:3])
        drawn.clear()  # the trial before the first step draws the same in every run
        pruner.run(vectors)
        return drawn

    first, second = noises(0), noises(1)
    assert len(set(first)) == len(first)
    assert not set(first) & set(second)


def test_ignored_layers_and_callbacks(mlp, vectors):
    records = []
    result = prune(mlp, vectors, config=quick(), ignored_layers=["0"], callbacks=[records.append])
    assert list(result.mask) == ["2.weight"]
    assert records == result.history


def test_written_particles_are_measured_anew(mlp, vectors):
    pruner = SFPKPruner(mlp, config=quick(retract=False))
    pruner.step(vectors[:3])
    pruner.particles.mul_(0.5)
    fresh = SFPKPruner(mlp, config=quick(retract=False))
    fresh.step(vectors[:3])
    fresh._run.system.load_state_dict(pruner._run.system.state_dict())
    pruner.step(vectors[:3])
    fresh.step(vectors[:3])
    assert torch.equal(pruner.particles, fresh.particles)


def test_particle_state_dict(mlp):
    theta = torch.rand(10)
    system = ParticleSystem(10, quick(), Execution(), theta, theta)
    system.end_step(system.move_(torch.randn(3, 10)).densities.tolist())
    state = system.state_dict()
    other = ParticleSystem(10, quick(), Execution(), theta, theta)
    other.load_state_dict(state)
    assert other.step == 1
    assert torch.equal(other.masks, system.masks)
    with pytest.raises(ValueError, match="masks: wanted shape"):
        other.load_state_dict({**state, "masks": torch.ones(2, 10)})
    with pytest.raises(ValueError, match="step: wanted"):
        other.load_state_dict({**state, "step": 9})
    with pytest.raises(ValueError, match="schedule: wanted 9 densities, got 2"):
        other.load_state_dict({**state, "schedule": [1.0, 0.2]})


def test_guard_replaces_swapped_buffers(convnet):
    snapshot = Snapshot(convnet)
    with guarded(convnet, bn="batch", training=True):
        convnet[1].running_mean = torch.full((6,), 7.0)
        convnet[1].running_var.zero_()
    snapshot.check()


@pytest.mark.gpu
def test_runs_on_a_gpu(convnet, images):
    result = prune(convnet.cuda(), images, config=quick())
    assert result.mask.kept == round(0.2 * result.coordinates.d)
    assert result.particles.is_cuda


@pytest.mark.parametrize("callbacks", [print, [print, 3]])
def test_callbacks_that_are_none(mlp, callbacks):
    with pytest.raises(TypeError, match="^callbacks: wanted (a list of functions|functions of a StepRecord), got"):
        SFPKPruner(mlp, config=quick(), callbacks=callbacks)
    with pytest.raises(TypeError, match="^callbacks: wanted functions of a StepRecord, got int"):
        SFPKPruner(mlp, config=quick()).add_callback(3)


@pytest.mark.parametrize(
    "options",
    [{"energy_mode": "sequential"}, {"energy_mode": "vmap"}, {"energy_mode": "auto"}, {"update": "gauss_seidel"}],
)
def test_under_inference_mode_a_run_is_the_same(convnet, images, options, tmp_path):
    settings = both(quick, momentum=0.1, **options)
    pruner = SFPKPruner(convnet, **settings)
    pruner.run(images[:9], save_every=4, save_path=tmp_path / "run")
    expected = prune(convnet, images[:9], **settings)
    snapshot = Snapshot(convnet)
    with torch.inference_mode():
        found = prune(convnet, images[:9], **settings)
        assert (
            prune(convnet, images[:9], config=settings["config"].replace(sparsity=0.9), start=found.particles).mask.kept
            > 0
        )
        assert plan(convnet, images, **settings).choice.mode == pruner.plan.choice.mode
        assert snip(convnet, images, 0.8) == snip(convnet, images, 0.8)
        resumed = SFPKPruner(convnet, **settings)
        resumed.load(tmp_path / "run")
        assert resumed.result().mask == pruner.result().mask
        assert torch.is_inference_mode_enabled()
    assert found.mask == expected.mask
    assert not found.particles.is_inference()
    snapshot.check()


def test_a_model_made_under_inference_mode_is_refused(vectors):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(8, 4))
    for search in (
        lambda: prune(model, vectors, config=quick()),
        lambda: plan(model, vectors, config=quick()),
        lambda: snip(model, vectors, 0.8),
    ):
        with pytest.raises(ValueError, match=r"^model: wanted tensors that autograd can read, got 0.weight"):
            search()
    assert prune(copy.deepcopy(model), vectors, config=quick()).mask.kept == round(0.2 * 32)
