"""Drop-ins for code written against the paper or its authors' released experiments.

- :func:`SFPK_prune`: the signature of the paper's Algorithm 3.
- :class:`SFPK`: the pruner object of the authors' code. ``from sfpk_kernels.compat import pruners`` in the place of
  their module ``pruners`` is the one import to change (scripts that also run their other methods keep their module and
  set ``pruners.SFPK = sfpk_kernels.compat.SFPK``); the masks may still be registered by their own helpers, or by the
  ones here (:func:`init_masks_hooks`, :func:`free_modules`, …, in :mod:`sfpk_kernels.compat.utils`).

Two conventions meet here. ``SFPK_prune(model, t, …)``: t is the fraction REMOVED, as everywhere in this package.
``SFPK.mask(sparsity)``: the fraction KEPT, as in the authors' code.

What it saves depends on model, particles and machine; measure it there: time ``SFPK_prune`` against
:func:`sfpk_kernels.naive.naive_sfpk`, Algorithm 3 written literally, on the same model and batches with the same n and
K; or an experiment of the authors' before and after the change of import.
"""

from .algorithm3 import SFPK_prune
from .pruners import SFPK
from .utils import free_modules, init_masks, init_masks_hooks, is_masked_module, masked_params, reg_fwd_hooks

__all__ = [
    "SFPK",
    "SFPK_prune",
    "free_modules",
    "init_masks",
    "init_masks_hooks",
    "is_masked_module",
    "masked_params",
    "reg_fwd_hooks",
]
