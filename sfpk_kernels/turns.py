"""One at a time: torch's random generators, and a model while it runs, are shared by all threads of a process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .model_state import seeded

_lock = threading.RLock()


def _renew() -> None:
    """In a forked child the thread that held it does not exist."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def alone() -> Iterator[None]:
    """While one thread is inside, others wait at the door; a thread that is inside may enter again."""
    with _lock:
        yield


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
        with alone(), seeded(self._seed, self._device):
            if self._states is not None:
                host, device = self._states
                torch.set_rng_state(host)
                if device is not None:
                    torch.cuda.set_rng_state(device, self._device)
            try:
                yield
            finally:
                self._states = torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if cuda else None
