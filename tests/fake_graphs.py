"""torch.cuda's graphs on the CPU: a graph replays by running the recorded pass again; everything is written down."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch

from sfpk_kernels.search.energy import capture, graphed

DEVICE = torch.device("cuda:1")


class Machine:
    """Two devices, of which the second is the model's.

    Args:
        fails: where a capture fails: "begin", "body", "end", "end also" (whatever the body did), or "" for nowhere.
        empty: graphs hold nothing.
        good: captures that succeed before one fails.
        dropout_on_device: the pass draws from what stands for the device's generator.
    """

    def __init__(self, fails="", empty=False, good=0, error=RuntimeError, dropout_on_device=True):
        self.dropout_on_device = dropout_on_device
        self.fails, self.empty, self.good, self.error = fails, empty, good, error
        self.events, self.captures = [], 0
        self.device = torch.device("cuda:0")
        self.streams = {"cuda:0": "main 0", "cuda:1": "main 1"}
        self.capturing = False
        self.generator = "as before"  # "stuck" while and after a capture that never ended

    def note(self, *event):
        self.events.append((*event, str(self.device)))

    @contextlib.contextmanager
    def on(self, device):
        before, self.device = self.device, torch.device(device)
        try:
            yield
        finally:
            self.device = before

    @contextlib.contextmanager
    def stream(self, stream):
        before = self.streams[stream.device]
        self.streams[stream.device] = stream.name
        yield  # as torch's: not put back after an error of the capture's end
        self.streams[stream.device] = before

    def new_stream(self, device):
        self.note("stream", str(device))
        return SimpleNamespace(device=str(device), name=f"side {len(self.events)}", wait_stream=self.wait("side"))

    def wait(self, who):
        return lambda other: self.note("wait", who)

    def current_stream(self, device):
        name = self.streams[str(device)]
        return SimpleNamespace(device=str(device), name=name, wait_stream=self.wait("main"))

    def set_stream(self, stream):
        self.note("set stream", stream.name)
        self.streams[stream.device] = stream.name

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.note("capture", stream.device, capture_error_mode)
        failing = self.fails if self.captures >= self.good else ""
        self.captures += 1
        before = self.streams[stream.device]
        self.streams[stream.device] = stream.name
        if failing == "begin":
            raise self.error("no capture may begin\nsecond line")
        self.generator, self.capturing = "stuck", True
        if failing == "end":
            yield
            self.capturing = False
            raise self.error("the capture was invalidated\nsecond line")
        if failing == "end also":
            try:
                yield
            finally:
                raise self.error("the capture was invalidated")
        yield
        self.streams[stream.device] = before
        self.generator, self.capturing = "as before", False

    def record(self, graph, once, pool, stream):
        def body():
            if self.fails == "body" and self.captures > self.good:
                raise self.error("not permitted while capturing\nsecond line")
            return once()

        graph.once = once
        graph.loss = self.real_record(graph, body, pool, stream)
        return graph.loss

    def new_graph(self):
        graph = SimpleNamespace(reset=lambda: self.note("reset"))

        def replay():
            self.note("replay")
            if not self.empty:
                graph.loss.copy_(graph.once())

        graph.replay = replay
        return graph

    @contextlib.contextmanager
    def installed(self):
        """In the place of torch.cuda and of what asks for a CUDA device."""
        generator = SimpleNamespace(
            clone_state=lambda: "a clone", graphsafe_set_state=lambda state: setattr(self, "generator", state)
        )
        self.real_record = capture._record
        cuda = {
            "device": self.on, "Stream": self.new_stream, "stream": self.stream, "current_stream": self.current_stream,
            "set_stream": self.set_stream, "graph": self.graph, "CUDAGraph": self.new_graph,
            "graph_pool_handle": lambda: (0, 1), "default_generators": [generator] * 2,
            "current_device": lambda: self.device.index, "synchronize": lambda device: self.note("synchronize"),
            "get_rng_state": lambda device: torch.get_rng_state(),
            "set_rng_state": lambda state, device: torch.set_rng_state(state),
        }  # fmt: skip
        with contextlib.ExitStack() as stack:
            for name, value in cuda.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            stack.enter_context(mock.patch.object(capture, "_record", self.record))
            stack.enter_context(mock.patch.object(graphed, "_why_not", return_value=None))
            if self.dropout_on_device:  # which is the CPU's generator here
                stack.enter_context(mock.patch.object(capture, "_host_random", return_value=None))
            yield self
