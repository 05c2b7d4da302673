"""Distillation: the loss of a pruned model against the outputs of the dense one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..modeling.batches import forward
from ..modeling.state import guarded
from ..utils.arguments import check_positive
from .measured import tensor_of

Compare = Callable[[Tensor, Tensor], Tensor]
Dense = nn.Module | Callable[[Any], Any]

DISTANCES = ("kl", "mse", "cosine")


def check_dense(name: str, dense: Any, model: nn.Module) -> None:
    """That it is another model, with weights of its own.

    Raises:
        TypeError: no module.
        ValueError: it shares parameters with ``model``, and would change with it.
    """
    if not isinstance(dense, nn.Module):
        raise TypeError(f"{name}: wanted the dense model, an nn.Module, got {type(dense).__name__}")
    ours = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in ours for parameter in dense.parameters()):
        raise ValueError(f"{name}: wanted a model with weights of its own, got the one to change: copy.deepcopy(model)")


class Distillation:
    """``loss_fn(model, batch)`` that compares the model's output with the dense one's.

    Args:
        dense: the dense model, run in eval mode; or a function of a batch that gives its outputs.
        distance: ``"kl"``, τ²·KL(softmax(dense/τ) ‖ softmax(model/τ)) over the last dimension, the mean over all
            others (Hinton, Vinyals and Dean 2015, arXiv:1503.02531); ``"mse"``; ``"cosine"``, the mean of 1 - cos over
            the last dimension; or a function ``(output, dense_output) -> scalar``.
        temperature: τ, of ``"kl"``.

    Raises:
        TypeError, ValueError: another distance or temperature.
    """

    def __init__(self, dense: Dense, distance: str | Compare, temperature: float):
        if not callable(dense):
            raise TypeError(
                "distill: wanted the dense model, a function of a batch that gives its outputs, or None, got "
                f"{type(dense).__name__}"
            )
        if not callable(distance) and distance not in DISTANCES:
            raise ValueError(f"distance: wanted one of {', '.join(DISTANCES)} or a function, got {distance!r}")
        check_positive("temperature", temperature)
        self._dense, self._distance, self._temperature = dense, distance, float(temperature)

    def ready(self) -> AbstractContextManager[None]:
        """The dense model in eval mode; it is put back as it was at the end."""
        if isinstance(self._dense, nn.Module):
            return guarded(self._dense, bn="running", training=False)
        return nullcontext()

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Their distance on one batch; gradients go to ``model`` alone.

        Raises:
            TypeError: outputs without a tensor.
            ValueError: outputs of different shapes.
        """
        with torch.no_grad():
            found = forward(self._dense, batch) if isinstance(self._dense, nn.Module) else self._dense(batch)
            wanted = tensor_of(found).detach()
        output = tensor_of(forward(model, batch))
        if output.shape != wanted.shape:
            raise ValueError(f"distill: wanted outputs in shape {tuple(output.shape)}, got {tuple(wanted.shape)}")
        if callable(self._distance):
            return self._distance(output, wanted)
        if self._distance == "mse":
            return F.mse_loss(output, wanted)
        if self._distance == "cosine":
            return 1 - F.cosine_similarity(output, wanted, dim=-1).mean()
        classes = output.shape[-1]
        ours = F.log_softmax(output.reshape(-1, classes) / self._temperature, dim=-1)
        theirs = F.log_softmax(wanted.reshape(-1, classes) / self._temperature, dim=-1)
        return self._temperature**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
