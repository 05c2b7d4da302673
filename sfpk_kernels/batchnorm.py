"""Re-estimate batch-norm statistics after pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn

from .batches import forward, move_to
from .model_state import BATCH_NORMS


@torch.no_grad()
def recalibrate_batchnorm(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    max_batches: int | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward,
) -> nn.Module:
    """Set the running statistics of every batch-norm layer to their plain average over ``loader``, in place.

    Removing weights shifts activations, and one-shot pruned networks with stale statistics lose much of their
    accuracy. Unlike ``torch.optim.swa_utils.update_bn`` dropout stays off, dict batches work, and an error
    leaves the old statistics in place. Modes and momenta are as before; a model without batch-norm is returned
    as it is.

    Args:
        model: the pruned model.
        loader: batches; labels, if any, are not used.
        max_batches: use only the first ones; ``None`` for all.
        forward_fn: runs the model on a batch; by default ``model(x)`` for (x, …), ``model(**batch)`` for dicts.

    Raises:
        ValueError: an empty loader, or ``max_batches`` below 1.
    """
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches: wanted ≥ 1 or None, got {max_batches}")
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None]
    if not norms:
        return model
    device = next(norms[0].buffers()).device
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    statistics = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    batches = 0
    finished = False
    try:
        for module, _ in modes:  # not by eval(): a model's own may merge adapters into weights
            module.training = False
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.training = True
        for batch in islice(loader, max_batches):
            forward_fn(model, move_to(batch, device))
            batches += 1
        if batches == 0:
            raise ValueError("loader: wanted batches, got an empty iterable")
        finished = True
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum, saved in zip(norms, momenta, statistics, strict=True):
            norm.momentum = momentum
            if not finished:
                for buffer, value in zip(norm.buffers(), saved, strict=True):
                    buffer.copy_(value)
    return model
