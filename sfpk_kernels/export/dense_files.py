"""A model's state dict in a safetensors file: shared tensors once, sparse ones in their parts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

from ..utils.tensors import PARTS, is_sparse, parts

_LAYOUTS = {str(layout).removeprefix("torch."): layout for layout in PARTS}
_SPARSE = "sfpk_sparse"  # of the metadata


def _assembled(facts: Mapping[str, Any], found: Mapping[str, Tensor]) -> Tensor:
    layout, size = _LAYOUTS[facts["layout"]], facts["shape"]
    pieces = [found[name.strip("_")] for name in PARTS[layout]]
    if layout == torch.sparse_coo:
        indices, values = pieces
        return torch.sparse_coo_tensor(indices, values, size, is_coalesced=facts["coalesced"], check_invariants=True)
    outer, inner, values = pieces
    return torch.sparse_compressed_tensor(outer, inner, values, size, layout=layout, check_invariants=True)


def in_parts(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict with sparse tensors in their parts, and the metadata by which :func:`whole` puts them together."""
    state, sparse = {}, {}
    for name, tensor in tensors.items():
        if is_sparse(tensor):
            state.update({f"{name}.{part}": piece.clone() for part, piece in parts(tensor).items()})
            sparse[name] = {
                "layout": str(tensor.layout).removeprefix("torch."),
                "shape": list(tensor.shape),
                "coalesced": tensor.layout == torch.sparse_coo and tensor.is_coalesced(),
            }
        else:
            state[name] = tensor
    return state, {_SPARSE: json.dumps(sparse)} if sparse else {}


def whole(state: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """The inverse of :func:`in_parts`, in place.

    Raises:
        KeyError, RuntimeError, TypeError, ValueError: parts that are missing or do not fit.
    """
    for name, facts in json.loads(metadata.get(_SPARSE, "{}")).items():
        pieces = {part.strip("_"): state.pop(f"{name}.{part.strip('_')}") for part in PARTS[_LAYOUTS[facts["layout"]]]}
        state[name] = _assembled(facts, pieces)


def save_dense(model: nn.Module, path: Path, facts: Mapping[str, str]) -> None:
    """Write the state dict.

    Without sparse tensors that is a file of ``safetensors.torch.save_model``. A sparse tensor ``x`` becomes the dense
    ``x.indices`` and ``x.values`` (``x.crow_indices`` …), and an entry of ``sfpk_sparse`` in the metadata.

    Args:
        model: whose state dict holds nothing but tensors.
        path: the file.
        facts: metadata.
    """
    state, sparse = in_parts(model.state_dict())
    metadata = {**facts, **sparse}
    # All that save_model wants of a model.
    save_model(cast(nn.Module, SimpleNamespace(state_dict=lambda: state)), str(path), metadata=metadata)


def read_dense(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict that was written, every name of shared tensors, on the CPU; and the metadata.

    Raises:
        KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError: a damaged file.
    """
    with safe_open(os.fspath(path), framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() or {}
    state.update({name: state[same] for name, same in metadata.items() if same in state and name not in state})
    whole(state, metadata)
    return state, metadata
