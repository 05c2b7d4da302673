"""One at a time: torch's random generators, and a model while it runs, are shared by all threads of a process."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .state import seeded

P = ParamSpec("P")
T = TypeVar("T")

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_PATIENCE = 1.0  # seconds
_TIMES = 3  # that nobody is seen inside a lock that is held: once may be the moment between two holders

_lock = threading.RLock()


def _renew() -> None:
    """Such as in a forked child, where the thread that held it does not exist."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def lock() -> threading.RLock:
    """``with lock():`` one thread is inside, others wait at the door; a thread that is inside may enter again.

    The lock itself is returned, because its own ``with`` cannot be interrupted half-way. Should it be held all the same
    by nobody who is inside, waiting for it ends.
    """
    nobody = 0  # times in a row
    while not _lock._is_owned() and not _free():  # type: ignore[attr-defined]
        nobody = 0 if _somebody_inside() else nobody + 1
        if nobody == _TIMES:
            _renew()
    return _lock


def _free() -> bool:
    current = _lock
    if current.acquire(timeout=_PATIENCE):
        current.release()
        return True
    return False


def _somebody_inside() -> bool:
    """Whether another thread runs code of this package, other than waiting here."""
    for thread, frame in sys._current_frames().items():
        if thread == threading.get_ident():
            continue
        ours, current = set(), frame
        while current is not None:
            if current.f_code.co_filename.startswith(_PACKAGE):
                ours.add(current.f_code)
            current = current.f_back  # type: ignore[assignment]
        if ours and _free.__code__ not in ours:
            return True
    return False


def alone(function: Callable[P, T]) -> Callable[P, T]:
    """A function that one thread at a time is in, of all that are so decorated."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with lock():
                return function(*args, **kwargs)
        except BaseException as error:
            end_contexts(error)
            raise

    return inside


def end_contexts(error: BaseException) -> None:
    """End the ``with`` blocks that an interruption has left open.

    One that came just when a block began to be left, or to be entered, lives on in the traceback, and would put back
    what it has changed whenever that is deleted, such as in the middle of a later step.
    """
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == contextlib.__file__:
            with contextlib.suppress(RuntimeError):  # still running
                traceback.tb_frame.clear()
        traceback = traceback.tb_next


class Turns:
    """The random stream of something that goes on in turns, such as the order of a run's data.

    In every turn torch's generators go on where the turn before left them, whatever others drew between the two; the
    first one begins as after ``manual_seed(seed)``. Outside nothing is drawn.

    Args:
        seed: of the stream.
        device: whose generator is part of it, beside that of the CPU.
    """

    def __init__(self, seed: int, device: torch.device):
        self._seed, self._device = seed, device
        self._states: tuple[Tensor, Tensor | None] | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One turn; other threads wait."""
        cuda = self._device.type == "cuda"
        with lock(), seeded(self._seed, self._device):
            if self._states is not None:
                host, device = self._states
                torch.set_rng_state(host)
                if device is not None:
                    torch.cuda.set_rng_state(device, self._device)
            try:
                yield
            finally:
                self._states = torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if cuda else None
