"""Export of a pruned model: written atomically, read back, compared, measured."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..coordinates.flat import named_parameters, unwrapped
from ..masks.maskset import MaskSet
from ..modeling.batches import forward, move_to
from ..modeling.turns import lock
from ..utils.files import atomic_write
from ..utils.memory import format_bytes
from ..utils.tensors import is_sparse
from .dense_files import save_dense
from .measure import Forward, count_flops, median_latency
from .verify import copy_of, verify_file

logger = logging.getLogger(__name__)

KINDS = ("dense", "masks")
_OTHERS = (".bin", ".ckpt", ".onnx", ".pkl", ".pt", ".pt2", ".pth")  # names of other formats


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written, and what the exported model is like."""

    path: str
    kind: str  # "dense" or "masks"
    bytes_on_disk: int
    parameters: int  # of the model, tied ones once
    nonzero: int  # of them
    prunable: int  # weights under masks
    kept: int  # of them
    verified: str | None  # what was compared after reading back; None: nothing
    flops: int | None  # of one forward pass on the example, zeros counted; None without an example
    flops_nonzero: float | None  # share of them in [0, 1] that multiply kept weights
    latency: float | None  # seconds of one forward pass on the example, median
    runs: int  # behind the median
    device: str
    uncounted: tuple[str, ...] = ()  # types of recurrent layers whose FLOPs torch does not count

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights that is removed."""
        return 1.0 - self.kept / self.prunable

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {**dataclasses.asdict(self), "sparsity": self.sparsity}

    def __str__(self) -> str:
        unknown = "not measured: no example batch"
        where = f"median of {self.runs} ({self.device})"
        zeros = ", ".join(["zeros counted", *(f"{layer} not counted" for layer in self.uncounted)])
        rows = [
            ("parameters", f"{self.parameters:,}, {self.nonzero:,} of them not zero"),
            ("prunable", f"{self.prunable:,}, {self.kept:,} kept (sparsity {self.sparsity:.4f})"),
            ("on disk", format_bytes(self.bytes_on_disk)),
            ("FLOPs", unknown if self.flops is None else f"{self.flops:,} per forward pass, {zeros}"),
            ("latency", unknown if self.latency is None else f"{_time(self.latency)}, {where}"),
            ("verified", self.verified or "no"),
        ]  # fmt: skip
        if self.flops_nonzero is not None:
            note = f"{self.flops_nonzero:.1%} of the FLOPs multiply kept weights; dense kernels compute the rest too"
            rows.insert(4, ("", note))
        width = max(len(name) for name, _ in rows)
        return "\n".join([f"{self.kind}: {self.path}", *(f"  {name:<{width}}  {text}" for name, text in rows)])


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    verify: bool = True,
    *,
    kind: str = "dense",
    masks: MaskSet | None = None,
    example: Any = None,
    forward_fn: Forward = forward,
    metadata: Mapping[str, Any] | None = None,
    runs: int = 20,
) -> ExportReport:
    """Write a pruned model to a file, read it back, compare, and report size, FLOPs and latency.

    The file takes its place only when everything has been compared and measured. The model is not changed (its outputs
    are taken in eval mode, without gradients).

    Args:
        model: the pruned model, on one device. Of ``torch.compile``, DataParallel and DistributedDataParallel the model
            inside is written and measured.
        path: the safetensors file, written atomically.
        verify: read the file back into a copy of the model whose own values were wiped out, and compare every
            tensor, and the outputs on ``example``, exactly.
        kind: ``"dense"``: the state dict, removed weights as zeros; tensors shared under several names are written once
            (``safetensors.torch.load_model`` loads it), sparse buffers in their parts (:func:`load_exported` loads
            it). ``"masks"``: the masks alone (:meth:`MaskSet.load`), 1 bit per
            prunable weight, to be applied to the dense model.
        masks: what is removed; a weight of the model that they remove is written as 0. ``None``: the zeros in the
            model's prunable weights.
        example: a batch; without one there are no outputs, FLOPs and latency.
        forward_fn: runs a model on a batch; by default ``model(x)`` for (x, …), ``model(**batch)`` for dicts.
        metadata: JSON values by name to keep in the file.
        runs: forward passes behind the median latency, ≥ 1.

    Raises:
        TypeError: masks that are no MaskSet.
        ValueError: an unknown kind (``"shrunk"`` among them: it takes structured pruning), a path that is named as
            another format (``.pt``, ``.onnx``, …), masks of another model, a state dict with other things than tensors,
            or with tensors that share memory without being the same one.
        FileNotFoundError: no such folder.
        RuntimeError: what was read back differs, or the model cannot be copied to compare it. After an error, one of
            the model on the example among them, no file is written.
    """
    if kind == "shrunk":
        raise ValueError(
            "kind: wanted 'dense' or 'masks', got 'shrunk': smaller tensors take structured pruning (whole channels or "
            "heads), which this version does not have"
        )
    if kind not in KINDS:
        raise ValueError(f"kind: wanted one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if Path(path).suffix.lower() in _OTHERS:
        raise ValueError(f"path: wanted a safetensors file, got {os.fspath(path)!r}, which is named as another format")
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise ValueError(f"runs: wanted an integer ≥ 1, got {runs!r}")
    if masks is not None and not isinstance(masks, MaskSet):
        raise TypeError(f"masks: wanted a MaskSet or None, got {type(masks).__name__}")
    model = unwrapped(model)
    masks = MaskSet.from_model(model) if masks is None else masks
    masks.check(model)
    if metadata is not None:
        masks = masks.with_metadata(metadata)
    if kind == "dense":
        _check_state(model)
    cure = "apply the masks first, masks.apply_(model), and pass verify=False"
    with lock():  # no other thread's pruner has other weights in it
        pruned = model if _holds(masks, model) else masks.apply_(copy_of(model, cure))
    device = next(model.parameters()).device
    batch = None if example is None else move_to(example, device)
    with lock(), atomic_write(path) as temporary:
        if kind == "dense":
            _save_dense(pruned, masks, temporary)
        else:
            masks.save(temporary)
        verified = verify_file(pruned, model, masks, kind, temporary, batch, forward_fn) if verify else None
        # Measured before the file takes its place: an example that the model cannot run leaves none.
        flops, share, uncounted = (None, None, ()) if batch is None else count_flops(pruned, masks, batch, forward_fn)
        report = ExportReport(
            path=os.fspath(path),
            kind=kind,
            bytes_on_disk=temporary.stat().st_size,
            parameters=sum(parameter.numel() for parameter in pruned.parameters()),
            nonzero=sum(int(parameter.detach().count_nonzero()) for parameter in pruned.parameters()),
            prunable=masks.prunable,
            kept=masks.kept,
            verified=verified,
            flops=flops,
            flops_nonzero=share,
            latency=None if batch is None else median_latency(pruned, batch, forward_fn, runs, device),
            runs=0 if batch is None else runs,
            device=str(device),
            uncounted=uncounted,
        )
    logger.info("exported %s", report)
    return report


@torch.no_grad()
def _holds(masks: MaskSet, model: nn.Module) -> bool:
    """Whether every removed weight is 0 already."""
    parameters = named_parameters(model)
    return not any(bool(parameters[n][(~masks[n]).to(parameters[n].device)].count_nonzero()) for n in masks)


def _check_state(model: nn.Module) -> None:
    """That the state dict can be written: tensors, of which none is a view of another one.

    Raises:
        ValueError: it cannot.
    """
    state = model.state_dict()
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"model: wanted a state dict of tensors, which is what safetensors holds, got {', '.join(others[:5])}, "
            "which is none: kind='masks' writes the masks alone"
        )
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    spans = sorted(
        (str(value.device), value.data_ptr(), _end(value), name)
        for name, value in state.items()
        if not is_sparse(value)
    )
    # In the order of their beginnings: where any two overlap, two neighbours do.
    for (device, _, end, name), (other_device, begin, _, other) in pairwise(spans):
        if device == other_device and begin < end and own.get(name) is not own.get(other):
            raise ValueError(
                f"model: wanted tensors that are the same (tied) or apart, got {name} and {other}, which share memory "
                "without being one: a file would hold one of them; give each its own, such as by .clone()"
            )


def _end(tensor: Tensor) -> int:
    """The address behind its last element."""
    if tensor.numel() == 0:
        return tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _save_dense(pruned: nn.Module, masks: MaskSet, path: Path) -> None:
    facts = {
        "format": "pt",  # what loaders of the safetensors family look for
        "sfpk": json.dumps({
            "fingerprint": masks.fingerprint(), "kept": masks.kept, "prunable": masks.prunable,
            "sparsity": masks.sparsity, "metadata": masks.metadata,
        }),
    }  # fmt: skip
    save_dense(pruned, path, facts)


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
