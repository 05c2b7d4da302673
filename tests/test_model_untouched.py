"""No run damages a model: modules under several names, train() of a model's own, memory shared by weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfpk_kernels import (
    Coordinates,
    Execution,
    GradualPruner,
    RetrainConfig,
    baselines,
    default_loss,
    export,
    plan,
    prune,
    recalibrate_batchnorm,
)

from .settings import population
from .snapshot import Snapshot


def quick(**options):
    return population(0.5, **{"n_particles": 3, "n_steps": 4, **options})


def repeated():
    """The same layer three times."""
    return nn.Sequential(nn.Linear(8, 8), *[nn.Linear(8, 8)] * 3, nn.Linear(8, 4))


class Beside(nn.Module):
    """A network kept whole beside its parts."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4))
        self.first, self.norm, self.head = self.net
        self.layers = nn.ModuleList(self.net)
        self.named = nn.ModuleDict({"first": self.first})

    def forward(self, x):
        return self.head(F.relu(self.norm(self.first(x))))


class Tied(nn.Module):
    """One parameter in two modules, and one of the modules twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.b.weight = self.a.weight
        self.again = self.b

    def forward(self, x):
        return self.out(torch.tanh(self.again(torch.tanh(self.a(x)) + self.b(x))))


class OwnSetattr(nn.Module):
    """Notices what is assigned to it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 4)
        self.same = self.inner

    def __setattr__(self, name, value):
        super().__setattr__(name, value)

    def forward(self, x):
        return self.same(x)


