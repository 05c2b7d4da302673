"""A digest of tensors and of what is written beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch import Tensor

from ..utils.tensors import as_numpy, is_sparse, parts


def digest_of(text: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the text, and over name, dtype, shape and bits of every tensor, in the order given.

    One tensor at a time is copied, and only where it lies elsewhere or with gaps.
    """
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        pieces = {"": tensor.detach()} if not is_sparse(tensor) else parts(tensor.detach())
        for part, piece in pieces.items():
            digest.update(json.dumps([name, part, str(piece.dtype), list(piece.shape)]).encode())
            flat = piece.cpu().contiguous().reshape(-1)
            digest.update(as_numpy(flat.view(torch.uint8)).data)
    return digest.hexdigest()
