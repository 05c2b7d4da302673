"""Parameters and MACs of a shrunk model, predicted: sums of products of how many positions are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.flat import unwrapped
from .axes import Structure

BUDGETS = ("params", "macs", "channels")


class Costs:
    """What a structure's model costs, dense or with some coordinates kept.

    - ``"params"``: elements of its parameters, tied ones once.
    - ``"macs"``: multiply-accumulates of its convolutions and linear layers in one call with the example inputs; the
      products of activations in attention are not counted.
    - ``"channels"``: coordinates.

    Args:
        model: it is called once, on the inputs, in eval mode; it stays as it is.
        structure: of this model.
        args, kwargs: example inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        structure: Structure,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ):
        model = unwrapped(model)
        self._structure = structure
        places = {(entry.tensor, entry.dim): i + 1 for i, entry in enumerate(structure.entries)}
        uses = multiplications(model, args, kwargs)
        factors: list[tuple[int, int, list[int]]] = []  # (elements per kept position, times used, entries)
        for name, parameter in model.named_parameters():
            shape, inside, constant = tuple(parameter.shape), [], 1
            for dim, size in enumerate(shape):
                if (name, dim) in places:
                    inside.append(places[name, dim])
                else:
                    constant *= size
            factors.append((constant, uses.get(name, 0), inside))
        widest = max((len(inside) for _, _, inside in factors), default=0)
        self._constants = torch.tensor([[constant, constant * times] for constant, times, _ in factors])  # (T, 2)
        # Number 0 is the factor 1.
        self._factors = torch.tensor([inside + [0] * (widest - len(inside)) for _, _, inside in factors])
        self._fixed = torch.tensor([1, *(int((entry.index < 0).sum()) for entry in structure.entries)])
        self._entry = torch.cat(
            [torch.full((int((e.index >= 0).sum()),), i + 1) for i, e in enumerate(structure.entries)]
        )
        self._coordinate = torch.cat([entry.index[entry.index >= 0] for entry in structure.entries])
        self.dense = {budget: self.cost(torch.ones(structure.size, dtype=torch.bool), budget) for budget in BUDGETS}

    def cost(
        self,
        keep: Tensor,  # (C,) bool
        budget: str,
    ) -> int:
        """What is left, exactly.

        Raises:
            ValueError: no such budget.
        """
        if budget not in BUDGETS:
            raise ValueError(f"budget: wanted one of {BUDGETS}, got {budget!r}")
        if budget == "channels":
            return int(keep.sum())
        counts = self._fixed.index_add(0, self._entry, keep[self._coordinate].long())
        products = counts[self._factors].prod(1)
        return int((products * self._constants[:, BUDGETS.index(budget)]).sum())

    def alike(self) -> Tensor:  # (C,) int64
        """A number per coordinate, the same for those of a group that cost the same whatever else is kept."""
        entries = [[] for _ in range(self._structure.size)]  # type: list[list[int]]
        for entry, coordinate in zip(self._entry.tolist(), self._coordinate.tolist(), strict=True):
            entries[coordinate].append(entry)
        numbers: dict[tuple[int, ...], int] = {}
        return torch.tensor([numbers.setdefault(tuple(one), len(numbers)) for one in entries])


def multiplications(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """How often the weight of each convolution and linear layer is multiplied with in one call, by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, int] = {}

    def look(module: Any, inputs: Any, output: Tensor) -> None:
        if isinstance(module, nn.modules.conv._ConvNd):
            read = inputs[0] if module.transposed else output
            times = read.numel() // (module.in_channels if module.transposed else module.out_channels)
        else:
            times = output.numel() // output.shape[-1]
        name = names[id(module.weight)]
        found[name] = found.get(name, 0) + times

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd) or _transposed(m)]
    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(look) for module in layers]
    try:
        model.eval()
        with torch.no_grad():
            model(*args, **dict(kwargs or {}))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return found


def _transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
