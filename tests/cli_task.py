"""What ``sfpk prune`` is tried with."""

import torch
from torch import nn


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    batches = [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(6)]

    def eval_fn(net):
        return float((net[0].weight == 0).float().mean())

    return model, None, batches, eval_fn


def without_eval():
    return small()[:3]


def wrong():
    return "model"


def broken():
    model, _, batches = without_eval()

    def loss_fn(net, batch):
        raise RuntimeError("the loss is broken")

    return model, loss_fn, batches


def interrupted():
    raise KeyboardInterrupt


NUMBER = 3
