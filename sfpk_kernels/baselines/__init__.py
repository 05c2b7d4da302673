"""Baselines: ``name(model, sparsity)``, or ``name(model, loader, sparsity, loss_fn=None)`` for those that read data.

All return a :class:`~sfpk_kernels.MaskSet` of round((1 - sparsity)·d) weights and take the options of
:class:`~sfpk_kernels.Coordinates`.
"""

from .magnitude import magnitude
from .snip import snip

__all__ = ["magnitude", "snip"]
