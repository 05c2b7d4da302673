"""``prune``: a whole run in one call."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..config import SFPKConfig
from ..execution import Execution
from ..utils.arguments import called, check_loader
from .energy import LossFn
from .pruner import SFPKPruner
from .result import PruneResult
from .settings import FIELDS, chosen

_CALL = "prune(model, loader, sparsity, loss_fn=…)"


@called(_CALL, checkpoints="waypoints=[…]", **FIELDS)
def prune(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float | None = None,
    *,
    passes: int | None = None,
    loss_fn: LossFn | None = None,
    config: SFPKConfig | None = None,
    execution: Execution | None = None,
    progress: bool | None = None,
    save_every: int | None = None,
    save_path: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | bool | None = None,
    **options: Any,
) -> PruneResult:
    """Search a mask for ``model`` in one run; the model itself is not changed.

    ``prune(model, loader, 0.9)`` is the simple case, ``prune(model, loader, 0.9, passes=300)`` a shorter one;
    ``options`` are the others of :class:`SFPKPruner` (``waypoints``,
    ``ignored_layers``, ``callbacks``, …). Arguments and errors as there and in :meth:`SFPKPruner.run`.
    """
    settings = chosen(_CALL, sparsity, config, execution, passes)
    check_loader(loader)
    pruner = SFPKPruner(model, loss_fn=loss_fn, config=settings[0], execution=settings[1], **options)
    return pruner.run(loader, progress=progress, save_every=save_every, save_path=save_path, resume=resume)
