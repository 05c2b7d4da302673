"""SFPKPruner: the loop of the method, and nothing else."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .batches import BatchStream, move_to
from .config import SFPKConfig
from .coordinates import Coordinates, Ignored
from .energy import LossFn
from .masks import MaskSet
from .model_state import guarded, seeded
from .particles import ParticleSystem
from .planning import Plan, check_state, make_energy, plan_run, state_device
from .polarizer import Polarizer, budget
from .vote import Vote

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """What happened in one step; plain numbers, one value per particle in the lists."""

    step: int  # 1 … K
    scheduled_density: float  # ρ_k
    densities: list[float]  # soft density after the step
    energies: list[float]  # loss at the step's start, at the density of the step before
    cosines: list[float]  # cosine between the move and -∂L/∂m
    seconds: float

    @property
    def energy(self) -> float:
        """Mean energy of the particles."""
        return sum(self.energies) / len(self.energies)

    @property
    def density(self) -> float:
        """Mean soft density of the particles."""
        return sum(self.densities) / len(self.densities)


@dataclasses.dataclass(frozen=True)
class PruneResult:
    """Outcome of a run."""

    mask: MaskSet  # the final mask
    history: list[StepRecord]  # one entry per step done
    particles: Tensor  # (n, d) final particles (of a finished run the live ones, not a copy)
    score: Tensor  # (d,) the vote behind the mask
    config: SFPKConfig
    coordinates: Coordinates
    plan: Plan  # memory, and how particles went through the model

    def apply_(self, model: nn.Module) -> nn.Module:
        """Apply the mask to ``model``; see :meth:`MaskSet.apply_`."""
        return self.mask.apply_(model)


class SFPKPruner:
    """Prunes a trained model by simulating mask particles (SFPK-pruner, ICLR 2025).

    The model is only read: its weights, gradients, mode, buffers, ``requires_grad`` flags and parameter
    identities are the same after every call, also after an exception. Apply ``result.mask`` to prune it.

    Args:
        model: the trained, dense model, on one device. Its weights are copied now; make a new pruner if they
            change.
        loss_fn: ``loss_fn(model, batch) -> scalar tensor``; ``None`` for cross-entropy on batches (x, y) and
            the output's ``.loss`` on dict batches.
        config: hyper-parameters; see :class:`SFPKConfig`.
        ignored_layers, include_embeddings, include_biases, include_norms: what is prunable, see
            :class:`Coordinates`.
        callbacks: called with the :class:`StepRecord` of every step.
        start: (n, d) particles to go on from, such as those of an earlier run; the schedule begins at their mean
            density. ``None``: at 1, nothing removed.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: nothing prunable, a model on two devices, or a sparsity that keeps no weight.
        MemoryError: particles and weights alone will not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        config: SFPKConfig,
        *,
        ignored_layers: Iterable[Ignored] = (),
        include_embeddings: bool = False,
        include_biases: bool = False,
        include_norms: bool = False,
        callbacks: Sequence[Callable[[StepRecord], None]] = (),
        start: Tensor | None = None,
    ):
        if not isinstance(config, SFPKConfig):
            raise TypeError(f"config: wanted an SFPKConfig, got {type(config).__name__}")
        if loss_fn is not None and not callable(loss_fn):
            raise TypeError(f"loss_fn: wanted a function (model, batch) -> scalar, got {type(loss_fn).__name__}")
        self.coordinates = Coordinates(
            model,
            ignored_layers=ignored_layers,
            include_embeddings=include_embeddings,
            include_biases=include_biases,
            include_norms=include_norms,
        )
        budget(config.sparsity, self.coordinates.d)
        check_state(self.coordinates, config)
        self.config = config
        self.history: list[StepRecord] = []
        self._model = model
        self._callbacks = tuple(callbacks)
        self.plan: Plan | None = None  # made on the first batch
        self._theta = self.coordinates.flatten(model).to(state_device(self.coordinates, config))
        backend = None if config.backend is None else f"{config.backend}?"
        self._polarizer = Polarizer(self.coordinates, self._theta, config.selection, backend)
        saliency = self._polarizer.saliency if config.kernel == "weighted_rbf" else None
        self._system = ParticleSystem(self.coordinates.d, config, self._theta, saliency, start)
        self._energy = make_energy(model, loss_fn, self.coordinates, self._theta, config)
        self._vote = Vote(
            self._polarizer,
            config.final_score or config.polarizer,
            config.vote,
            config.vote_ratio,
            config.momentum,
        )
        self._last_energies: Tensor | None = None
        self._broken: str | None = None  # why no step can follow

    @property
    def particles(self) -> Tensor:
        """(n, d), the live particles."""
        return self._system.masks

    @property
    def done(self) -> bool:
        """Whether the run is over: all K steps, or the target density with ``early_stop``."""
        if self._system.done:
            return True
        reached = float(self._system.densities.mean()) <= self.config.target_density
        return self.config.early_stop and reached

    def run(self, loader: Iterable[Any], *, progress: bool | None = None) -> PruneResult:
        """All remaining steps; every particle takes its own batch in every step.

        Args:
            loader: batches, cycled; n · K are used by a whole run. Its order is drawn under ``config.seed``
                where it uses torch's global generator.
            progress: show a bar; ``None`` for only on a terminal.

        Raises:
            ValueError: an empty loader or a one-shot iterator that runs out.
            FloatingPointError: a loss that is not finite; the message names step and particle.
            MemoryError: the run will not fit; the message holds the plan, and what would fit.
        """
        n, remaining = self.config.n_particles, self.config.n_steps - self._system.step
        with (
            self._guard(),
            seeded(self._step_seed(0), self.coordinates.device),
            tqdm(total=remaining, desc="SFPK", disable=None if progress is None else not progress) as bar,
        ):
            stream = BatchStream(loader, self.coordinates.device, n * remaining)  # draws the data order: seeded
            while not self.done:
                batches = stream.take(n)
                if self.plan is None:
                    plan = self._make_plan(batches[0])
                    if not bar.disable:
                        bar.write(str(plan), file=sys.stderr)
                record = self._step(batches)
                bar.set_postfix(loss=f"{record.energy:.4f}", density=f"{record.density:.4f}", refresh=False)
                bar.update()
            self._energy.release()
            return self.result()

    def step(self, batches: Sequence[Any]) -> StepRecord:
        """One step of every particle.

        Args:
            batches: n of them, one per particle.

        Raises:
            RuntimeError: the run is over, or an error left a lean step half done.
            ValueError: another number of batches.
            FloatingPointError: a loss that is not finite. The particles have not moved then (``memory="lean"``: those
                before it have, as the message says).
            MemoryError: as for :meth:`run`.
        """
        if self.done:
            raise RuntimeError(f"step: the run is over after {self._system.step} steps")
        if self._broken is not None:
            raise RuntimeError(f"step: this run cannot go on: {self._broken}")
        if not isinstance(batches, Sequence) or len(batches) != self.config.n_particles:
            got = len(batches) if isinstance(batches, Sequence) else type(batches).__name__
            raise ValueError(f"batches: wanted a list of {self.config.n_particles}, one per particle, got {got}")
        with self._guard():
            return self._step([move_to(batch, self.coordinates.device) for batch in batches])

    def _step(self, batches: Sequence[Any]) -> StepRecord:
        """The numbered steps of the method, in their order."""
        plan = self.plan or self._make_plan(batches[0])
        started = time.perf_counter()
        system, number = self._system, self._system.step + 1
        # 1. polarize
        keep = self._polarizer.polarize(system.masks, system.densities, self.config.polarizer)
        # 2. energies, each particle on its own batch; 3.-7. repulsion, transition, retraction, consensus
        moved = 0
        try:
            with seeded(self._step_seed(number), self.coordinates.device):
                if plan.memory == "fast":
                    energies, grads = self._energy(keep, batches)
                    self._check_finite(energies, grads, number)
                    stats = system.move_(grads)
                else:
                    energies = torch.empty(len(keep), dtype=torch.float64, device=self._theta.device)
                    cosines, grad = torch.zeros_like(energies), self._energy.buffer(1)
                    with self._energy.one_by_one():
                        for i in range(len(keep)):
                            energies[i] = self._energy.single(i, keep.rows(slice(i, i + 1)), batches[i], grad[0])
                            self._check_finite(energies[i : i + 1], grad, number, first=i)
                            stats = system.move_(grad, row=i)
                            cosines[i] = stats.cosines[i]
                            moved = i + 1
                    stats = stats._replace(cosines=cosines)
        except BaseException as error:
            who = f"particles 0 … {moved - 1} have moved" if moved else "the particles have not moved"
            if moved:
                self._broken = f"step {number} stopped half-way, {who}"
            if hasattr(error, "add_note"):  # Python ≥ 3.11
                error.add_note(f"sfpk_kernels: in step {number} of {self.config.n_steps}; {who}")
            raise
        self._last_energies = energies
        if self._vote.remembers:
            self._vote.update(system.masks, stats.densities, energies)
        record = StepRecord(
            step=number,
            scheduled_density=system.schedule[number],
            densities=stats.densities.tolist(),
            energies=energies.tolist(),
            cosines=stats.cosines.tolist(),
            seconds=time.perf_counter() - started,
        )
        self.history.append(record)
        for callback in self._callbacks:
            callback(record)
        return record

    def result(self) -> PruneResult:
        """The final mask from the particles as they stand.

        Raises:
            RuntimeError: no step was done yet.
        """
        if self._last_energies is None or self.plan is None:
            raise RuntimeError("result: wanted at least one step done, got none")
        score = self._vote.current(self._system.masks, self._system.densities, self._last_energies)
        mask = self._polarizer.final(score, self.config.sparsity)
        return PruneResult(
            mask=MaskSet.from_flat(mask, self.coordinates),
            history=list(self.history),
            particles=self._system.masks if self.done else self._system.masks.clone(),
            score=score.clone() if self._vote.remembers else score,
            config=self.config,
            coordinates=self.coordinates,
            plan=self.plan,
        )

    def _make_plan(self, batch: Any) -> Plan:
        """Measure the first batch, decide what is left to decide, refuse what will not fit."""
        taken = sum(t.numel() * t.element_size() for t in (self._theta, self._system.masks))
        try:
            plan = plan_run(self._energy, self.config, batch, taken)
        except BaseException as error:
            if hasattr(error, "add_note"):  # Python ≥ 3.11
                error.add_note("sfpk_kernels: in the trial pass before step 1; the particles have not moved")
            raise
        logger.info("%s", plan)
        plan.check()
        self.plan = plan
        return plan

    def _step_seed(self, number: int) -> int:
        """One per step, far from those of neighbouring seeds."""
        return (self.config.seed * 1_000_003 + number) % 2**63

    def _guard(self) -> Any:
        return guarded(self._model, bn=self.config.bn, dropout=self.config.dropout)

    def _check_finite(self, energies: Tensor, grads: Tensor, number: int, first: int = 0) -> None:
        finite = torch.isfinite(energies)
        what, value = "loss", energies
        if bool(finite.all()):
            # Row by row: no (n, d) temporary, and all threads at work. A NaN is both lowest and highest.
            extremes = torch.stack([torch.stack(torch.aminmax(row)) for row in grads])
            value = extremes.abs().amax(dim=1)
            finite, what = torch.isfinite(value), "gradient"
        if not bool(finite.all()):
            bad = int((~finite).int().argmax())
            raise FloatingPointError(
                f"loss_fn: wanted a finite {what}, got {float(value[bad])} in step {number}, particle {first + bad}"
            )


def prune(
    model: nn.Module,
    loss_fn: LossFn | None,
    loader: Iterable[Any],
    config: SFPKConfig,
    *,
    progress: bool | None = None,
    **options: Any,
) -> PruneResult:
    """Search a mask for ``model`` in one run; the model itself is not changed.

    ``options`` are those of :class:`SFPKPruner` (``ignored_layers``, ``include_embeddings``, ``callbacks``, …);
    arguments and errors as there and in :meth:`SFPKPruner.run`.
    """
    return SFPKPruner(model, loss_fn, config, **options).run(loader, progress=progress)
