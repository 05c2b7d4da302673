"""Runs that are interrupted: by exceptions, signals, a full disk; what is saved then, and that it goes on."""

import contextlib
import copy
import logging
import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

import sfpk_kernels
from sfpk_kernels import Execution, GradualPruner, MaskSet, SFPKPruner, prune
from sfpk_kernels.modeling.whole_model import _nesting
from sfpk_kernels.retraining.gradual import FORMAT
from sfpk_kernels.search.merging import passes
from sfpk_kernels.search.run import Run
from sfpk_kernels.utils.files import load_state

from .interruptions import every_moment
from .settings import both
from .snapshot import Snapshot
from .test_resume import Killed, quick, stop_after


def test_a_lean_step_that_stopped_half_way_is_not_saved(mlp, vectors, tmp_path):
    batches = list(vectors)
    batches[4] = (batches[4][0] * float("nan"), batches[4][1])
    path = tmp_path / "run"
    pruner = SFPKPruner(mlp, config=quick(update="gauss_seidel"))
    with pytest.raises(FloatingPointError):
        pruner.run(batches, save_every=1, save_path=path)
    with pytest.raises(RuntimeError, match="step 2 stopped half-way"):
        pruner.save(path)
    resumed = prune(mlp, vectors, config=quick(update="gauss_seidel"), resume=path)
    assert torch.equal(resumed.particles, prune(mlp, vectors, config=quick(update="gauss_seidel")).particles)


def test_a_stopped_pruner_goes_on(mlp, vectors, tmp_path):
    path = tmp_path / "run"
    whole = prune(mlp, vectors, config=quick())
    pruner = SFPKPruner(mlp, config=quick(), callbacks=[stop_after(3)])
    with pytest.raises(Killed):
        pruner.run(vectors)
    pruner.save(path)
    assert torch.equal(pruner.run(vectors).particles, whole.particles)
    assert torch.equal(prune(mlp, vectors, config=quick(), resume=path).particles, whole.particles)


def test_an_interruption_between_two_steps_counts_its_batches(mlp, vectors, monkeypatch):
    whole = prune(mlp, vectors, config=quick())
    pruner = SFPKPruner(mlp, config=quick())
    guard, left = Run.guard, iter([False, False, True])

    @contextlib.contextmanager
    def interrupted(self):
        with guard(self):
            yield
        if next(left, False):
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "guard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruner.run(vectors)
    assert len(pruner.history) == 3
    assert torch.equal(pruner.run(vectors).particles, whole.particles)


@pytest.mark.parametrize(
    "where",
    ["sfpk_kernels.search.diagnostics.Diagnostics.deviation", "sfpk_kernels.search.vote.Vote.update"],
)
def test_an_interruption_after_the_move_is_not_saved(mlp, vectors, tmp_path, monkeypatch, where):
    def interrupted(*args):
        raise KeyboardInterrupt

    pruner = SFPKPruner(mlp, config=quick(momentum=0.1))
    pruner.step(vectors[:3])
    with monkeypatch.context() as patch:
        patch.setattr(where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            pruner.step(vectors[3:6])
    for wrong in (
        lambda: pruner.save(tmp_path / "run"),
        lambda: pruner.step(vectors[3:6]),
        lambda: pruner.run(vectors),
    ):
        with pytest.raises(RuntimeError, match="step 2 stopped half-way, particles 0 … 2 have moved"):
            wrong()


def test_an_interruption_before_the_move_changes_nothing(mlp, vectors):
    def loss_fn(model, batch):
        raise KeyboardInterrupt

    pruner, other = SFPKPruner(mlp, config=quick()), SFPKPruner(mlp, loss_fn=loss_fn, config=quick())
    pruner.step(vectors[:3])
    other.load_state_dict(pruner.state_dict())
    with pytest.raises(KeyboardInterrupt):
        other.step(vectors[3:6])
    assert torch.equal(other.particles, pruner.particles)
    other.state_dict()


def test_a_full_disk_does_not_end_the_run(mlp, vectors, tmp_path, caplog):
    path, wide = tmp_path / "run", torch.nn.Sequential(torch.nn.Linear(8, 300), torch.nn.Linear(300, 4))
    whole = prune(wide, vectors, config=quick())
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(record):
        if record.step in (3, 6):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if record.step == 3 else limits[0], limits[1]))

    try:
        pruner = SFPKPruner(wide, config=quick(), callbacks=[fill, stop_after(7)])
        with pytest.raises(Killed):
            pruner.run(vectors, save_every=2, save_path=path)
        assert len(pruner.history) == 7
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [r.message for r in caplog.records if r.levelname == "ERROR"] == [
        f"step 4 was not saved, the run goes on: [Errno 27] File too large: {str(path)!r}"
    ]
    assert os.listdir(tmp_path) == ["run"]
    seen = []
    assert torch.equal(
        prune(wide, vectors, config=quick(), resume=path, callbacks=[seen.append]).particles, whole.particles
    )
    assert seen[0].step == 7, "the save of step 6 worked again"


