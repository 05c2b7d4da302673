"""Wrappers around a model that put a prefix before its names."""

import torch
from torch import nn


def compiled(model):
    return torch.compile(model, backend="eager")


def parallel(model):
    wrapped = nn.DataParallel(model)
    wrapped.device_ids = []  # as on a machine without GPUs
    return wrapped.cpu()


WRAPPERS = [compiled, parallel, lambda model: parallel(compiled(model))]
