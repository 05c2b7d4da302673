"""No size overflows an integer in a Triton kernel, up to 2^32 columns; see integer_proof.py."""

import json

import pytest

from .processes import module, python

pytest.importorskip("triton")

EVERY_KERNEL = {
    "apply", "choose_digit", "combine", "count_digits", "count_ties", "find_chunk", "find_tie", "group_sums",
    "products", "write_mask",
}  # fmt: skip
EVERY_STAGE = {"measure", "prepare", "reduce", "plan", "update", "plan rescale", "rescale", "finish"}

WRONG = """
import sys
sys.path.insert(0, {folder!r})
import kernels
from tests.integer_proof import faults_of
from tests.recorder import Launch
d, n = 2**30, 10
def faults(name, *arguments, grid=(1024,)):
    return faults_of(getattr(kernels, name), Launch(name, None, grid, arguments, {{"BLOCK": 128}}))
import torch
with torch._subclasses.fake_tensor.FakeTensorMode():
    x = torch.empty(n, d, device="cuda:0")
names = "rows rows_widened hops hops_widened programs masks branches"
print([len(faults(name, x, n, d)) for name in names.split()])
"""
KERNELS = """
import triton
import triton.language as tl

@triton.jit
def rows(x, n, stride, BLOCK: tl.constexpr):
    for row in range(n):
        tl.store(x + row * stride + tl.arange(0, BLOCK), 1.0)

@triton.jit
def rows_widened(x, n, stride, BLOCK: tl.constexpr):
    for i in range(n):
        row = tl.full([], 0, tl.int64) + i
        tl.store(x + row * stride + tl.arange(0, BLOCK), 1.0)

@triton.jit
def hops(x, n, hop, BLOCK: tl.constexpr):
    for at in range(0, hop.to(tl.int64) * n, 16 * hop):
        tl.store(x + at, 1.0)

@triton.jit
def hops_widened(x, n, hop, BLOCK: tl.constexpr):
    for at in range(0, hop.to(tl.int64) * n, 16 * hop.to(tl.int64)):
        tl.store(x + at, 1.0)

@triton.jit
def programs(x, n, d, BLOCK: tl.constexpr):
    at = tl.program_id(0) * (BLOCK * 65536) + tl.arange(0, BLOCK)
    tl.store(x + at, 1.0)

@triton.jit
def branches(x, n, d, BLOCK: tl.constexpr):
    at = tl.program_id(0)
    if at * d < 5 * n:
        tl.store(x + at, 1.0)

@triton.jit
def masks(x, n, d, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, 1.0, mask=at + d < 3 * d + n)
"""


@pytest.mark.parametrize("group", ["few", pytest.param("many", marks=pytest.mark.slow)])
def test_every_size_fits(group):
    # A process of its own: in this one the kernels are interpreted.
    found = json.loads(module("tests.integer_proof", group, TRITON_INTERPRET=None).splitlines()[-1])
    assert found["faults"] == []
    assert EVERY_KERNEL | {f"transition {stage}" for stage in EVERY_STAGE} <= set(found["kernels"])


def test_what_does_not_fit_is_found(tmp_path):
    """Products of rows and strides, loops that do not advance, program ids, comparisons in masks."""
    (tmp_path / "kernels.py").write_text(KERNELS)
    rows, rows_widened, hops, hops_widened, programs, masks, branches = json.loads(
        python(WRONG.format(folder=str(tmp_path)), TRITON_INTERPRET=None).splitlines()[-1]
    )
    assert rows > 0
    assert hops > 0
    assert programs > 0
    assert masks > 0
    assert branches > 0
    assert rows_widened == hops_widened == 0
