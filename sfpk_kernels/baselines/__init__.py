"""Baselines: ``name(model, sparsity)``, or ``name(model, loader, sparsity, loss_fn=None)`` for those that read data.

All return a :class:`~sfpk_kernels.MaskSet` of round((1 - sparsity)·d) weights and take the options of
:class:`~sfpk_kernels.Coordinates`. How the score of a method becomes a mask is an argument of its own,
``allocation=``, where the method leaves it open.
"""

from .magnitude import magnitude
from .random import random
from .snip import snip
from .ste import ste

__all__ = ["magnitude", "random", "snip", "ste"]
