"""One whole SFPK step, ours against Algorithm 3 as printed, in one run (pytest-benchmark)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfpk_kernels import SFPKConfig, SFPKPruner
from sfpk_kernels.demo.task import build_model
from sfpk_kernels.model_state import guarded
from sfpk_kernels.naive import naive_sfpk

N = 10


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def make_mlp():
    hidden = (nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


@pytest.fixture(params=["mlp", "demo-resnet"])
def task(request):
    torch.manual_seed(0)
    model = make_mlp() if request.param == "mlp" else build_model()
    batches = [(torch.randn(128, 1, 8, 8), torch.randint(10, (128,))) for _ in range(N)]
    config = SFPKConfig.preset("paper", sparsity=0.9, n_particles=N, n_steps=1)
    return model, batches, config


def naive_step(model, batches, config):
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    with guarded(model, bn="batch", dropout=False):
        return naive_sfpk(model, loss_fn, batches, names, sparsity=config.sparsity, n_particles=N, n_steps=1)


def our_step(model, batches, config):
    pruner = SFPKPruner(model, loss_fn, config)
    pruner.step(batches)
    return pruner


@pytest.mark.parametrize("provider", ["naive", "sfpk_kernels"])
def test_step(benchmark, task, provider):
    """Gate first: a provider that leaves the naive trajectory is not timed."""
    naive = naive_step(*task).trajectory[0]
    ours = our_step(*task).particles
    assert (ours - naive).norm() / naive.norm() < 1e-4
    step = naive_step if provider == "naive" else our_step
    benchmark.pedantic(step, args=task, rounds=7, warmup_rounds=2)
