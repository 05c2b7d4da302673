"""The factor on fp16 losses that keeps small gradients from vanishing."""

from __future__ import annotations

from torch import Tensor

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

    def accepts(
        self,
        loss: Tensor,  # any shape, unscaled
        grads: Tensor,  # scaled, in place
    ) -> bool:
        """Unscale the gradients; False where they overflowed and the pass is worth another try at a lower factor."""
        if not self.active:
            return True
        low, high = grads.aminmax()
        overflowed = not bool((low.abs() + high.abs()).isfinite())
        if overflowed and self.value > 1.0 and bool(loss.isfinite().all()):
            self.value, self.calm = self.value / 2, 0
            return False
        grads.mul_(1.0 / self.value)
        self.calm += 1
        if self.calm >= _CALM:
            self.value, self.calm = self.value * 2, 0
        return True
