"""Linear layers under a 2:4 mask in torch's semi-structured format, compared and timed; NVIDIA GPUs only."""

from __future__ import annotations

import dataclasses
import logging
import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.flat import unwrapped
from ..masks.maskset import MaskSet
from ..modeling.batches import forward, move_to
from ..modeling.turns import lock
from .measure import Forward, median_latency, run
from .verify import copy_of, tensors_of

logger = logging.getLogger(__name__)

WHO = "to_semi_structured"
DTYPES = (torch.float16, torch.bfloat16)
# Rows and columns of a weight are multiples of these in torch's tables; a test compares.
MULTIPLES = {"cutlass": (32, 64), "cusparselt": (16, 16)}
# What these compute in eval mode, they compute from their layers' weights without calling the layers.
_FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclasses.dataclass(frozen=True)
class SemiStructured:
    """A converted model, and how it compares with the masked dense one."""

    model: nn.Module  # a copy, its weights converted
    layers: tuple[str, ...]  # weights that were
    dense: dict[str, str]  # weights under masks that were not, and why
    format: str  # "cutlass" or "cusparselt"
    seconds_dense: float  # of one forward pass on the example, median, masked and dense
    seconds_sparse: float  # likewise, converted
    runs: int  # behind each median
    difference: float  # largest, of the outputs on the example
    scale: float  # the largest output of the dense model in size
    device: str

    @property
    def speedup(self) -> float:
        """Dense over converted time; below 1 the converted model is the slower one."""
        return self.seconds_dense / self.seconds_sparse

    def __str__(self) -> str:
        rows = [
            f"2:4 ({self.format}): {len(self.layers)} weights converted, {len(self.dense)} left dense",
            f"  forward pass  {_ms(self.seconds_dense)} dense, {_ms(self.seconds_sparse)} converted "
            f"({self.speedup:.2f} ×), medians of {self.runs} ({self.device})",
            f"  outputs       differ by {self.difference:.2g} at most, the largest is {self.scale:.2g}",
            *(f"  {name}: {why}" for name, why in self.dense.items()),
        ]
        return "\n".join(rows)


