"""Channels, heads and neurons in the place of single weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...config import SFPKConfig
from ...coordinates.flat import Coordinates, Ignored, PrunableTensor, SkippedTensor, named_parameters, unwrapped
from ...masks.maskset import MaskSet
from ...modeling.batches import move_to
from ...modeling.state import seeded
from ...structure import Costs, Structure, coordinate_sums, find_structure, select
from ...structure.axes import kept
from ...structure.find import check_structure_of, split_inputs
from ...structure.kinds import only
from ...structure.limits import limits_of
from ...structure.select import check_ceilings


class StructuredCoordinates(Coordinates):
    """The coordinates of a model's structure, group after group as tensors are in :class:`Coordinates`.

    Args:
        model: the trained model; no reference to it is kept.
        config: ``granularity`` says which kinds of groups may go; budget, ``min_keep``, ``round_to`` and
            ``layer_sparsity`` how many; ``on_refusal`` what happens to those that cannot be removed right.
        example_inputs: what the model is called with, as for :func:`~sfpk_kernels.structure.find_structure`.
        ignored_layers: modules or names whose outputs all stay.
        structure: one that was found before, of this model; ``None`` to find it.

    Raises:
        TypeError, ValueError, ImportError: as :func:`~sfpk_kernels.structure.find_structure`; no coordinates of this
            kind; a budget that even the fewest coordinates exceed.

    Attributes:
        structure: what may go, and with it what.
        costs: of the dense model and of what is left.
        limits: how many of each group may stay.
        tensors: one "tensor" per group.
        d: C, the number of coordinates.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SFPKConfig,
        example_inputs: Any,
        *,
        ignored_layers: Iterable[Ignored] = (),
        structure: Structure | None = None,
    ):
        # Looks at model and ignored layers, and says where it is and in what precision.
        everything = Coordinates(model, include_embeddings=True, include_biases=True, include_norms=True)
        self.device, self.dtype = everything.device, everything.dtype
        inputs = move_to(example_inputs, self.device)
        with seeded(config.seed, self.device):
            if structure is None:
                structure = find_structure(model, inputs, ignored_layers=ignored_layers, on_refusal=config.on_refusal)
            else:
                _alone(ignored_layers)
                check_structure_of(model, structure)
            self.structure: Structure = (
                structure if config.granularity == "group" else only(structure, config.granularity)
            )
            self.costs = Costs(model, self.structure, *split_inputs(inputs))
        self.budget = config.budget
        self.floors: dict[str, Any] = {
            "min_keep": config.min_keep, "round_to": config.round_to, "layer_sparsity": config.layer_sparsity
        }  # fmt: skip
        self.limits = limits_of(self.structure, **self.floors)
        self.tensors = [
            PrunableTensor(group.name, (), group.kind, (group.size,), group.first, group.size)
            for group in self.structure.groups
        ]
        self.d = self.structure.size
        parameters = named_parameters(model)
        entries = self.structure.by_tensor()
        self._shapes = {
            name: tuple(parameters[name].shape)
            for name in entries
            if name in parameters and (parameters[name].dim() > 1 or any(one.role == "gate" for one in entries[name]))
        }
        self.skipped = [
            SkippedTensor(name, tuple(one.shape), one.numel(), "nothing goes, or goes with weights that do")
            for name, one in unwrapped(model).named_parameters()
            if name not in self._shapes
        ]
        select(self.structure, self.costs, self.saliency(model), config.sparsity, config.budget, **self.floors)
        if config.layer_sparsity is not None and not config.partway:
            check_ceilings(
                self.structure, self.costs, config.sparsity, config.budget, self.limits, config.layer_sparsity
            )

    @property
    def masked(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that :meth:`masks_of` covers, in order."""
        return dict(self._shapes)

    @property
    def copied(self) -> int:
        """Weights that a pass has copies of, gradients included."""
        sizes = [torch.Size(self._shapes[one.tensor]).numel() for one in self.structure.gates]
        return 3 * sum(sizes)

    def flatten(self, model: nn.Module) -> Tensor:
        """Ones (C,): what a mask value is multiplied with; fp32, or fp64 if the model has fp64 weights.

        Raises:
            ValueError: a weight that goes with a coordinate is not finite.
        """
        parameters = named_parameters(model)
        bad = [name for name in self._shapes if not bool(parameters[name].detach().isfinite().all())]
        if bad:
            raise ValueError(f"model: wanted finite weights, got NaN or infinite ones in {', '.join(bad)}")
        return torch.ones(self.d, dtype=self.dtype, device=self.device)

    def saliency(self, model: nn.Module) -> Tensor:
        """a_c = Σ|θ_e| of the weights that compute or read each coordinate, (C,)."""
        parameters = named_parameters(model)
        names = {one.tensor for one in self.structure.entries} & parameters.keys()
        values = {name: parameters[name].detach().abs() for name in names}
        return coordinate_sums(self.structure, values).to(self.device, self.dtype)

    def masks_of(
        self,
        keep: Tensor,  # (C,) bool
    ) -> MaskSet:
        """Masks of the dense model's weights: False in every row and column that goes."""
        keep = keep.cpu()
        masks = {name: torch.ones(shape, dtype=torch.bool, device="cpu") for name, shape in self._shapes.items()}
        for entry in self.structure.entries:
            if entry.tensor in masks:
                mask = masks[entry.tensor]
                mask.movedim(entry.dim, -1).logical_and_(kept(entry.index, keep))
        return MaskSet(masks)

    def keep_of(self, masks: MaskSet) -> Tensor:  # (C,) bool
        """What :meth:`masks_of` made these masks of: a column stays as long as anything in it does."""
        keep = torch.zeros(self.d, dtype=torch.bool, device="cpu")
        for gate in self.structure.gates:
            left = masks[gate.tensor].movedim(gate.dim, 0).flatten(1).any(1)
            inside = gate.index >= 0
            keep[gate.index[inside & left]] = True
        return keep

    def fingerprint(self) -> str:
        """SHA-256 over all that decides which coordinates there are and what they cost."""
        structure = self.structure
        digest = hashlib.sha256(json.dumps(self.costs.dense).encode())
        for group in structure.groups:
            digest.update(json.dumps([group.name, group.kind, group.size]).encode())
        for entry in structure.entries:
            digest.update(json.dumps([entry.tensor, entry.dim, entry.role, entry.index.tolist()]).encode())
        for norm in structure.norms:
            digest.update(json.dumps([norm.module, norm.index.tolist()]).encode())
        for one in structure.attributes:
            digest.update(json.dumps([one.module, one.name, one.unit, one.index.tolist()]).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """A table of the groups, and of what stays."""
        rows = [f"{group.name}  {group.size:,} {group.kind}s" for group in self.structure.groups]
        rows += [f"{name}  stays: {why}" for name, why in self.structure.protected.items()]
        dense = self.costs.dense
        return "\n".join([*rows, f"{self.d:,} coordinates; {dense['params']:,} parameters, {dense['macs']:,} MACs"])


def _alone(ignored_layers: Iterable[Ignored]) -> None:
    """A structure that was found knows already what stays."""
    if ignored_layers:
        raise TypeError(
            f"ignored_layers: wanted only without structure=, which was found already, got {ignored_layers!r}"
        )
