"""A pass recorded as a CUDA graph: on its own stream of the right device, and everything as before where it fails."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._problem import CannotRunError

_WARM_UPS = 3  # outside the capture, so that libraries have chosen their algorithms
_SENTINEL = -(2.0**15)  # the same in every float dtype; no pass leaves it everywhere


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
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    once()
        finally:
            current.wait_stream(stream)
        check_buffers()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        spare, failed = generator.clone_state(), []

        def noted() -> Tensor:
            try:
                return once()
            except BaseException as error:
                failed.append(error)
                raise

        try:
            loss = _record(graph, noted, pool, stream)
            check_buffers()
            _check_not_empty(graph, row, loss)
        except BaseException as last:
            # A capture that fails at its end leaves its stream current, the generator waiting for the capture's end,
            # and the allocator with its pool. (A graph that somebody else has captured with that generator's state
            # stays with a state that never saw its end: before torch 2.12 it cannot be replayed.)
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(spare)
            for clean in (
                lambda: torch._C._cuda_endAllocateToPool(device.index, pool),
                lambda: _release(graph, pool, device),
                graph.reset,
                lambda: torch.cuda.synchronize(device),
            ):
                with contextlib.suppress(Exception):  # done already, or not begun
                    clean()
            error = failed[0] if failed else last  # what came first: the capture's end complains, too
            if isinstance(error, CannotRunError | torch.OutOfMemoryError) or not isinstance(error, Exception):
                raise error from None
            words = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CannotRunError(f"the pass cannot be captured: {words}") from error
    return graph, loss


def _record(graph: torch.cuda.CUDAGraph, once: Callable[[], Tensor], pool: Any, stream: torch.cuda.Stream) -> Tensor:
    # thread_local: what other threads do meanwhile (loading data) must not break it.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        return once()


def _release(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Give back the pool of a capture that never ended; reset() does it for one that did."""
    try:
        graph.pool()
    except RuntimeError:
        torch._C._cuda_releasePool(device.index, pool)


def _check_not_empty(graph: torch.cuda.CUDAGraph, row: Tensor, loss: Tensor) -> None:
    """Replays once over marked memory; waits for it."""
    row.fill_(_SENTINEL)
    loss.fill_(_SENTINEL)
    graph.replay()
    if bool((row == _SENTINEL).all()) or bool(loss == _SENTINEL):
        raise CannotRunError("the captured graph is empty: the pass runs on another device or stream")


@contextlib.contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[Callable[[], None]]:
    """Buffers and random numbers are put back; yields a check that the pass leaves both to the graph.

    A graph repeats what the host decided once: buffers that are replaced would be written no more, and random numbers
    drawn on the host would be the same for ever.
    """
    tables = [(module, dict(module._buffers)) for module in model.modules()]
    values = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    random_of_device, random_of_host = torch.cuda.get_rng_state(device), torch.get_rng_state()
    python, numpys, drawn = random.getstate(), np.random.get_state(), _host_random()

    def check() -> None:
        for module, table in tables:
            for name in {**table, **module._buffers}:
                if table.get(name) is not module._buffers.get(name):
                    raise CannotRunError(f"the pass cannot be captured: the model replaces its buffer {name}")
        if _host_random() != drawn:
            raise CannotRunError("the pass cannot be captured: it draws random numbers on the host")

    try:
        yield check
    finally:
        for module, table in tables:
            module._buffers.clear()
            module._buffers.update(table)
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)
        torch.cuda.set_rng_state(random_of_device, device)
        torch.set_rng_state(random_of_host)
        random.setstate(python)
        np.random.set_state(numpys)


def _host_random() -> object:
    """Equal as long as nobody draws from the host's generators."""
    numpys = np.random.get_state(legacy=False)["state"]
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpys["pos"], numpys["key"].tobytes()
