"""What an exported model costs: FLOPs, and seconds of a forward pass."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..masks.maskset import MaskSet
from ..modeling.state import guarded, seeded
from ..utils.modes import within

Forward = Callable[[nn.Module, Any], Any]
_WARM_UP = 3  # runs before latency is measured


def run(model: nn.Module, batch: Any, forward_fn: Forward) -> Any:
    """The output in eval mode, without gradients; the model is as before."""
    device = next(model.parameters()).device
    with guarded(model, bn="running", training=False), seeded(0, device), torch.no_grad():
        return forward_fn(model, batch)


def count_flops(
    model: nn.Module, masks: MaskSet | None, batch: Any, forward_fn: Forward
) -> tuple[int, float | None, tuple[str, ...]]:
    """FLOPs as torch counts them, the share that multiplies kept weights, and types of layers torch does not count.

    What a module with masked weights computes counts by their density there; everything else in full. Without masks
    there is no such share.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode  # here, because it imports Triton

    on_cpu = next(model.parameters()).device.type == "cpu"
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch does not count the fused attention layer
    try:
        # Fused attention is counted on GPUs, but not on the CPU.
        kernels = sdpa_kernel(SDPBackend.MATH) if on_cpu else nullcontext()
        with kernels, within(FlopCounterMode(display=False)) as counter:
            run(model, batch, forward_fn)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    counts = counter.get_flop_counts()
    total, root = sum(counts.get("Global", {}).values()), type(model).__name__
    recurrent = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.RNNBase)]
    uncounted = tuple(sorted({type(m).__name__ for n, m in recurrent if not counts.get(f"{root}.{n}" if n else root)}))
    if masks is None:
        return total, None, uncounted
    if total == 0:
        return 0, 1.0, uncounted
    densities = {id(model.get_parameter(name)): density for name, density in masks.layer_densities().items()}
    saved = 0.0
    for prefix, module in model.named_modules():
        weights = [p for p in module.parameters(recurse=isinstance(module, nn.MultiheadAttention)) if p.dim() > 1]
        if not any(id(weight) in densities for weight in weights):
            continue
        kept = sum(weight.numel() * densities.get(id(weight), 1.0) for weight in weights)
        by_op = counts.get(f"{root}.{prefix}" if prefix else root, {})
        own = sum(flops for op, flops in by_op.items() if not _multiplies_activations(str(op)))
        saved += own * (1.0 - kept / sum(weight.numel() for weight in weights))
    return total, 1.0 - saved / total, uncounted


def _multiplies_activations(op: str) -> bool:
    """Products of activations with activations, in attention."""
    return "bmm" in op or "attention" in op


def median_latency(model: nn.Module, batch: Any, forward_fn: Forward, runs: int, device: torch.device) -> float:
    """Seconds of a forward pass, the median of so many runs."""
    return _medians([model], lambda one: forward_fn(one, batch), runs, device)[0]


@dataclass(frozen=True)
class Latency:
    """One call of the dense and of the smaller model, in eval mode without gradients, with the same inputs."""

    batch: int  # size of the inputs along dim 0
    dense: float  # seconds, median
    shrunk: float  # seconds, median
    runs: int  # behind each median
    device: str  # "cpu" or the GPU's name
    threads: int  # of the CPU

    @property
    def speedup(self) -> float:
        """Dense over shrunk time; below 1 the smaller model is the slower one."""
        return self.dense / self.shrunk

    def __str__(self) -> str:
        where = f"{self.device}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return (
            f"batch {self.batch}: {1e3 * self.dense:.3g} ms dense, {1e3 * self.shrunk:.3g} ms shrunk "
            f"({self.speedup:.2f} ×), medians of {self.runs} ({where})"
        )


def compare_latency(
    dense: nn.Module,
    smaller: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batches: Sequence[int],
    runs: int,
) -> list[Latency]:
    """Both models timed by turns, so that what else the machine does meets both.

    Args:
        dense, smaller: on one device; they stay as they are.
        args, kwargs: example inputs, on that device; rows along dim 0 are repeated for the sizes wanted.
        batches: these sizes.
        runs: calls behind each median.
    """
    device = next(dense.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found = []
    for batch in batches:
        given, named = resized((args, kwargs), batch)
        before, after = _medians([dense, smaller], lambda one: one(*given, **named), runs, device)  # noqa: B023
        found.append(Latency(batch, before, after, runs, name, torch.get_num_threads()))
    return found


def resized(inputs: Any, batch: int) -> Any:
    """Inputs with so many rows: of tensors with as many along dim 0 as the first one has, repeated or cut."""
    tensors = [one for one in pytree.tree_leaves(inputs) if isinstance(one, Tensor) and one.dim() > 0]
    rows = len(tensors[0]) if tensors else 0

    def change(one: Any) -> Any:
        if not isinstance(one, Tensor) or one.dim() == 0 or len(one) != rows or rows == 0:
            return one
        return one.repeat(math.ceil(batch / rows), *[1] * (one.dim() - 1))[:batch].contiguous()

    return pytree.tree_map(change, inputs)


def _medians(
    models: Sequence[nn.Module], call: Callable[[nn.Module], Any], runs: int, device: torch.device
) -> list[float]:
    """Seconds of a call of each model, the median of so many runs, taken by turns."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(_WARM_UP + runs):
        for model, seconds in zip(models, times, strict=True):
            with guarded(model, bn="running", training=False), torch.no_grad():
                _synchronize(device)
                started = time.perf_counter()
                call(model)
                _synchronize(device)
                seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds[_WARM_UP:]) for seconds in times]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
