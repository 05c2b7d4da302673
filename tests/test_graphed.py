"""Energies by CUDA graphs: on the CPU through stand-ins for torch.cuda, and on GPUs where there are some."""

import logging
from unittest import mock

import pytest
import torch
from torch import nn

from sfpk_kernels import Coordinates, Execution, default_loss, prune
from sfpk_kernels.modeling.state import guarded
from sfpk_kernels.search.energy import Choice, ParticleEnergy, capture, choice, graphed

from .fake_graphs import DEVICE, Machine
from .settings import population
from .snapshot import Snapshot

N = 4
FAILURES = {
    "begin": "no capture may begin",
    "body": "not permitted while capturing",
    "end": "the capture was invalidated",
}


def energy_of(model, mode, decided=None, loss_fn=default_loss):
    coordinates = Coordinates(model)
    energy = ParticleEnergy(model, loss_fn, coordinates, coordinates.flatten(model), mode=mode)
    if decided:
        energy.choice = Choice(decided, "the trial")
    return energy


def keep_of(energy, n=N):
    return torch.rand(n, energy.problem.theta.numel(), generator=torch.Generator().manual_seed(1)) > 0.3


def run(model, batches, mode, decided=None, dropout=False, **options):
    energy = energy_of(model, mode, decided, **options)
    torch.manual_seed(5)
    with guarded(model, bn="batch", training=dropout):
        losses, grads = energy(keep_of(energy, len(batches)), batches)
    return losses, grads.clone(), energy


def same(one, other):
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.fixture
def on_cuda_1(monkeypatch):
    """The model counts as one on cuda:1 where graphs are concerned."""
    real = capture.captured
    monkeypatch.setattr(graphed, "captured", lambda once, row, model, device: real(once, row, model, DEVICE))


def test_every_particle_gets_its_own_gradient(convnet, images, on_cuda_1):
    ragged = [images[0], images[1], (images[2][0][:9], images[2][1][:9]), images[3]]
    expected = run(convnet, ragged, "sequential")
    snapshot = Snapshot(convnet)
    with Machine().installed() as machine:
        found = run(convnet, ragged, "cudagraph")
    assert same(found, expected)
    snapshot.check()
    assert machine.captures == 2, "once per shape"
    assert len({row.sum().item() for row in found[1]}) == N


def test_streams_and_devices(mlp, vectors, on_cuda_1):
    with Machine().installed() as machine:
        run(mlp, vectors[:2], "cudagraph")
    places = {event[0]: event for event in machine.events}
    assert places["capture"] == ("capture", "cuda:1", "thread_local", "cuda:1")
    assert places["stream"] == ("stream", "cuda:1", "cuda:1"), "a stream of its own, of the model's device"
    kinds = [event[:2] for event in machine.events if event[0] in ("wait", "capture")]
    assert kinds == [("wait", "side"), ("wait", "main"), ("capture", "cuda:1")]
    assert machine.device == torch.device("cuda:0"), "the caller's device is current again"
    assert machine.streams == {"cuda:0": "main 0", "cuda:1": "main 1"}


