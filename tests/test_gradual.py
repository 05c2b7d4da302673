"""Gradual pruning: shots, budgets, particles that go on, resume, the model after errors."""

import copy
import itertools
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sfpk_kernels
from sfpk_kernels import GradualPruner, MaskSet, RetrainConfig, SFPKConfig, SFPKPruner, prune, retrain
from sfpk_kernels.retraining.shots import schedule_shots
from sfpk_kernels.search.particles import ParticleSystem

from .interruptions import every_moment


def quick(sparsity=0.9, **overrides):
    options = {"n_particles": 2, "n_steps": 9, **overrides}
    return SFPKConfig.preset(options.pop("preset", "population"), sparsity=sparsity, **options)


@pytest.fixture
def loader(vectors):
    x, y = torch.cat([x for x, _ in vectors]), torch.cat([y for _, y in vectors])
    return DataLoader(TensorDataset(x, y), 16, shuffle=True)


def state(model):
    return copy.deepcopy(model.state_dict())


def same(model, values):
    return all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_shots_follow_the_formulas():
    plan = schedule_shots(quick(0.98, n_steps=103), 10)
    assert [shot.density for shot in plan] == pytest.approx([0.02 ** (i / 10) for i in range(1, 11)])
    assert [shot.start_density for shot in plan] == [1.0, *(shot.density for shot in plan[:-1])]
    assert plan[-1].density == quick(0.98).target_density
    assert sum(shot.n_steps for shot in plan) == 103
    assert {shot.n_steps for shot in plan} == {10, 11}
    assert sum(shot.share for shot in plan) == pytest.approx(1)
    ratios = [b.share / a.share for a, b in itertools.pairwise(plan)]
    assert ratios == pytest.approx([50**0.1] * 9), "inversely proportional to the density"
    plan = schedule_shots(quick(), 3, 2.0)
    assert [shot.share for shot in plan] == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert [shot.share for shot in schedule_shots(quick(), 4, 1)] == [0.25] * 4
    assert schedule_shots(quick(0.9999, n_steps=1000), 1000, 10.0)[-1].share == pytest.approx(0.9)


@pytest.mark.parametrize("preset", ["default", "population", "paper", "authors"])
def test_a_run(convnet, images, preset):
    dense = state(convnet)
    identities = {name: id(p) for name, p in convnet.named_parameters()}
    modes = [module.training for module in convnet.modules()]
    pruner = GradualPruner(convnet, images, config=quick(preset=preset), shots=3, retrain=2)
    d = pruner.coordinates.d
    result = pruner.run()
    assert pruner.done
    assert {name: id(p) for name, p in convnet.named_parameters()} == identities
    assert [module.training for module in convnet.modules()] == modes
    assert all(parameter.grad is None for parameter in convnet.parameters())
    assert MaskSet.from_model(convnet) == result.mask
    assert result.mask == result.masks[-1]
    assert repr(result) == f"GradualResult({result.mask!r}, 3 shots, {len(result.particles)} particles)"
    assert [record.kept for record in result.history] == [mask.kept for mask in result.masks]
    if preset != "authors":  # their threshold keeps what it keeps
        assert [mask.kept for mask in result.masks] == [round(0.1 ** (i / 3) * d) for i in (1, 2, 3)]
    assert sum(len(record.losses) for record in result.history) == 20
    assert [len(record.search) for record in result.history] == [3, 3, 3] or preset == "authors"
    assert not torch.equal(convnet[1].running_mean, dense["1.running_mean"])
    with pytest.raises(RuntimeError, match="the run is over after 3 shots"):
        pruner.shot()
    assert pruner.run().mask == result.mask


def test_one_shot_is_prune_and_retrain(mlp, vectors):
    other = copy.deepcopy(mlp)
    result = GradualPruner(mlp, vectors, config=quick(seed=4), shots=1, retrain=RetrainConfig(3, lr=0.1)).run()
    mask = prune(other, vectors, config=quick(seed=4 * 10_007 + 1)).mask
    retrain(other, vectors, mask, RetrainConfig(3, lr=0.1), seed=4 * 10_007 + 1)
    assert result.mask == mask
    assert same(mlp, state(other))


