"""SFPKPruner: the numbered steps of the method, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..config import SFPKConfig
from ..coordinates.flat import Ignored
from ..execution import Execution
from ..modeling.batches import move_to
from ..modeling.state import autograd_allowed, seeded
from ..modeling.turns import alone, end_contexts, lock
from ..utils.arguments import called, check_loss_fn
from .averaging import staying
from .energy import LossFn
from .loop import Loop
from .nonfinite import standing_still
from .parts import coordinates_of, of_covered
from .reading import read_together
from .records import StepRecord
from .run import Run
from .settings import FIELDS, chosen
from .step import move_particles
from .waypoints import check_waypoints

_CALL = "SFPKPruner(model, sparsity, loss_fn=…)"


class SFPKPruner(Loop):
    """Prunes a trained model by simulating mask particles (SFPK-pruner, ICLR 2025).

    The model is only read: its weights, gradients, mode, buffers, ``requires_grad`` flags and parameter
    identities are the same after every call, also after an exception. Apply ``result.mask`` to prune it.

    A step is done as a whole or not at all: after an error or an interruption (Ctrl-C) anywhere in it the run either
    goes on from the step before, bit for bit, or says that it cannot, because particles have moved; what was saved
    before can then be resumed. torch's random generators are shared by the threads of a process, so steps, callbacks
    and the reading of batches take turns with those of other pruners in other threads, and no outcome depends on the
    others (whatever else draws from the global generator meanwhile does disturb).

    Args:
        model: the trained, dense model, on one device. Its weights are copied now; make a new pruner if they
            change.
        sparsity: fraction of the prunable weights that is REMOVED, in (0, 1); everything else at its default.
        passes: forward and backward passes the run may take, beside ``sparsity``: as many steps as these allow.
        loss_fn: ``loss_fn(model, batch) -> scalar tensor``; ``None`` for cross-entropy on batches (x, y) and
            the output's ``.loss`` on dict batches.
        config: instead of ``sparsity``: all that decides the mask, see :class:`SFPKConfig`.
        execution: how it is computed, see :class:`Execution`.
        ignored_layers, include, include_embeddings, include_biases, include_norms: what is prunable, see
            :class:`Coordinates`.
        example_inputs: with ``config.granularity`` other than ``"weight"``: what the model is called with, a tensor, a
            tuple of arguments or a dict of keywords; see :func:`~sfpk_kernels.structure.find_structure`, whose errors
            apply.
        callbacks: called with the :class:`StepRecord` of every step. They must not wait for another thread's pruner.
        start: (n, d) particles to go on from, such as those of an earlier run; the schedule begins at their mean
            density. ``None``: at 1, nothing removed.
        waypoints: sparsities at which to take an exact mask on the way (``result.waypoints``, ``result.mask_at``).
            Taking them does not change the run, unless ``config.settle`` is set. Of what ``config.sparsity_of`` says;
            results speak of the covered weights.
        keep_scores: keep the scores behind them, too (d numbers each), for the masks of sparsities in between.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: nothing prunable, a model on two devices or made under ``torch.inference_mode()``, or a sparsity
            that keeps no weight.
        MemoryError: particles and weights alone will not fit.
    """

    @called(_CALL, checkpoints="waypoints=[…]", **FIELDS)
    @alone
    @autograd_allowed()
    def __init__(
        self,
        model: nn.Module,
        sparsity: float | None = None,
        *,
        passes: int | None = None,
        loss_fn: LossFn | None = None,
        config: SFPKConfig | None = None,
        execution: Execution | None = None,
        ignored_layers: Iterable[Ignored] = (),
        include: Iterable[Ignored] = (),
        include_embeddings: bool = False,
        include_biases: bool = False,
        include_norms: bool = False,
        example_inputs: Any = None,
        callbacks: Sequence[Callable[[StepRecord], None]] = (),
        start: Tensor | None = None,
        waypoints: Iterable[float] = (),
        keep_scores: bool = False,
    ):
        config, execution = chosen(_CALL, sparsity, config, execution, passes)
        check_loss_fn(loss_fn)
        coordinates = coordinates_of(
            model,
            config,
            execution,
            example_inputs=example_inputs,
            ignored_layers=ignored_layers,
            include=include,
            include_embeddings=include_embeddings,
            include_biases=include_biases,
            include_norms=include_norms,
        )
        if config.sparsity_of == "model":
            found = check_waypoints(waypoints, config)
            waypoints = [of_covered(config.replace(sparsity=one), coordinates).sparsity for one in found]
        config = of_covered(config, coordinates)
        run = Run(model, coordinates, loss_fn, config, execution, start, waypoints, keep_scores)
        super().__init__(run, callbacks)

    @autograd_allowed()
    def step(self, batches: Sequence[Any]) -> StepRecord:
        """One step of every particle.

        Args:
            batches: one per particle: n of them, and one once the particles are merged (``config.merge``).

        Raises:
            RuntimeError: the run is over, or an error or an interruption has left a step half done.
            ValueError: another number of batches.
            FloatingPointError: a loss that is not finite. The particles have not moved then (with
                ``update="gauss_seidel"`` those before it have, as the message says).
            MemoryError: as for :meth:`run`.
        """
        self._attempt.check("step")
        if self.done:
            raise RuntimeError(f"step: the run is over after {self._run.system.step} steps")
        n = len(self.particles)
        if not isinstance(batches, Sequence) or len(batches) != n:
            got = len(batches) if isinstance(batches, Sequence) else type(batches).__name__
            raise ValueError(f"batches: wanted a list of {n}, one per particle, got {got}")
        try:
            with lock(), self._run.guard():
                record = self._step([move_to(batch, self.coordinates.device) for batch in batches])
            self._call_back(record)
        except BaseException as error:
            end_contexts(error)
            raise
        return record

    def _step(
        self,
        batches: Sequence[Any],
        taken: int = 0,  # of them from the loader of a run
    ) -> StepRecord:
        """The numbered steps of the method, in their order."""
        self._attempt.check("step")
        run, system, number = self._run, self._run.system, self._run.system.step + 1
        if run.plan is None:
            run.make_plan(batches[0])
        started = time.perf_counter()
        reached, dimensions, agreements = run.look_for_gradients(), run.look_at_dimensions(), run.look_at_agreements()
        beta = staying(self.config, run.history)
        with self._attempt:
            densities = system.densities
            # 1. polarize
            keep = run.polarizer.polarize(system.masks, densities, self.config.polarizer, system.known_densities)
            observed = run.diagnostics.observe(keep)
            # 2. energies, each particle on its own batch; 3.-7. repulsion, transition, retraction, consensus
            with seeded(run.seed_of(number), self.coordinates.device):
                energies, stats = move_particles(
                    self.config, run.energy, system, keep, batches, lambda: run.angle(dimensions, beta), reached,
                    [one for one in (dimensions, agreements) if one is not None], beta,
                )  # fmt: skip
            # All that the host wants to know of the step, in the one wait for the device.
            read = read_together(
                start_density=densities.mean(),
                energies=energies,
                densities=stats.densities,
                cosines=stats.cosines,
                deviation=run.diagnostics.deviation(system.masks, stats),
                **observed._asdict(),
                **({} if reached is None or reached.flags is None else {"reached": reached.flags}),
                **({} if dimensions is None else {"effective_dimensions": dimensions.shares}),
                **({} if agreements is None else {"agreements": agreements.values}),
            )
            missing = [] if reached is None else reached.missing(read.pop("reached"), number)
            skips = self.config.nonfinite == "skip_particle"
            skipped = standing_still(read["energies"], read["cosines"], number, skips)
            # 8. vote, and the masks of the sparsities passed in this step
            score = run.voting(read["energies"], read["densities"])
            passed = run.waypoints.passed(number, system.schedule[number], score, run.mask_of)
            record = StepRecord(
                step=number,
                scheduled_density=system.schedule[number],
                seconds=time.perf_counter() - started,
                skipped=skipped,
                **read,
            )
            record.alarms.extend(run.alarms.check(run.history, record, missing))
            run.count_in(record, energies, passed, taken)
            # 9. several become one, once
            if system.merge_is_due:
                run.merge()
        return record
