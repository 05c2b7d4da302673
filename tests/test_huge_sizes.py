"""Triton kernels run, in the interpreter, where sizes no longer fit 32 bits; see huge_sizes.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(("name", "checks"), [("sample", 8), ("last slot", 8), ("far rows", 1)])
def test_huge_sizes(name, checks):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-W", "ignore", "-m", "tests.huge_sizes", name]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=200
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"does not end; passed before: {error.stdout!r}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == checks
