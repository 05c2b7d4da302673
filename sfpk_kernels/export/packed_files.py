"""A masked model's file: one bit for each weight under masks, the values of kept ones, all other tensors as they are.

Two tensors hold what all masks keep: ``.bits``, uint8, those of each mask beginning at a byte, in the order of
:func:`~sfpk_kernels.ops.pack_mask`; ``.kept.DTYPE``, the values behind them. Where removed weights are −0.0, ``.signs``
has another bit for each weight of these tensors, so that every bit of a model comes back. (No name of a state dict
begins with a dot.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..coordinates.flat import named_parameters
from ..masks.maskset import MaskSet
from ..ops import pack_mask
from ..utils.tensors import is_sparse
from .dense_files import in_parts
from .digest import digest_of

PACKED, DIGEST = "sfpk_packed", "sfpk_digest"  # of the metadata
BITS, SIGNS, KEPT = ".bits", ".signs", ".kept."
# Values are moved as integers, which no arithmetic touches: payloads of NaN and signs of zeros stay.
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def save_packed(model: nn.Module, masks: MaskSet, path: Path, facts: Mapping[str, str]) -> None:
    """Write the state dict.

    Args:
        model: whose state dict holds nothing but tensors, and whose removed weights are 0.
        masks: of its parameters; of a tied one under any of its names.
        path: the file.
        facts: metadata.

    Raises:
        ValueError: masks of parameters that are not in the state dict, or of a dtype that is not packed.
    """
    state = model.state_dict()
    tied = _tied(state)
    own = _names_of_masks(model, masks, state, tied)
    plain = {name: tensor for name, tensor in state.items() if name not in tied and name not in own}
    bits, signs, signed = [], [], []
    shapes: dict[str, dict[str, list[int]]] = {}
    values: dict[str, list[Tensor]] = {}
    for name in sorted(own, key=lambda name: str(state[name].dtype)):  # those of a dtype together, as in the facts
        tensor = state[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ValueError(f"model: wanted {name} in one of {', '.join(DTYPES)}, which are packed, got {dtype}")
        mask = masks[own[name][0]].reshape(-1)
        for other in own[name][1:]:
            mask = mask & masks[other].reshape(-1)
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(INTEGERS[tensor.dtype.itemsize])
        values.setdefault(dtype, []).append(flat[mask])
        bits.append(pack_mask(mask))
        negative = (flat != 0) & ~mask  # removed ones are 0, so their sign is all they may have
        if negative.any():
            signs.append(pack_mask(negative))
            signed.append(name)
        shapes.setdefault(dtype, {})[name] = list(tensor.shape)
    parts, metadata = in_parts(plain)
    written = {name: tensor.detach().cpu().contiguous() for name, tensor in parts.items()}
    written |= {name: torch.cat(pieces) for name, pieces in ((BITS, bits), (SIGNS, signs)) if pieces}
    written |= {f"{KEPT}{dtype}": torch.cat(pieces).view(DTYPES[dtype]) for dtype, pieces in values.items()}
    facts_here = {"shapes": shapes, "signed": signed, "tied": tied, "sparse": metadata}
    text = json.dumps({key: value for key, value in facts_here.items() if value}, separators=(",", ":"))
    digest = digest_of(text, sorted(written.items()))
    save_file(written, path, {**facts, PACKED: text, DIGEST: digest})


def _place(tensor: Tensor) -> Any:
    """Equal for two tensors that are one: the same memory, seen in the same way."""
    if is_sparse(tensor) or tensor.numel() == 0:
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Other names of a tensor, each with the first one."""
    first: dict[Any, str] = {}
    names = {name: first.setdefault(_place(tensor), name) for name, tensor in state.items()}
    return {name: same for name, same in names.items() if name != same}


def _names_of_masks(
    model: nn.Module, masks: MaskSet, state: Mapping[str, Tensor], tied: Mapping[str, str]
) -> dict[str, list[str]]:
    """The masks of each masked tensor, by the tensor's first name in the state dict.

    Raises:
        ValueError: one that is not in the state dict as it is in the model.
    """
    parameters, found = named_parameters(model), dict[str, list[str]]()
    for name in masks:
        if name not in state or _place(state[name]) != _place(parameters[name]):
            raise ValueError(
                f"model: wanted {name} in its state dict as it is in the model, got a state dict of its own making: "
                "kind='dense' writes it"
            )
        found.setdefault(tied.get(name, name), []).append(name)
    return found
