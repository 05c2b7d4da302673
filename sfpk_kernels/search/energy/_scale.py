"""The factor on fp16 losses that keeps small gradients from vanishing."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import state_checks as check

_FIRST = 2.0**16
_CALM = 1000  # passes without overflow before the factor is doubled


class LossScale:
    """A power of two, halved when a gradient overflows, doubled after many passes in which none did.

    Args:
        active: whether there is anything to scale; otherwise the factor is 1 for good.
    """

    def __init__(self, active: bool):
        self.active = active
        self.value = _FIRST if active else 1.0
        self.calm = 0
        self._before: float | None = None  # the factor before the tries of this pass

    def accepts(
        self,
        loss: Tensor,  # any shape, unscaled
        grads: Tensor,  # scaled, in place
    ) -> bool:
        """Unscale the gradients; False where they overflowed and the pass is worth another try at a lower factor.

        Where no factor helps, down to 1, it was not the factor: the next pass begins where this one did.
        """
        if not self.active:
            return True
        low, high = grads.aminmax()
        overflowed = not bool((low.abs() + high.abs()).isfinite())
        if overflowed and self.value > 1.0 and bool(loss.isfinite().all()):
            self._before = self._before or self.value
            self.value, self.calm = self.value / 2, 0
            return False
        grads.mul_(1.0 / self.value)
        if overflowed:
            self.value, self._before = self._before or self.value, None
            return True
        self._before = None
        self.calm += 1
        if self.calm >= _CALM:
            self.value, self.calm = self.value * 2, 0
        return True

    def state_dict(self) -> tuple[float, int]:
        """The factor, and passes since it changed."""
        return self.value, self.calm

    def checked(self, name: str, state: Any) -> tuple[float, int]:
        """What :meth:`state_dict` gave.

        Raises:
            TypeError, ValueError: something else.
        """
        pair = check.sequence(name, state, 2)
        factor, calm = check.real(f"{name}[0]", pair[0], 1.0), check.integer(f"{name}[1]", pair[1])
        if not self.active and (factor, calm) != (1.0, 0):
            raise ValueError(f"{name}: wanted (1.0, 0) where no loss is scaled, got ({factor:g}, {calm})")
        if math.frexp(factor)[0] != 0.5:
            raise ValueError(f"{name}[0]: wanted a power of two, got {factor!r}")
        return factor, calm

    def take_over(self, state: tuple[float, int]) -> None:
        """Go on from what was checked, with no pass under way."""
        (self.value, self.calm), self._before = state, None
