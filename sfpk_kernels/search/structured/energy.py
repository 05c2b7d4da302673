"""Energies of particles over channels, heads and neurons: gates on what consumers read, ∂L/∂keep as the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...coordinates.flat import named_parameters
from ...modeling.state import seeded
from ...structure import GateBuffers, kept_statistics
from ..energy import Choice, LossFn, ParticleEnergy
from ..energy._problem import Problem
from ..energy._scale import LossScale
from ..energy._swap import stand_ins
from ..energy.choice import time_one_by_one
from ..energy.sequential import OneByOne
from ..polarizer import Polarized
from .coordinates import StructuredCoordinates


@dataclass(frozen=True)
class GatedProblem(Problem):
    """With the weights that consumers have in the dense model, as they were when the run began."""

    gates: GateBuffers | None = None


class Gated(OneByOne):
    """One particle at a time: consumers' weights are stood in for by gated ones, with a gradient of their own."""

    def __init__(self, problem: Problem, scale: LossScale):
        assert isinstance(problem, GatedProblem)
        assert problem.gates is not None
        assert isinstance(problem.coordinates, StructuredCoordinates)
        self.problem, self.scale = problem, scale
        self._structure = problem.coordinates.structure
        self._gates = problem.gates
        parameters = named_parameters(problem.model)
        self._memory, views = self._gates.new()
        self._gated = {name: nn.Parameter(view) for name, view in views.items()}
        self.leaves = list(self._gated.values())
        self._places = stand_ins(problem.model, {id(parameters[name]): gated for name, gated in self._gated.items()})
        self._loss = problem.loss_fn
        self._row = None
        self._keep = torch.ones(self._structure.size, dtype=torch.bool, device=problem.device)

    @torch.no_grad()
    def fill(self, keep: Polarized) -> None:
        """Write the weights whose removed columns are 0 where the model reads."""
        self._keep = keep.values[0].to(self.problem.device)
        self._gates.fill_(self._memory, self._keep)

    def load_dense(self) -> None:
        """Keep everything."""
        self.fill(Polarized(torch.ones(1, self._structure.size, dtype=torch.bool, device=self.problem.device)))

    def differentiate(self, batch: Any, row: Tensor) -> Tensor:
        """Forward and backward at the gates as they are; ∂L/∂keep, times the loss scale, into ``row``."""
        for leaf in self.leaves:
            leaf.grad = None
        with kept_statistics(self.problem.model, self._structure, self._keep):
            loss = self.accumulate(batch)
        row.copy_(
            self._gates.gradient({name: leaf.grad for name, leaf in self._gated.items() if leaf.grad is not None})
        )
        return loss


class StructuredEnergy(ParticleEnergy):
    """Loss L_i and gradient ∂L_i/∂keep at the gates of each particle, one after the other.

    Args:
        model: the dense model.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        coordinates: of ``model``.
        theta: ones (C,).
        backend: of the ops for masked weights.
        precision: ``"bf16"`` or ``"fp16"``, as in :class:`ParticleEnergy`.
        microbatch: samples per forward/backward.
    """

    one_by_one_runner = Gated

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        coordinates: StructuredCoordinates,
        theta: Tensor,
        *,
        backend: str | None = None,
        precision: str | None = None,
        microbatch: int | None = None,
    ):
        super().__init__(
            model, loss_fn, coordinates, theta, mode="sequential", precision=precision, microbatch=microbatch
        )
        gates = GateBuffers(coordinates.structure, named_parameters(model), backend)
        self.problem = GatedProblem(
            model, loss_fn, coordinates, theta, precision=precision, microbatch=microbatch, gates=gates
        )

    def choose(self, batch: Any, n: int, together: bool = True, trial_bytes: int | None = None) -> Choice:
        """Measure one pass; particles always go one by one."""
        with seeded(0, self.problem.device):
            seconds, transient = time_one_by_one(self._runner(Gated), batch)
        self.choice = Choice("sequential", "gates", {"sequential": seconds}, {"sequential": transient})
        return self.choice
