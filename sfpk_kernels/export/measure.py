"""What an exported model costs: FLOPs, and seconds of a forward pass."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

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
    times = []
    for _ in range(_WARM_UP + runs):
        with guarded(model, bn="running", training=False), torch.no_grad():
            _synchronize(device)
            started = time.perf_counter()
            forward_fn(model, batch)
            _synchronize(device)
            times.append(time.perf_counter() - started)
    return statistics.median(times[_WARM_UP:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
