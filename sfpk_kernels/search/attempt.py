"""A step is done as a whole or not at all, or the run says that it cannot go on."""

from __future__ import annotations

from types import TracebackType

from ..modeling.state import mode_note
from ..modeling.turns import end_contexts
from .nonfinite import NonFiniteError
from .run import Run
from .unreached import NoGradientError


class Attempt:
    """``with attempt:`` everything of one step, up to what makes it count.

    The run counts as broken from the beginning, until all of the step is done or nothing of it was.

    Args:
        run: of which steps are attempted.
    """

    def __init__(self, run: Run):
        self._run = run
        self._broken: str | None = None  # why nothing can follow

    def check(self, what: str) -> None:
        """That no step was left half done; ``what`` is asked for.

        Raises:
            RuntimeError: one was.
        """
        if self._broken is not None:
            raise RuntimeError(
                f"{what}: this run cannot go on: {self._broken}; resume what was saved before, or begin again"
            )

    def begin(self, what: str) -> None:
        """From here on an interruption leaves a run that says so, until :meth:`end`."""
        self._broken = f"{what} stopped half-way"

    def end(self) -> None:
        """All of it is done, or nothing was."""
        self._broken = None

    def __enter__(self) -> None:
        self.check("step")
        run = self._run
        self._number = run.system.step + 1
        self._moves, self._measured, self._energy = run.system.moves, run.system.measured(), run.energy.state()
        self.begin(f"step {self._number}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
            return
        end_contexts(error)
        run, one_by_one = self._run, self._run.config.update == "gauss_seidel"
        # Found at the end of the step, and by the transition, which has moved nothing then.
        if isinstance(error, NonFiniteError):
            run.system.count_moves(self._moves + (error.moved if one_by_one else 0))
        elif isinstance(error, NoGradientError) and not one_by_one:
            run.system.count_moves(self._moves)
        moved = run.system.moves - self._moves
        who = f"particles 0 … {moved - 1} have moved" if moved else "the particles have not moved"
        if hasattr(error, "add_note"):  # Python ≥ 3.11
            error.add_note(f"sfpk_kernels: in step {self._number} of {run.config.n_steps}; {who}")
            if isinstance(error, Exception):  # no interruption
                error.add_note(mode_note(run.config))
        if moved:  # no later step would be what it should
            self._broken = f"step {self._number} stopped half-way, {who}"
        else:
            run.system.put_back(self._measured)
            run.energy.put_back(self._energy)
            self.end()
