"""Parameters and MACs of a shrunk model, predicted: sums of products of how many positions are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..coordinates.flat import unwrapped
from ..utils.modes import within
from ._counting import Counting, counting
from .axes import BUDGETS, Structure
from .outputs import called


class Costs:
    """What a structure's model costs, dense or with some coordinates kept.

    - ``"params"``: elements of its parameters, tied ones once.
    - ``"macs"``: multiply-accumulates of one call with the example inputs, as torch's counter of floating point
      operations sees them: convolutions, products of matrices, attention.
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
        uses, macs = multiplications(model, args, kwargs)
        factors: list[tuple[list[int], list[int]]] = []  # (what each kept position counts, entries)
        buffers = dict(model.named_buffers())
        for name, tensor in [*model.named_parameters(), *buffers.items()]:
            inside, constant = [], 1
            for dim, size in enumerate(tensor.shape):
                if (name, dim) in places:
                    inside.append(places[name, dim])
                else:
                    constant *= size
            counted = 0 if name in buffers else constant
            columns = [counted, counted * uses.get(name, 0), constant * tensor.element_size()]
            factors.append((columns, inside))
        widest = max((len(inside) for _, inside in factors), default=0)
        self._constants = torch.tensor(
            [columns for columns, _ in factors], dtype=torch.int64, device="cpu"
        )  # (T, 3): elements, multiply-accumulates, bytes
        # Number 0 is the factor 1.
        self._factors = torch.tensor(
            [inside + [0] * (widest - len(inside)) for _, inside in factors], dtype=torch.int64, device="cpu"
        )
        self._fixed = torch.tensor(
            [1, *(int((entry.index < 0).sum()) for entry in structure.entries)], dtype=torch.int64, device="cpu"
        )
        self._entry = torch.cat(
            [
                torch.full((int((e.index >= 0).sum()),), i + 1, dtype=torch.int64, device="cpu")
                for i, e in enumerate(structure.entries)
            ]
        )
        self._coordinate = torch.cat([entry.index[entry.index >= 0] for entry in structure.entries])
        self._per_coordinate, self._constant = _per_head(structure, model, uses, macs), 0
        dense = self.cost(torch.ones(structure.size, dtype=torch.bool, device="cpu"), "macs")
        self._constant = max(macs[""] - dense, 0)  # products that stay whatever is kept
        self.dense = {
            budget: self.cost(torch.ones(structure.size, dtype=torch.bool, device="cpu"), budget) for budget in BUDGETS
        }

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
        keep = keep.cpu()
        if budget == "channels":
            return int(keep.sum())
        found = self._sum(keep, BUDGETS.index(budget))
        return found if budget == "params" else found + self._constant + int(self._per_coordinate[keep].sum())

    def bytes(
        self,
        keep: Tensor,  # (C,) bool
    ) -> int:
        """What parameters and buffers take in memory with that kept, exactly; sparse buffers as if dense."""
        return self._sum(keep.cpu(), 2)

    def left(
        self,
        keep: Tensor,  # (C,) bool
    ) -> dict[str, int]:
        """``"params"``, ``"macs"``, ``"channels"`` and ``"bytes"`` of what is kept."""
        return {**{budget: self.cost(keep, budget) for budget in BUDGETS}, "bytes": self.bytes(keep)}

    def whole(self) -> dict[str, int]:
        """The same of the dense model."""
        return self.left(torch.ones(self._structure.size, dtype=torch.bool, device="cpu"))

    def _sum(self, keep: Tensor, column: int) -> int:
        """Σ over the tensors: what a kept position counts, times how many are kept in each dim."""
        counts = self._fixed.index_add(0, self._entry, keep[self._coordinate].long())
        return int((counts[self._factors].prod(1) * self._constants[:, column]).sum())

    @cached_property
    def alike(self) -> Tensor:  # (C,) int64
        """A number per coordinate, the same for those of a group that cost the same whatever else is kept."""
        entries = [[] for _ in range(self._structure.size)]  # type: list[list[int]]
        for entry, coordinate in zip(self._entry.tolist(), self._coordinate.tolist(), strict=True):
            entries[coordinate].append(entry)
        numbers: dict[tuple[int, ...], int] = {}
        return torch.tensor(
            [numbers.setdefault(tuple(one), len(numbers)) for one in entries], dtype=torch.int64, device="cpu"
        )

    @cached_property
    def counting(self) -> Counting:
        """The same costs by how many coordinates of each class are kept."""
        groups = np.repeat(
            np.arange(len(self._structure.groups), dtype=np.int64), [group.size for group in self._structure.groups]
        )
        constants, own = self._constants.numpy(), self._per_coordinate.numpy()
        nothing, ones = np.zeros_like(own), np.ones_like(own)
        return counting(
            self.alike.numpy(),
            groups,
            (self._entry.numpy(), self._coordinate.numpy()),
            self._fixed.numpy(),
            self._factors.numpy(),
            {"params": constants[:, 0], "macs": constants[:, 1], "channels": np.zeros_like(constants[:, 0])},
            {"params": nothing, "macs": own, "channels": ones},
            {"params": 0, "macs": self._constant, "channels": 0},
        )


def multiplications(
    model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """(how often the weight of each convolution and linear layer is multiplied with, MACs of each module), by name.

    The model itself is "". It is called once, in eval mode, and put back.
    """
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton

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
    counter = FlopCounterMode(display=False)
    try:
        model.eval()
        # Fused attention has no count on every device.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), within(counter):
            called(model, tuple(args), dict(kwargs or {}))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    root = type(model).__name__
    macs = {
        name.removeprefix(root).removeprefix("."): sum(counts.values()) // 2
        for name, counts in counter.get_flop_counts().items()
        if name == root or name.startswith(f"{root}.")
    }
    return found, {"": counter.get_total_flops() // 2, **macs}


def _per_head(
    structure: Structure, model: nn.Module, uses: Mapping[str, int], macs: Mapping[str, int]
) -> Tensor:  # (C,) int64
    """What each head multiplies beside its weights: queries with keys, and the result with values."""
    found = torch.zeros(structure.size, dtype=torch.int64, device="cpu")
    for group in structure.groups:
        if group.kind == "head":
            inside = group.name.rpartition(".")[0]
            weights = [
                uses[name] * parameter.numel()
                for name, parameter in model.named_parameters()
                if name in uses and name.startswith(f"{inside}." if inside else "")
            ]
            found[group.span] = max(macs.get(inside, 0) - sum(weights), 0) // group.size
    return found


def _transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