class Merging(nn.Linear):
    """Folds its adapter into the weight on eval() and takes it out on train()."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a)
            self.merged = not mode
        return self

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + (0 if self.merged else x @ self.a.T @ self.b.T)


class Freezing(nn.Sequential):
    """Switches gradients of its first stage off on train(), as backbones do."""

    def train(self, mode=True):
        super().train(mode)
        self[0].eval()
        for parameter in self[0].parameters():
            parameter.requires_grad_(not mode)
        return self


def merging():
    return nn.Sequential(Merging(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4))


def freezing():
    return Freezing(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4))


MODELS = [repeated, Beside, Tied, OwnSetattr, merging, freezing]


def everything(model, batches, tmp_path):
    """All that runs a model without being meant to change it."""
    for mode in ("auto", "vmap", "sequential"):
        prune(model, batches, config=quick(), execution=Execution(energy_mode=mode))
    prune(model, batches, config=quick(update="gauss_seidel"))
    prune(model, batches, config=quick(model_mode="train"))
    plan(model, batches, config=quick())
    baselines.snip(model, batches, 0.5, loss_fn=default_loss)
    baselines.magnitude(model, 0.5)
    export(model, tmp_path / "model.safetensors", example=batches[0])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", MODELS)
def test_everything_leaves_it_as_it_was(make, training, vectors, tmp_path):
    model = make()
    model.train(training)
    tables = {id(m): dict(m._parameters) for m in model.modules()}
    snapshot = Snapshot(model)
    everything(model, vectors[:4], tmp_path)
    snapshot.check()
    for module in model.modules():
        assert module._parameters == tables[id(module)]
        assert all(p is None or isinstance(p, nn.Parameter) for p in module._parameters.values())


@pytest.mark.parametrize("make", MODELS[:4])
def test_every_way_of_computing_energies_agrees(make, vectors):
    model = make()
    runs = [
        prune(model, vectors, config=quick(), execution=Execution(energy_mode=mode)) for mode in ("vmap", "sequential")
    ]
    for one, other in zip(*(run.history for run in runs), strict=True):
        assert one.energies == pytest.approx(other.energies, rel=1e-4)
    torch.testing.assert_close(runs[0].particles, runs[1].particles, rtol=0, atol=1e-3)


def test_an_error_inside_vmap_leaves_it_as_it_was(vectors):
    model, calls = repeated(), []

    def loss_fn(model, batch):
        calls.append(None)
        if len(calls) > 6:
            raise ValueError("late")
        return default_loss(model, batch)

    snapshot = Snapshot(model)
    with pytest.raises((ValueError, RuntimeError)):
        prune(model, vectors, loss_fn=loss_fn, config=quick(), execution=Execution(energy_mode="vmap"))
    snapshot.check()


def test_energies_are_those_of_the_model(vectors):
    """With its adapter, though eval() was never called."""
    model = merging().train()
    dense = copy.deepcopy(model)
    result = prune(model, vectors[:1], config=population(1e-6, n_particles=1, n_steps=1, bn="running"))
    for module in dense.modules():
        module.training = False
    assert result.history[0].energy == pytest.approx(float(default_loss(dense, vectors[0])), rel=1e-5)


def test_recalibration_calls_no_eval(vectors):
    model = merging().train()
    before = model[0].weight.detach().clone()
    recalibrate_batchnorm(model, vectors)
    assert torch.equal(model[0].weight, before)
    assert not model[0].merged
    assert model.training


def test_gradual_pruning_of_a_shared_module(vectors):
    model = repeated()
    shared = model[1]
    pruner = GradualPruner(model, vectors, config=quick(), shots=2, retrain=RetrainConfig(epochs=1))
    result = pruner.run()
    assert model[2] is shared
    assert isinstance(shared.weight, nn.Parameter)
    assert int((shared.weight == 0).sum()) >= shared.weight.numel() - result.mask["1.weight"].sum()


def by_memory():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
    model[2].weight.data = model[0].weight.data
    return model


@pytest.mark.parametrize("mode", ["vmap", "sequential"])
def test_one_memory_counts_once(mode, vectors):
    model, tied = by_memory(), by_memory()
    tied.load_state_dict(model.state_dict())
    tied[2].weight = tied[0].weight
    coordinates = Coordinates(model)
    assert [(t.name, t.aliases) for t in coordinates.tensors] == [("0.weight", ("2.weight",)), ("3.weight", ())]
    result, expected = (prune(m, vectors, config=quick(), execution=Execution(energy_mode=mode)) for m in (model, tied))
    assert result.mask == expected.mask
    assert torch.equal(result.particles, expected.particles)
    result.mask.apply_(model)
    assert torch.equal(model[0].weight, model[2].weight)
    assert int(model[0].weight.count_nonzero() + model[3].weight.count_nonzero()) == result.mask.kept


def transposed():
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8), nn.Linear(8, 4))
    model[2].weight = nn.Parameter(model[0].weight.detach().t())
    return model


def overlapping():
    model, memory = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(80)
    model[0].weight.data, model[1].weight.data = memory[:64].view(8, 8), memory[48:].view(4, 8)
    return model


def with_a_buffer():
    model = nn.Sequential(nn.Linear(8, 4))
    model.register_buffer("copy", model[0].weight.data[1:])
    return model


@pytest.mark.parametrize("make", [transposed, overlapping, with_a_buffer])
def test_other_shared_memory_is_refused_by_name(make):
    with pytest.raises(ValueError, match=r"memory of its own, got .*weight.* which overlap: tie whole"):
        Coordinates(make())


def test_interleaved_weights_do_not_overlap():
    """Columns of one matrix, and neighbours in one buffer."""
    memory = torch.randn(4, 16)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 4), nn.Linear(8, 4))
    model[0].weight.data, model[1].weight.data = memory[:, :8], memory[:, 8:]
    assert len(Coordinates(model).tensors) == 3


@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("where", ["batch", "buffer"])
def test_sparse_tensors(layout, where):
    """A graph's adjacency; what measures and fingerprints copes."""
    dense = (torch.rand(16, 16) > 0.7).float()
    adjacency = dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()

    class Graph(nn.Module):
        def __init__(self, own):
            super().__init__()
            self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 4)
            self.register_buffer("adjacency", own)

        def forward(self, x, given=None):
            adjacency = self.adjacency if given is None else given
            return adjacency @ self.b(F.relu(adjacency @ self.a(x)))

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0], *batch[2:]), batch[1])

    model = Graph(adjacency if where == "buffer" else None)
    batch = (torch.randn(16, 8), torch.randint(4, (16,)))
    batches = [batch if where == "buffer" else (*batch, adjacency)] * 4
    for mode in ("auto", "sequential"):
        result = prune(model, batches, loss_fn=loss_fn, config=quick(), execution=Execution(energy_mode=mode))
        assert result.mask.kept == 72
