"""For code written against the paper or against its authors' release: the same names and calls, run by this package.

- :func:`SFPK_prune` has the signature of the paper's Algorithm 3.
- :class:`SFPK` has the interface of the authors' released pruner, for their experiment scripts: import it from here in
  place of theirs. It works on models whose modules carry ``weight_mask`` (and ``bias_mask``) buffers and a forward
  hook ``fwd_hook`` that multiplies them in, made by their ``init_masks_hooks`` or by the one here.

**In the authors' code "sparsity" is the fraction KEPT**; so it is in :class:`SFPK`, and nowhere else in this package.

What one gains is for you to measure on your model: ``sfpk bench --group end_to_end`` compares whole steps with a
literal Algorithm 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batchnorm import recalibrate_batchnorm
from .config import SFPKConfig
from .coordinates import Coordinates
from .masks import MaskSet
from .model_state import BATCH_NORMS
from .pruner import SFPKPruner
from .result import PruneResult

_LAYERS = (nn.Linear, nn.Conv2d)
_BATCHNORM_BATCHES = 2  # as the authors' scripts

_SCORES = {"mp": "mask_weight", "m": "mask"}
_SCHEDULES = {"exp": "exponential", "lin": "linear"}


def SFPK_prune(
    model: nn.Module,
    t: float,
    dataloader: Iterable[Any],
    n: int,
    K: int,
    r: float,
    **options: Any,
) -> MaskSet:
    """The paper's Algorithm 3 (preset ``"paper"``): the mask of a model, which stays as it is.

    Args:
        model: the trained, dense model.
        t: target sparsity, the fraction REMOVED, in (0, 1).
        dataloader: batches (x, y), or dicts.
        n: particles.
        K: steps.
        r: relative localization radius, above 1.
        options: other fields of :class:`SFPKConfig`, and ``loss_fn`` (default: cross-entropy).

    Raises:
        TypeError, ValueError: as :class:`SFPKConfig` and :class:`SFPKPruner` do.
    """
    loss_fn = options.pop("loss_fn", None)
    config = SFPKConfig.preset("paper", sparsity=t, n_particles=n, n_steps=K, radius=r, **options)
    return SFPKPruner(model, loss_fn, config).run(dataloader).mask


def init_masks_hooks(model: nn.Module, structural: bool = False, mask_dim: int = 0) -> None:
    """Give every Linear and Conv2d the buffers ``weight_mask`` and ``bias_mask``, all 1, and the hook for them.

    Raises:
        ValueError: ``structural``, which is not covered.
    """
    if structural:
        raise ValueError("structural: wanted False, got True: structured masks are not covered")
    for module in model.modules():
        if isinstance(module, _LAYERS):
            module.register_buffer("weight_mask", torch.ones_like(module.weight.detach()))
            if module.bias is not None:
                module.register_buffer("bias_mask", torch.ones_like(module.bias.detach()))
    reg_fwd_hooks(model)


def reg_fwd_hooks(model: nn.Module) -> None:
    """The hook ``fwd_hook`` on every masked module: its output computed from weight ⊙ weight_mask (bias alike)."""
    for module in model.modules():
        if isinstance(module, _LAYERS) and (hasattr(module, "weight_mask") or hasattr(module, "bias_mask")):
            handle: Any = getattr(module, "fwd_hook", None)
            if handle is not None:
                handle.remove()
            object.__setattr__(module, "fwd_hook", module.register_forward_hook(_masked_forward))


def masked_params(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Parameter]]:
    """Name, mask and parameter of everything that has a mask."""
    for name, module in model.named_modules():
        for kind in ("weight", "bias"):
            mask = getattr(module, f"{kind}_mask", None)
            if mask is not None:
                yield f"{name}.{kind}", mask, getattr(module, kind)


class SFPK:
    """The authors' pruner: ``score``, then ``mask``, then ``stats``.

    Runs the preset ``"authors"``, which follows their code to the letter. A second ``mask`` goes on from the particles
    of the first, at their density. The weights are never written, only the masks are.

    Args:
        model: with masks (:func:`init_masks_hooks`); modules without them are left alone.
        N: steps.
        r: relative localization radius, above 1.
        score_option: ``"mp"`` (|mask · weight|) or ``"m"``.
        schedule: ``"exp"`` or ``"lin"``.
        momentum, n_mc, repl, repl_weighted, vote_ratio, vote_mode: momentum of the score, particles, repulsion λ, its
            weighted kernel, share of the particles that vote (0 or None: all), ``"soft"`` or ``"hard"``.
        ode_scope, E, G, mask_option, rt_schedule, repl_mode: only ``"global"``, ``"CE"``, ``"l2"``, ``"one"``,
            ``"fix"`` and ``"exp"``.
        mask_proc_kwargs, save_dir, save_ckpt, start: taken and not used.
        settings: other fields of :class:`SFPKConfig`.

    Raises:
        ValueError: an option that is not covered, or a model without masks.
    """

    def __init__(
        self,
        model: nn.Module,
        N: int = 15,
        r: float = 1.4,
        ode_scope: str = "global",
        E: str = "CE",
        G: str = "l2",
        score_option: str = "mp",
        mask_option: str = "one",
        mask_proc_kwargs: Any = None,
        schedule: str = "exp",
        rt_schedule: str = "fix",
        momentum: float = 0.0,
        n_mc: int = 1,
        repl: float = 0.0,
        repl_weighted: bool = False,
        repl_mode: str = "exp",
        vote_ratio: float | None = 1.0,
        vote_mode: str = "soft",
        start: Any = None,
        save_dir: Any = None,
        save_ckpt: bool = False,
        settings: dict[str, Any] | None = None,
    ):
        for name, value, known in (
            ("ode_scope", ode_scope, ("global",)),
            ("E", E, ("CE",)),
            ("G", G, ("l2",)),
            ("mask_option", mask_option, ("one",)),
            ("rt_schedule", rt_schedule, ("fix",)),
            ("repl_mode", repl_mode, ("exp",)),
            ("score_option", score_option, tuple(_SCORES)),
            ("schedule", schedule, tuple(_SCHEDULES)),
        ):
            if value not in known:
                raise ValueError(f"{name}: wanted {' or '.join(map(repr, known))}, got {value!r}, which is not covered")
        self.model = model
        masked = list(masked_params(model))
        if not masked:
            raise ValueError("model: wanted one whose modules carry weight_mask buffers, got one without: call "
                             "init_masks_hooks first")  # fmt: skip
        self.total_param = sum(mask.numel() for _, mask, _ in masked)
        self.scores: dict[str, Tensor] = {name: torch.ones_like(mask) for name, mask, _ in masked}
        self.result: PruneResult | None = None  # of the last mask()
        self._settings: dict[str, Any] = {
            "n_particles": int(n_mc),
            "n_steps": int(N),
            "radius": float(r),
            "repulsion": float(repl),
            "kernel": "weighted_rbf" if repl_weighted else "rbf",
            "polarizer": _SCORES[score_option],
            "schedule": _SCHEDULES[schedule],
            "momentum": float(momentum),
            "vote": vote_mode,
            "vote_ratio": float(vote_ratio) if vote_ratio else 1.0,
            **(settings or {}),
        }
        SFPKConfig.preset("authors", sparsity=0.5, **self._settings)  # says now what is out of range
        self.dataloader: Iterable[Any] | None = None
        self.device: Any = None

    def score(self, criterion: Any, dataloader: Iterable[Any], device: Any) -> None:
        """Take the data; ``criterion`` is not used: the energy is the cross-entropy, as in the authors' code."""
        self.dataloader, self.device = dataloader, device

    def mask(self, sparsity: float) -> None:
        """Search, write the masks, re-estimate batch-norm statistics on two batches.

        Args:
            sparsity: the fraction KEPT, of all masked parameters together.

        Raises:
            RuntimeError: :meth:`score` was not called.
            ValueError: sparsities by layer, or one outside (0, 1).
        """
        if self.dataloader is None:
            raise RuntimeError("mask: wanted score(criterion, dataloader, device) called before, got no data")
        if isinstance(sparsity, list | tuple):
            raise ValueError("sparsity: wanted one number, got a list: sparsities by layer are not covered")
        config = SFPKConfig.preset("authors", sparsity=1.0 - float(sparsity), **self._settings)
        self.model.to(self.device)
        masked = {name: mask for name, mask, _ in masked_params(self.model)}
        with _without_hooks(self.model):
            pruner = SFPKPruner(
                self.model, _cross_entropy, config, **_only(self.model, masked),
                start=None if self.result is None else self.result.particles,
            )  # fmt: skip
            self.result = pruner.run(self.dataloader)
        scores = dict(zip(self.result.mask, self.result.coordinates.split(self.result.score), strict=True))
        with torch.no_grad():
            for name, mask in masked.items():
                self.scores[name] = scores[name].clone()
                mask.copy_(self.result.mask[name])
        if any(isinstance(module, BATCH_NORMS) for module in self.model.modules()):
            recalibrate_batchnorm(self.model, self.dataloader, max_batches=_BATCHNORM_BATCHES)

    def stats(self, model: nn.Module) -> tuple[int, int, float]:
        """Masked parameters that are kept, all of them, and the first over the second."""
        kept = sum(int(mask.count_nonzero()) for _, mask, _ in masked_params(model))
        total = sum(mask.numel() for _, mask, _ in masked_params(model))
        return kept, total, kept / total


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _masked_forward(module: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Replaces the output by that of the masked parameters."""
    weight = module.weight * module.weight_mask if hasattr(module, "weight_mask") else module.weight
    bias = module.bias * module.bias_mask if hasattr(module, "bias_mask") else module.bias
    if isinstance(module, nn.Linear):
        return F.linear(inputs[0], weight, bias)
    return module._conv_forward(inputs[0], weight, bias)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Masks out of the way: the search writes masked weights itself, and removed ones must receive gradients."""
    taken = []
    for module in model.modules():
        handle = getattr(module, "fwd_hook", None)
        if handle is not None and handle.id in module._forward_hooks:
            taken.append((module, dict(module._forward_hooks)))
            del module._forward_hooks[handle.id]
    try:
        yield
    finally:
        for module, hooks in taken:
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


def _only(model: nn.Module, masked: dict[str, Tensor]) -> dict[str, Any]:
    """Options of the pruner that make exactly the masked parameters prunable."""
    biases = any(name.endswith(".bias") for name in masked)
    found = Coordinates(model, include_biases=biases).tensors
    return {"include_biases": biases, "ignored_layers": [t.name for t in found if t.name not in masked]}
