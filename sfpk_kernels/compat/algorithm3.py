"""The signature of the paper's Algorithm 3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..config import SFPKConfig
from ..search.energy import LossFn
from ..search.prune import prune
from ..search.result import PruneResult
from .fields import renamed, separated


def SFPK_prune(
    model: nn.Module,
    t: float,
    dataloader: Iterable[Any],
    n: int = 10,
    K: int = 100,
    r: float = 1.4,
    *,
    loss_fn: LossFn | None = None,
    progress: bool | None = None,
    **fields: Any,
) -> PruneResult:
    """Prune ``model`` to sparsity ``t`` by Algorithm 3 (SFPK-pruner, ICLR 2025); the model is not changed.

    Args:
        model: the trained, dense model.
        t: target sparsity, the fraction REMOVED, in (0, 1): the paper's sparsity index, at which its time ends.
        dataloader: batches, cycled; n · K are used.
        n: particles.
        K: steps.
        r: localization radius > 1, RELATIVE: the paper's r_t is r / ‖∇s‖.
        loss_fn: the energy, ``loss_fn(model, batch) -> scalar``; ``None`` for cross-entropy on batches (x, y).
        progress: show a bar; ``None`` for only on a terminal.
        fields: any other field of :class:`~sfpk_kernels.SFPKConfig` or :class:`~sfpk_kernels.Execution`, over preset
            ``"paper"``; ``preset="population"`` for the same with the stabilisers of ours.

    Returns:
        The result of the run; ``.mask`` is the algorithm's m̂, ``.apply_(model)`` prunes.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of its range; also as :func:`sfpk_kernels.prune`.
    """
    given = {"t": t, "n": n, "K": K, "r": r}
    names = {"t": "sparsity", "n": "n_particles", "K": "n_steps", "r": "radius"}
    twice = sorted(set(fields) & set(names.values()))
    if twice:
        raise TypeError(f"{twice[0]}: given twice, it is {next(a for a, b in names.items() if b == twice[0])} here")
    preset = fields.pop("preset", "paper")
    try:
        fields, execution = separated(fields)
        config = SFPKConfig.preset(preset, **{names[name]: value for name, value in given.items()}, **fields)
    except (TypeError, ValueError) as error:
        raise type(error)(renamed(str(error), names)) from None
    return prune(model, dataloader, loss_fn=loss_fn, config=config, execution=execution, progress=progress)
