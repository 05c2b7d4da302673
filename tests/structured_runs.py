"""Models, batches and settings of short runs over channels, heads and neurons."""

import torch
from torch import nn

from sfpk_kernels import SFPKConfig
from sfpk_kernels.structure.cost import multiplications


def images(classes=4, count=6, size=8):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(8, 3, size, size, generator=generator), torch.randint(0, classes, (8,), generator=generator))
        for _ in range(count)
    ]


def structured(sparsity=0.5, **options):
    return SFPKConfig(sparsity, **{"granularity": "group", "budget": "macs", "n_steps": 12, **options})


def counted(model, x):
    """Parameters, and multiplications as torch counts them."""
    return sum(p.numel() for p in model.parameters()), multiplications(model, (x,))[1][""]


def mlp():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)
    )