def test_particles_go_on_from_shot_to_shot(mlp, vectors, monkeypatch):
    starts = []
    made = ParticleSystem.__init__

    def recorded(self, *arguments, **options):
        made(self, *arguments, **options)
        starts.append((self.masks.clone(), self.schedule))

    monkeypatch.setattr(ParticleSystem, "__init__", recorded)
    pruner = GradualPruner(mlp, vectors, config=quick(), shots=3, retrain=1)
    ends = []
    while not pruner.done:
        pruner.shot()
        ends.append(pruner.result().particles)
    assert bool((starts[0][0] == 1).all())
    for (particles, schedule), end, shot in zip(starts[1:], ends, pruner.shots[1:], strict=False):
        assert torch.equal(particles, end)
        assert schedule[0] == pytest.approx(shot.start_density, rel=1e-5)
        assert schedule[-1] == pytest.approx(shot.density)


@pytest.mark.parametrize("density", ["l2", "l2_squared"])
def test_particles_that_drifted_are_put_on_the_schedule(mlp, vectors, density):
    pruner = GradualPruner(mlp, vectors, config=quick(retract=False, density=density, radius=3), shots=3, retrain=1)
    record = pruner.shot()
    assert abs(record.search[-1].density - record.shot.density) > 0.01
    square = pruner.result().particles.double().square().mean(dim=1)
    found = square.sqrt() if density == "l2" else square
    torch.testing.assert_close(found, torch.full_like(found, record.shot.density), rtol=1e-5, atol=0)


def test_removed_weights_may_return_with_their_values(mlp, vectors):
    """Between the shots a weight of before its removal is large again for the search, not for the model."""
    config = quick(0.6, n_particles=1, consensus=0.0)
    pruner = GradualPruner(mlp, vectors, config=config, shots=2, retrain=lambda *_: None)
    dense = pruner.coordinates.flatten(mlp)
    pruner.shot()
    first = pruner.result().mask.flat()
    assert torch.equal(pruner.coordinates.flatten(mlp), dense * first)
    back = int((dense.abs() * ~first).argmax())
    pruner._particles[:, back] = 5.0
    pruner._particles.mul_(pruner.shots[0].density / pruner._particles.square().mean().sqrt())
    record = pruner.shot()
    assert pruner.result().mask.flat()[back]
    assert float(pruner.coordinates.flatten(mlp)[back]) == float(dense[back])
    assert record.returned >= 1
    assert record.returned == int((pruner.result().mask.flat() & ~first).sum())


def test_a_function_retrains(mlp, vectors):
    seen = []

    def train(model, masks, shot):
        seen.append((shot, MaskSet.from_model(model) == masks, float(torch.rand(()))))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01)
        model.train(not model.training)

    before = torch.random.get_rng_state()
    result = GradualPruner(mlp, vectors, config=quick(), shots=3, retrain=train).run()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [shot.number for shot, _, _ in seen] == [1, 2, 3]
    assert all(masked for _, masked, _ in seen)
    assert len({drawn for _, _, drawn in seen}) == 3
    assert MaskSet.from_model(mlp) == result.mask, "masked once more"
    assert all(record.losses == [] for record in result.history)
    assert mlp.training


@pytest.mark.parametrize("fails_in", ["search", "retraining", "weights"])
def test_after_an_error_the_model_is_as_after_the_last_shot(convnet, images, fails_in):
    broken = [False]

    def loss_fn(model, batch):
        if broken[0] and fails_in == "search":
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def train(model, masks, shot):
        model.train()
        retrain(model, images, masks, RetrainConfig(0.5), loss_fn=loss_fn, seed=shot.number)
        if broken[0] and fails_in == "weights":
            model[0].weight.data[:] = float("nan")
        elif broken[0]:
            raise KeyboardInterrupt

    whole = copy.deepcopy(convnet)
    expected = GradualPruner(whole, images, loss_fn=loss_fn, config=quick(), shots=3, retrain=train).run()
    pruner = GradualPruner(convnet, images, loss_fn=loss_fn, config=quick(), shots=3, retrain=train)
    pruner.shot()
    after, modes = state(convnet), [module.training for module in convnet.modules()]
    broken[0] = True
    with pytest.raises((KeyboardInterrupt, ValueError)):
        pruner.run()
    assert same(convnet, after)
    assert [module.training for module in convnet.modules()] == modes
    assert pruner.finished == 1
    broken[0] = False
    assert pruner.run().mask == expected.mask
    assert same(convnet, state(whole))


