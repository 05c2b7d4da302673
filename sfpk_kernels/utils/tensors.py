"""Looking into tensors that belong to others: their memory for NumPy and for kernels, the parts of sparse ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# The tensors that sparse ones are made of: all that has memory. (With an underscore: without coalescing.)
PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def is_sparse(tensor: Tensor) -> bool:
    """Whether it has no memory of its own, but parts that have."""
    return tensor.layout in PARTS


def parts(tensor: Tensor) -> dict[str, Tensor]:
    """The tensors that a sparse one is made of, by name."""
    return {name.strip("_"): getattr(tensor, name)() for name in PARTS[tensor.layout]}


def as_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A CPU tensor's own memory. After ``tensor.numpy()`` it could never be resized again, which some modules do."""
    return np.from_dlpack(tensor.detach())


def gapless(rows: Tensor) -> Tensor:  # (n, d)
    """Rows may lie apart, entries of a row may not."""
    if rows.shape[1] <= 1 or rows.stride(1) == 1:
        return rows
    # Without entries, every tensor is contiguous already.
    return rows.contiguous() if rows.numel() else torch.empty(rows.shape, dtype=rows.dtype, device=rows.device)
