"""What a pruner lets one see of its run, take away and bring back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import SFPKConfig
from ..coordinates.flat import Coordinates
from ..execution import Execution
from ..modeling.state import autograd_allowed
from ..modeling.turns import alone
from .attempt import Attempt
from .one_run import OneRun
from .planning import Plan
from .records import StepRecord
from .result import PruneResult
from .run import Run
from .saving import RunFile
from .state import checked, state_of


class Resumable:
    """A run that can be looked at, saved and gone on with.

    Args:
        run: its parts.
    """

    def __init__(self, run: Run):
        self._run = run
        self._attempt = Attempt(run)
        self._one_run = OneRun()
        self._file = RunFile()

    @property
    def config(self) -> SFPKConfig:
        """What decides the mask."""
        return self._run.config

    @property
    def execution(self) -> Execution:
        """How it is computed."""
        return self._run.execution

    @property
    def coordinates(self) -> Coordinates:
        """Of the prunable weights."""
        return self._run.coordinates

    @property
    def plan(self) -> Plan | None:
        """Memory and time; made on the first batch."""
        return self._run.plan

    @property
    def history(self) -> list[StepRecord]:
        """One record per step done."""
        return self._run.history

    @property
    def particles(self) -> Tensor:
        """(n, d), the live particles; (1, d), another tensor, once they are merged (``config.merge``)."""
        return self._run.system.masks

    @property
    def done(self) -> bool:
        """Whether the run is over: all K steps, or the target density with ``early_stop``."""
        return self._run.done

    @alone
    @autograd_allowed()
    def result(self) -> PruneResult:
        """The final mask from the particles as they stand.

        Raises:
            RuntimeError: no step was done yet, or an error or an interruption has left one half done.
        """
        self._attempt.check("result")
        return self._run.result()

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
        take_over = checked(self._run, state)
        # All of it has been looked at. An interruption from here on leaves a pruner that says so.
        self._attempt.begin("loading a state")
        take_over()
        self._file.forget()
        self._one_run.forget()
        self._attempt.end()

    @alone
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`state_dict` to a file, atomically: killed at any moment, it holds the old state or the new one.

        Raises:
            OSError: it cannot be written; FileNotFoundError where the folder does not exist.
            RuntimeError: an error or an interruption has left a step half done.
        """
        self._file.write(path, self._state(copy=False))

    def load(self, path: str | os.PathLike[str]) -> None:
        """:meth:`load_state_dict` from a file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that was cut or altered, or of another kind, model or settings.
        """
        self.load_state_dict(self._file.read(path))
        self._file.was_read(path, self._run.system.step)

    @alone
    def _state(self, copy: bool) -> dict[str, Any]:
        self._attempt.check("state_dict")
        return state_of(self._run, copy)

    @alone
    def _try_to_save(self, path: str | os.PathLike[str]) -> None:
        self._file.try_to_write(path, self._state(copy=False))

    def _save_if_missing(self, path: str | os.PathLike[str] | None) -> None:
        if path is not None and not self._file.holds(path, self._run.system.step):
            self._try_to_save(path)
