"""The authors' pruner object on this package's backend."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SFPKConfig
from ..coordinates.flat import Coordinates, named_parameters
from ..modeling.batchnorm import recalibrate_batchnorm
from ..search.energy import LossFn
from ..search.pruner import SFPKPruner
from ..search.result import PruneResult
from .fields import renamed, separated
from .utils import masked_params, without_mask_hooks

_BN_BATCHES = 2  # after a mask, as in the authors' code

_FIELDS = {
    "N": "n_steps",
    "r": "radius",
    "n_mc": "n_particles",
    "repl": "repulsion",
    "vote_mode": "vote",
}  # by argument
_VOTES = {"hard": "masked"}
_SCHEDULES = {"exp": "exponential", "lin": "linear"}


class SFPK:
    """Prunes a model whose modules carry ``weight_mask`` buffers and forward hooks.

    ``score(criterion, dataloader, device)``, then ``mask(sparsity)`` with ``sparsity`` the fraction KEPT; then
    ``stats(model)``. The weights are never changed; masks are written into the buffers. A further ``mask`` with fewer
    weights goes on from where the particles stand (retraining in between is fine).

    Arguments are those of the authors' class, at the defaults of their scripts; what this backend does not offer is
    refused. Differences: the energy is the ``criterion`` given (theirs is always cross-entropy); mini-batches are
    drawn under a seed taken from ``torch.initial_seed()``; batch-norm is re-estimated with dropout off.

    Args:
        model: with masks on it, see :mod:`sfpk_kernels.compat.utils`. What has no mask is not pruned.
        N: steps.
        r: relative localization radius > 1.
        ode_scope: only ``"global"``.
        E: only ``"CE"``: the criterion on (model(x), y).
        G: only ``"l2"``.
        score_option: ``"mp"`` (mask times weight) or ``"m"``: the score behind the final mask.
        mask_option: only ``"one"``: masks of 0 and 1.
        mask_proc_kwargs: ``mask_proc_option`` only ``"ohh"``, ``mask_proc_score_option`` only ``"Id"``;
            ``mask_proc_mxp`` True ranks by mask times weight, False by the mask.
        schedule: ``"exp"`` or ``"lin"``.
        rt_schedule: only ``"fix"``.
        momentum: of the score over the steps.
        n_mc: particles.
        repl: weight of the repulsion.
        repl_weighted, repl_mode: only True and ``"exp"`` (where ``repl`` is not 0).
        vote_ratio: share of the particles that vote, best first; 0 for all.
        vote_mode: ``"soft"`` or ``"hard"``.
        start: only ``None`` or 1.
        save_dir, save_ckpt: not used: nothing is written.
        fields: fields of :class:`~sfpk_kernels.SFPKConfig` and :class:`~sfpk_kernels.Execution` that go over all this
            (``seed``, ``update``, ``energy_mode``, ``selection="exact"`` for exact counts, …).

    Attributes:
        scores: by parameter name, the score behind the last mask, in the mask's shape.
        result: the last run's :class:`~sfpk_kernels.PruneResult`, None before.

    Raises:
        NotImplementedError: an option this backend does not offer; the message names it.
        TypeError: an argument of the wrong type.
        ValueError: an argument out of its range, no masks on the model, or masks on parameters that are not prunable
            here.
    """

    def __init__(
        self,
        model: nn.Module,
        N: int = 100,
        r: float = 1.4,
        ode_scope: str = "global",
        E: str = "CE",
        G: str = "l2",
        score_option: str = "mp",
        mask_option: str = "one",
        mask_proc_kwargs: Mapping[str, Any] | None = None,
        schedule: str = "exp",
        rt_schedule: str = "fix",
        momentum: float = 0.1,
        n_mc: int = 10,
        repl: float = 0.2,
        repl_weighted: bool = True,
        repl_mode: str = "exp",
        vote_ratio: float | None = 1.0,
        vote_mode: str = "soft",
        start: float | None = None,
        save_dir: Any = None,
        save_ckpt: bool = False,
        **fields: Any,
    ):
        polarizing = {"mask_proc_option": "ohh", "mask_proc_score_option": "Id", "mask_proc_mxp": True}
        polarizing.update(mask_proc_kwargs or {})
        _only("ode_scope", ode_scope, "global")
        _only("E", E, "CE")
        _only("G", G, "l2")
        _only("score_option", score_option, "mp", "m")
        _only("mask_option", mask_option, "one")
        _only("mask_proc_option", polarizing["mask_proc_option"], "ohh")
        _only("mask_proc_score_option", polarizing["mask_proc_score_option"], "Id")
        _only("schedule", schedule, *_SCHEDULES)
        _only("rt_schedule", rt_schedule, "fix")
        _only("start", start, None, 1)
        if repl:
            _only("repl_weighted", repl_weighted, True)
            _only("repl_mode", repl_mode, "exp")
        names = [name for name, _, _ in masked_params(model)]
        if not names:
            raise ValueError(
                "model: wanted modules with weight_mask buffers, got none: call init_masks_hooks(model) first"
            )
        given = {
            "n_steps": N,
            "radius": r,
            "final_score": "mask_weight" if score_option == "mp" else "mask",
            "polarizer": "mask_weight" if polarizing["mask_proc_mxp"] else "mask",
            "schedule": _SCHEDULES[schedule],
            "momentum": momentum,
            "n_particles": n_mc,
            "repulsion": repl,
            "vote": _VOTES.get(vote_mode, vote_mode),
            "vote_ratio": vote_ratio or 1.0,
            "seed": torch.initial_seed() % 2**63,
        }
        try:
            fields, self._execution = separated(fields)
            self._config = SFPKConfig.preset("authors", sparsity=0.5, **{**given, **fields})  # 0.5 until mask() says
        except (TypeError, ValueError) as error:
            arguments = {name: field for name, field in _FIELDS.items() if field not in fields}
            raise type(error)(renamed(str(error), arguments)) from None
        self.model = model
        self.total_param = sum(mask.numel() for _, mask, _ in masked_params(model))
        self.scores: dict[str, Tensor] = {
            name: torch.ones_like(mask, requires_grad=False) for name, mask, _ in masked_params(model)
        }
        self.result: PruneResult | None = None
        self._given: tuple[LossFn, Iterable[Any], Any] | None = None
        self._options = _coordinate_options(model, names)

    def score(
        self,
        criterion: Callable[[Tensor, Tensor], Tensor],
        dataloader: Iterable[Any],
        device: torch.device | str | None = None,
    ) -> None:
        """Say what :meth:`mask` measures energies with.

        Args:
            criterion: ``criterion(output, y) -> scalar`` on the model's output (its ``logits``, where it has them).
            dataloader: batches (x, y), cycled.
            device: the model is moved there; ``None`` leaves it.
        """
        if not callable(criterion):
            raise TypeError(f"criterion: wanted a function (output, y) -> scalar, got {type(criterion).__name__}")

        def loss(model: nn.Module, batch: Any) -> Tensor:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise TypeError(f"dataloader: wanted batches (x, y), got {type(batch).__name__}")
            x, y = batch
            output = model(x)
            return criterion(output if isinstance(output, Tensor) else output["logits"], y)

        self._given = (loss, dataloader, device)

    def mask(self, sparsity: float) -> None:
        """Run the particles until the fraction ``sparsity`` is left, write the masks, re-estimate batch-norm.

        Args:
            sparsity: fraction KEPT, in (0, 1].

        Raises:
            RuntimeError: no :meth:`score` before.
            NotImplementedError: a list (a fraction per layer).
            ValueError: a fraction out of its range. Also all errors of :meth:`sfpk_kernels.SFPKPruner.run`; the masks
                are as before after an error.
        """
        if self._given is None:
            raise RuntimeError("mask: wanted score(criterion, dataloader, device) before, got no such call")
        if isinstance(sparsity, list | tuple):
            raise NotImplementedError("sparsity: wanted one fraction kept of all weights, got a list (local pruning)")
        if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
            raise TypeError(f"sparsity: wanted the fraction kept, a number in (0, 1], got {sparsity!r}")
        if not 0 < sparsity <= 1:
            raise ValueError(f"sparsity: wanted the fraction kept, in (0, 1], got {sparsity!r}")
        if sparsity == 1:
            return  # nothing to remove
        loss, loader, device = self._given
        if device is not None:
            self.model.to(device)
        with without_mask_hooks(self.model):
            self.result = self._search(loss, loader, 1.0 - float(sparsity))
        for name, mask, _ in masked_params(self.model):
            mask.data.copy_(self.result.mask[name])
        parts = self.result.coordinates.split(self.result.score)
        self.scores = {t.name: part.clone() for t, part in zip(self.result.coordinates.tensors, parts, strict=True)}
        recalibrate_batchnorm(self.model, loader, max_batches=_BN_BATCHES, forward_fn=_forward)

    def stats(self, model: nn.Module) -> tuple[int, int, float]:
        """Masked weights kept, masked weights in all, and their ratio."""
        masks = [mask for _, mask, _ in masked_params(model)]
        total = sum(mask.numel() for mask in masks)
        kept = sum(int(mask.count_nonzero()) for mask in masks)
        return kept, total, kept / total if total else math.nan

    def _search(self, loss: LossFn, loader: Iterable[Any], removed: float) -> PruneResult:
        config = self._config.replace(sparsity=removed)
        try:
            pruner = SFPKPruner(
                self.model,
                loss_fn=loss,
                config=config,
                execution=self._execution,
                start=self._particles(),
                **self._options,
            )
        except ValueError as error:
            if str(error).startswith("start:"):
                raise ValueError(f"sparsity: {config.target_density:g} cannot be reached: {error}") from None
            if str(error).startswith("sparsity:"):
                kept = f"a fraction kept of at least one of {self.total_param} weights"
                raise ValueError(f"sparsity: wanted {kept}, got {1 - removed:g}") from None
            raise
        return pruner.run(loader)

    def _particles(self) -> Tensor | None:
        """Where the particles stand, (n, d); None at their usual start, all ones."""
        if self.result is not None:
            return self.result.particles.expand(self._config.n_particles, -1)  # from one, where they were merged
        masks = torch.cat([mask.detach().reshape(-1) for _, mask, _ in masked_params(self.model)])
        return None if bool((masks == 1).all()) else masks.expand(self._config.n_particles, -1)


def _only(name: str, value: Any, *offered: Any) -> None:
    if value not in offered:
        raise NotImplementedError(f"{name}: wanted {' or '.join(map(repr, offered))}, got {value!r}")


def _coordinate_options(model: nn.Module, masked: list[str]) -> dict[str, Any]:
    """What makes the masked parameters, and only them, prunable."""
    options: dict[str, Any] = {
        "ignored_layers": [name for name in named_parameters(model) if name not in masked],
        "include_biases": any(name.endswith("bias") for name in masked),
    }
    names = [tensor.name for tensor in Coordinates(model, **options).tensors]
    if names != masked:
        raise ValueError(
            f"model: wanted masks on weights and biases of Linear and Conv2d, each parameter once, got also "
            f"{', '.join(sorted(set(masked) ^ set(names)))}"
        )
    return options


def _forward(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])
