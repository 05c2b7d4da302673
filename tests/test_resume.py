"""Saving and resuming: bit for bit, at any moment, only what belongs together."""

import copy
import dataclasses
import random

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sfpk_kernels import SFPKPruner, prune

from .settings import both, population


def quick(**overrides):
    options = {"n_particles": 3, "n_steps": 8, **overrides}
    return population(0.8, **options)


class Killed(BaseException):
    pass


def stop_after(step):
    def callback(record):
        if record.step == step:
            raise Killed

    return callback


VARIANTS = [
    {},
    {"update": "gauss_seidel"},
    {"momentum": 0.1, "vote": "hard"},
    {"particle_dtype": "float16"},
    {"particle_dtype": "bfloat16", "kernel": "weighted_rbf"},
    {"model_mode": "train", "dtype": "fp16"},
    {"energy_mode": "vmap"},
    {"merge": 0.5, "averaging": 0.5},
    {"update": "gauss_seidel", "averaging": 0.9},
    {"selection": "threshold", "early_stop": True, "momentum": 0.1, "retract": False, "schedule": "exponential"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("stop", [3, 6])
def test_resumed_is_bit_for_bit_the_uninterrupted_run(mlp, vectors, tmp_path, options, stop):
    settings = {**both(quick, **options), "waypoints": [0.5, 0.7], "keep_scores": True}
    x, y = torch.cat([x for x, _ in vectors]), torch.cat([y for _, y in vectors])
    loader = DataLoader(TensorDataset(x, y), 16, shuffle=True)
    whole = prune(mlp, loader, **settings)
    path = tmp_path / "run"
    with pytest.raises(Killed):
        prune(mlp, loader, **settings, save_every=2, save_path=path, callbacks=[stop_after(stop)])
    torch.manual_seed(99)
    seen = []
    again = prune(mlp, loader, **settings, resume=path, callbacks=[seen.append])
    assert seen[0].step == (stop - 1) // 2 * 2 + 1, "it goes on where it was saved"
    assert torch.equal(again.particles, whole.particles)
    assert torch.equal(again.score, whole.score)
    assert again.mask.fingerprint() == whole.mask.fingerprint()
    assert [w.mask for w in again.waypoints] == [w.mask for w in whole.waypoints]
    assert [w.step for w in again.waypoints] == [w.step for w in whole.waypoints]
    assert torch.equal(again.waypoints[0].score, whole.waypoints[0].score)
    assert len(again.history) == len(whole.history)
    for a, b in zip(again.history, whole.history, strict=True):
        assert (a.step, a.energies, a.densities, a.overlaps) == (b.step, b.energies, b.densities, b.overlaps)
    assert again.alarms == whole.alarms


def test_the_timed_choice_is_kept(mlp, vectors, tmp_path):
    settings = both(quick, energy_mode="timed")
    pruner = SFPKPruner(mlp, **settings)
    pruner.step(vectors[:3])
    pruner.save(tmp_path / "run")
    other = SFPKPruner(mlp, **settings)
    other.load(tmp_path / "run")
    assert other.plan == pruner.plan
    assert other._run.energy.mode == pruner._run.energy.mode
    pruner.step(vectors[3:6])
    other.step(vectors[3:6])
    assert torch.equal(pruner.particles, other.particles)


def test_a_finished_run_is_reopened(mlp, vectors, tmp_path):
    path = tmp_path / "run"
    done = prune(mlp, vectors, config=quick(), save_every=5, save_path=path)
    again = prune(mlp, vectors, config=quick(), resume=path)
    assert again.mask == done.mask
    assert again.vote("hard") == done.vote("hard")


def test_resume_true_begins_or_goes_on(mlp, vectors, tmp_path):
    path = tmp_path / "run"
    first = prune(mlp, vectors, config=quick(), save_every=3, save_path=path, resume=True)
    assert path.exists()
    steps = []
    again = prune(mlp, vectors, config=quick(), save_every=3, save_path=path, resume=True, callbacks=[steps.append])
    assert again.mask == first.mask
    assert not steps


def test_state_dict_is_a_copy_and_a_branch_has_another_seed(mlp, vectors):
    config = quick(model_mode="eval", particle_dtype="float16")
    pruner = SFPKPruner(mlp, config=config)
    for k in range(3):
        pruner.step(vectors[3 * k :][:3])
    state = pruner.state_dict()
    before = copy.deepcopy(state["particles"]["masks"])
    pruner.step(vectors[:3])
    assert torch.equal(state["particles"]["masks"], before)
    same, branch = SFPKPruner(mlp, config=config), SFPKPruner(mlp, config=config.replace(seed=7))
    for other in (same, branch):
        other.load_state_dict(state)
        other.step(vectors[:3])
    assert torch.equal(same.particles, pruner.particles)
    assert not torch.equal(branch.particles, pruner.particles)


def test_on_to_a_higher_sparsity(mlp, vectors):
    first = prune(mlp, vectors, config=quick())
    further = prune(mlp, vectors, config=quick().replace(sparsity=0.95), start=first.particles)
    assert further.mask.kept == round(0.05 * 144)
    assert further.history[0].start_density == pytest.approx(0.2, rel=1e-5)


def test_what_does_not_belong_together_is_refused(mlp, vectors, tmp_path):
    path = tmp_path / "run"
    pruner = SFPKPruner(mlp, config=quick())
    pruner.step(vectors[:3])
    pruner.save(path)
    with pytest.raises(ValueError, match=r"difference in radius 2.0 \(now 3.0\)"):
        SFPKPruner(mlp, config=quick(radius=3.0)).load(path)
    other = copy.deepcopy(mlp)
    with torch.no_grad():
        other[0].bias.add_(1)
    fresh = SFPKPruner(other, config=quick())
    before = fresh.state_dict()
    with pytest.raises(ValueError, match="wanted one of this model"):
        fresh.load(path)
    assert torch.equal(fresh.state_dict()["particles"]["masks"], before["particles"]["masks"])
    with pytest.raises(ValueError, match=r"differs in \['2.weight'\]"):
        SFPKPruner(mlp, config=quick(), ignored_layers=["2"]).load(path)
    with pytest.raises(FileNotFoundError, match="is no file"):
        prune(mlp, vectors, config=quick(), resume=tmp_path / "absent")
    with pytest.raises(ValueError, match="save_path: wanted a file to write"):
        prune(mlp, vectors, config=quick(), save_every=2)
    with pytest.raises(ValueError, match="save_every: wanted ≥ 1"):
        prune(mlp, vectors, config=quick(), save_every=0, save_path=path)
    with pytest.raises(TypeError, match="save_every: wanted a number of steps"):
        prune(mlp, vectors, config=quick(), save_every=1.5, save_path=path)
    with pytest.raises(ValueError, match="^save_every: wanted a number of steps beside save_path='never', got None"):
        prune(mlp, vectors, config=quick(), save_path="never")
    with pytest.raises(FileNotFoundError, match="save_path: wanted a file in an existing folder"):
        prune(mlp, vectors, config=quick(), save_every=2, save_path=tmp_path / "no" / "run")


def test_a_state_that_is_not_whole_changes_nothing(mlp, vectors):
    pruner = SFPKPruner(mlp, config=quick(), waypoints=[0.5])
    for k in range(6):
        pruner.step(vectors[k : k + 3])
    state = pruner.state_dict()
    fresh = SFPKPruner(mlp, config=quick())
    before = fresh.state_dict()
    with pytest.raises(TypeError, match="^state: wanted what SFPKPruner.state_dict.. returns, got str"):
        fresh.load_state_dict("run")
    for name in state:
        with pytest.raises(ValueError, match=rf"got one without \['{name}'\]"):
            fresh.load_state_dict({key: value for key, value in state.items() if key != name})
    broken = {"energies": 3, "history": [{"step": 1}], "waypoints": [{}], "plan": {}, "vote": "x"}
    for name, value in broken.items():
        with pytest.raises((TypeError, ValueError), match=f"^state: {name}"):
            fresh.load_state_dict({**state, name: value})
    with pytest.raises(ValueError, match="^state: particles.stats: wanted a dict of"):
        fresh.load_state_dict({**state, "particles": {**state["particles"], "stats": {"norms": torch.ones(3)}}})
    after = fresh.state_dict()
    assert torch.equal(after["particles"]["masks"], before["particles"]["masks"])
    assert {k: after[k] for k in ("step", "history", "waypoints", "taken", "plan")} == {
        k: before[k] for k in ("step", "history", "waypoints", "taken", "plan")
    }


def test_masks_on_the_way_survive_going_back_and_are_not_lost_in_silence(mlp, vectors):
    pruner = SFPKPruner(mlp, config=quick(), waypoints=[0.3, 0.75])
    pruner.step(vectors[:3])
    early = pruner.state_dict()
    first = pruner.run(vectors)
    assert [w.sparsity for w in first.waypoints] == [0.3, 0.75]
    late = pruner.state_dict()
    pruner.load_state_dict(early)
    again = pruner.run(vectors)
    assert [w.sparsity for w in again.waypoints] == [0.3, 0.75]
    fresh = SFPKPruner(mlp, config=quick(), waypoints=[0.3, 0.6])
    with pytest.raises(ValueError, match=r"^waypoints: wanted sparsities that the saved run took .* got 0.6"):
        fresh.load_state_dict(late)
    assert not fresh.history
    fresh.load_state_dict(early)
    assert [w.sparsity for w in fresh.run(vectors).waypoints] == [0.3, 0.6]


def test_a_damaged_file_is_refused_whole(mlp, vectors, tmp_path):
    path = tmp_path / "run"
    pruner = SFPKPruner(mlp, config=quick())
    pruner.step(vectors[:3])
    pruner.save(path)
    good = path.read_bytes()
    draw = random.Random(0)
    fresh = SFPKPruner(mlp, config=quick())
    untouched = torch.ones_like(fresh.particles)
    for _ in range(40):
        place = draw.randrange(len(good))
        if draw.random() < 0.5:
            path.write_bytes(good[:place])
        else:
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << draw.randrange(8)]) + good[place + 1 :])
        with pytest.raises(ValueError, match=r"was cut or altered|wanted a file of format"):
            fresh.load(path)
        assert torch.equal(fresh.particles, untouched)
    path.write_bytes(good)
    fresh.load(path)
    assert torch.equal(fresh.particles, pruner.particles)


