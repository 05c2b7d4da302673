"""The CUDA kernels as a library for the CPU, whose threads are fibers; see cuda_emulation/."""

import ctypes
import os
import subprocess
from pathlib import Path

import torch

from sfpk_kernels import _extension

ROOT = Path(__file__).resolve().parents[1]
NAMES = {torch.float32: "FLOAT", torch.bfloat16: "BFLOAT16", torch.float16: "HALF"}
KINDS = {dtype: _extension.load().codes()["FloatKind"][name] for dtype, name in NAMES.items()}


def library(folder):
    """Compiled into `folder`."""
    path = folder / "kernels.so"
    sources = [ROOT / "tests" / "cuda_emulation", ROOT / "csrc", ROOT / "csrc" / "cuda"]
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC",
         *(f"-I{source}" for source in sources), str(sources[0] / "kernels.cpp"), "-o", str(path)],
        check=True,
    )  # fmt: skip
    return ctypes.CDLL(str(path))


def pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def long(value):
    return ctypes.c_int64(value)


def masked_weights_(
    kernels, theta, values, blocks, out, *, kind, bits=0, score=0, saliency=None, cut=None, borders=None
):
    """One piece under every row of the mask."""
    borders = torch.tensor(borders or [0, (blocks.first or 0) + blocks.groups])
    threshold, tie_end = cut if cut is not None else (None, None)
    kernels.emulated_masked_weights(
        pointer(theta), KINDS[theta.dtype], *map(long, blocks[:3]), long(blocks.first or 0), kind, pointer(values),
        KINDS.get(values.dtype, 0), long(values.stride(0)), bits, score, pointer(saliency), pointer(threshold),
        pointer(tie_end), pointer(borders), long(borders.numel() - 1), long(values.shape[0]), pointer(out),
        KINDS[out.dtype], long(out.stride(0)),
    )  # fmt: skip


def mask_gradient_(kernels, theta, grads, blocks, out):
    """One piece's sums: written to `out` in fp32, added to it in fp64."""
    kernels.emulated_mask_gradient(
        pointer(theta), KINDS[theta.dtype], *map(long, blocks[:3]), long(blocks.first or 0), pointer(grads),
        KINDS[grads.dtype], long(grads.stride(0)), long(grads.shape[0]), int(out.dtype == torch.float64), pointer(out),
        long(out.stride(0)),
    )  # fmt: skip