def to_semi_structured(
    model: nn.Module,
    mask: MaskSet,
    example: Any,
    *,
    keep_dense: Iterable[str] = (),
    forward_fn: Forward = forward,
    tolerance: float = 0.05,
    runs: int = 20,
) -> SemiStructured:
    """Apply a 2:4 mask to a copy of a model and convert its Linear weights to torch's semi-structured format.

    That is ``torch.sparse.to_sparse_semi_structured``. The copy's outputs on ``example`` are compared with those of the
    masked dense model, and both are timed, in eval mode without gradients. The model is not changed. The converted one
    need not be faster: measure with batches of the size you serve.

    Args:
        model: on a CUDA device of compute capability 8.0 or later, in fp16 or bf16.
        mask: that keeps at most 2 of every 4 inputs, such as of ``SFPKConfig(0.5, pattern=(2, 4))``. Of Linear layers
            all its weights are converted but those in ``keep_dense``; those of other layers, and of
            nn.MultiheadAttention and nn.TransformerEncoderLayer, whose fused kernels take dense ones, are masked and
            left dense.
        example: a batch.
        keep_dense: names of weights (``"head.weight"``) to mask and leave dense.
        forward_fn: runs a model on a batch; by default ``model(x)`` for (x, …), ``model(**batch)`` for dicts.
        tolerance: largest difference of the outputs to take, as a share of the largest output in size; half precision
            adds in another order.
        runs: forward passes behind each median, ≥ 1.

    Raises:
        TypeError: a mask that is no MaskSet, or a weight of another dtype.
        ValueError: a model elsewhere or of which nothing can be converted, a mask of another model or with more than 2
            of 4, a weight whose shape torch's kernels do not take; the message names it, and ``keep_dense`` leaves it
            out.
        RuntimeError: the outputs differ by more, or the model cannot be copied.
    """
    if not isinstance(mask, MaskSet):
        raise TypeError(f"mask: wanted a MaskSet, got {type(mask).__name__}")
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise ValueError(f"runs: wanted an integer ≥ 1, got {runs!r}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, numbers.Real) or not tolerance >= 0:
        raise ValueError(f"tolerance: wanted a number ≥ 0, got {tolerance!r}")
    left = _names(keep_dense, mask)
    model = unwrapped(model)
    mask.check(model)
    device = next(model.parameters()).device
    check_device(device)
    kind = format_in_use()
    found = {name: why_dense(model, name) for name in mask}
    reasons = {name: "keep_dense" if name in left else why for name, why in found.items()}
    dense = {name: why for name, why in reasons.items() if why is not None}
    layers = tuple(name for name in mask if name not in dense)
    if not layers:
        raise ValueError(f"mask: wanted a weight of a Linear layer to convert, got none: {dense}")
    for name in layers:
        _check_weight(name, model.get_parameter(name), mask[name], kind)
    with lock():  # no other thread's pruner has other weights in it
        masked = mask.apply_(copy_of(model, "convert what copy.deepcopy can copy", WHO))
    sparse = copy_of(masked, "convert what copy.deepcopy can copy", WHO)
    with torch.no_grad():
        for name in layers:
            _convert(sparse, name)
    batch = move_to(example, device)
    with lock():
        difference, scale = _compare(masked, sparse, batch, forward_fn, tolerance)
        before, after = (median_latency(each, batch, forward_fn, runs, device) for each in (masked, sparse))
    result = SemiStructured(sparse, layers, dense, kind, before, after, runs, difference, scale, str(device))
    logger.info("%s", result)
    return result


def check_device(device: torch.device) -> None:
    """That it multiplies 2:4 matrices.

    Raises:
        ValueError: it does not.
    """
    wanted = "model: wanted it on a CUDA device of compute capability 8.0 or later, which multiplies 2:4 matrices, got"
    if device.type != "cuda":
        raise ValueError(f"{wanted} it on {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise ValueError(f"{wanted} {torch.cuda.get_device_name(device)}, {capability[0]}.{capability[1]}")


def format_in_use() -> str:
    """Of torch's two: cuSPARSELt where torch was built with it, unless CUTLASS is asked for; else CUTLASS."""
    forced = torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS
    return "cusparselt" if torch.backends.cusparselt.is_available() and not forced else "cutlass"


def converted(weight: Tensor) -> Tensor:
    """In torch's format."""
    if format_in_use() == "cutlass":  # what to_sparse_semi_structured does where it is forced to
        return torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(weight)
    return torch.sparse.to_sparse_semi_structured(weight)


def why_dense(model: nn.Module, name: str) -> str | None:
    """Why a weight is none to convert: it is used by others than Linear layers that are called."""
    weight = model.get_parameter(name)
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _FUSED) and any(weight is inner for inner in module.parameters()):
            return f"in {prefix or 'the model'} ({type(module).__name__}), which computes with dense weights"
        for local, parameter in module._parameters.items():
            if parameter is not weight:
                continue
            if local != "weight" or type(module).forward is not nn.Linear.forward:
                return f"of {prefix or 'the model'} ({type(module).__name__}), no plain Linear layer"
    return None


def _names(keep_dense: Any, mask: MaskSet) -> set[str]:
    if isinstance(keep_dense, str) or not isinstance(keep_dense, Iterable):
        raise TypeError(f"keep_dense: wanted a list of names, got {keep_dense!r:.80}")
    names = list(keep_dense)
    unknown = [name for name in names if name not in mask]
    if unknown:
        raise ValueError(f"keep_dense: wanted names of the mask, {', '.join(mask)}, got {unknown[0]!r}")
    return set(names)


def _check_weight(name: str, weight: Tensor, kept: Tensor, kind: str) -> None:
    cure = f", or keep_dense=[{name!r}]"
    if weight.dtype not in DTYPES:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: wanted float16 or bfloat16, got {dtype}: model.to(torch.bfloat16){cure}")
    rows, columns = MULTIPLES[kind]
    if weight.shape[0] % rows or weight.shape[1] % columns:
        raise ValueError(
            f"{name}: wanted a shape of multiples of ({rows}, {columns}) for {kind}, got {tuple(weight.shape)}: "
            f"leave it out of the search (ignored_layers){cure}"
        )
    most = int(kept.reshape(-1, 4).sum(dim=1).max())
    if most > 2:
        raise ValueError(
            f"{name}: wanted a mask that keeps at most 2 of every 4 inputs, got {most} in one: search with "
            f"SFPKConfig(0.5, pattern=(2, 4)){cure}"
        )


def _convert(model: nn.Module, name: str) -> None:
    """In every place that holds the weight."""
    weight = model.get_parameter(name)
    stand_in = nn.Parameter(converted(weight.detach().contiguous()), requires_grad=False)
    for module in list(model.modules()):
        if module._parameters.get("weight") is weight:
            module.weight = stand_in


def _compare(
    masked: nn.Module, sparse: nn.Module, batch: Any, forward_fn: Forward, tolerance: float
) -> tuple[float, float]:
    """The largest difference, and the largest output of the dense model in size."""
    first, second = (
        [output for output in tensors_of(run(each, batch, forward_fn)) if output.is_floating_point()]
        for each in (masked, sparse)
    )
    if not first:
        raise RuntimeError(f"{WHO}: the output on the example holds no numbers to compare; pass forward_fn")
    if [output.shape for output in first] != [output.shape for output in second]:
        raise RuntimeError(f"{WHO}: the outputs of the converted model have other shapes")
    pairs = [(a.double(), b.double()) for a, b in zip(first, second, strict=True) if a.numel()]
    difference = max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
    scale = max((float(a.abs().max()) for a, _ in pairs), default=0.0)
    if not difference <= tolerance * scale or not math.isfinite(scale):  # NaN among them
        raise RuntimeError(
            f"{WHO}: wanted outputs that differ by at most {tolerance:g} of the largest ({scale:.3g}), got a "
            f"difference of {difference:.3g}"
        )
    return difference, scale


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
