"""Baselines with one signature: ``(model, loss_fn, loader, sparsity) -> MaskSet``."""

from .magnitude import magnitude
from .snip import snip

__all__ = ["magnitude", "snip"]
