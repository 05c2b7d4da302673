"""Particles one by one through the model itself: masked weights written where it reads, gradients where they stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..polarizer import Polarized
from ._problem import Problem
from ._scale import LossScale
from ._swap import stand_ins, swapped


class OneByOne:
    """One particle at a time.

    The model's prunable parameters are stood in for by views of one flat buffer, written anew for each particle; the
    backward pass adds into views of the gradient row. Nothing is copied layer by layer, unless the layers' dtypes
    differ.
    """

    name = "sequential"

    def __init__(self, problem: Problem, scale: LossScale):
        self.problem = problem
        self.scale = scale
        theta, dtypes = problem.theta, problem.dtypes
        dtype = dtypes[0] if len(set(dtypes)) == 1 else theta.dtype
        self._weights = torch.empty(1, theta.numel(), dtype=dtype, device=problem.device)
        # Particles elsewhere: their weights and gradient cross over whole.
        self._crosses = theta.device != problem.device
        pinned = self._crosses and problem.device.type == "cuda"
        self._staged = (
            torch.empty(1, theta.numel(), dtype=dtype, device=theta.device, pin_memory=pinned)
            if self._crosses
            else self._weights
        )
        self._row = torch.empty(theta.numel(), dtype=theta.dtype, device=problem.device) if self._crosses else None
        self._views = problem.coordinates.split(self._weights[0])
        self.leaves = [
            nn.Parameter(view if view.dtype == own else torch.empty_like(view, dtype=own))
            for view, own in zip(self._views, dtypes, strict=True)
        ]
        self._places = stand_ins(problem.model, problem.coordinates.by_parameter(problem.model, self.leaves))
        self._loss = torch.compile(problem.loss_fn) if problem.compiled else problem.loss_fn

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model with the stand-ins, for as many particles as wanted."""
        with swapped(self._places), torch.enable_grad():
            try:
                yield
            finally:
                for leaf in self.leaves:
                    leaf.grad = None

    def run(
        self,
        keep: Polarized,  # one particle
        batch: Any,
        grad: Tensor,  # (d,) where the particles are: receives ∂L/∂W
    ) -> Tensor:  # the loss, 0-d
        """Loss and weight gradient of one particle; only inside :meth:`ready`."""
        self.fill(keep)
        row = grad if self._row is None else self._row
        while True:
            loss = self.differentiate(batch, row)
            if self.scale.accepts(loss, row):
                break
        if row is not grad:
            grad.copy_(row)
        return loss

    @torch.no_grad()
    def fill(self, keep: Polarized) -> None:
        """Write P ⊙ θ into the weights the model reads."""
        keep.weights(self.problem.theta, out=self._staged, backend=self.problem.backend)
        self._publish()

    @torch.no_grad()
    def load_dense(self) -> None:
        """Write θ there."""
        self._staged.copy_(self.problem.theta)
        self._publish()

    def _publish(self) -> None:
        if self._crosses:
            self._weights.copy_(self._staged, non_blocking=True)
        for leaf, view in zip(self.leaves, self._views, strict=True):
            if leaf.dtype != view.dtype:
                leaf.copy_(view)

    def differentiate(self, batch: Any, row: Tensor) -> Tensor:
        """Forward and backward at the weights as they are; the gradient, times the loss scale, into ``row``."""
        problem = self.problem
        row.zero_()
        parts = problem.coordinates.split(row)
        for leaf, part in zip(self.leaves, parts, strict=True):
            leaf.grad = part if part.dtype == leaf.dtype else None
        total = self.accumulate(batch)
        with torch.no_grad():
            for leaf, part in zip(self.leaves, parts, strict=True):
                if part.dtype != leaf.dtype and leaf.grad is not None:
                    part.add_(leaf.grad)
        return total

    def accumulate(self, batch: Any) -> Tensor:
        """The loss; gradients of its micro-batches, times the loss scale, are added up in the leaves."""
        problem = self.problem
        total: Tensor | None = None
        for micro, share in problem.parts(batch):
            with problem.autocast():
                loss = problem.checked(self._loss, micro)
            if not loss.requires_grad:
                raise RuntimeError("loss_fn: wanted a loss that depends on the prunable weights, got a constant")
            factor = share * self.scale.value
            torch.autograd.backward(loss if factor == 1.0 else loss * factor, inputs=self.leaves)
            with torch.no_grad():
                loss = loss.detach() * share if share != 1.0 else loss.detach()
                total = loss if total is None else total + loss
        assert total is not None
        return total