def kill_and_resume(model, batches, path, kills, seed):
    """Children that prune with a save after every step are killed at random moments; returns the last one's mask."""
    config, draw = quick(n_steps=25), random.Random(seed)
    outcome = path.with_name("mask")
    longest, left = 0.4, kills
    while not outcome.exists():
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                result = prune(model, batches, config=config, save_every=1, save_path=path, resume=True, progress=False)
                result.mask.save(outcome)
            finally:
                os._exit(0)
        if left:
            time.sleep(draw.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
            left -= 1
            os.waitpid(child, 0)
        else:
            os.waitpid(child, 0)
            assert outcome.exists(), "a run that nobody killed ends"
        if left and outcome.exists():  # it was too quick for us: again from the start
            outcome.unlink()
            path.unlink(missing_ok=True)
            longest /= 2
    return outcome


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_mask_is_the_same(vectors, tmp_path, kills):
    wide = torch.nn.Sequential(torch.nn.Linear(8, 300), torch.nn.Tanh(), torch.nn.Linear(300, 4))
    whole = prune(wide, vectors, config=quick(n_steps=25))
    snapshot = Snapshot(wide)
    outcome = kill_and_resume(wide, vectors, Path(tmp_path) / "run", kills, seed=kills)
    assert MaskSet.load(outcome).fingerprint() == whole.mask.fingerprint()
    snapshot.check()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_while_writing_the_old_file_stays(mlp, vectors, tmp_path, monkeypatch):
    """The child dies inside the write itself, at several places of it."""
    path = tmp_path / "run"
    pruner = SFPKPruner(mlp, config=quick())
    pruner.step(vectors[:3])
    pruner.save(path)
    good = path.read_bytes()
    pruner.step(vectors[3:6])
    for call in ("fsync", "replace"):
        child = os.fork()
        if child == 0:
            setattr(os, call, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
            pruner.save(path)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        assert path.read_bytes() == good
    fresh = SFPKPruner(mlp, config=quick())
    fresh.load(path)
    assert len(fresh.history) == 1


SETTINGS = [
    {"momentum": 0.1, "merge": 0.5},
    {"update": "gauss_seidel", "momentum": 0.1, "vote": "hard"},
    {"particle_dtype": "bfloat16", "kernel": "weighted_rbf", "settle": True},
    {"dtype": "fp16", "energy_mode": "vmap", "vote": "masked_at_the_end"},
    {"update": "gauss_seidel", "particle_dtype": "float16", "nonfinite": "skip_particle", "selection": "threshold",
     "retract": False},
]  # fmt: skip
# What a step passes through.
MODULES = (
    "search/pruner", "search/attempt", "search/loop", "search/run", "search/resumable", "search/saving",
    "search/state", "search/one_run", "search/waypoints", "search/step", "search/particles", "search/merging",
    "search/vote", "search/polarizer", "search/diagnostics", "search/nonfinite", "search/reading", "masks/maskset",
    "modeling/turns", "modeling/batches", "modeling/state", "modeling/whole_model", "search/energy/__init__",
    "search/energy/sequential", "search/energy/batched", "search/energy/_swap", "search/energy/_scale",
    "search/energy/_problem",
)  # fmt: skip


def outcome(result):
    records = [(r.step, r.energies, r.densities, r.overlaps, r.skipped, r.alarms) for r in result.history]
    waypoints = [(w.sparsity, w.step, w.mask.fingerprint()) for w in result.waypoints]
    return result.mask.fingerprint(), result.particles.tolist(), result.score.tolist(), records, waypoints


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("at", "every"),
    [(2, 19), (4, 23), pytest.param(2, 5, marks=pytest.mark.slow), pytest.param(4, 7, marks=pytest.mark.slow)],
)
def test_interrupted_anywhere_it_goes_on_or_says_that_it_cannot(mlp, vectors, caplog, options, at, every):
    """At calls and lines all over a step (with a mask on the way in it), the last one, too; by run() and step()."""
    wanted = [0.5] if options.get("vote") == "masked_at_the_end" else [0.3, 0.5, 0.6]
    if options.get("vote") == "masked_at_the_end":
        options, wanted = {**options, "vote": "masked"}, []
    settings = both(quick, n_steps=4, **options)
    caplog.set_level(logging.ERROR, "sfpk_kernels")
    whole = SFPKPruner(mlp, **settings, waypoints=wanted)
    states = []
    whole.add_callback(lambda record: states.append(whole.state_dict()))
    expected, snapshot, counts = outcome(whole.run(vectors)), Snapshot(mlp), {"on": 0, "refused": 0}
    pruner = SFPKPruner(mlp, **settings, waypoints=wanted)
    by_run = at == 4

    def work():
        pruner.load_state_dict(states[at - 2])
        pruner.run(vectors) if by_run else pruner.step(vectors[3 * (at - 1) :][:3])

    first = Path(sfpk_kernels.__file__).parent
    files = [str(first / f"{name}.py") for name in MODULES]
    for raised in every_moment(work, files, step=every):
        assert type(raised) is KeyboardInterrupt
        del raised
        snapshot.check()
        assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), _nesting()) == (True, False, 0)
        if pruner._attempt._broken is not None:
            counts["refused"] += 1
            refused = (
                lambda: pruner.run(vectors), lambda: pruner.step(vectors[:3]), pruner.result, pruner.state_dict,
            )  # fmt: skip
            for further in refused:
                with pytest.raises(RuntimeError, match="^(run|step|result|state_dict): this run cannot go on: "):
                    further()
            continue
        counts["on"] += 1
        if not by_run:  # the batches were given by hand
            done = len(pruner.history)
            for number in range(done, 4):
                pruner.step((vectors * 2)[passes(pruner.config, number) :][: len(pruner.particles)])
            assert outcome(pruner.result()) == expected
        else:
            assert outcome(pruner.run(vectors)) == expected
    assert min(counts.values()) * every > 140, counts


