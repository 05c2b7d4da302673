"""A model's state dict in a safetensors file: shared tensors once, sparse ones in their parts; and its way back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_model
from torch import Tensor, nn

from ..coordinates.flat import unwrapped
from ..modeling.state import autograd_allowed
from ..utils.tensors import PARTS, is_sparse, parts

_LAYOUTS = {str(layout).removeprefix("torch."): layout for layout in PARTS}


def _assembled(facts: Mapping[str, Any], found: Mapping[str, Tensor]) -> Tensor:
    layout, size = _LAYOUTS[facts["layout"]], facts["shape"]
    pieces = [found[name.strip("_")] for name in PARTS[layout]]
    if layout == torch.sparse_coo:
        indices, values = pieces
        return torch.sparse_coo_tensor(indices, values, size, is_coalesced=facts["coalesced"], check_invariants=True)
    outer, inner, values = pieces
    return torch.sparse_compressed_tensor(outer, inner, values, size, layout=layout, check_invariants=True)


def save_dense(model: nn.Module, path: Path, facts: Mapping[str, str]) -> None:
    """Write the state dict.

    Without sparse tensors that is a file of ``safetensors.torch.save_model``. A sparse tensor ``x`` becomes the dense
    ``x.indices`` and ``x.values`` (``x.crow_indices`` …), and an entry of ``sfpk_sparse`` in the metadata.

    Args:
        model: whose state dict holds nothing but tensors.
        path: the file.
        facts: metadata.
    """
    state, sparse = {}, {}
    for name, tensor in model.state_dict().items():
        if is_sparse(tensor):
            state.update({f"{name}.{part}": piece.clone() for part, piece in parts(tensor).items()})
            sparse[name] = {
                "layout": str(tensor.layout).removeprefix("torch."),
                "shape": list(tensor.shape),
                "coalesced": tensor.layout == torch.sparse_coo and tensor.is_coalesced(),
            }
        else:
            state[name] = tensor
    metadata = {**facts, "sfpk_sparse": json.dumps(sparse)} if sparse else dict(facts)
    # All that save_model wants of a model.
    save_model(cast(nn.Module, SimpleNamespace(state_dict=lambda: state)), str(path), metadata=metadata)


@autograd_allowed()
def load_exported(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read a file of :func:`~sfpk_kernels.export` (``kind="dense"``) into a model, in place, and return it.

    ``safetensors.torch.load_model`` reads these files, too, but for models with sparse buffers, or with one batch-norm
    layer under several names.

    Args:
        model: of the structure that was exported, such as the dense model; its tensors may lie on any device.
        path: the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such safetensors file, or one of another model: the message names what differs. The model is as
            it was then.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: wanted an exported model, got {os.fspath(path)!r}, which is no file")
    model = unwrapped(model)
    state, wanted = _read(path), model.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    other = sorted(
        f"{name} {tuple(state[name].shape)} for {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape or state[name].layout != wanted[name].layout
    )
    differing = [
        f"{what} {', '.join(names[:5])}"
        for what, names in (("no", missing), ("also", unknown), ("other shapes or layouts:", other))
        if names
    ]
    if differing:
        raise ValueError(
            f"path: wanted the tensors of this {type(model).__name__}, got a file with {'; '.join(differing)}"
        )
    model.load_state_dict(state)
    return model


def _read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict that was written, every name of shared tensors, on the CPU."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        state.update({name: state[same] for name, same in metadata.items() if same in state and name not in state})
        for name, facts in json.loads(metadata.get("sfpk_sparse", "{}")).items():
            pieces = {
                part.strip("_"): state.pop(f"{name}.{part.strip('_')}") for part in PARTS[_LAYOUTS[facts["layout"]]]
            }
            state[name] = _assembled(facts, pieces)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"path: wanted an exported model, got {os.fspath(path)!r}, which is damaged: {error}"
        ) from error
    return state
