"""Particles one by one, forward and backward replayed as a captured CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._problem import CannotRunError, Problem
from ._scale import LossScale
from .sequential import OneByOne

_WARM_UPS = 3  # outside the capture, so that libraries have chosen their algorithms


class Graphed(OneByOne):
    """As :class:`OneByOne`; every batch shape is captured once and replayed from then on.

    The graph reads the weights' buffer and a copy of the batch, and leaves loss and gradient in buffers of its own.
    """

    name = "cudagraph"

    def __init__(self, problem: Problem, scale: LossScale):
        if problem.device.type != "cuda":
            raise CannotRunError(f"CUDA graphs need a CUDA device, the model is on {problem.device}")
        super().__init__(problem, scale)
        # The gradient always crosses over: a graph cannot write a different row every time.
        if self._row is None:
            self._row = torch.empty_like(problem.theta)
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[Any], Tensor]] = {}

    def differentiate(self, batch: Any, row: Tensor) -> Tensor:
        """As :meth:`OneByOne.differentiate`, by replaying."""
        leaves, spec = pytree.tree_flatten(batch)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        rest = tuple(repr(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        shape = (str(spec), tuple((tuple(t.shape), t.dtype) for t in tensors), rest, self.scale.value)
        if shape not in self._captured:
            self._captured[shape] = self._capture(batch, row)
        graph, inputs, loss = self._captured[shape]
        for mine, given in zip(inputs, tensors, strict=True):
            mine.copy_(given, non_blocking=True)
        graph.replay()
        return loss.clone()

    def _capture(self, batch: Any, row: Tensor) -> tuple[torch.cuda.CUDAGraph, list[Any], Tensor]:
        own = pytree.tree_map_only(Tensor, torch.clone, batch)
        inputs = [leaf for leaf in pytree.tree_flatten(own)[0] if isinstance(leaf, Tensor)]
        stream = torch.cuda.Stream(self.problem.device)
        stream.wait_stream(torch.cuda.current_stream(self.problem.device))
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    super().differentiate(own, row)
            torch.cuda.current_stream(self.problem.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = super().differentiate(own, row)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize(self.problem.device)
            raise CannotRunError(f"the pass cannot be captured: {str(error).splitlines()[0]}") from error
        return graph, inputs, loss