class Counting(torch.nn.Module):
    """Writes buffers in its forward pass; one of them matters for what follows."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("drift", torch.zeros(8))

    def forward(self, x):
        self.calls += 1
        self.drift.mul_(0.9).add_(0.1 * x.mean(dim=0))
        return self.inner(x - self.drift)


def test_a_model_that_writes_its_buffers(mlp, vectors, tmp_path):
    """Every step begins with the buffers the model came with."""
    model, path = Counting(mlp), tmp_path / "run"
    whole = prune(model, vectors, config=quick())
    with pytest.raises(Killed):
        prune(model, vectors, config=quick(), save_every=2, save_path=path, callbacks=[stop_after(5)])
    assert int(model.calls) == 0
    again = prune(model, vectors, config=quick(), resume=path)
    assert torch.equal(again.particles, whole.particles)
    pruner = SFPKPruner(model, config=quick())
    pruner.run(vectors).mask.apply_(model)
    pruner.save(path)
    with pytest.raises(ValueError, match="wanted one of this model"):
        SFPKPruner(model, config=quick()).load(path)


def test_a_run_goes_on_with_the_model_in_a_wrapper(mlp, vectors, tmp_path):
    whole = prune(mlp, vectors, config=quick())
    with pytest.raises(Killed):
        prune(mlp, vectors, config=quick(), save_every=2, save_path=tmp_path / "run", callbacks=[stop_after(5)])
    again = prune(torch.nn.DataParallel(mlp), vectors, config=quick(), resume=tmp_path / "run")
    assert again.mask == whole.mask


def test_callbacks_may_save_and_draw(mlp, vectors, tmp_path):
    x, y = torch.cat([x for x, _ in vectors]), torch.cat([y for _, y in vectors])
    loader = DataLoader(TensorDataset(x, y), 16, shuffle=True)
    whole = prune(mlp, loader, config=quick())
    drawn, modes, path = [], set(), tmp_path / "run"

    def draw(record):
        drawn.append(float(torch.rand(())))
        modes.add(mlp.training)
        for _ in DataLoader(TensorDataset(x), 16):  # draws a seed for workers, used or not
            pass

    pruner = SFPKPruner(mlp, config=quick(), callbacks=[draw])
    pruner.add_callback(lambda record: pruner.save(path) if record.step == 5 else None)
    mlp.train()
    assert torch.equal(pruner.run(loader).particles, whole.particles)
    assert modes == {True}, "between steps the model is as it was"
    again = prune(mlp, loader, config=quick(), resume=path, callbacks=[draw])
    assert torch.equal(again.particles, whole.particles)
    assert drawn[8:] == drawn[5:8]


def test_a_place_that_cannot_be_written_is_known_before_the_run(mlp, vectors, tmp_path):
    def never(model, batch):
        raise AssertionError("a pass was run")

    for path, error in [
        (tmp_path, IsADirectoryError),
        ("/proc/run", OSError),
        (tmp_path / "no" / "run", FileNotFoundError),
    ]:
        with pytest.raises(error, match="save_path: wanted a file"):
            prune(mlp, vectors, loss_fn=never, config=quick(), save_every=5, save_path=path)


def test_reopening_a_finished_run_reads_no_data(mlp, vectors, tmp_path):
    path = tmp_path / "run"
    prune(mlp, vectors, config=quick(), save_every=5, save_path=path)

    class Unread(list):
        def __iter__(self):
            return iter([])

    assert prune(mlp, Unread(), config=quick(), resume=path).mask.kept == 29


def test_a_way_given_up_on_the_way_is_remembered(vectors, tmp_path):
    class Odd(torch.nn.Module):
        """From some batch on it decides by values, which vmap cannot."""

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 4)

        def forward(self, x):
            if x.shape[0] == 9:
                bool(x.sum() > 0)
            return self.layer(x)

    model, config = Odd(), quick()
    pruner = SFPKPruner(model, config=config)
    pruner.step(vectors[:3])
    pruner._run.energy.choice = dataclasses.replace(pruner._run.energy.choice, mode="vmap")
    pruner.step([(x[:9], y[:9]) for x, y in vectors[:3]])
    pruner.save(tmp_path / "run")
    other = SFPKPruner(model, config=config)
    other.load(tmp_path / "run")
    assert other._run.energy.mode == other.plan.choice.mode == pruner.result().plan.choice.mode == "sequential"


@pytest.mark.parametrize("saved", [True, False])
def test_an_interruption_names_the_file_to_resume(mlp, vectors, tmp_path, saved):
    files = {"save_every": 2, "save_path": tmp_path / "run"} if saved else {}
    with pytest.raises(Killed) as caught:
        prune(mlp, vectors, config=quick(), callbacks=[stop_after(5)], **files)
    if hasattr(caught.value, "add_note"):  # Python ≥ 3.11
        note = f"step 4 is saved, resume={str(tmp_path / 'run')!r} goes on from it"
        assert (note in "".join(getattr(caught.value, "__notes__", ()))) == saved