def test_random_numbers_and_buffers_are_as_if_nothing_was_tried(images, on_cuda_1):
    """Warm-ups draw and write; the pass that counts must not notice."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Flatten(), nn.Linear(96, 4))
    model.register_buffer("calls", torch.zeros(()))
    model[0].register_forward_pre_hook(lambda *arguments: model.calls.add_(1) and None)
    with Machine().installed():
        energy = energy_of(model, "cudagraph")
        with guarded(model, bn="running", training=True):
            torch.manual_seed(5)
            before = torch.get_rng_state()
            with energy.one_by_one():
                calls = model.calls.clone()
                energy._inside._capture(images[0])
            assert torch.equal(torch.get_rng_state(), before)
            assert torch.equal(model.calls, calls)
    for dropout in (False, True):
        expected = run(model, images[:3], "sequential", dropout=dropout)
        with Machine().installed():
            assert same(run(model, images[:3], "cudagraph", dropout=dropout), expected)


@pytest.mark.parametrize("fails", FAILURES)
def test_a_failed_capture_leaves_no_trace(mlp, vectors, fails, on_cuda_1):
    snapshot = Snapshot(mlp)
    with Machine(fails).installed() as machine:
        with pytest.raises(RuntimeError, match=f"'cudagraph' cannot run this model: .*{FAILURES[fails]}$"):
            run(mlp, vectors[:2], "cudagraph")
        assert machine.streams == {"cuda:0": "main 0", "cuda:1": "main 1"}
        assert machine.generator == "a clone", "one that never entered the capture"
        assert {"reset", "synchronize"} <= {event[0] for event in machine.events}
    snapshot.check()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("fails", FAILURES)
@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_capture_that_fails_on_the_way_falls_back(convnet, images, fails, good, error, caplog, on_cuda_1):
    """Also in the middle of a step, for a shape of batch that comes late."""
    ragged = [images[0], (images[1][0][:9], images[1][1][:9]), images[2], (images[3][0][:5], images[3][1][:5])]
    expected = run(convnet, ragged, "sequential")
    snapshot = Snapshot(convnet)
    with Machine(fails, good=good, error=error).installed(), caplog.at_level(logging.WARNING, "sfpk_kernels"):
        losses, grads, energy = run(convnet, ragged, "auto", decided="cudagraph")
        assert same((losses, grads), expected)
        snapshot.check()
        assert energy.mode == "sequential"
        assert FAILURES[fails] in energy.choice.reason
        with guarded(convnet, bn="batch", training=False):
            again = energy(keep_of(energy), ragged)
    assert same(again, expected), "and the steps after it"
    snapshot.check()
    said = [record for record in caplog.records if "without CUDA graphs from now on" in record.getMessage()]
    assert len(said) == 1


def test_an_empty_graph_is_refused(mlp, vectors, on_cuda_1):
    expected = run(mlp, vectors[:3], "sequential")
    with Machine(empty=True).installed():
        with pytest.raises(RuntimeError, match="the captured graph is empty: the pass runs on another device"):
            run(mlp, vectors[:3], "cudagraph")
        assert same(run(mlp, vectors[:3], "auto", decided="cudagraph"), expected)


def test_errors_of_the_model_are_the_models(mlp, vectors, on_cuda_1):
    def loss_fn(model, batch):
        raise ZeroDivisionError("of the loss itself")

    with Machine().installed() as machine, pytest.raises(ZeroDivisionError, match="of the loss itself"):
        run(mlp, vectors[:2], "auto", decided="cudagraph", loss_fn=loss_fn)
    assert machine.captures == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_is_no_matter_of_capturing_passes_through(mlp, vectors, error, on_cuda_1):
    with Machine("end", error=error).installed() as machine, pytest.raises(error):
        run(mlp, vectors[:2], "auto", decided="cudagraph")
    assert machine.streams["cuda:1"] == "main 1"


def test_a_model_that_replaces_its_buffers_is_not_captured(vectors, on_cuda_1):
    """A graph would go on writing the old ones."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 4)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen = self.seen + 1
            return self.inner(x)

    model = Counts()
    with (
        Machine().installed(),
        pytest.raises(RuntimeError, match="the model replaces its buffer seen"),
    ):
        run(model, vectors[:2], "cudagraph")


@pytest.mark.parametrize("draw", ["torch", "random", "numpy"])
def test_a_pass_that_draws_on_the_host_is_not_captured(mlp, vectors, draw, on_cuda_1):
    """A graph would repeat what was drawn once."""
    import random

    import numpy as np

    draws = {"torch": lambda: float(torch.rand(())), "random": random.random, "numpy": np.random.rand}

    def loss_fn(model, batch):
        return default_loss(model, batch) * (1 + draws[draw]())

    before = torch.get_rng_state(), random.getstate()
    with Machine(dropout_on_device=False).installed(), guarded(mlp, bn="batch", training=False):
        energy = energy_of(mlp, "cudagraph", loss_fn=loss_fn)
        with pytest.raises(RuntimeError, match="it draws random numbers on the host"):
            energy(keep_of(energy, 2), vectors[:2])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("extra", [{"a": 1}.keys(), object()], ids=["view", "object"])