@pytest.mark.parametrize("what", ["mask", "run", "shots"])
def test_interrupted_while_saving_the_old_file_is_whole(mlp, vectors, tmp_path, what):
    """At every line of ours: KeyboardInterrupt, and nothing beside the file."""
    path = tmp_path / "file"
    pruner = SFPKPruner(mlp, config=quick())
    pruner.step(vectors[:3])
    shots = GradualPruner(copy.deepcopy(mlp), vectors, config=quick(), shots=2, retrain=1)
    shots.shot()
    mask = pruner.result().mask
    save, load = {
        "mask": (lambda: mask.save(path), MaskSet.load),
        "run": (lambda: pruner.save(path), SFPKPruner(mlp, config=quick()).load),
        "shots": (lambda: shots._save(path), lambda path: load_state(path, FORMAT)),
    }[what]
    save()
    package = os.path.dirname(sfpk_kernels.__file__)
    files = [
        f"{package}/{name}.py"
        for name in (
            "utils/files",
            "masks/maskset",
            "masks/files",
            "masks/masked_parameters",
            "retraining/gradual_state",
            "search/resumable",
            "search/saving",
            "retraining/gradual",
            "modeling/turns",
        )
    ]

    def work():
        shots._saved = None
        save()

    for raised in every_moment(work, files, step=1 if what == "mask" else 3):
        assert type(raised) is KeyboardInterrupt
        del raised
        assert os.listdir(tmp_path) == ["file"]
        load(path)


