"""Models and batches that measuring, or one way of computing energies, cannot take: slower, never stopped."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sfpk_kernels import Execution, plan, prune

from .settings import both, population
from .snapshot import Snapshot

ROWS = torch.Generator().manual_seed(1)
VECTORS = [(torch.randn(16, 8, generator=ROWS), torch.randint(4, (16,), generator=ROWS)) for _ in range(4)]
TOKENS = [(torch.randint(20, (16, 5), generator=ROWS), torch.randint(4, (16,), generator=ROWS)) for _ in range(4)]


def quick(**overrides):
    return population(0.6, **{"n_particles": 3, "n_steps": 4, **overrides})


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.outer, self.reentrant = nn.Linear(8, 16), nn.Linear(16, 4), reentrant

    def forward(self, x):
        x = x.clone().requires_grad_()  # reentrant ones want an input with a gradient
        return self.outer(checkpoint(lambda y: self.inner(y).relu(), x, use_reentrant=self.reentrant))


class Bag(nn.Module):
    """Gradients of the table are sparse."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.table(x).mean(1))


class LazyBuffer(nn.Module):
    """Makes a buffer of the size of its first input, and another one when that changes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.register_buffer("positions", None, persistent=False)

    def forward(self, x):
        if self.positions is None or len(self.positions) != len(x):
            self.positions = torch.arange(len(x), dtype=x.dtype, device=x.device)[:, None] * 1e-3
        return self.linear(x + self.positions)


class Memo(nn.Module):
    """Keeps something of its forward pass in an attribute, as auxiliary losses do."""

    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(8, 4), None

    def forward(self, x):
        self.last = self.linear(x)
        return self.last * (1 if float(self.last.detach().abs().max()) < 1e9 else 0)  # a branch on values


def quantization_aware():
    """Freshly prepared: its observers have seen nothing, and begin with empty buffers."""
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).train()
    model.qconfig = get_default_qat_qconfig("x86")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare_qat(model)


MODELS = {
    "checkpoint": (lambda: Checkpointed(False), VECTORS),
    "reentrant checkpoint": (lambda: Checkpointed(True), VECTORS),
    "sparse gradients": (Bag, TOKENS),
    "lazy buffer": (LazyBuffer, VECTORS),
    "branch and memo": (Memo, VECTORS),
    "quantization aware": (quantization_aware, VECTORS),
}


@pytest.mark.parametrize("options", [{}, {"update": "gauss_seidel"}, {"microbatch": 8}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_auto_prunes_it_as_one_by_one_does(name, options):
    make, batches = MODELS[name]
    torch.manual_seed(0)
    model = make()
    twin, before = copy.deepcopy(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto = prune(model, batches, **both(quick, **options), include_embeddings=name == "sparse gradients")
        alone = prune(
            twin,
            batches,
            **both(quick, energy_mode="sequential", **options),
            include_embeddings=name == "sparse gradients",
        )
    assert auto.mask.kept == alone.mask.kept == round(0.4 * auto.mask.prunable)
    assert auto.history[0].energies == pytest.approx(alone.history[0].energies, rel=1e-4)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    auto.apply_(model)


def jagged(sizes):
    return torch.nested.nested_tensor([torch.randn(size, 8) for size in sizes], layout=torch.jagged)


def of_values(model, batch):
    return F.cross_entropy(model(batch[0]).values(), batch[1])


@pytest.mark.parametrize("same", [True, False])
def test_jagged_batches(same):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        batches = [(jagged((3, 5) if same else (3 + i, 5 - i)), torch.randint(4, (8,))) for i in range(3)]
        model = nn.Linear(8, 4)
        before = Snapshot(model)
        auto = prune(model, batches, loss_fn=of_values, config=quick())
        alone = prune(model, batches, loss_fn=of_values, config=quick(), execution=Execution(energy_mode="sequential"))
        assert str(plan(model, batches, loss_fn=of_values, config=quick()))
    before.check()
    assert auto.mask == alone.mask