def test_resume_equals_the_uninterrupted_run(convnet, images, tmp_path):
    x, y = torch.cat([x for x, _ in images]), torch.cat([y for _, y in images])
    batches = DataLoader(TensorDataset(x, y), 16, shuffle=True)
    dense = copy.deepcopy(convnet)

    def pruner(model):
        return GradualPruner(
            model, batches, config=quick(model_mode="train"), shots=3, retrain=RetrainConfig(2, lr=0.02)
        )

    expected = pruner(convnet).run(save=tmp_path / "whole")
    first = pruner(copy.deepcopy(dense))
    first.shot()
    torch.save(first.state_dict(), tmp_path / "plain")
    half = copy.deepcopy(dense)
    second = pruner(half)
    second.load_state_dict(torch.load(tmp_path / "plain", weights_only=True))
    second.shot()
    assert second.finished == 2
    done = pruner(copy.deepcopy(dense)).run(resume=tmp_path / "whole")
    assert done.mask == expected.mask
    result = second.run(save=tmp_path / "second")
    assert result.masks == expected.masks
    assert torch.equal(result.particles, expected.particles)
    assert [record.losses for record in result.history] == [record.losses for record in expected.history]
    assert [record.shot for record in result.history] == [record.shot for record in expected.history]
    assert same(half, state(convnet))
    finished = copy.deepcopy(dense)
    assert pruner(finished).run(resume=tmp_path / "second").mask == expected.mask
    assert same(finished, state(convnet))


def test_another_run_is_not_resumed(mlp, vectors, tmp_path):
    path = tmp_path / "run"
    GradualPruner(copy.deepcopy(mlp), vectors, config=quick(), shots=3, retrain=1).run(save=path)
    before = state(mlp)
    for changes, words in [
        ({"config": quick(seed=1)}, "config: "),
        ({"shots": 2}, "plan: "),
        ({"retrain": RetrainConfig(1, lr=0.2)}, "retrain: "),
        ({"ignored_layers": ["0"]}, "prunable: "),
    ]:
        options = {"config": quick(), "shots": 3, "retrain": 1, **changes}
        pruner = GradualPruner(mlp, vectors, config=options.pop("config"), **options)
        with pytest.raises(ValueError, match=f"wanted one of a run with the same settings, got another: .*{words}"):
            pruner.run(resume=path)
        assert pruner.finished == 0
    wider = nn.Sequential(*mlp, nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"wanted one of the same model, got another: 3.weight"):
        GradualPruner(wider, vectors, config=quick(), shots=3, retrain=1).run(resume=path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="was cut or altered"):
        GradualPruner(mlp, vectors, config=quick(), shots=3, retrain=1).run(resume=path)
    assert same(mlp, before)


def test_what_is_wrong_is_known_before_the_first_shot(mlp, vectors, tmp_path):
    def never(model, batch):
        raise AssertionError("a pass was run")

    def make(**options):
        return GradualPruner(mlp, vectors, loss_fn=never, config=quick(), **{"shots": 3, "retrain": 1, **options})

    for path, error in [(tmp_path, IsADirectoryError), (tmp_path / "no" / "run", FileNotFoundError)]:
        with pytest.raises(error, match="save: wanted a file"):
            make().run(save=path)
    with pytest.raises(ValueError, match="resume: wanted a file, or True beside save=, got True alone"):
        make().run(resume=True)
    for wrong, error, words in [
        ("state", TypeError, "got str"), ({}, ValueError, r"got one without \['history', 'masks', "),
    ]:  # fmt: skip
        with pytest.raises(error, match=f"state: wanted what GradualPruner.state_dict.. returns, {words}"):
            make().load_state_dict(wrong)
    with pytest.raises(ValueError, match="config: wanted settle=False"):
        GradualPruner(mlp, vectors, loss_fn=never, config=quick(settle=True), shots=3, retrain=1)
    mlp.requires_grad_(False)
    with pytest.raises(ValueError, match="model: wanted parameters that require gradients, got none"):
        make()


