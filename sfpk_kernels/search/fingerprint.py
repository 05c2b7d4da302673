"""Which model a run belongs to."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import nn

from ..coordinates.flat import unwrapped
from ..utils.tensors import as_numpy, is_sparse, parts


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of all parameters and buffers, the same inside a wrapper."""
    digest = hashlib.sha256()
    for name, value in unwrapped(model).state_dict().items():
        if not isinstance(value, torch.Tensor):
            continue
        value = value.detach().cpu()
        digest.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode())
        for part in _dense_parts(value):
            digest.update(as_numpy(part.contiguous().reshape(-1).view(torch.uint8)).data)
    return digest.hexdigest()


def _dense_parts(value: torch.Tensor) -> list[torch.Tensor]:
    """What a tensor is made of: itself, or indices and values of a sparse one."""
    if value.layout == torch.strided:
        return [value]
    if value.layout == torch.sparse_coo:
        value = value.coalesce()
    return list(parts(value).values()) if is_sparse(value) else [value.to_dense()]
