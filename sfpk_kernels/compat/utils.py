"""Masks as buffers of modules, applied by forward hooks: the conventions of the authors' experiment scripts.

A masked module carries ``weight_mask`` (and ``bias_mask``) of its parameter's shape, float, 1 = kept, and
``fwd_hook``, the handle of a hook that recomputes its output from the masked parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..coordinates.flat import unwrapped

logger = logging.getLogger(__name__)

_MASKED = (nn.Linear, nn.Conv2d)


def is_masked_module(module: nn.Module) -> bool:
    """Whether a module carries a mask."""
    return hasattr(module, "weight_mask") or hasattr(module, "bias_mask")


def masked_params(model: nn.Module) -> Iterator[tuple[str, Tensor, nn.Parameter]]:
    """Name, mask and parameter of everything masked, weights before biases, in the order of the modules."""
    for name, module in unwrapped(model).named_modules():
        for kind in ("weight", "bias"):
            if hasattr(module, f"{kind}_mask"):
                prefix = f"{name}." if name else ""
                yield f"{prefix}{kind}", getattr(module, f"{kind}_mask"), getattr(module, kind)


def init_masks(model: nn.Module, structural: bool = False, mask_dim: int = 0) -> None:
    """Give every Linear and Conv2d masks of ones, for weight and bias.

    Raises:
        NotImplementedError: ``structural=True``.
    """
    _unstructured(structural)
    for module in model.modules():
        if isinstance(module, _MASKED):
            module.register_buffer("weight_mask", torch.ones_like(module.weight))
            if module.bias is not None:
                module.register_buffer("bias_mask", torch.ones_like(module.bias))


def reg_fwd_hooks(model: nn.Module, structural: bool = False, mask_dim: int = 0) -> None:
    """Let every masked Linear and Conv2d compute with its masked parameters; an earlier hook is replaced.

    Raises:
        NotImplementedError: ``structural=True``.
    """
    _unstructured(structural)
    for module in model.modules():
        if isinstance(module, _MASKED) and is_masked_module(module):
            _remove_hook(module)
            module.__dict__["fwd_hook"] = module.register_forward_hook(_masked_forward)


def init_masks_hooks(model: nn.Module, structural: bool = False, mask_dim: int = 0) -> None:
    """:func:`init_masks`, then :func:`reg_fwd_hooks`."""
    init_masks(model, structural, mask_dim)
    reg_fwd_hooks(model, structural, mask_dim)


def free_modules(
    model: nn.Module,
    free_bn: bool,
    free_Id: bool,
    free_bias: bool,
    free_conv1: bool,
    free_lastfc: bool = False,
    verbose: bool = True,
) -> None:
    """Take masks away again: what has none is not pruned.

    Args:
        model: with masks.
        free_bn: those of normalization layers.
        free_Id: those of other modules than Linear, Conv2d and normalization (the authors' scaling layers).
        free_bias: those of the biases of convolutions; the biases of Linear layers keep theirs.
        free_conv1: those of the first Conv2d.
        free_lastfc: those of the last masked module.
        verbose: log how many were taken.
    """
    masked = [module for module in model.modules() if is_masked_module(module)]
    convolutions = [module for module in masked if isinstance(module, nn.Conv2d)]
    weighted = [module for module in masked if hasattr(module, "weight_mask")]
    freed = 0
    for module in masked:
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        whole = (
            (free_bn and norm)
            or (free_Id and not norm and not isinstance(module, _MASKED))
            or (free_conv1 and convolutions and module is convolutions[0])
            or (free_lastfc and weighted and module is weighted[-1])
        )
        bias = whole or (free_bias and isinstance(module, nn.Conv2d))
        for kind, free in (("weight_mask", whole), ("bias_mask", bias)):
            if free and hasattr(module, kind):
                delattr(module, kind)
                freed += 1
        if not is_masked_module(module):
            _remove_hook(module)
    if verbose:
        logger.info("%d masks taken away; %d left", freed, sum(1 for _ in masked_params(model)))


@contextmanager
def without_mask_hooks(model: nn.Module) -> Iterator[None]:
    """The model without its masking hooks; all hooks are back, in their order, afterwards."""
    saved: list[tuple[nn.Module, list[tuple[int, Any]]]] = []
    try:
        for module in model.modules():
            handle: Any = module.__dict__.get("fwd_hook")
            if handle is not None and handle.id in module._forward_hooks:
                saved.append((module, list(module._forward_hooks.items())))
                del module._forward_hooks[handle.id]
        yield
    finally:
        for module, hooks in saved:
            module._forward_hooks.clear()
            module._forward_hooks.update(hooks)


def _remove_hook(module: nn.Module) -> None:
    handle: Any = module.__dict__.pop("fwd_hook", None)
    if handle is not None:
        handle.remove()


def _masked_forward(module: Any, inputs: tuple[Any, ...], output: Any) -> Tensor:
    weight, bias = module.weight, module.bias
    if hasattr(module, "weight_mask"):
        weight = weight * module.weight_mask
    if hasattr(module, "bias_mask"):
        bias = bias * module.bias_mask
    if isinstance(module, nn.Conv2d):
        return module._conv_forward(inputs[0], weight, bias)
    return F.linear(inputs[0], weight, bias)


def _unstructured(structural: bool) -> None:
    if structural:
        raise NotImplementedError("structural: wanted False, got True: only unstructured masks are offered")
