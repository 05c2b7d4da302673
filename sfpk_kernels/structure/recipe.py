"""What stays of a model, as plain lists: enough to shrink a fresh copy of the architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        for name, dims in self.sizes.items():
            for dim, size in dims.items():
                got = tuple(tensors[name].shape) if name in tensors else "none"
                if got == "none" or dim >= len(got) or got[dim] != size:
                    raise ValueError(f"model: wanted {name} with {size} positions along dim {dim}, got shape {got}")
        smaller = self.share(model)
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
            if any(len(one) < self.sizes[name][dim] for dim, one in dims.items())
        }
        slice_tensors(smaller, removed)
        set_sizes(smaller, self.slices, self.attributes)
        for module in smaller.modules():  # all that is left is kept: its statistics are those of its own
            if isinstance(module.__dict__.get("forward"), KeptForward):
                del module.__dict__["forward"]
        return smaller

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, with text as keys."""
        return _texts(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ShrinkRecipe:
        """The recipe back from :meth:`to_dict`.

        Raises:
            ValueError: something else.
        """
        try:
            by_dim = [
                {name: {int(dim): one for dim, one in dims.items()} for name, dims in values[part].items()}
                for part in ("slices", "sizes")
            ]
            return cls(dict(values["groups"]), by_dim[0], by_dim[1], dict(values["attributes"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"values: wanted what to_dict() wrote, got {str(values)[:80]}") from error


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
