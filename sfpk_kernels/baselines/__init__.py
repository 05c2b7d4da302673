"""Baselines: ``name(model, sparsity)``, or ``name(model, loader, sparsity, loss_fn=None)`` for those that read data.

All return a :class:`~sfpk_kernels.MaskSet` of round((1 - sparsity)·d) weights and take the options of
:class:`~sfpk_kernels.Coordinates`. How the score of a method becomes a mask is an argument of its own,
``allocation=``, where the method leaves it open.
"""

from .force import force
from .grasp import grasp
from .magnitude import magnitude
from .random import random
from .snip import snip
from .sparsegpt import sparsegpt, sparsegpt_update_
from .ste import ste
from .synflow import synflow
from .wanda import wanda

__all__ = [
    "force", "grasp", "magnitude", "random", "snip", "sparsegpt", "sparsegpt_update_", "ste", "synflow", "wanda",
]  # fmt: skip
