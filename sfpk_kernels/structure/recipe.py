"""What stays of a model, as plain lists: enough to shrink a fresh copy of the architecture."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..coordinates.flat import unwrapped
from ..utils.arguments import check_model
from .axes import Structure, kept
from .gates import KeptForward
from .surgery import set_sizes, slice_tensors


@dataclass(frozen=True)
class ShrinkRecipe:
    """Kept positions of tensors and numbers of modules, all by name; JSON can hold ``to_dict()``.

    ``model.load_state_dict`` of a shrunk model's weights fits what :meth:`shrink` makes of a fresh dense one.
    """

    groups: dict[str, list[int]]  # name → kept coordinates, counted within the group
    slices: dict[str, dict[int, list[int]]]  # tensor → dim → kept positions
    sizes: dict[str, dict[int, int]]  # tensor → dim → size before
    attributes: dict[str, dict[str, int]]  # module → attribute → value

    @classmethod
    def of(
        cls,
        structure: Structure,
        keep: Tensor,  # (C,) bool
    ) -> ShrinkRecipe:
        """The recipe for what is kept.

        Raises:
            TypeError, ValueError: ``keep`` as in :meth:`Structure.check_keep`.
        """
        keep = structure.check_keep(keep)
        slices: dict[str, dict[int, list[int]]] = {}
        sizes: dict[str, dict[int, int]] = {}
        attributes: dict[str, dict[str, int]] = {}
        for entry in structure.entries:
            slices.setdefault(entry.tensor, {})[entry.dim] = kept(entry.index, keep).nonzero().flatten().tolist()
            sizes.setdefault(entry.tensor, {})[entry.dim] = entry.index.numel()
        for one in structure.attributes:
            attributes.setdefault(one.module, {})[one.name] = one.unit * int(kept(one.index, keep).sum())
        groups = {group.name: keep[group.span].nonzero().flatten().tolist() for group in structure.groups}
        return cls(groups, slices, sizes, attributes)

    def shrink(self, model: nn.Module) -> nn.Module:
        """A smaller deep copy of a dense model of this architecture, which is left as it is.

        Raises:
            TypeError: no module.
            ValueError: a model without one of the tensors, or with another shape.
        """
        check_model(model)
        model = unwrapped(model)
        differs = self._differs(model, self.sizes) or self._lacks(model)
        if differs is not None:
            raise ValueError(differs)
        smaller = self.share(model)
        # What was sliced is its own already.
        copies: dict[int, Any] = {}  # one of each, so that what is tied stays tied
        of_model = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        for module in smaller.modules():
            for registered in cast(list[dict[str, Any]], [module._parameters, module._buffers]):
                for name, tensor in registered.items():
                    if id(tensor) in of_model:
                        registered[name] = copy.deepcopy(tensor, copies)
        return smaller

    def share(self, model: nn.Module) -> nn.Module:
        """Like :meth:`shrink`, unchecked, with the tensors of which nothing is removed those of the model itself."""
        memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        smaller = copy.deepcopy(model, memo)
        removed = {
            name: {dim: torch.tensor(one, dtype=torch.int64, device="cpu") for dim, one in dims.items()}
            for name, dims in self.slices.items()
            if {dim: len(one) for dim, one in dims.items()} != self.sizes[name]
        }
        slice_tensors(smaller, removed)
        set_sizes(smaller, self.slices, self.attributes)
        for module in smaller.modules():  # all that is left is kept: its statistics are those of its own
            if isinstance(module.__dict__.get("forward"), KeptForward):
                del module.__dict__["forward"]
        return smaller

    def move(self, smaller: nn.Module, model: nn.Module) -> None:
        """Turn the dense model into what :meth:`shrink` made of it: the same tensors, not copies; unchecked.

        Interrupted, it is the dense model again.
        """
        pairs = list(zip(model.modules(), smaller.modules(), strict=True))
        before = [(old, dict(vars(old)), dict(old._parameters), dict(old._buffers)) for old, _ in pairs]
        try:
            for old, new in pairs:
                old._parameters.update(new._parameters)
                old._buffers.update(new._buffers)
            set_sizes(model, self.slices, self.attributes)
        except BaseException:
            for module, attributes, parameters, buffers in before:
                vars(module).update(attributes)
                module._parameters.update(parameters)
                module._buffers.update(buffers)
            raise

    def state_of(self, model: nn.Module) -> str:
        """``"dense"`` where :meth:`shrink` takes the model, ``"shrunk"`` where it is as small as what that returns.

        A recipe that removes nothing finds a dense one.

        Raises:
            TypeError: no module.
            ValueError: neither; the message names the first tensor or module that differs from a dense one.
        """
        check_model(model)
        model = unwrapped(model)
        differs = self._differs(model, self.sizes) or self._lacks(model)
        if differs is None:
            return "dense"
        left = {name: {dim: len(kept) for dim, kept in dims.items()} for name, dims in self.slices.items()}
        if self._differs(model, left) is None and self._lacks(model) is None:
            return "shrunk"
        raise ValueError(f"{differs}; nor is it as small as the recipe makes one")

    def dense_numel(self, name: str, shape: Sequence[int]) -> int:
        """Elements that a tensor of the smaller model has in the dense one."""
        dims, sizes = self.slices.get(name, {}), self.sizes.get(name, {})
        return math.prod(sizes[dim] if dim in dims else size for dim, size in enumerate(shape))

    def _differs(self, model: nn.Module, sizes: Mapping[str, Mapping[int, int]]) -> str | None:
        """Where a model's tensors have other sizes, in words; None: nowhere."""
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        for name, dims in sizes.items():
            for dim, size in dims.items():
                got = tuple(tensors[name].shape) if name in tensors else "none"
                if got == "none" or dim >= len(got) or got[dim] != size:
                    return f"model: wanted {name} with {size} positions along dim {dim}, got shape {got}"
        return None

    def _lacks(self, model: nn.Module) -> str | None:
        """Which module, or number that one keeps, is not there, in words; None: all are."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, values in self.attributes.items():
            for attribute in values:
                if not isinstance(getattr(modules.get(name), attribute, None), int | tuple | list):
                    return f"model: wanted a module {name} that keeps a number {attribute}, got none"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, with text as keys."""
        return _texts(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ShrinkRecipe:
        """The recipe back from :meth:`to_dict`.

        Raises:
            ValueError: something else, positions among it that are not ascending or outside of their tensor.
        """
        try:
            by_dim = [
                {name: {int(dim): one for dim, one in dims.items()} for name, dims in values[part].items()}
                for part in ("slices", "sizes")
            ]
            attributes = {name: dict(one) for name, one in values["attributes"].items()}
            found = cls(dict(values["groups"]), by_dim[0], by_dim[1], attributes)
            found._check()
            return found
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"values: wanted what to_dict() wrote, got {str(values)[:80]}") from error

    def _check(self) -> None:
        """That it can be followed: it may come out of a file.

        Raises:
            TypeError, ValueError, KeyError: it cannot.
        """
        numbers = [size for dims in self.sizes.values() for size in dims.values()]
        numbers += [value for one in self.attributes.values() for value in one.values()]
        lists = list(self.groups.values())
        if self.slices.keys() != self.sizes.keys():
            raise ValueError("slices and sizes of other tensors")
        for name, dims in self.slices.items():
            if dims.keys() != self.sizes[name].keys() or min(dims, default=0) < 0:
                raise ValueError(f"{name}: slices and sizes of other dims")
            for dim, positions in dims.items():
                if not positions or positions[-1] >= self.sizes[name][dim]:
                    raise ValueError(f"{name}: positions outside of dim {dim}")
                lists.append(positions)
        for positions in lists:
            numbers += positions
            if any(a >= b for a, b in pairwise([-1, *positions])):
                raise ValueError("positions that do not ascend")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise TypeError("numbers that are no counts")


def shrink(
    model: nn.Module,
    structure: Structure,
    keep: Tensor,  # (C,) bool
) -> nn.Module:
    """A smaller deep copy of the model, in which only the kept coordinates are left; the model stays as it is.

    Its outputs are those of the masked model, see :func:`gated_call`.

    Raises:
        TypeError, ValueError: ``keep`` as in :meth:`Structure.check_keep`; a model that the structure is not of.
    """
    return ShrinkRecipe.of(structure, keep).shrink(model)


def _texts(value: Any) -> Any:
    return {str(key): _texts(one) for key, one in value.items()} if isinstance(value, dict) else value
