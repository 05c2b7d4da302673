"""Re-estimate batch-norm statistics after pruning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..utils.arguments import check_loader, check_model
from .batches import forward, move_to
from .state import BATCH_NORMS

logger = logging.getLogger(__name__)

_NO_VARIANCE = "more than 1 value per channel"  # in torch's words


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
    as it is. Batches in which a batch-norm layer sees one value per channel, which has no variance, are left out
    (a last batch of one sample, empty ones), with a word in the log.

    Args:
        model: the pruned model.
        loader: batches; labels, if any, are not used.
        max_batches: use only the first ones; ``None`` for all.
        forward_fn: runs the model on a batch; by default ``model(x)`` for tensors and (x, …), ``model(**batch)`` for
            dicts and (dict, …).

    Raises:
        TypeError: no module, no iterable of batches, or batches of another kind.
        ValueError: an empty loader, nothing but batches of one sample, or ``max_batches`` below 1.
    """
    check_model(model)
    check_loader(loader)
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches: wanted ≥ 1 or None, got {max_batches}")
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None]
    if not norms:
        return model
    device = next(norms[0].buffers()).device
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    statistics = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    batches = left_out = 0
    finished = False
    try:
        for module, _ in modes:  # not by eval(): a model's own may merge adapters into weights
            module.training = False
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.training = True
        for batch in islice(loader, max_batches):
            before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
            batches += 1
            if _is_empty(batch):
                left_out += 1
                continue
            try:
                forward_fn(model, move_to(batch, device))
            except ValueError as error:
                if _NO_VARIANCE not in str(error):
                    raise
                left_out += 1
                _restore(norms, before)  # layers before that one have counted the batch
        if batches == 0:
            raise ValueError("loader: wanted batches, got an empty iterable")
        if batches == left_out:
            raise ValueError(
                f"loader: wanted batches of more than one sample, of which batch-norm takes a variance, got {batches} "
                "without: pass a larger batch_size"
            )
        if left_out:
            logger.warning(
                "recalibrate_batchnorm: %d of %d batches left out: batch-norm takes no variance of one sample or none",
                left_out, batches,
            )  # fmt: skip
        finished = True
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum, saved in zip(norms, momenta, statistics, strict=True):
            norm.momentum = momentum
            if not finished:
                _restore([norm], [saved])
    return model


def _is_empty(batch: Any) -> bool:
    """Whether there are no samples: batch-norm would take means of nothing, which are not numbers."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    return bool(tensors) and tensors[0].shape[0] == 0


def _restore(norms: list[Any], saved: list[list[Tensor]]) -> None:
    for norm, values in zip(norms, saved, strict=True):
        for buffer, value in zip(norm.buffers(), values, strict=True):
            buffer.copy_(value)