def test_resume_true_begins_or_goes_on(mlp, vectors, tmp_path):
    path, dense = tmp_path / "run", copy.deepcopy(mlp)
    first = GradualPruner(mlp, vectors, config=quick(), shots=3, retrain=1).run(save=path, resume=True)
    pruner = GradualPruner(dense, vectors, config=quick(), shots=3, retrain=1)
    assert pruner.run(save=path, resume=True).mask == first.mask
    assert same(dense, mlp.state_dict())
    with pytest.raises(ValueError, match="of the same model, got another: 0.weight, 0.bias"):
        GradualPruner(dense.double(), vectors, config=quick(), shots=3, retrain=1).run(resume=path)


KILLED = """
import os, signal, sys, torch
from torch import nn
import sfpk_kernels
from sfpk_kernels import GradualPruner, SFPKConfig
from .settings import population
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
batches = [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(5)]
config = population(0.9, n_particles=2, n_steps=8)
calls = iter(range(10**6))
def loss_fn(model, batch):
    if next(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.functional.cross_entropy(model(batch[0]), batch[1])
pruner = GradualPruner(model, loss_fn, batches, config, shots=4, retrain=2, progress=False)
result = pruner.run(save=sys.argv[1], resume=sys.argv[1] if os.path.exists(sys.argv[1]) else None)
torch.save({"mask": result.mask.fingerprint(), "model": model.state_dict()}, sys.argv[2])
"""


@pytest.mark.slow
def test_killed_runs_resume(tmp_path):
    def outcome(name, kills):
        for kill in [*kills, -1]:
            arguments = [str(tmp_path / f"{name}.run"), str(tmp_path / f"{name}.out"), str(kill)]
            done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=os.environ, check=False)
            assert done.returncode == (0 if kill == -1 else -signal.SIGKILL)
        return torch.load(tmp_path / f"{name}.out", weights_only=True)

    whole, killed = outcome("whole", []), outcome("killed", [3, 14, 13, 9])
    assert killed["mask"] == whole["mask"]
    assert all(torch.equal(value, whole["model"][name]) for name, value in killed["model"].items())


def test_bad_arguments(mlp, vectors):
    def make(config=None, **options):
        return GradualPruner(mlp, vectors, config=config or quick(), **{"shots": 3, "retrain": 1, **options})

    for shots, error in [(0, ValueError), (10, ValueError), (2.0, TypeError), (True, TypeError)]:
        with pytest.raises(error, match="shots: wanted"):
            make(shots=shots)
    for growth, error in [(0.5, ValueError), ("2", TypeError), (float("nan"), ValueError)]:
        with pytest.raises(error, match="growth: wanted a number ≥ 1 or None"):
            make(growth=growth)
    with pytest.raises(TypeError, match="config: wanted an SFPKConfig, got dict"):
        make(config={"sparsity": 0.5})
    with pytest.raises(TypeError, match="retrain: wanted epochs, a RetrainConfig or a function, got None"):
        make(retrain=None)
    with pytest.raises(ValueError, match="epochs: wanted a number > 0"):
        make(retrain=0)
    with pytest.raises(TypeError, match="loader: wanted one with a length"):
        make(retrain_loader=iter(vectors))
    with pytest.raises(ValueError, match="sparsity: wanted one that keeps at least one of 144"):
        make(quick(0.9999))
    with pytest.raises(ValueError, match="label_smoothing: wanted 0 beside a loss_fn"):
        GradualPruner(
            mlp, vectors, loss_fn=lambda m, b: 0, config=quick(), retrain=RetrainConfig(1, label_smoothing=0.1), shots=2
        )
    with pytest.raises(RuntimeError, match="result: wanted at least one shot done"):
        make().result()
    with pytest.raises(ValueError, match=r"start: wanted shape \(2, 144\), got \(3, 144\)"):
        SFPKPruner(mlp, config=quick(), start=torch.ones(3, 144))
    for value in (0.09, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="start: wanted particles of a mean density above the target 0.1"):
            SFPKPruner(mlp, config=quick(), start=torch.full((2, 144), value))


