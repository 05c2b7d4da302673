"""Packed files, read: checked as a whole first, then one tensor after the other into the model's own memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.state import check_no_inference_tensors
from ..ops import popcount, unpack_mask
from ..utils.tensors import is_sparse
from .dense_files import whole
from .digest import digest_of
from .packed_files import BITS, DIGEST, DTYPES, INTEGERS, KEPT, PACKED, SIGNS


@dataclass(frozen=True)
class _Masked:
    """Where a tensor's parts lie."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: slice
    kept: slice
    signs: slice | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class PackedFile:
    """An open file of :func:`save_packed`, checked; its tensors are read from disk one at a time.

    Raises:
        KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError: a damaged file.
    """

    def __init__(self, file: Any):  # of safe_open
        self._file = file
        self._names = set(file.keys())
        metadata = file.metadata()
        text = metadata[PACKED]
        stored = ((name, file.get_tensor(name)) for name in sorted(self._names))
        if digest_of(text, stored) != metadata[DIGEST]:
            raise ValueError("its tensors are not those that were written")
        facts = json.loads(text)
        tied: dict[str, str] = facts.get("tied", {})
        self._tied = tied
        self._masked = dict(self._places(facts.get("shapes", {}), set(facts.get("signed", ()))))
        # Without values: what is in memory for a whole model is its shapes.
        described = {name: file.get_tensor(name).to("meta") for name in self._names if not name.startswith(".")}
        self._sparse = {}
        if "sparse" in facts:
            of_sparse = tuple(f"{name}." for name in json.loads(facts["sparse"]["sfpk_sparse"]))
            self._sparse = {name: file.get_tensor(name) for name in described if name.startswith(of_sparse)}
            described = {name: tensor for name, tensor in described.items() if name not in self._sparse}
            whole(self._sparse, facts["sparse"])
        for name, one in self._masked.items():
            described[name] = torch.empty(one.shape, dtype=one.dtype, device="meta")
        self.tensors: dict[str, Tensor] = {**described, **self._sparse}  # by every name; values of sparse ones alone
        self.tensors |= {name: self.tensors[same] for name, same in tied.items()}

    def _places(self, shapes: dict[str, Any], signed: set[str]) -> Iterator[tuple[str, _Masked]]:
        """Where each masked tensor's parts begin and end: popcounts say it."""
        stored = self._file.get_tensor(BITS) if shapes else torch.empty(0, dtype=torch.uint8, device="cpu")
        at, kept_at, signs_at = 0, dict.fromkeys(DTYPES, 0), 0
        for dtype, name, shape in ((dtype, *row) for dtype, rows in shapes.items() for row in rows.items()):
            numel = math.prod(shape)
            length = -(-numel // 8)
            bits = stored[at : at + length]
            if len(bits) != length or (numel % 8 and int(bits[-1]) >> numel % 8):
                raise ValueError(f"{name}: wanted one bit for each weight of shape {tuple(shape)}, got others")
            kept = slice(kept_at[dtype], kept_at[dtype] + int(popcount(bits)))
            signs = slice(signs_at, signs_at + length) if name in signed else None
            yield name, _Masked(tuple(shape), DTYPES[dtype], slice(at, at + length), kept, signs)
            at, kept_at[dtype], signs_at = at + length, kept.stop, signs_at + (length if signs else 0)
        lengths = {BITS: at, SIGNS: signs_at, **{f"{KEPT}{dtype}": count for dtype, count in kept_at.items()}}
        for name, length in lengths.items():
            found = self._file.get_slice(name).get_shape() if name in self._names else [0]
            if found != [length]:
                raise ValueError(f"{name}: wanted {length} entries, got shape {tuple(found)}")

    def fill(self, name: str, target: Tensor) -> None:
        """Write a tensor's values into one of its shape, on any device, cast to its dtype."""
        name = self._tied.get(name, name)
        one = self._masked.get(name)
        if one is None:
            target.copy_(self._sparse[name] if name in self._sparse else self._file.get_tensor(name))
        elif target.dtype == one.dtype and target.is_contiguous():  # no memory but the target's own
            self._unpack(one, target.view(-1).view(INTEGERS[one.dtype.itemsize]))
        else:
            flat = torch.empty(one.numel, dtype=INTEGERS[one.dtype.itemsize], device=target.device)
            target.copy_(self._unpack(one, flat).view(one.dtype).view(one.shape))

    def tensor(self, name: str) -> Tensor:
        """A tensor with its values, on the CPU."""
        found = self.tensors[name]
        tensor = torch.empty(found.shape, dtype=found.dtype, device="cpu") if found.is_meta else found
        if found.is_meta:
            self.fill(name, tensor)
        return tensor

    def _unpack(self, one: _Masked, flat: Tensor) -> Tensor:
        device = flat.device
        bits = self._file.get_slice(BITS)[one.bits].to(device)
        kept = self._file.get_slice(f"{KEPT}{str(one.dtype).removeprefix('torch.')}")[one.kept].to(device)
        flat.zero_().masked_scatter_(unpack_mask(bits, one.numel), kept.view(flat.dtype))
        if one.signs is not None:
            signs = self._file.get_slice(SIGNS)[one.signs].to(device)
            flat.masked_fill_(unpack_mask(signs, one.numel), torch.iinfo(flat.dtype).min)
        return flat


def load_packed(model: nn.Module, file: PackedFile) -> None:
    """Read all tensors into a model of their names and shapes.

    Beside the model no more than one tensor is in memory, unless the model makes its state dict by itself or something
    hooks into loading: ``load_state_dict`` is called then, with all of them. An interruption waits: the model is
    wholly the file's when it goes on.

    Raises:
        RuntimeError: a tensor could not be written, such as for want of memory; others may have been.
        ValueError: a model without memory of its own (meta device), or made under ``torch.inference_mode()``.
    """
    check_no_inference_tensors(model)
    state = model.state_dict()
    meta = [name for name, tensor in state.items() if tensor.is_meta]
    if meta:
        raise ValueError(f"model: wanted one with memory, got {meta[0]} on the meta device: model.to_empty(device=…)")
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    if not _is_plain(model, state, own):
        model.load_state_dict({name: file.tensor(name) for name in state})
        return
    # Sparse tensors take others' parts: a detached one would take them alone.
    targets = {name: own[name] if is_sparse(tensor) else tensor for name, tensor in state.items()}
    try:
        _fill(file, targets)
    except Exception as error:
        raise RuntimeError(f"model: its tensors could not all be read, load it again: {error}") from error
    except BaseException:  # whatever interrupts: everything has been checked, so the rest is quickly done
        _fill(file, targets)
        raise


@torch.no_grad()
def _fill(file: PackedFile, targets: dict[str, Tensor]) -> None:
    for name, target in targets.items():
        file.fill(name, target)


def _is_plain(model: nn.Module, state: dict[str, Tensor], own: dict[str, Tensor]) -> bool:
    """Whether ``load_state_dict`` would copy into parameters and buffers, ``own``, and do nothing else."""
    if any(name not in own or not _same(own[name].detach(), tensor) for name, tensor in state.items()):
        return False
    modules = list(model.modules())
    return type(model).load_state_dict is nn.Module.load_state_dict and not any(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or not type(module)._load_from_state_dict.__module__.startswith("torch.nn.modules.")
        for module in modules
    )


def _same(a: Tensor, b: Tensor) -> bool:
    if is_sparse(a) or is_sparse(b):
        return a.layout == b.layout
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
