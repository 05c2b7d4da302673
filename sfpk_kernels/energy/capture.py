"""A pass recorded as a CUDA graph: on its own stream of the right device, and everything as before where it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ._problem import CannotRunError

_WARM_UPS = 3  # outside the capture, so that libraries have chosen their algorithms
_SENTINEL = 1.2345e30  # no pass leaves this everywhere


def captured(
    once: Callable[[], Tensor],  # the pass; returns its loss, writes its gradient into ``row``
    row: Tensor,  # (d,)
    model: nn.Module,
    device: torch.device,
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """The graph of ``once`` and the loss that replaying it writes; replay it with ``device`` current.

    The model's buffers and the device's random numbers are afterwards as before.

    Raises:
        CannotRunError: the pass runs, but cannot be captured, or the graph does nothing. Stream, random numbers and
            memory pools are then as before. What the pass itself raises passes through.
    """
    with torch.cuda.device(device), _undisturbed(model, device) as check_buffers:
        current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                once()
        current.wait_stream(stream)
        check_buffers()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        spare = generator.clone_state()
        try:
            loss = _record(graph, once, pool, stream)
            check_buffers()
            _check_not_empty(graph, row, loss)
        except BaseException as error:
            # A capture that fails at its end leaves its stream current, the generator waiting for the capture's end,
            # and the allocator with its pool.
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(spare)
            for clean in (
                lambda: torch._C._cuda_endAllocateToPool(device.index, pool),
                graph.reset,
                lambda: torch.cuda.synchronize(device),
            ):
                with contextlib.suppress(Exception):  # done already, or not begun
                    clean()
            if isinstance(error, CannotRunError | torch.OutOfMemoryError) or not isinstance(error, Exception):
                raise
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CannotRunError(f"the pass cannot be captured: {words}") from error
    return graph, loss


def _record(graph: torch.cuda.CUDAGraph, once: Callable[[], Tensor], pool: Any, stream: torch.cuda.Stream) -> Tensor:
    # thread_local: what other threads do meanwhile (loading data) must not break it.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        return once()


def _check_not_empty(graph: torch.cuda.CUDAGraph, row: Tensor, loss: Tensor) -> None:
    """Replays once over marked memory; waits for it."""
    row.fill_(_SENTINEL)
    loss.fill_(_SENTINEL)
    graph.replay()
    if bool((row == _SENTINEL).all()) or bool(loss == _SENTINEL):
        raise CannotRunError("the captured graph is empty: the pass runs on another device or stream")


@contextlib.contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[Callable[[], None]]:
    """Buffers and the device's random numbers are put back; yields a check that the model keeps its buffers."""
    buffers = dict(model.named_buffers())
    values = [(buffer, buffer._version, buffer.clone()) for buffer in buffers.values()]
    random = torch.cuda.get_rng_state(device)

    def check() -> None:
        now = dict(model.named_buffers())
        new = next((name for name in {**buffers, **now} if buffers.get(name) is not now.get(name)), None)
        if new is not None:
            raise CannotRunError(f"the pass cannot be captured: the model replaces its buffer {new}")

    try:
        yield check
    finally:
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)
        torch.cuda.set_rng_state(random, device)