@pytest.mark.slow
def test_shots_beat_one_shot_with_the_same_epochs():
    """The demo's task to 98 %, three seeds: five shots against one, 10 steps each, both 20 epochs of retraining.

    One search as long as all five together does as well (README): what pays is the search, not the shots.
    """
    pytest.importorskip("sklearn")
    from sfpk_kernels import recalibrate_batchnorm
    from sfpk_kernels.demo.task import TRAINING_BATCH, accuracy, load_digits, train

    digits, how = load_digits(), RetrainConfig(epochs=20)
    data = TensorDataset(digits.train_x, digits.train_y)
    batches, large = (DataLoader(data, size, shuffle=True, drop_last=True) for size in (64, TRAINING_BATCH))
    found = {1: [], 5: []}
    for seed in range(3):
        dense = train(digits, seed, 15)
        for shots, accuracies in found.items():
            model = copy.deepcopy(dense)
            config = quick(0.98, seed=seed, n_particles=5, n_steps=10 * shots)
            pruner = GradualPruner(model, batches, config=config, shots=shots, retrain=how, retrain_loader=large)
            result = pruner.run()
            assert sum(len(record.losses) for record in result.history) == 200
            assert [len(record.search) for record in result.history] == [10] * shots
            assert MaskSet.from_model(model).kept == result.mask.kept == round(0.02 * pruner.coordinates.d)
            recalibrate_batchnorm(model, DataLoader(data, TRAINING_BATCH))
            accuracies.append(accuracy(model, digits))
    assert sum(found[5]) > sum(found[1]) + 3 * 0.003, found


def whole_state(model):
    """Everything a shot may change."""
    parameters = list(model.parameters())
    return (
        {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]},
        [id(value) for _, value in [*model.named_parameters(), *model.named_buffers()]],
        [module.training for module in model.modules()],
        [(id(parameter.grad), parameter.requires_grad) for parameter in parameters],
    )


def agree(a, b):
    return a[1:] == b[1:] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][name], b[0][name]) for name in a[0])


