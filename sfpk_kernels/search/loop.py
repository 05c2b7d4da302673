"""All steps of a run, over a loader."""

from __future__ import annotations

import abc
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..modeling.batches import BatchStream
from ..modeling.state import autograd_allowed, seeded
from ..modeling.turns import Turns, end_contexts, lock
from ..utils.threads import warn_of_spinning
from .records import StepRecord
from .result import PruneResult
from .resumable import Resumable
from .run import Run
from .saving import save_path as checked_save_path

_COLUMNS = 80  # of the progress bar


class Loop(Resumable, abc.ABC):
    """A run that goes through its steps by itself.

    Args:
        run: its parts.
        callbacks: called with the :class:`StepRecord` of every step.
    """

    def __init__(self, run: Run, callbacks: Sequence[Callable[[StepRecord], None]]):
        self._callbacks = _functions(callbacks)
        super().__init__(run)

    @abc.abstractmethod
    def _step(self, batches: Sequence[Any], taken: int = 0) -> StepRecord:
        """One step on batches that are where the model is; ``taken`` of them from the loader."""

    def add_callback(self, callback: Callable[[StepRecord], None]) -> None:
        """Have it called with the :class:`StepRecord` of every further step."""
        self._callbacks += _functions([callback])

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
            loader: batches, cycled; n · K are used by a whole run (fewer with ``config.merge``). Its order is drawn
                under ``config.seed`` where it uses torch's global generator. A resumed run, and a further call, pass
                over the batches used before: give them the same loader from its beginning (a list, or a DataLoader
                whose order and augmentation come from torch's global generator, without ``persistent_workers``).
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
        target = checked_save_path(save_every, save_path, resume)
        with self._one_run.running():
            if resume is True:
                resume = target if target is not None and os.path.exists(target) else None
            if resume:
                self.load(resume)
            self._attempt.check("run")
            try:
                result = self._loop(loader, progress, target if save_every else None, save_every or 1)
            except BaseException as error:
                end_contexts(error)
                self._file.note(error)
                raise
        result.warn_of_dead_layers()
        return result

    def _loop(
        self, loader: Iterable[Any], progress: bool | None, target: str | os.PathLike[str] | None, every: int
    ) -> PruneResult:
        run = self._run
        if self.coordinates.device.type == "cpu":
            warn_of_spinning()
        remaining = self.config.n_steps - run.system.step
        # Its own random stream from step to step, because a loader draws its order when it begins, and more on the way.
        turns = Turns(run.seed_of(0), self.coordinates.device)
        hidden = None if progress is None else not progress
        with tqdm(total=remaining, desc="SFPK", ncols=_COLUMNS, disable=hidden) as bar:
            with turns.turn():
                what = "particles × steps" if self.config.merge is None else "one per particle and step"
                stream = BatchStream(loader, self.coordinates.device, run.taken + run.system.passes_left, what)
                if self.done:
                    self._save_if_missing(target)  # an interruption came before it
                else:
                    self._one_run.begin(stream)
                    stream.skip(run.taken)
            while not self.done:
                with turns.turn():
                    batches = stream.take(len(run.system.masks))
                    with run.guard():
                        if run.plan is None:
                            plan = run.make_plan(batches[0])
                            if not bar.disable:
                                bar.write(str(plan), file=sys.stderr)
                        record = self._step(batches, taken=len(batches))
                self._call_back(record)
                if target is not None and (record.step % every == 0 or self.done):
                    self._try_to_save(target)
                bar.set_postfix(loss=f"{record.energy:.4f}", sparsity=f"{1.0 - record.density:.4f}", refresh=False)
                bar.update()
            run.energy.release()
            return self.result()

    def _call_back(self, record: StepRecord) -> None:
        """After everything of the step is done: a callback may save. What it draws does not move the data's order."""
        for callback in self._callbacks:
            with lock(), seeded(self._run.seed_of(record.step), self.coordinates.device):
                callback(record)


def _functions(callbacks: Iterable[Any]) -> list[Callable[[StepRecord], None]]:
    if not isinstance(callbacks, Iterable):
        raise TypeError(f"callbacks: wanted a list of functions, got {type(callbacks).__name__}")
    callbacks = list(callbacks)
    for callback in callbacks:
        if not callable(callback):
            raise TypeError(f"callbacks: wanted functions of a StepRecord, got {type(callback).__name__}")
    return callbacks
