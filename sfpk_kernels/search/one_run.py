"""One ``run()`` of a pruner at a time, each with the batches from the first one on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..modeling.batches import BatchStream


class OneRun:
    """Who runs: two at once would share the steps, and each read batches for all of them."""

    def __init__(self) -> None:
        self._runs_in: list[threading.Thread] = []  # in the order in which they came
        self._begun: Iterator[Any] | None = None  # one-shot: the last one that a run has read from

    @contextmanager
    def running(self) -> Iterator[None]:
        """A run of this thread.

        Raises:
            RuntimeError: another thread's is under way.
        """
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

    def begin(self, stream: BatchStream) -> None:
        """That a one-shot iterator has its first batch yet to come.

        Raises:
            ValueError: an earlier run has read from it.
        """
        if stream.one_shot is not None and stream.one_shot is self._begun:
            raise ValueError(
                "loader: wanted the batches from the first one on, to pass over those used before, got the one-shot "
                "iterator that an earlier call has read from: pass a list, a DataLoader or a new iterator"
            )
        self._begun = stream.one_shot

    def forget(self) -> None:
        """What was read from belongs to another run."""
        self._begun = None
