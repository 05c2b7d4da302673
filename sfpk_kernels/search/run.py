"""A run as it stands: its parts, each of which keeps its own state, and what its steps have left."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..config import SFPKConfig
from ..coordinates.flat import Coordinates
from ..coordinates.pattern import check_divides
from ..execution import Execution
from ..masks.maskset import MaskSet
from ..modeling.state import check_no_inference_tensors, guarded, mode_note
from ..modeling.turns import end_contexts
from ..modeling.whole_model import Registered
from .averaging import Gradients
from .diagnostics import Alarms, Diagnostics, layer_names
from .energy import LossFn
from .fingerprint import model_fingerprint
from .merging import energies_of
from .particles import ParticleSystem
from .parts import energy_of, masks_of, polarizer_of, structure_fingerprint
from .planning import Plan, check_state, plan_run, state_device
from .records import StepRecord
from .result import PruneResult
from .settings import check_together, warn_of_poor
from .step_length import StepLength
from .structured.result import result_kind
from .unreached import Reached
from .vote import Vote
from .waypoints import Waypoint, Waypoints

logger = logging.getLogger(__name__)


class Run:
    """The parts of a run, made for each other.

    Args:
        model: the dense model, read and never changed.
        coordinates: of ``model``.
        loss_fn: as for :class:`~sfpk_kernels.SFPKPruner`, like all below.
        config: what decides the mask.
        execution: how it is computed.
        start: particles to go on from.
        waypoints: sparsities at which masks are taken.
        keep_scores: keep the scores behind them.

    Attributes:
        theta: (d,) the dense weights, where the particles are.
        plan: memory and time, from the first batch on.
        history: one record per step done.
        energies: (n,) fp64 of the last step, None before the first; their mean, (1,), once particles are merged.
        taken: batches of the loader that were used.
        fingerprint: of the model, taken now: forward passes may write buffers.
        structure: the fingerprint of channels, heads and neurons; None for single weights.
    """

    def __init__(
        self,
        model: nn.Module,
        coordinates: Coordinates,
        loss_fn: LossFn | None,
        config: SFPKConfig,
        execution: Execution,
        start: Tensor | None,
        waypoints: Iterable[float],
        keep_scores: bool,
    ):
        check_no_inference_tensors(model)
        check_together(config, execution, model)
        check_divides(coordinates.tensors, config.pattern)
        warn_of_poor(config)
        check_state(coordinates, config, execution)
        self.model, self.coordinates = model, coordinates
        self.config, self.execution = config, execution
        self.theta = coordinates.flatten(model).to(state_device(coordinates, execution))
        self.polarizer = polarizer_of(model, coordinates, self.theta, config, execution)
        saliency = self.polarizer.saliency if config.kernel == "weighted_rbf" else None
        self.system = ParticleSystem(coordinates.d, config, execution, self.theta, saliency, start)
        self.energy = energy_of(model, loss_fn, coordinates, self.theta, execution)
        self.vote = Vote(
            self.polarizer,
            config.final_score or config.polarizer,
            config.vote,
            config.vote_ratio,
            config.momentum,
            config.sparsity,
        )
        self.diagnostics = Diagnostics(coordinates, config, self.theta.device)
        self.alarms = Alarms(config, layer_names(coordinates))
        self.waypoints = Waypoints(waypoints, config, self.system.schedule[0], keep_scores)
        if config.settle:
            self.system.settle_at(self.waypoints.stops)
        self.plan: Plan | None = None
        self.history: list[StepRecord] = []
        self._step_length = StepLength(config, self.history)
        self.energies: Tensor | None = None
        self.taken = 0
        self.fingerprint = model_fingerprint(model)
        self.structure = structure_fingerprint(coordinates)

    @property
    def done(self) -> bool:
        """Whether the run is over: all K steps, or the target density with ``early_stop``."""
        if self.system.done:
            return True
        return self.config.early_stop and self.system.mean_density <= self.config.target_density

    def seed_of(self, number: int) -> int:
        """One per step, far from those of neighbouring seeds; of step 0: that of the data's order."""
        return (self.config.seed * 1_000_003 + number) % 2**63

    @contextmanager
    def guard(self) -> Iterator[None]:
        """The model in the mode energies are measured in, and as it was afterwards.

        What computes energies, and the guard itself, put back what they change; where an interruption comes in between,
        that is done once more.
        """
        before = Registered(self.model)
        try:
            with guarded(self.model, bn=self.config.bn, training=self.config.model_mode == "train"):
                yield
        except BaseException as error:
            end_contexts(error)
            before.restore()
            raise

    def make_plan(self, batch: Any) -> Plan:
        """Measure the first batch, decide what is left to decide, refuse what will not fit; under :meth:`guard`."""
        taken = sum(t.numel() * t.element_size() for t in (self.theta, self.system.masks))
        try:
            plan = plan_run(self.energy, self.config, self.execution, batch, taken)
        except BaseException as error:
            if hasattr(error, "add_note"):  # Python ≥ 3.11
                error.add_note("sfpk_kernels: in the trial pass before step 1; the particles have not moved")
                if isinstance(error, Exception):  # no interruption
                    error.add_note(mode_note(self.config))
            raise
        logger.info("%s", plan)
        plan.check()
        self.plan = plan
        return plan

    def plan_in_use(self) -> Plan:
        """The plan, with the way of computing energies that is in use: another than planned where vmap failed."""
        assert self.plan is not None
        return dataclasses.replace(self.plan, choice=self.energy.choice or self.plan.choice)

    def look_for_gradients(self) -> Reached | None:
        """In step 1, and in step 2 where step 1 had none: then no move had anything of one."""
        done = self.system.step
        if done == 0 or (done == 1 and not any(self.history[0].cosines)):
            return Reached(self.coordinates, needed=done == 1 or self.config.n_steps == 1)
        return None

    def angle(self, gradients: Gradients | None, staying: float) -> float | None:
        """By which particles turn in the next step, where the radius does not say it."""
        now = gradients if gradients is not None and gradients.measured else None
        return self._step_length.angle(self.system.step, self.system.schedule[0], now, staying)

    def look_at_gradients(self) -> Gradients | None:
        """Where they are averaged, and in the steps whose gradients say how long later moves are."""
        averaged, measured = self.system.averages is not None, self._step_length.looks_at(self.system.step)
        return Gradients(averaged, measured) if averaged or measured else None

    def count_in(self, record: StepRecord, energies: Tensor, passed: list[Waypoint], taken: int) -> None:
        """All of a step is known: from here on it is done.

        Args:
            record: of it.
            energies: (n,) fp64 before its moves.
            passed: masks taken in it.
            taken: batches of the loader that it used.
        """
        self.system.end_step(record.densities)
        self.energies = energies
        self.waypoints.take(passed)
        self.history.append(record)
        self.taken += taken

    def merge(self) -> None:
        """The particles become one, after a step that was counted in; what n of them needed is freed."""
        self.energy.drop_gradients()  # first: there is room for the one then
        self.system.merge_()
        self.energies = energies_of(self.history, self.config, self.theta.device)

    def take_over(self, history: list[StepRecord], energies: Tensor | None, taken: int, plan: Plan | None) -> None:
        """Go on from what was checked; the parts have been taken over."""
        self.history[:] = history
        self.energies, self.taken = energies, taken
        self.plan = self.plan if plan is None else plan

    def voting(self, energies: Sequence[float], densities: Sequence[float]) -> Callable[[], Tensor]:
        """Count a step in, where earlier steps matter; what is returned gives the score (d,) as it stands then."""
        if self.vote.remembers:
            self.vote.update(self.system.masks, densities, energies)
        return lambda: self.vote.current(self.system.masks, densities, energies)

    def mask_of(self, score: Tensor, sparsity: float) -> MaskSet:
        """The best coordinates by a score, exactly counted."""
        return masks_of(self.polarizer.final(score, sparsity), self.coordinates)

    def result(self) -> PruneResult:
        """What the particles as they stand vote for.

        Raises:
            RuntimeError: no step was done yet.
        """
        if self.energies is None or self.plan is None:
            raise RuntimeError("result: wanted at least one step done, got none")
        densities = self.system.known_densities or self.system.densities.tolist()
        score = self.vote.current(self.system.masks, densities, self.energies.tolist())
        mask = self.mask_of(score, self.config.sparsity)
        kind, more = result_kind(mask, self.coordinates)
        return kind(
            mask=mask,
            history=list(self.history),
            particles=self.system.masks if self.done else self.system.masks.clone(),
            score=score.clone() if self.vote.remembers else score,
            config=self.config,
            execution=self.execution,
            coordinates=self.coordinates,
            plan=self.plan_in_use(),
            densities=self.system.densities.clone(),
            energies=self.energies.clone(),
            waypoints=list(self.waypoints.taken),
            polarizer=self.polarizer,
            **more,
        )
