"""Export of a pruned model: written atomically, read back, compared, measured."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
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
from ..utils.tensors import is_sparse, parts
from .dense_files import save_dense
from .measure import Forward, count_flops, median_latency
from .packed_files import save_packed
from .shrunk_files import recipe_of, save_shrunk
from .verify import copy_of, verify_file

logger = logging.getLogger(__name__)

KINDS = ("dense", "packed", "masks", "shrunk")
_FORMAT = {"format": "pt"}  # what loaders of the safetensors family look for
_OTHERS = (".bin", ".ckpt", ".onnx", ".pkl", ".pt", ".pt2", ".pth")  # names of other formats


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written, and what the exported model is like."""

    path: str
    kind: str  # "dense", "packed", "masks" or "shrunk"
    bytes_on_disk: int
    bytes_dense: int  # of the tensors of the dense model's state dict, tied ones once
    parameters: int  # of the model, tied ones once; of a shrunk one what is left
    nonzero: int  # of them
    prunable: int  # weights under masks; of a shrunk model the dense one's parameters
    kept: int  # of them
    verified: str | None  # what was compared after reading back; None: nothing
    flops: int | None  # of one forward pass on the example, zeros counted; None without an example
    flops_nonzero: float | None  # share of them in [0, 1] that multiply kept weights; None also for a shrunk model
    latency: float | None  # seconds of one forward pass on the example, median
    runs: int  # behind the median
    device: str
    uncounted: tuple[str, ...] = ()  # types of recurrent layers whose FLOPs torch does not count

    @property
    def sparsity(self) -> float:
        """Fraction of the prunable weights, of a shrunk model of all parameters, that is removed."""
        return 1.0 - self.kept / self.prunable

    @property
    def times_smaller(self) -> float:
        """Bytes of the dense model's tensors over those on disk."""
        return self.bytes_dense / self.bytes_on_disk

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {**dataclasses.asdict(self), "sparsity": self.sparsity, "times_smaller": self.times_smaller}

    @property
    def size(self) -> str:
        """Bytes on disk in words, of another kind than ``"dense"`` beside those of the dense model's tensors."""
        size, dense = format_bytes(self.bytes_on_disk), format_bytes(self.bytes_dense)
        if self.kind == "dense":
            return size
        if self.kind == "masks" or self.times_smaller < 1:  # which a small model's names and digest do
            return f"{size}; the dense model has {dense}"
        return f"{size}, {self.times_smaller:.1f} × smaller than the dense {dense}"

    def __str__(self) -> str:
        unknown = "not measured: no example batch"
        where = f"median of {self.runs} ({self.device})"
        shrunk = self.kind == "shrunk"
        notes = [*([] if shrunk else ["zeros counted"]), *(f"{layer} not counted" for layer in self.uncounted)]
        counted = ", ".join(["per forward pass", *notes])
        held = f"{self.parameters:,}, {self.nonzero:,} of them not zero"
        masked = f"{self.prunable:,}, {self.kept:,} kept (sparsity {self.sparsity:.4f})"
        left = f"{self.kept:,} of the dense model's {self.prunable:,} ({self.sparsity:.1%} less)"
        rows = [
            *([("parameters", left)] if shrunk else [("parameters", held), ("prunable", masked)]),
            ("on disk", self.size),
            ("FLOPs", unknown if self.flops is None else f"{self.flops:,} {counted}"),
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
    recipe: Any = None,
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
            it). ``"packed"``: the same tensors, of those under masks one bit for each weight and the values of the kept
            ones, d / 8 bytes and the kept ones' (:func:`load_exported` loads it, bit for bit). ``"masks"``: the masks
            alone (:meth:`MaskSet.load`), 1 bit per prunable weight, to be applied to the dense model. ``"shrunk"``: the
            state dict of a smaller model and the recipe by which :func:`load_exported` makes a freshly built dense one
            as small.
        masks: what is removed; a weight of the model that they remove is written as 0. ``None``: the zeros in the
            model's prunable weights.
        recipe: with ``kind="shrunk"``, in the place of masks: the result of a run with another granularity than
            ``"weight"``, that of a structured baseline, or a :class:`~sfpk_kernels.structure.ShrinkRecipe`. The model
            is the dense one or, after retraining or re-estimating batch-norm, the smaller one.
        example: a batch; without one there are no outputs, FLOPs and latency.
        forward_fn: runs a model on a batch; by default ``model(x)`` for (x, …), ``model(**batch)`` for dicts.
        metadata: JSON values by name to keep in the file.
        runs: forward passes behind the median latency, ≥ 1.

    Raises:
        TypeError: masks that are no MaskSet, a recipe that is none nor a structured result.
        ValueError: an unknown kind, masks or a recipe with a kind that takes none, a path that is named as another
            format (``.pt``, ``.onnx``, …), masks or a recipe of another model, a state dict with other things than
            tensors, or with tensors that share memory without being the same one.
        FileNotFoundError: no such folder.
        RuntimeError: what was read back differs, or the model cannot be copied to compare it. After an error, one of
            the model on the example among them, no file is written.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: wanted one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if Path(path).suffix.lower() in _OTHERS:
        raise ValueError(f"path: wanted a safetensors file, got {os.fspath(path)!r}, which is named as another format")
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise ValueError(f"runs: wanted an integer ≥ 1, got {runs!r}")
    if masks is not None and not isinstance(masks, MaskSet):
        raise TypeError(f"masks: wanted a MaskSet or None, got {type(masks).__name__}")
    if kind == "shrunk" and masks is not None:
        raise ValueError("masks: wanted None with kind='shrunk', which takes recipe=, got masks")
    if kind != "shrunk" and recipe is not None:
        raise ValueError(f"recipe: wanted None with kind={kind!r}, got {type(recipe).__name__}: kind='shrunk' takes it")
    model = unwrapped(model)
    kept = _Shrunk(model, recipe, metadata) if kind == "shrunk" else _Masked(model, masks, metadata)
    if kind != "masks":
        _check_state(model)
    with lock():  # no other thread's pruner has other weights in it
        pruned = kept.pruned(model)
    device = next(model.parameters()).device
    batch = None if example is None else move_to(example, device)
    with lock(), atomic_write(path) as temporary:
        kept.save(pruned, temporary, kind)
        held = kept.masks if kind == "masks" else None
        verified = verify_file(pruned, model, held, temporary, batch, forward_fn) if verify else None
        # Measured before the file takes its place: an example that the model cannot run leaves none.
        counted = (None, None, ()) if batch is None else count_flops(pruned, kept.masks, batch, forward_fn)
        flops, share, uncounted = counted
        prunable, left = kept.counts(pruned)
        report = ExportReport(
            path=os.fspath(path),
            kind=kind,
            bytes_on_disk=temporary.stat().st_size,
            bytes_dense=_bytes(pruned, kept.dense_numel),
            parameters=sum(parameter.numel() for parameter in pruned.parameters()),
            nonzero=sum(int(parameter.detach().count_nonzero()) for parameter in pruned.parameters()),
            prunable=prunable,
            kept=left,
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


class _Masked:
    """Zeros, or the masks that say where."""

    def __init__(self, model: nn.Module, masks: MaskSet | None, metadata: Mapping[str, Any] | None):
        masks = MaskSet.from_model(model) if masks is None else masks.fitted_to(model)
        masks.check(model)
        self.masks = masks if metadata is None else masks.with_metadata(metadata)

    def pruned(self, model: nn.Module) -> nn.Module:
        cure = "apply the masks first, masks.apply_(model), and pass verify=False"
        return model if self._holds(model) else self.masks.apply_(copy_of(model, cure))

    def save(self, pruned: nn.Module, path: Path, kind: str) -> None:
        masks = self.masks
        if kind == "masks":
            masks.save(path)
            return
        facts = {
            "fingerprint": masks.fingerprint(), "kept": masks.kept, "prunable": masks.prunable,
            "sparsity": masks.sparsity, "metadata": masks.metadata,
        }  # fmt: skip
        written = {**_FORMAT, "sfpk": json.dumps(facts)}
        if kind == "packed":
            save_packed(pruned, masks, path, written)
        else:
            save_dense(pruned, path, written)

    def counts(self, pruned: nn.Module) -> tuple[int, int]:
        return self.masks.prunable, self.masks.kept

    def dense_numel(self, name: str, shape: Sequence[int]) -> int:
        return math.prod(shape)

    @torch.no_grad()
    def _holds(self, model: nn.Module) -> bool:
        """Whether every removed weight is 0 already."""
        parameters, masks = named_parameters(model), self.masks
        removed = (parameters[name].masked_fill(masks[name].to(parameters[name].device), 0) for name in masks)
        return not any(bool(one.count_nonzero()) for one in removed)


class _Shrunk:
    """Smaller tensors, and the recipe of their sizes."""

    masks = None

    def __init__(self, model: nn.Module, recipe: Any, metadata: Mapping[str, Any] | None):
        self._recipe = recipe_of(recipe)
        self._dense = self._recipe.state_of(model) == "dense"
        self._facts = {**_FORMAT, "sfpk": json.dumps({"metadata": dict(metadata or {})})}

    def pruned(self, model: nn.Module) -> nn.Module:
        if not self._dense:
            return model
        try:
            return self._recipe.shrink(model)
        except (RuntimeError, TypeError) as error:
            raise RuntimeError(f"export: the model cannot be copied ({error}): pass the smaller one") from error

    def save(self, pruned: nn.Module, path: Path, kind: str) -> None:
        save_shrunk(pruned, self._recipe, path, self._facts)

    def counts(self, pruned: nn.Module) -> tuple[int, int]:
        sizes = {name: parameter.shape for name, parameter in pruned.named_parameters()}
        dense = sum(self._recipe.dense_numel(name, shape) for name, shape in sizes.items())
        return dense, sum(shape.numel() for shape in sizes.values())

    def dense_numel(self, name: str, shape: Sequence[int]) -> int:
        return self._recipe.dense_numel(name, shape)


def _bytes(model: nn.Module, dense_numel: Callable[[str, Sequence[int]], int]) -> int:
    """Of the tensors in the state dict, in the sizes of the dense model; what shares memory counts once."""
    seen: set[Any] = set()
    total = 0
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        pieces = parts(tensor).values() if is_sparse(tensor) else [tensor]
        place = tuple(piece.data_ptr() for piece in pieces)
        if place in seen and any(place):
            continue
        seen.add(place)
        sizes = [p.numel() for p in pieces] if is_sparse(tensor) else [dense_numel(name, tuple(tensor.shape))]
        total += sum(size * piece.element_size() for size, piece in zip(sizes, pieces, strict=True))
    return total


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


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
