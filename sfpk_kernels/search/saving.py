"""The file of a run, and when it is written."""

from __future__ import annotations

import logging
import os
from typing import Any

from ..utils.files import check_writable, load_state, save_state
from .checkpoint import KIND

logger = logging.getLogger(__name__)

Path = str | os.PathLike[str]


class RunFile:
    """Where the state of a run was written last, and whether it is still there."""

    def __init__(self) -> None:
        self._last: tuple[str, int] | None = None  # the file, and the step in it

    def holds(self, path: Path, step: int) -> bool:
        """Whether ``path`` was written, or read, at this step."""
        return self._last == (os.path.realpath(path), step)

    def note(self, error: BaseException) -> None:
        """Have an interruption say where the run goes on."""
        if self._last is None or isinstance(error, Exception) or not hasattr(error, "add_note"):  # Python ≥ 3.11
            return
        path, step = self._last
        error.add_note(f"sfpk_kernels: step {step} is saved, resume={path!r} goes on from it")

    def forget(self) -> None:
        """The run is another one than in any file."""
        self._last = None

    def write(self, path: Path, state: dict[str, Any]) -> None:
        """Atomically: killed at any moment, the file holds the old state or the new one.

        Raises:
            OSError: it cannot be written; FileNotFoundError where the folder does not exist.
        """
        save_state(path, KIND, state)
        self._last = os.path.realpath(path), state["step"]

    def try_to_write(self, path: Path, state: dict[str, Any]) -> None:
        """A full disk does not end a run: the file of before stays, the next save tries again."""
        try:
            self.write(path, state)
        except OSError as error:
            if isinstance(error, TimeoutError) and error.errno is None:
                raise  # from an alarm, not from the disk
            logger.error("step %d was not saved, the run goes on: %s", state["step"], error)

    def read(self, path: Path) -> dict[str, Any]:
        """The state in a file; :meth:`was_read` once it was taken over.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that was cut or altered, or of another kind.
        """
        return load_state(path, KIND)

    def was_read(self, path: Path, step: int) -> None:
        """The run stands where the file does."""
        self._last = os.path.realpath(path), step


def save_path(every: int | None, path: Path | None, resume: Path | bool | None) -> Path | None:
    """Where a run is saved: the arguments of :meth:`~sfpk_kernels.SFPKPruner.run`, checked.

    Raises:
        TypeError, ValueError: a bad ``every``, nothing to write to, or a file that would never be written.
        OSError: the file cannot be written there.
    """
    if every is not None and (isinstance(every, bool) or not isinstance(every, int)):
        raise TypeError(f"save_every: wanted a number of steps or None, got {every!r}")
    if every is not None and every < 1:
        raise ValueError(f"save_every: wanted ≥ 1, got {every}")
    if path is None and not isinstance(resume, bool):
        path = resume
    if path is None and (every is not None or resume is True):
        raise ValueError("save_path: wanted a file to write, got None")
    if path is not None and every is None and not resume:
        raise ValueError(f"save_every: wanted a number of steps beside save_path={os.fspath(path)!r}, got None")
    if path is not None and every is not None:
        check_writable(path, "save_path")
    return path