def test_batches_that_a_graph_would_freeze_are_not_captured(mlp, vectors, extra, on_cuda_1):
    batches = [(x, y, extra) for x, y in vectors[:2]]
    with Machine().installed(), pytest.raises(RuntimeError, match="something else than tensors and plain values"):
        run(mlp, batches, "cudagraph", loss_fn=lambda model, batch: default_loss(model, batch[:2]))


def test_the_first_error_counts(mlp, vectors, on_cuda_1):
    """An interruption inside a capture whose end complains, too."""
    calls = []

    def loss_fn(model, batch):
        calls.append(None)
        if len(calls) > 3:  # after the warm-ups
            raise KeyboardInterrupt
        return default_loss(model, batch)

    with Machine("end also").installed() as machine, pytest.raises(KeyboardInterrupt):
        run(mlp, vectors[:2], "auto", decided="cudagraph", loss_fn=loss_fn)
    assert machine.streams["cuda:1"] == "main 1"


def test_not_more_shapes_than_memory_is_for(mlp, on_cuda_1):
    batches = [(torch.randn(k + 2, 8), torch.randint(4, (k + 2,))) for k in range(10)]
    expected = run(mlp, batches, "sequential")
    with Machine().installed() as machine:
        with pytest.raises(RuntimeError, match="batches of more than 8 shapes"):
            run(mlp, batches, "cudagraph")
        assert machine.captures == 8
        assert same(run(mlp, batches, "auto", decided="cudagraph"), expected)


@pytest.mark.parametrize("error", [RuntimeError("boom"), TypeError("boom"), torch.OutOfMemoryError("boom")])
@pytest.mark.parametrize("way", ["_time_batched"])
def test_a_trial_may_raise_whatever_it_likes(mlp, vectors, error, way):
    with mock.patch.object(choice, way, side_effect=error):
        config = population(0.8, n_particles=3, n_steps=3)
        result = prune(mlp, vectors, config=config, execution=Execution(energy_mode="timed"))
        assert result.plan.choice.mode == "sequential"
        assert "boom" in result.plan.choice.reason
        with pytest.raises(type(error), match="boom"):
            prune(mlp, vectors, config=config, execution=Execution(energy_mode="vmap"))
        # By the rule it is vmap, too: what the model cannot do decides again and again, what is free just now must not.
        if isinstance(error, torch.OutOfMemoryError):
            with pytest.raises(torch.OutOfMemoryError, match="boom") as caught:
                prune(mlp, vectors, config=config)
            if hasattr(error, "add_note"):  # Python ≥ 3.11
                assert any("energy_mode='sequential'" in note for note in caught.value.__notes__)
        else:
            assert prune(mlp, vectors, config=config).plan.choice.mode == "sequential"


@pytest.mark.gpu
def test_graphs_on_a_gpu(convnet, images):
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        model = convnet.to(device)
        batches = [(x.to(device), y.to(device)) for x, y in images[:N]]
        expected, found = run(model, batches, "sequential"), run(model, batches, "cudagraph")
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-5)
        assert len({row.sum().item() for row in found[1]}) == N


@pytest.mark.gpu
def test_after_a_failed_capture_on_a_gpu(mlp, vectors):
    """Dropout draws, streams are as before, and the run goes on one by one."""

    def loss_fn(model, batch):
        loss = default_loss(model, batch)
        return loss if loss.item() >= 0 else -loss  # a read: not permitted while capturing

    model = nn.Sequential(mlp, nn.Dropout(0.5)).cuda()
    batches = [(x.cuda(), y.cuda()) for x, y in vectors[:N]]
    stream = torch.cuda.current_stream()
    _, grads, energy = run(model, batches, "auto", decided="cudagraph", dropout=True, loss_fn=loss_fn)
    assert energy.mode == "sequential"
    assert torch.cuda.current_stream() == stream
    assert torch.isfinite(grads).all()
    a, b = (nn.functional.dropout(torch.ones(1000, device="cuda")) for _ in range(2))
    assert not torch.equal(a, b)
