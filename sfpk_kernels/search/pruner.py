"""SFPKPruner: the loop of the method, and nothing else."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._dispatch import where_present
from ..config import SFPKConfig
from ..coordinates.flat import Coordinates, Ignored
from ..execution import Execution
from ..masks.maskset import MaskSet
from ..modeling.batches import BatchStream, move_to
from ..modeling.state import autograd_allowed, check_no_inference_tensors, guarded, mode_note, seeded
from ..modeling.turns import Turns, alone, end_contexts, lock
from ..modeling.whole_model import Registered
from ..ops import pack_mask
from ..utils.arguments import called, check_loader, check_loss_fn
from ..utils.files import load_state, save_state
from . import checkpoint
from . import state_checks as check
from .diagnostics import Alarms, Diagnostics, layer_names
from .energy import LossFn, energy_of
from .nonfinite import NonFiniteError, standing_still
from .particles import ParticleSystem, SystemState
from .planning import Plan, check_state, plan_run, state_device
from .polarizer import Polarizer, budget
from .reading import read_together
from .records import StepRecord
from .result import PruneResult
from .settings import check_together, chosen
from .step import gauss_seidel, jacobi
from .unreached import NoGradientError, Reached
from .vote import Vote
from .waypoints import Waypoint, check_waypoints

logger = logging.getLogger(__name__)

_COLUMNS = 80  # of the progress bar


class SFPKPruner:
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
        loss_fn: ``loss_fn(model, batch) -> scalar tensor``; ``None`` for cross-entropy on batches (x, y) and
            the output's ``.loss`` on dict batches.
        config: instead of ``sparsity``: all that decides the mask, see :class:`SFPKConfig`.
        execution: how it is computed, see :class:`Execution`.
        ignored_layers, include_embeddings, include_biases, include_norms: what is prunable, see
            :class:`Coordinates`.
        callbacks: called with the :class:`StepRecord` of every step. They must not wait for another thread's pruner.
        start: (n, d) particles to go on from, such as those of an earlier run; the schedule begins at their mean
            density. ``None``: at 1, nothing removed.
        waypoints: sparsities at which to take an exact mask on the way (``result.waypoints``, ``result.mask_at``).
            Taking them does not change the run, unless ``config.settle`` is set.
        keep_scores: keep the scores behind them, too (d numbers each), for the masks of sparsities in between.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: nothing prunable, a model on two devices or made under ``torch.inference_mode()``, or a sparsity
            that keeps no weight.
        MemoryError: particles and weights alone will not fit.
    """

    @called("SFPKPruner(model, sparsity, loss_fn=…)", checkpoints="waypoints=[…]")
    @alone
    @autograd_allowed()
    def __init__(
        self,
        model: nn.Module,
        sparsity: float | None = None,
        *,
        loss_fn: LossFn | None = None,
        config: SFPKConfig | None = None,
        execution: Execution | None = None,
        ignored_layers: Iterable[Ignored] = (),
        include_embeddings: bool = False,
        include_biases: bool = False,
        include_norms: bool = False,
        callbacks: Sequence[Callable[[StepRecord], None]] = (),
        start: Tensor | None = None,
        waypoints: Iterable[float] = (),
        keep_scores: bool = False,
    ):
        config, execution = chosen("SFPKPruner(model, sparsity, loss_fn=…)", sparsity, config, execution)
        check_loss_fn(loss_fn)
        self.coordinates = Coordinates(
            model,
            ignored_layers=ignored_layers,
            include_embeddings=include_embeddings,
            include_biases=include_biases,
            include_norms=include_norms,
        )
        budget(config.sparsity, self.coordinates.d)
        check_no_inference_tensors(model)
        check_together(config, execution, model)
        check_state(self.coordinates, config, execution)
        self.config, self.execution = config, execution
        self.history: list[StepRecord] = []
        self._model = model
        self._callbacks = _functions(callbacks)
        self.plan: Plan | None = None  # made on the first batch
        self._theta = self.coordinates.flatten(model).to(state_device(self.coordinates, execution))
        backend = where_present(execution.backend)
        self._polarizer = Polarizer(self.coordinates, self._theta, config.selection, backend)
        saliency = self._polarizer.saliency if config.kernel == "weighted_rbf" else None
        self._system = ParticleSystem(self.coordinates.d, config, execution, self._theta, saliency, start)
        self._energy = energy_of(model, loss_fn, self.coordinates, self._theta, execution)
        self._vote = Vote(
            self._polarizer,
            config.final_score or config.polarizer,
            config.vote,
            config.vote_ratio,
            config.momentum,
            config.sparsity,
        )
        self._diagnostics = Diagnostics(self.coordinates, config, self._theta.device)
        self._alarms = Alarms(config, layer_names(self.coordinates))
        first = 1.0 - self._system.schedule[0]
        self._wanted = check_waypoints(waypoints, config, first, keep_scores)
        if config.settle:
            self._system.settle_at([1.0 - sparsity for sparsity in self._wanted if sparsity < config.sparsity])
        self._due = list(self._wanted)  # those still to be passed
        self._keep_scores = keep_scores
        self._waypoints: list[Waypoint] = []
        self._last_energies: Tensor | None = None
        self._taken = 0  # batches of the loader that were used by run()
        self._fingerprint = checkpoint.model_fingerprint(model)  # now: forward passes may write buffers
        self._broken: str | None = None  # why nothing can follow
        self._runs_in: list[threading.Thread] = []  # in the order in which they came
        self._begun: Iterator[Any] | None = None  # one-shot: the last one that a run has read from
        self._saved: tuple[str, int] | None = None  # the last file, and the step in it

    def add_callback(self, callback: Callable[[StepRecord], None]) -> None:
        """Have it called with the :class:`StepRecord` of every further step."""
        self._callbacks += _functions([callback])

    @property
    def particles(self) -> Tensor:
        """(n, d), the live particles."""
        return self._system.masks

    @property
    def done(self) -> bool:
        """Whether the run is over: all K steps, or the target density with ``early_stop``."""
        if self._system.done:
            return True
        return self.config.early_stop and self._system.mean_density <= self.config.target_density

    @autograd_allowed()
    def run(
        self,
        loader: Iterable[Any],
        *,
        progress: bool | None = None,
        save_every: int | None = None,
        save_path: str | os.PathLike[str] | None = None,
        resume: str | os.PathLike[str] | bool | None = None,
    ) -> PruneResult:
        """All remaining steps; every particle takes its own batch in every step.

        Args:
            loader: batches, cycled; n · K are used by a whole run. Its order is drawn under ``config.seed``
                where it uses torch's global generator. A resumed run, and a further call, pass over the batches used
                before: give them the same loader from its beginning (a list, or a DataLoader whose order and
                augmentation come from torch's global generator, without ``persistent_workers``).
            progress: show a bar; ``None`` for only on a terminal.
            save_every: write ``save_path`` after so many steps, and at the end; ``None`` writes nothing. Where that
                fails (a full disk) the run goes on, with an error in the log.
            save_path: the file; ``None`` for that of ``resume``.
            resume: a file that a run with the same model, settings and loader has written (:meth:`load_state_dict`);
                True for ``save_path`` if it exists.

        Raises:
            FileNotFoundError: no file ``resume``.
            ValueError: an empty loader or a one-shot iterator that runs out; a file that is damaged, or of another
                model or other settings.
            FloatingPointError: a loss that is not finite; the message names step and particle.
            NoGradientError: a ValueError; all gradients are zero in the first two steps. (Tensors without are alarms.)
            MemoryError: the run will not fit; the message holds the plan, and what would fit.
            RuntimeError: an error or an interruption has left a step half done; what was saved before can be resumed.
                Or this pruner runs in another thread.
            OSError: ``save_path`` cannot be written, known before the first step.
        """
        target = checkpoint.save_path(save_every, save_path, resume)
        with self._running():
            if resume is True:
                resume = target if target is not None and os.path.exists(target) else None
            if resume:
                self.load(resume)
            self._check_whole("run")
            try:
                result = self._run(loader, progress, save_every, target)
            except BaseException as error:
                end_contexts(error)
                raise
        for words in result.dead_layers:
            logger.warning("%s", words)
        return result

    def _run(
        self,
        loader: Iterable[Any],
        progress: bool | None,
        save_every: int | None,
        target: str | os.PathLike[str] | None,
    ) -> PruneResult:
        n, remaining = self.config.n_particles, self.config.n_steps - self._system.step
        # Its own random stream from step to step, because a loader draws its order when it begins, and more on the way.
        turns = Turns(self._step_seed(0), self.coordinates.device)
        hidden = None if progress is None else not progress
        with tqdm(total=remaining, desc="SFPK", ncols=_COLUMNS, disable=hidden) as bar:
            with turns.turn():
                stream = BatchStream(loader, self.coordinates.device, self._taken + n * remaining)
                if self.done:
                    if save_every and target is not None and self._saved != _place(target, self._system.step):
                        self._try_to_save(target)  # an interruption came before it
                else:
                    self._begin(stream)
                    stream.skip(self._taken)
            while not self.done:
                with turns.turn():
                    batches = stream.take(n)
                    with self._guard():
                        if self.plan is None:
                            plan = self._make_plan(batches[0])
                            if not bar.disable:
                                bar.write(str(plan), file=sys.stderr)
                        record = self._step(batches, taken=n)
                self._call_back(record)
                if save_every and target is not None and (record.step % save_every == 0 or self.done):
                    self._try_to_save(target)
                bar.set_postfix(loss=f"{record.energy:.4f}", sparsity=f"{1.0 - record.density:.4f}", refresh=False)
                bar.update()
            self._energy.release()
            return self.result()

    @contextmanager
    def _running(self) -> Iterator[None]:
        """One run at a time: two of the same pruner would share its steps, and each read batches for all of them."""
        me = threading.current_thread()
        try:
            # No lock: an interruption must not leave one. Whoever has come first may run, in nested runs, too.
            self._runs_in.append(me)
            first = next(thread for thread in list(self._runs_in) if thread.is_alive())
            if first is not me:
                raise RuntimeError(
                    f"run: wanted one run of a pruner at a time, got another beside that of {first.name}"
                )
            yield
        finally:
            if me in self._runs_in:
                self._runs_in.remove(me)

    def _begin(self, stream: BatchStream) -> None:
        """That a one-shot iterator has its first batch yet to come."""
        if stream.one_shot is not None and stream.one_shot is self._begun:
            raise ValueError(
                "loader: wanted the batches from the first one on, to pass over those used before, got the one-shot "
                "iterator that an earlier call has read from: pass a list, a DataLoader or a new iterator"
            )
        self._begun = stream.one_shot

    @autograd_allowed()
    def step(self, batches: Sequence[Any]) -> StepRecord:
        """One step of every particle.

        Args:
            batches: n of them, one per particle.

        Raises:
            RuntimeError: the run is over, or an error or an interruption has left a step half done.
            ValueError: another number of batches.
            FloatingPointError: a loss that is not finite. The particles have not moved then (with
                ``update="gauss_seidel"`` those before it have, as the message says).
            MemoryError: as for :meth:`run`.
        """
        self._check_whole("step")
        if self.done:
            raise RuntimeError(f"step: the run is over after {self._system.step} steps")
        if not isinstance(batches, Sequence) or len(batches) != self.config.n_particles:
            got = len(batches) if isinstance(batches, Sequence) else type(batches).__name__
            raise ValueError(f"batches: wanted a list of {self.config.n_particles}, one per particle, got {got}")
        try:
            with lock(), self._guard():
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
        """The numbered steps of the method, in their order.

        The run counts as broken from the beginning, until all of the step is done or nothing of it was.
        """
        self._check_whole("step")
        if self.plan is None:
            self._make_plan(batches[0])
        started = time.perf_counter()
        system, number = self._system, self._system.step + 1
        before, measured, energy = system.moves, system.measured(), self._energy_state()
        skips = self.config.nonfinite == "skip_particle"
        reached = self._look_for_gradients()
        self._broken = f"step {number} stopped half-way"
        try:
            densities = system.densities
            # 1. polarize
            keep = self._polarizer.polarize(system.masks, densities, self.config.polarizer, system.known_densities)
            seen = self._diagnostics.see(keep)
            # 2. energies, each particle on its own batch; 3.-7. repulsion, transition, retraction, consensus
            with seeded(self._step_seed(number), self.coordinates.device):
                if self.config.update == "jacobi":
                    energies, stats = jacobi(self._energy, system, keep, batches, reached)
                else:
                    energies, stats = gauss_seidel(self._energy, system, keep, batches, skips, reached)
            # All that the host wants to know of the step, in the one wait for the device.
            read = read_together(
                start_density=densities.mean(),
                energies=energies,
                densities=stats.densities,
                cosines=stats.cosines,
                deviation=self._diagnostics.deviation(system.masks, stats),
                **seen._asdict(),
                **({} if reached is None or reached.flags is None else {"reached": reached.flags}),
            )
            missing = [] if reached is None else reached.missing(read.pop("reached"), number)
            skipped = standing_still(read["energies"], read["cosines"], number, skips)
            if self._vote.remembers:
                self._vote.update(system.masks, read["densities"], read["energies"])
            passed = self._passed(number, read["densities"], read["energies"])
            record = StepRecord(
                step=number,
                scheduled_density=system.schedule[number],
                seconds=time.perf_counter() - started,
                skipped=skipped,
                **read,
            )
            record.alarms.extend(self._alarms.check(self.history, record, missing))
            # All of it is known: from here on it is done.
            system.end_step(read["densities"])
            self._last_energies = energies
            self._waypoints, self._due = [*self._waypoints, *passed], self._due[len(passed) :]
            self.history.append(record)
            self._taken += taken
            self._broken = None
        except BaseException as error:
            end_contexts(error)
            # Found at the end of the step, and by the transition, which has moved nothing then.
            if isinstance(error, NonFiniteError):
                system.moves = before + (error.moved if self.config.update == "gauss_seidel" else 0)
            elif isinstance(error, NoGradientError) and self.config.update == "jacobi":
                system.moves = before
            moved = system.moves - before
            who = f"particles 0 … {moved - 1} have moved" if moved else "the particles have not moved"
            if hasattr(error, "add_note"):  # Python ≥ 3.11
                error.add_note(f"sfpk_kernels: in step {number} of {self.config.n_steps}; {who}")
                error.add_note(mode_note(self.config))
            if moved:  # no later step would be what it should
                self._broken = f"step {number} stopped half-way, {who}"
            else:
                system.put_back(measured)
                self._put_back_energy(energy)
                self._broken = None
            raise
        return record

    def _look_for_gradients(self) -> Reached | None:
        """In step 1, and in step 2 where step 1 had none: then no move had anything of one."""
        done = self._system.step
        if done == 0 or (done == 1 and not any(self.history[0].cosines)):
            return Reached(self.coordinates, needed=done == 1 or self.config.n_steps == 1)
        return None

    def _check_whole(self, what: str) -> None:
        """That no step was left half done."""
        if self._broken is not None:
            raise RuntimeError(
                f"{what}: this run cannot go on: {self._broken}; resume what was saved before, or begin again"
            )

    def _energy_state(self) -> tuple[Any, dict[str, Any]]:
        """What computing energies changes for later steps: the way it is done, and the scale of fp16 losses."""
        return self._energy.choice, dict(vars(self._energy.scale))

    def _put_back_energy(self, state: tuple[Any, dict[str, Any]]) -> None:
        self._energy.choice = state[0]
        vars(self._energy.scale).update(state[1])

    def _call_back(self, record: StepRecord) -> None:
        """After everything of the step is done: a callback may save. What it draws does not move the data's order."""
        for callback in self._callbacks:
            with lock(), seeded(self._step_seed(record.step), self.coordinates.device):
                callback(record)

    def _passed(self, number: int, densities: list[float], energies: list[float]) -> list[Waypoint]:
        """The masks of the sparsities that the schedule passes in this step."""
        found = []
        for sparsity in self._due:
            if not checkpoint.reached(sparsity, self._system.schedule[number]):
                break
            score = self._vote.current(self._system.masks, densities, energies)
            mask = MaskSet.from_flat(self._polarizer.final(score, sparsity), self.coordinates)
            kept = score.to("cpu", copy=True) if self._keep_scores else None
            found.append(Waypoint(sparsity, number, mask, kept))
        return found

    def _current_score(self) -> Tensor:
        assert self._last_energies is not None
        densities = self._system.known_densities or self._system.densities.tolist()
        return self._vote.current(self._system.masks, densities, self._last_energies.tolist())

    @alone
    @autograd_allowed()
    def result(self) -> PruneResult:
        """The final mask from the particles as they stand.

        Raises:
            RuntimeError: no step was done yet, or an error or an interruption has left one half done.
        """
        self._check_whole("result")
        if self._last_energies is None or self.plan is None:
            raise RuntimeError("result: wanted at least one step done, got none")
        score = self._current_score()
        mask = self._polarizer.final(score, self.config.sparsity)
        return PruneResult(
            mask=MaskSet.from_flat(mask, self.coordinates),
            history=list(self.history),
            particles=self._system.masks if self.done else self._system.masks.clone(),
            score=score.clone() if self._vote.remembers else score,
            config=self.config,
            coordinates=self.coordinates,
            plan=self._plan_in_use(),
            densities=self._system.densities.clone(),
            energies=self._last_energies.clone(),
            waypoints=list(self._waypoints),
            _polarizer=self._polarizer,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the rest of the run; copies of tensors, and plain values.

        Particles, step, statistics, votes, masks along the way, history, how many batches of the loader were used, how
        energies are computed, and which model and settings all that belongs to. Random numbers are drawn anew in every
        step from seed and step, so there is no random state to keep.

        Raises:
            RuntimeError: an error or an interruption has left a step half done.
        """
        return self._state(copy=True)

    @alone
    @autograd_allowed()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; nothing is changed after an error.

        The rest of the run is then bit for bit what it would have been. With another ``config.seed`` it is a branch:
        the same particles, other random numbers and another order of the data from here on.

        Raises:
            TypeError: no dict, or an entry of another type.
            ValueError: a state of another model, of other settings, or not of a run (an entry of another shape or
                range, missing or unknown: the message names it); one of ``waypoints`` that the saved run has passed
                without taking a mask.
        """
        config, tensors = self.config, self.coordinates.tensors
        state = checkpoint.of_this_version(state)
        names = [tensor.name for tensor in tensors]
        checkpoint.check_same(state, config, self.execution, self._fingerprint, names)
        particles = check.entries("state: particles", state["particles"], SystemState._fields)
        if config.settle and not check.same(particles["schedule"], self._system.schedule):
            raise ValueError(
                "waypoints, start: wanted those of the saved run, which settles, got others (particles.schedule)"
            )
        system = self._system.checked(particles, "state: particles.")
        if check.integer("state: step", state["step"]) != system.step:
            raise ValueError(f"state: step: wanted {system.step}, that of particles, got {state['step']}")
        history = checkpoint.history("state: history", state["history"], config, len(tensors), system.step)
        energies = checkpoint.energies("state: energies", state["energies"], history, self._theta.device)
        dtypes = torch.promote_types(system.masks.dtype, torch.float32), torch.float64
        vote = state["vote"]
        if vote is not None:
            vote = check.tensor("state: vote", vote, (self.coordinates.d,), *dtypes).to(self._theta.device, copy=True)
        if self._vote.remembers and (vote is None) != (system.step == 0):
            raise ValueError(f"state: vote: wanted one score of all {system.step} steps, got {check.got(vote)}")
        waypoints = checkpoint.waypoints(
            "state: waypoints", state["waypoints"], self.coordinates, system.schedule, system.step, dtypes
        )
        alarms = set(check.texts("state: alarms", state["alarms"]))
        n = config.n_particles
        taken = check.integer("state: taken", state["taken"], 0, n * system.step)
        if taken % n:
            raise ValueError(f"state: taken: wanted a multiple of {n} batches, one per particle, got {taken}")
        scale = checkpoint.scale("state: scale", state["scale"], self._energy.scale.active)
        plan = None
        if state["plan"] is not None or system.step:
            plan = checkpoint.plan("state: plan", state["plan"], config, self.coordinates.d)
        density = system.schedule[system.step]
        due = [sparsity for sparsity in self._wanted if sparsity not in {w.sparsity for w in waypoints}]
        passed = [sparsity for sparsity in due if checkpoint.reached(sparsity, density)]
        if passed:
            raise ValueError(
                f"waypoints: wanted sparsities that the saved run took or has yet to pass (now {1 - density:.4g}), "
                f"got {passed[0]:g}, which is not among its waypoints"
            )
        # All of it has been looked at. An interruption from here on leaves a pruner that says so.
        self._broken = "loading a state stopped half-way"
        self._system.take_over(system)
        self._vote.score, self._last_energies = vote, energies
        self.history[:] = history
        self._waypoints, self._due = waypoints, due
        self._alarms.said = alarms
        self._taken = taken
        choice = self._energy.choice if plan is None else plan.choice
        self._put_back_energy((choice, {"value": scale[0], "calm": scale[1], "_before": None}))
        self.plan = self.plan if plan is None else plan
        self._saved = self._begun = None
        self._broken = None

    @alone
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`state_dict` to a file, atomically: killed at any moment, it holds the old state or the new one.

        Raises:
            OSError: it cannot be written; FileNotFoundError where the folder does not exist.
            RuntimeError: an error or an interruption has left a step half done.
        """
        save_state(path, checkpoint.KIND, self._state(copy=False))
        self._saved = _place(path, self._system.step)

    def _try_to_save(self, path: str | os.PathLike[str]) -> None:
        """A full disk does not end a run: the file of before stays, the next save tries again."""
        try:
            self.save(path)
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:
                raise  # from an alarm, not from the disk
            logger.error("step %d was not saved, the run goes on: %s", self._system.step, error)

    def load(self, path: str | os.PathLike[str]) -> None:
        """:meth:`load_state_dict` from a file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that was cut or altered, or of another kind, model or settings.
        """
        self.load_state_dict(load_state(path, checkpoint.KIND))
        self._saved = _place(path, self._system.step)

    @alone
    def _state(self, copy: bool) -> dict[str, Any]:
        self._check_whole("state_dict")
        vote, energies, scale = self._vote.score, self._last_energies, self._energy.scale
        return {
            "model": self._fingerprint,
            "config": checkpoint.settings(self.config, self.execution),
            "names": [tensor.name for tensor in self.coordinates.tensors],
            "step": self._system.step,
            "particles": self._system.state_dict(copy=copy),
            "vote": vote.clone() if copy and vote is not None and self._vote.remembers else vote,
            "energies": None if energies is None else energies.clone(),
            "history": [dataclasses.asdict(record) for record in self.history],
            "waypoints": [
                {"sparsity": w.sparsity, "step": w.step, "bits": pack_mask(w.mask.flat()), "score": w.score}
                for w in self._waypoints
            ],
            "alarms": sorted(self._alarms.said),
            "taken": self._taken,
            "scale": (scale.value, scale.calm),
            "plan": None if self.plan is None else dataclasses.asdict(self._plan_in_use()),
        }

    def _make_plan(self, batch: Any) -> Plan:
        """Measure the first batch, decide what is left to decide, refuse what will not fit."""
        taken = sum(t.numel() * t.element_size() for t in (self._theta, self._system.masks))
        try:
            plan = plan_run(self._energy, self.config, self.execution, batch, taken)
        except BaseException as error:
            if hasattr(error, "add_note"):  # Python ≥ 3.11
                error.add_note("sfpk_kernels: in the trial pass before step 1; the particles have not moved")
                error.add_note(mode_note(self.config))
            raise
        logger.info("%s", plan)
        plan.check()
        self.plan = plan
        return plan

    def _plan_in_use(self) -> Plan:
        """The plan, with the way of computing energies that is in use: another than planned where vmap failed."""
        assert self.plan is not None
        return dataclasses.replace(self.plan, choice=self._energy.choice or self.plan.choice)

    def _step_seed(self, number: int) -> int:
        """One per step, far from those of neighbouring seeds."""
        return (self.config.seed * 1_000_003 + number) % 2**63

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """The model in the mode energies are measured in, and as it was afterwards.

        What computes energies, and the guard itself, put back what they change; where an interruption comes in between,
        that is done once more.
        """
        before = Registered(self._model)
        try:
            with guarded(self._model, bn=self.config.bn, training=self.config.model_mode == "train"):
                yield
        except BaseException as error:
            end_contexts(error)
            before.restore()
            raise


def _functions(callbacks: Iterable[Any]) -> list[Callable[[StepRecord], None]]:
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks: wanted a list of functions, got {type(callbacks).__name__}")
    callbacks = list(callbacks)
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"callbacks: wanted functions of a StepRecord, got {type(callback).__name__}")
    return callbacks


def _place(path: str | os.PathLike[str], step: int) -> tuple[str, int]:
    return os.path.realpath(path), step


@called("prune(model, loader, sparsity, loss_fn=…)", checkpoints="waypoints=[…]")
def prune(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float | None = None,
    *,
    loss_fn: LossFn | None = None,
    config: SFPKConfig | None = None,
    execution: Execution | None = None,
    progress: bool | None = None,
    save_every: int | None = None,
    save_path: str | os.PathLike[str] | None = None,
    resume: str | os.PathLike[str] | bool | None = None,
    **options: Any,
) -> PruneResult:
    """Search a mask for ``model`` in one run; the model itself is not changed.

    ``prune(model, loader, 0.9)`` is the simple case; ``options`` are the others of :class:`SFPKPruner` (``waypoints``,
    ``ignored_layers``, ``callbacks``, …). Arguments and errors as there and in :meth:`SFPKPruner.run`.
    """
    settings = chosen("prune(model, loader, sparsity, loss_fn=…)", sparsity, config, execution)
    check_loader(loader)
    pruner = SFPKPruner(model, loss_fn=loss_fn, config=settings[0], execution=settings[1], **options)
    return pruner.run(loader, progress=progress, save_every=save_every, save_path=save_path, resume=resume)
