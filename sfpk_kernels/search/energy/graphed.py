"""Particles one by one, forward and backward replayed as a captured CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._problem import CannotRunError, Problem
from ._scale import LossScale
from .capture import captured
from .sequential import OneByOne

_PLAIN = (bool, int, float, str, bytes, type(None))
_MOST_SHAPES = 8  # each graph keeps the memory of a whole pass


class Graphed(OneByOne):
    """As :class:`OneByOne`; every batch shape is captured once and replayed from then on.

    The graph reads the weights' buffer and a copy of the batch, and leaves loss and gradient in buffers of its own.
    """

    name = "cudagraph"

    def __init__(self, problem: Problem, scale: LossScale):
        why_not = _why_not(problem.device)
        if why_not:
            raise CannotRunError(why_not)
        super().__init__(problem, scale)
        # The gradient always crosses over: a graph cannot write a different row every time.
        if self._row is None:
            self._row = torch.empty_like(problem.theta)
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[Any], Tensor]] = {}
        self._scaled_by = scale.value  # the factor on losses that the graphs have

    def differentiate(self, batch: Any, row: Tensor) -> Tensor:
        """As :meth:`OneByOne.differentiate`, by replaying.

        Raises:
            CannotRunError: the pass cannot be captured for this shape of batch, or there are too many shapes.
        """
        assert self._row is not None
        leaves, spec = pytree.tree_flatten(batch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        rest = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        # What a graph would keep from its first batch must be part of what it is known by.
        frozen = next((leaf for leaf in rest if not isinstance(leaf, _PLAIN)), None)
        if frozen is not None:
            raise CannotRunError(f"a batch with something else than tensors and plain values: {type(frozen).__name__}")
        if any(tensor.device != self.problem.device for tensor in tensors):
            raise CannotRunError(f"a batch with tensors that are not on {self.problem.device}")
        shape = (str(spec), tuple((tuple(t.shape), t.stride(), t.dtype) for t in tensors), repr(rest))
        if self._scaled_by != self.scale.value:
            self._captured.clear()
            self._scaled_by = self.scale.value
        if shape not in self._captured:
            if len(self._captured) == _MOST_SHAPES:
                raise CannotRunError(f"batches of more than {_MOST_SHAPES} shapes: each graph takes memory of its own")
            self._captured[shape] = self._capture(batch)
        graph, inputs, loss = self._captured[shape]
        with torch.cuda.device(self.problem.device):
            for mine, given in zip(inputs, tensors, strict=True):
                mine.copy_(given, non_blocking=True)
            graph.replay()
            if row is not self._row:  # a trial's
                row.copy_(self._row)
            return loss.clone()

    def _capture(self, batch: Any) -> tuple[torch.cuda.CUDAGraph, list[Any], Tensor]:
        row, problem = self._row, self.problem
        assert row is not None
        own = pytree.tree_map_only(Tensor, torch.clone, batch)
        inputs = [leaf for leaf in pytree.tree_flatten(own)[0] if isinstance(leaf, Tensor)]
        once = super().differentiate
        graph, loss = captured(lambda: once(own, row), row, problem.model, problem.device)
        return graph, inputs, loss


def _why_not(device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"CUDA graphs need a CUDA device, the model is on {device}"
