"""Baselines: ``name(model, sparsity)``, or ``name(model, loader, sparsity, loss_fn=None)`` for those that read data.

All return a :class:`~sfpk_kernels.MaskSet` of round((1 - sparsity)·d) weights, unless they say that they count
otherwise, and take the options of :class:`~sfpk_kernels.Coordinates`. How a score becomes a mask is an argument of its
own, ``allocation=``, where the method leaves it open. The model is not changed but by functions whose names end in
``_``, which also update the weights that are kept. Those whose names begin with ``structured`` remove whole channels,
neurons and heads, and return a :class:`StructuredBaseline`.
"""

from ._structured import StructuredBaseline
from .force import force
from .grasp import grasp
from .magnitude import magnitude
from .random import random
from .single_particle import single_particle
from .snip import snip
from .sparsegpt import sparsegpt, sparsegpt_update_
from .ste import ste
from .structured import structured_magnitude, structured_random, structured_snip
from .synflow import synflow
from .wanda import wanda
from .woodfisher import woodfisher, woodfisher_update_

__all__ = [
    "StructuredBaseline", "force", "grasp", "magnitude", "random", "single_particle", "snip", "sparsegpt",
    "sparsegpt_update_", "ste", "structured_magnitude", "structured_random", "structured_snip", "synflow", "wanda",
    "woodfisher", "woodfisher_update_",
]  # fmt: skip
