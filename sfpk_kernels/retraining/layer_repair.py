"""One layer repaired: the way from its masked weights to the solution, and how far it is gone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

from ..masks.maskset import MaskSet
from ..modeling.layers import Layer
from .layer_moments import names_in, own_bias
from .least_squares import LeastSquares

_STEPS = (1.0, 0.5, 0.25)


@dataclasses.dataclass(frozen=True)
class LayerRepair:
    """What became of one layer."""

    name: str  # of its weight
    step: float  # share of the way to the solution that was taken: 1, ½ or ¼; 0 where it was rejected
    error_before: float  # mean of ‖output - dense output‖² on the calibration batches, as a share of the variance
    error_after: float  # of the dense output
    loss: float  # of the guard, with the layer as it is now; nan without a guard

    @property
    def kept(self) -> bool:
        """Whether the change was kept."""
        return self.step > 0


class Way:
    """From the masked weights and bias of a layer to those of least squares; written into the layer as it is gone."""

    @torch.no_grad()
    def __init__(self, layer: Layer, mask: MaskSet, problem: LeastSquares, damping: float, iterations: int):
        weight = layer.modules[0].weight
        assert isinstance(weight, nn.Parameter)
        self._layer, self._weight, self._bias, self._problem = layer, weight, own_bias(layer), problem
        self._name = names_in(mask, layer.tensor)[0]
        keep = layer.matrices(mask[self._name].to(weight.device))
        self._old = layer.matrices(weight).to(torch.promote_types(weight.dtype, torch.float32)).clone()
        self._new = problem.solve(self._old, keep, damping, iterations)
        self._old_bias = None if self._bias is None else self._bias.detach().double().clone()
        self._new_bias = None if self._bias is None else problem.bias(self._new).view(-1)

    @torch.no_grad()
    def go(self, step: float) -> None:
        """To a share of it; removed weights are 0 at both ends."""
        new = torch.lerp(self._old, self._new, step) if step else self._old  # the solution may be no number
        self._weight.copy_(self._layer.weight(new))
        if self._bias is not None and self._old_bias is not None and self._new_bias is not None:
            self._bias.copy_(torch.lerp(self._old_bias, self._new_bias, step) if step else self._old_bias)

    @torch.no_grad()
    def error(self) -> float:
        """Of the layer as it is, on the calibration batches."""
        bias = None if self._bias is None else self._bias.view(self._layer.groups, -1)
        return self._problem.error(self._layer.matrices(self._weight), bias)

    def walked(self, judge: Callable[[], float] | None, loss: float) -> LayerRepair:
        """As far as the judge finds best, of all that is below ``loss``; without one all of it."""
        before, taken = self.error(), 0.0
        if not bool(self._new.isfinite().all()):
            loss = loss if judge is not None else math.nan
        elif judge is None:
            loss, taken = math.nan, 1.0
        else:
            for step in _STEPS:
                self.go(step)
                try:
                    found = judge()
                except FloatingPointError:
                    continue
                if found < loss:
                    loss, taken = found, step
        self.go(taken)
        return LayerRepair(self._name, taken, before, self.error(), loss)
