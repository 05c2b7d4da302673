"""Pruners in several threads of one process: no outcome depends on the others."""

import copy
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import sfpk_kernels
from sfpk_kernels import GradualPruner, RetrainConfig, SFPKPruner, export, prune
from sfpk_kernels.modeling import turns
from sfpk_kernels.modeling.turns import Turns, lock

from .settings import population


def quick(**overrides):
    options = {"n_particles": 2, "n_steps": 6, "model_mode": "train", **overrides}
    return population(0.8, **options)


class Noisy(torch.utils.data.Dataset):
    """Draws from the global generator for every sample, as augmentations do."""

    def __init__(self, batches):
        self.x, self.y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        time.sleep(0)  # another thread's turn
        return self.x[index] + 0.01 * torch.randn(self.x.shape[1:]), self.y[index]


def at_once(*works):
    """What each of them returns, in threads of their own, begun together."""
    gate, found = threading.Barrier(len(works)), [None] * len(works)

    def begin(number):
        gate.wait()
        try:
            found[number] = works[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=begin, args=(number,), daemon=True) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    return found


def outcome(result):
    return result.mask, result.particles.tolist(), [record.energies for record in result.history]


@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
def test_runs_do_not_depend_on_each_other(convnet, images, update):
    """Dropout, drawn order, augmentation; of one model and of several; and torch's own state afterwards."""
    data = Noisy(images)

    def search(model, seed):
        drawn = []

        def draw(record):
            drawn.append(float(torch.rand(())))

        loader = DataLoader(data, 16, shuffle=True)
        return lambda: (*outcome(prune(model, loader, config=quick(seed=seed, update=update), callbacks=[draw])), drawn)

    models = [convnet, convnet, copy.deepcopy(convnet), convnet]
    alone = [search(model, seed)() for seed, model in enumerate(models)]
    before, weights = torch.get_rng_state(), copy.deepcopy(convnet.state_dict())
    for _ in range(3):
        assert at_once(*(search(model, seed) for seed, model in enumerate(models))) == alone
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, weights[name]) for name, value in convnet.state_dict().items())


def test_steps_and_shots_beside_runs(convnet, images):
    loader, dense = DataLoader(Noisy(images), 16, shuffle=True), copy.deepcopy(convnet)

    def steps():
        pruner = SFPKPruner(convnet, config=quick())
        while not pruner.done:
            pruner.step(images[:2])
        return outcome(pruner.result())

    def shots():
        model = copy.deepcopy(dense)
        result = GradualPruner(model, loader, config=quick(), shots=2, retrain=RetrainConfig(0.4)).run()
        return result.masks, result.particles.tolist(), [record.losses for record in result.history]

    def run():
        return outcome(prune(convnet, loader, config=quick()))

    works = (steps, shots, run, shots)
    alone = [work() for work in works]
    assert at_once(*works) == alone


def test_exports_beside_runs(convnet, images, tmp_path):
    twin = copy.deepcopy(convnet)

    def write():
        return export(twin, tmp_path / "file", example=images[0], runs=2).verified

    def run():
        return outcome(prune(convnet, images, config=quick()))

    assert at_once(write, run) == [write(), run()]


def test_one_pruner_runs_once_at_a_time(mlp, vectors):
    entered, leave = threading.Event(), threading.Event()
    pruner = SFPKPruner(mlp, config=quick(), callbacks=[lambda record: (entered.set(), leave.wait(60))])
    expected = prune(mlp, vectors, config=quick())
    found = []
    thread = threading.Thread(target=lambda: found.append(pruner.run(vectors)), daemon=True, name="first")
    thread.start()
    assert entered.wait(60)
    second = threading.Thread(target=lambda: found.append(caught(pruner, vectors)), daemon=True)
    second.start()
    leave.set()
    thread.join(60)
    second.join(60)
    kinds = {type(item) for item in found}
    assert RuntimeError in kinds
    assert "wanted one run of a pruner at a time, got another beside that of first" in str(
        next(item for item in found if isinstance(item, RuntimeError))
    )
    assert next(item for item in found if not isinstance(item, RuntimeError)).mask == expected.mask
    assert pruner.run(vectors).mask == expected.mask


def caught(pruner, batches):
    try:
        return pruner.run(batches)
    except RuntimeError as error:
        return error


def test_a_callback_may_prune(mlp, vectors):
    """In the same thread nobody waits."""
    inner = []
    expected, other = outcome(prune(mlp, vectors, config=quick())), outcome(prune(mlp, vectors, config=quick(seed=1)))

    def callback(record):
        inner.append(outcome(prune(mlp, vectors, config=quick(seed=1))))

    result = prune(mlp, vectors, config=quick(), callbacks=[callback])
    assert outcome(result) == expected
    assert all(each == other for each in inner)


def test_a_turn_goes_on_where_the_last_one_ended():
    torch.manual_seed(5)
    whole, turns = [float(torch.rand(())) for _ in range(4)], Turns(5, torch.device("cpu"))
    found = []
    for _ in range(4):
        torch.rand(3)
        before = torch.get_rng_state()
        with turns.turn():
            found.append(float(torch.rand(())))
        assert torch.equal(torch.get_rng_state(), before)
    assert found == whole


def test_a_one_shot_iterator_is_not_read_on(mlp, vectors):
    """After an interruption it stands somewhere; the steps to come would get other batches."""
    left = iter([False, True])

    def stop(record):
        if next(left, False):
            raise KeyboardInterrupt

    pruner, batches = SFPKPruner(mlp, config=quick(), callbacks=[stop]), iter(vectors * 3)
    with pytest.raises(KeyboardInterrupt):
        pruner.run(batches)
    with pytest.raises(
        ValueError, match="^loader: wanted the batches from the first one on.*pass a list, a DataLoader"
    ):
        pruner.run(batches)
    assert len(pruner.history) == 2
    assert pruner.run(iter(vectors * 3)).mask == prune(mlp, vectors, config=quick()).mask


def test_a_lock_that_nobody_inside_holds_is_not_waited_for(mlp, vectors):
    lock().acquire()  # and never released
    expected = prune(mlp, vectors, config=quick())
    (found,) = at_once(lambda: prune(mlp, vectors, config=quick()))
    assert found.mask == expected.mask
    assert prune(mlp, vectors, config=quick()).mask == expected.mask


def test_who_is_inside_is_told_by_the_whole_package():
    assert Path(turns._PACKAGE) == Path(sfpk_kernels.__file__).parent