@pytest.mark.parametrize("every", [37, pytest.param(13, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("shots", "at"), [(2, 0), (2, 1), (1, 0)])
def test_interrupted_anywhere_a_shot_is_undone_or_it_is_said(convnet, images, shots, at, every):
    """At lines all over a shot and its retraining: the model as after the last one, or the file has to be resumed."""
    config = quick(n_steps=2, particle_dtype="float16")
    dense = copy.deepcopy(convnet)

    def make(model):
        return GradualPruner(model, images[:3], config=config, shots=shots, retrain=RetrainConfig(shots, clip_norm=1.0))

    whole = make(convnet)
    states = [whole.state_dict()]
    while not whole.done:
        whole.shot()
        states.append(whole.state_dict())
    expected, trained = whole.result(), whole_state(convnet)[0]
    model, counts = dense, {"on": 0, "said": 0}
    pruner = make(model)

    def goes_on():
        found = pruner.run()
        assert found.masks == expected.masks
        assert torch.equal(found.particles, expected.particles)
        assert all(torch.equal(value, trained[name]) for name, value in whole_state(model)[0].items())

    def work():
        pruner.load_state_dict(states[at])
        seen.append(whole_state(model))
        pruner.shot()
        seen.append(whole_state(model))

    package, seen = os.path.dirname(sfpk_kernels.__file__), []
    files = [
        f"{package}/{name}.py"
        for name in ("retraining/gradual", "retraining/loop", "modeling/whole_model", "modeling/turns")
    ]
    for raised in every_moment(work, files, step=every):
        assert type(raised) is KeyboardInterrupt
        del raised
        assert torch.is_grad_enabled()
        if pruner._broken is not None:
            counts["said"] += 1
            for further in (pruner.run, pruner.shot, pruner.result, pruner.state_dict):
                with pytest.raises(RuntimeError, match="the model is not as after the last finished shot: "):
                    further()
            pruner.load_state_dict(states[at])
        else:
            counts["on"] += 1
            before = at if pruner.finished == at else at + 1
            assert pruner.finished in (at, at + 1) or not seen
            if seen and before == at and not seen[1:]:
                assert agree(whole_state(model), seen[0])
        if pruner.finished >= at:
            goes_on()
        seen.clear()
    assert counts["on"] * every > 260, counts


def test_what_a_function_did_to_the_model_is_put_back(convnet, images):
    """Weights exchanged, halved, registered anew, frozen, with gradients: all as before the shot that failed."""
    broken = []

    def train(model, masks, shot):
        if not broken:
            return
        model.half()
        model[0].weight.requires_grad_(False)
        model[1].running_mean = torch.ones(6)
        model[1].register_buffer("more", torch.ones(2))
        model[4].weight = nn.Parameter(torch.zeros(8, 6, 3, 3))
        model[8].bias.grad = torch.ones(4, dtype=torch.float16)
        model.train()
        raise broken[0]

    pruner = GradualPruner(convnet, images, config=quick(), shots=3, retrain=train)
    pruner.shot()
    convnet[4].weight.grad = torch.full((8, 6, 3, 3), 3.0)
    before, names = whole_state(convnet), list(convnet.state_dict())
    for error in (KeyboardInterrupt(), ValueError("mine"), SystemExit(3)):
        broken[:] = [error]
        with pytest.raises(type(error)) as caught:
            pruner.run()
        assert caught.value is error
        assert agree(whole_state(convnet), before)
        assert list(convnet.state_dict()) == names
        assert bool((convnet[4].weight.grad == 3).all())
        if sys.version_info >= (3, 11):
            assert "in shot 2 of 3; the model is as after shot 1" in error.__notes__[-1]
    broken.clear()
    assert pruner.run().mask.kept == round(0.1 * pruner.coordinates.d)


def test_the_last_shot_is_saved_by_a_further_run(mlp, vectors, tmp_path, monkeypatch):
    path = tmp_path / "run"
    pruner = GradualPruner(mlp, vectors, config=quick(), shots=2, retrain=1)
    with monkeypatch.context() as patch:
        patch.setattr("sfpk_kernels.retraining.gradual.save_state", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pruner.run(save=path)
        assert pruner.finished == 1
        with pytest.raises(KeyboardInterrupt):
            pruner.run(save=path)
    assert pruner.done
    assert not path.exists()
    result = pruner.run(save=path)
    fresh = GradualPruner(copy.deepcopy(mlp), vectors, config=quick(), shots=2, retrain=1)
    assert fresh.run(resume=path).mask == result.mask


def interrupted(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("sfpk_kernels.retraining.gradual.end_contexts", "shot 1 stopped half-way"),
        ("sfpk_kernels.modeling.whole_model.WholeModel.restore", "putting back shot 1 stopped half-way"),
    ],
)
def test_a_second_interruption_while_a_shot_is_put_back_is_said(mlp, vectors, monkeypatch, where, words):
    """Like Ctrl-C twice: the model may be anything, which every further call says, until a state is loaded."""

    class Interruption(BaseException):
        pass

    def interrupted(*arguments):
        raise Interruption

    pruner = GradualPruner(mlp, vectors, config=quick(), shots=2, retrain=interrupted)
    state = pruner.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(where, interrupted)
        with pytest.raises(Interruption):
            pruner.shot()
    for further in (pruner.run, pruner.shot, pruner.result, pruner.state_dict):
        with pytest.raises(RuntimeError, match=f"the model is not as after the last finished shot: {words}"):
            further()
    pruner.load_state_dict(state)
    assert pruner.state_dict()["history"] == []
