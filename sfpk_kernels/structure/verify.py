"""Masked and shrunk models compared under random removals: nothing is shrunk wrongly in silence."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.flat import unwrapped
from .axes import CoordinateGroup, Structure
from .gates import gated_call
from .kinds import without
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
    """That masked and shrunk outputs are equal with ``share`` of every group removed, then of some groups at a time.

    Those of one comparison lie far apart in the model, so that what is around each of them is whole; every group is in
    one of √n. What differs is halved until the group is found. Compared are copies in eval mode, in fp32 at least, with
    random biases, norm weights and statistics, and random weights where most are 0: the last layer of a residual
    branch, 0 in a fresh model, would hide an error. Costs two calls per comparison.

    Args:
        model: it stays as it is.
        structure: of this model.
        args, kwargs: what it is called with.
        share: removed of each group, at random.
        seed: of the random numbers.
        single_groups: False: all groups at once only.

    Raises:
        ValueError: outputs differ by more than 1e-5 of their largest; the message names the module.
    """
    wrong = Comparison(model, args, kwargs, seed).wrong(structure, share, single_groups=single_groups)
    if wrong is not None:
        raise ValueError(f"model: {wrong}")


def proven(
    model: nn.Module, structure: Structure, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Structure:
    """The groups that can be removed right, as :func:`verify` finds them; the others become protected.

    Raises:
        ValueError: nothing is left.
    """
    comparison = Comparison(model, args, kwargs)
    while (wrong := comparison.wrong(structure)) is not None:
        structure = without(structure, {group.name: f"cannot be removed, {wrong.how}" for group in wrong.groups})
    return structure


@dataclass(frozen=True)
class Wrong:
    """Groups that cannot be removed right: one alone, or several that can only together not be."""

    groups: tuple[CoordinateGroup, ...]
    how: str  # masked and shrunk differ

    def __str__(self) -> str:
        names = [group.name for group in self.groups]
        if len(names) == 1:
            what = f"some {self.groups[0].kind}s of {names[0]}"
        else:
            what = f"some outputs of {', '.join(names[:3])}{' …' if len(names) > 3 else ''} at once"
        return f"removing {what} cannot be done right, {self.how}: keep them all, ignored_layers={names}"


class Comparison:
    """A model's masked and shrunk outputs, for structures of it.

    Args:
        model: it stays as it is.
        args, kwargs: what it is called with.
        seed: of the random numbers.

    Raises:
        ValueError: outputs that are not finite.
    """

    def __init__(
        self, model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, seed: int = 0
    ):
        self._generator = torch.Generator().manual_seed(seed)
        self._spare = _randomized(unwrapped(model), self._generator)
        self._args, self._kwargs = _widened(tuple(args)), _widened(dict(kwargs or {}))
        with torch.no_grad():
            self._dense = tensors_in(called(self._spare, self._args, self._kwargs))
        if not all(bool(one.isfinite().all()) for one in self._dense):
            raise ValueError("model: wanted finite outputs for the example inputs, got NaN or infinite ones")

    @torch.no_grad()
    def wrong(self, structure: Structure, share: float = 0.3, *, single_groups: bool = True) -> Wrong | None:
        """The first groups found that cannot be removed right, or None: see :func:`verify`."""
        everything = tuple(structure.groups)
        count = math.isqrt(len(everything) - 1) + 1  # ⌈√n⌉
        batches = [everything[first::count] for first in range(count)] if single_groups else []
        for groups in (everything, *batches):
            keep = random_keep(structure, share, self._generator)
            how = self._difference(structure, _only(keep, groups))
            if how is not None:
                return self._guilty(structure, keep, groups, how)
        return None

    def _guilty(self, structure: Structure, keep: Tensor, groups: tuple[CoordinateGroup, ...], how: str) -> Wrong:
        """A part of these groups that differs, none of whose halves does."""
        while len(groups) > 1:
            middle = len(groups) // 2
            for half in (groups[:middle], groups[middle:]):
                of_half = self._difference(structure, _only(keep, half))
                if of_half is not None:
                    groups, how = half, of_half
                    break
            else:
                break
        return Wrong(groups, how)

    def _difference(self, structure: Structure, keep: Tensor) -> str | None:
        """How masked and shrunk differ, in words, or None."""

        def masked_model(*args: Any, **kwargs: Any) -> Any:
            return gated_call(self._spare, structure, keep, args, kwargs)

        which = "masked"
        try:
            masked = tensors_in(called(masked_model, self._args, self._kwargs))
            which = "smaller"
            smaller = ShrinkRecipe.of(structure, keep).share(self._spare)
            shrunk = tensors_in(called(smaller, self._args, self._kwargs))
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError, AttributeError) as error:
            said = (str(error).splitlines() or [""])[0][:120]
            return f"the {which} model raises {type(error).__name__}: {said}"
        return _apart(self._dense, masked, shrunk)


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


def _only(
    keep: Tensor,  # (C,) bool
    groups: Sequence[CoordinateGroup],
) -> Tensor:  # (C,) bool
    """What it removes of these groups alone."""
    found = torch.ones_like(keep, dtype=torch.bool, device="cpu")
    for group in groups:
        found[group.span] = keep[group.span]
    return found


def _apart(dense: list[Tensor], masked: list[Tensor], shrunk: list[Tensor]) -> str | None:
    """How the outputs of two models differ, in words, or None."""
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
