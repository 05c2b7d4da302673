"""Masked and shrunk models compared under random removals: nothing is shrunk wrongly in silence."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.flat import unwrapped
from .axes import CoordinateGroup, Structure
from .gates import gated_call
from .outputs import called, tensors_in
from .recipe import ShrinkRecipe

TOLERANCE = 1e-5  # of the largest output


def verify(
    model: nn.Module,
    structure: Structure,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    share: float = 0.3,
    seed: int = 0,
    single_groups: bool = True,
) -> None:
    """That masked and shrunk outputs are equal with ``share`` of every group removed, then of single groups.

    Compared are copies in eval mode, in fp32 at least, with random biases, norm weights and statistics, and random
    weights where most are 0: the last layer of a residual branch, 0 in a fresh model, would hide an error. Costs two
    calls per group.

    Raises:
        ValueError: outputs differ by more than 1e-5 of their largest; the message names the module.
    """
    generator = torch.Generator().manual_seed(seed)
    spare = _randomized(unwrapped(model), generator)
    args, kwargs = _widened(tuple(args)), _widened(dict(kwargs or {}))
    with torch.no_grad():
        dense = tensors_in(called(spare, args, kwargs))
        if not all(bool(one.isfinite().all()) for one in dense):
            raise ValueError("model: wanted finite outputs for the example inputs, got NaN or infinite ones")
        everywhere = random_keep(structure, share, generator)
        each = {group.name: _only(structure, group, share, generator) for group in structure.groups}
        trouble = _difference(spare, structure, everywhere, args, kwargs, dense)
        if trouble is None and not single_groups:
            return
        for group in structure.groups:
            alone = _difference(spare, structure, each[group.name], args, kwargs, dense)
            if alone is not None:
                raise ValueError(
                    f"model: removing some {group.kind}s of {group.name} cannot be done right, {alone}: keep them all, "
                    f"ignored_layers=[{group.name!r}]"
                )
        if trouble is not None:
            raise ValueError(f"model: removing channels of several groups at once cannot be done right, {trouble}")


def random_keep(
    structure: Structure,
    share: float,  # removed, of every group
    generator: torch.Generator,
) -> Tensor:  # (C,) bool
    """Removes so many of every group at random, at least one where two or more are there, and leaves no layer dead."""
    keep = torch.ones(structure.size, dtype=torch.bool, device="cpu")
    for group in structure.groups:
        if group.size > 1:
            count = min(max(round(share * group.size), 1), group.size - 1)
            keep[
                group.first + torch.randperm(group.size, generator=generator, dtype=torch.int64, device="cpu")[:count]
            ] = False
    for coordinates in structure.layers:
        if not bool(keep[coordinates].any()):
            keep[
                coordinates[
                    int(torch.randint(len(coordinates), (), generator=generator, dtype=torch.int64, device="cpu"))
                ]
            ] = True
    return keep


def _only(structure: Structure, group: CoordinateGroup, share: float, generator: torch.Generator) -> Tensor:
    keep = torch.ones(structure.size, dtype=torch.bool, device="cpu")
    keep[group.span] = random_keep(structure, share, generator)[group.span]
    return keep


def _difference(
    model: nn.Module, structure: Structure, keep: Tensor, args: Any, kwargs: Any, dense: list[Tensor]
) -> str | None:
    """How masked and shrunk differ, in words, or None."""

    def masked_model(*args: Any, **kwargs: Any) -> Any:
        return gated_call(model, structure, keep, args, kwargs)

    which = "masked"
    try:
        masked = tensors_in(called(masked_model, args, kwargs))
        which = "smaller"
        shrunk = tensors_in(called(ShrinkRecipe.of(structure, keep).share(model), args, kwargs))
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, AttributeError) as error:
        said = (str(error).splitlines() or [""])[0][:120]
        return f"the {which} model raises {type(error).__name__}: {said}"
    for before, one, other in zip(dense, masked, shrunk, strict=True):
        if one.shape != other.shape:
            return f"the smaller model has outputs of shape {tuple(other.shape)} instead of {tuple(one.shape)}"
        if not one.is_floating_point() or one.numel() == 0:
            continue
        scale = max(float(before.abs().max()), float(one.abs().max()))
        difference = float((one - other).abs().max())
        if not difference <= TOLERANCE * scale:  # NaN, too
            return f"outputs of the smaller and the masked model differ by {difference:.2g} (of {scale:.2g})"
    return None


def _randomized(model: nn.Module, generator: torch.Generator) -> nn.Module:
    spare = copy.deepcopy(model).eval()
    spare = spare.to(torch.float32) if any(_half(p) for p in spare.parameters()) else spare

    def draw(tensor: Tensor, low: float, high: float) -> None:
        values = torch.rand(tensor.shape, generator=generator, dtype=torch.float32, device="cpu") * (high - low) + low
        tensor.copy_(values.to(tensor.device, tensor.dtype))

    with torch.no_grad():
        for module in spare.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if not tensor.is_floating_point() or tensor.dim() == 0:
                    continue
                if name == "running_var":
                    draw(tensor, 0.5, 1.5)
                elif name == "running_mean" or "bias" in name:
                    draw(tensor, -0.3, 0.3)
                elif isinstance(tensor, nn.Parameter) and tensor.numel() == max(tensor.shape):  # weights of norms
                    draw(tensor, 0.5, 1.5)
                elif isinstance(tensor, nn.Parameter) and 2 * int(tensor.count_nonzero()) < tensor.numel():
                    draw(tensor, -0.3, 0.3)
    return spare


def _half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def _widened(value: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda one: one.float() if isinstance(one, Tensor) and _half(one) else one, value
    )