@pytest.mark.parametrize("count", [25, pytest.param(600, marks=pytest.mark.slow)])
def test_signals_at_random_moments(convnet, images, tmp_path, count):
    """As the system sends them, between any two instructions: a further run ends at the same mask, or is refused."""
    config, path, draw = quick(model_mode="train", momentum=0.1), tmp_path / "run", random.Random(count)
    expected, snapshot = outcome(prune(convnet, images, config=config, waypoints=[0.5])), Snapshot(convnet)
    started = time.perf_counter()
    prune(convnet, images, config=config, save_every=1, save_path=path)
    whole = time.perf_counter() - started
    stopped = []

    def stop(*arguments):
        raise KeyboardInterrupt

    def fresh():
        pruner = SFPKPruner(convnet, config=config, waypoints=[0.5])
        if path.exists():
            pruner.load(path)
        return pruner

    handler = signal.signal(signal.SIGALRM, stop)
    try:
        for _ in range(count):
            path.unlink(missing_ok=True)
            pruner = fresh()
            for _ in range(3):
                with contextlib.suppress(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.0005, whole))
                    pruner.run(images, save_every=1, save_path=path)
                signal.setitimer(signal.ITIMER_REAL, 0)
                snapshot.check()
                assert os.listdir(tmp_path) in ([], ["run"])
                stopped.append(len(pruner.history) < 8)
                if pruner._attempt._broken is not None:
                    with pytest.raises(RuntimeError, match="^run: this run cannot go on: step "):
                        pruner.run(images)
                    pruner = fresh()
            assert outcome(pruner.run(images, save_every=1, save_path=path)) == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert sum(stopped) > count / 4


def test_the_last_step_is_saved_by_a_further_run(mlp, vectors, tmp_path):
    path, whole = tmp_path / "run", prune(mlp, vectors, config=quick())
    pruner = SFPKPruner(mlp, config=quick(), callbacks=[stop_after(8)])
    with pytest.raises(Killed):
        pruner.run(vectors, save_every=3, save_path=path)
    assert pruner.done
    assert pruner.run(vectors, save_every=3, save_path=path).mask == whole.mask
    written = path.stat().st_mtime_ns
    assert pruner.run(vectors, save_every=3, save_path=path).mask == whole.mask
    assert path.stat().st_mtime_ns == written, "it is there already"
    fresh = SFPKPruner(mlp, config=quick())
    fresh.load(path)
    assert fresh.done


def test_a_second_interruption_while_a_step_is_put_back_is_said(mlp, vectors, monkeypatch):
    """Like Ctrl-C twice: whether anything has moved is not known any more, which every further call says."""

    class Interruption(BaseException):
        pass

    def interrupted(*arguments):
        raise Interruption

    pruner = SFPKPruner(mlp, loss_fn=lambda model, batch: interrupted(), config=quick())
    state = pruner.state_dict()
    pruner._run.make_plan = lambda batch: setattr(pruner._run, "plan", True)  # whose trial runs the loss, too
    with monkeypatch.context() as patch:
        patch.setattr("sfpk_kernels.search.attempt.end_contexts", interrupted)
        with pytest.raises(Interruption):
            pruner.step(vectors[:3])
    for further in (lambda: pruner.step(vectors[:3]), lambda: pruner.run(vectors), pruner.result, pruner.state_dict):
        with pytest.raises(RuntimeError, match="cannot go on: step 1 stopped half-way; resume what was saved before"):
            further()
    pruner.load_state_dict(state)
    pruner._run.plan = None
    assert pruner.state_dict()["step"] == 0


def test_a_step_that_failed_leaves_nothing_of_it_behind(mlp, vectors):
    """Statistics and densities the host knows, the scale of fp16 losses, how energies are computed: as before it."""
    nan = [(x * float("nan"), y) for x, y in vectors[:3]]
    pruner = SFPKPruner(mlp, config=quick(), execution=Execution(dtype="fp16", energy_mode="sequential"))
    pruner.step(vectors[:3])
    (stats, known), energy = pruner._run.system.measured(), pruner._run.energy.state()
    assert stats is not None
    assert known is not None
    for batches in (nan, [*vectors[:2], nan[2]], [*vectors[:2], (vectors[2][0], "no labels")]):
        with pytest.raises((FloatingPointError, TypeError)):
            pruner.step(batches)
        after, still_known = pruner._run.system.measured()
        assert all(torch.equal(a, b) for a, b in zip(after, stats, strict=True))
        assert still_known == known
        assert pruner._run.energy.state() == energy
