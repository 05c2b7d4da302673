"""What ``sfpk prune`` is tried with."""

import torch
from torch import nn

from .reach_nets import Bare, flat


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    batches = [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(6)]

    def eval_fn(net):
        return float((net[0].weight == 0).float().mean())

    return model, None, batches, eval_fn


def bare():
    """Parameters of the model itself: for --include."""
    torch.manual_seed(0)
    return Bare(), None, [flat() for _ in range(4)]


def without_eval():
    return small()[:3]


def wrong():
    return "model"


def broken():
    model, _, batches = without_eval()

    def loss_fn(net, batch):
        raise RuntimeError("the loss is broken")

    return model, loss_fn, batches


def needs_argument(path):
    return path


def bad_loss():
    model, _, batches = without_eval()
    return model, 3, batches


def empty():
    return (*without_eval()[:2], [])


def bad_eval():
    return *without_eval(), lambda net: "good"


def named_numbers():
    return *without_eval(), lambda net: {"zeros": torch.tensor(float((net[0].weight == 0).sum())), "one": 1}


def batchnorm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    batches = [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(6)]
    return model, None, batches, lambda net: float(net[1].running_mean.abs().sum())


def talks():
    print("hello from the task")

    def eval_fn(net):
        print("hello from eval_fn")
        return float("nan")

    return *without_eval(), eval_fn


def lost_worker():
    model, _, batches = without_eval()

    def loss_fn(net, batch):
        raise BrokenPipeError("a worker has died")

    return model, loss_fn, batches


def interrupted():
    raise KeyboardInterrupt


def fails_when_pruned():
    model, _, batches = without_eval()

    def eval_fn(net):
        if bool((net[0].weight == 0).any()):
            raise RuntimeError("the second evaluation fails")
        return 1

    return model, None, batches, eval_fn


NUMBER = 3
