"""Triton kernels run, in the interpreter, where sizes no longer fit 32 bits; see huge_sizes.py."""

import pytest

from .processes import module

pytest.importorskip("triton")


@pytest.mark.parametrize(("name", "checks"), [("sample", 8), ("last slot", 8), ("far rows", 1)])
def test_huge_sizes(name, checks):
    passed = module("tests.huge_sizes", name, timeout=200, TRITON_INTERPRET="1")
    assert len(passed.splitlines()) == checks
