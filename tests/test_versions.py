"""The versions we support: stated once, the same everywhere, and what is outside is refused with a clear word."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sfpk_kernels import _build, _triton
from tests import matrix

from .processes import Forked

ROOT = Path(__file__).resolve().parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


def words(version):
    return ".".join(map(str, version))


def test_they_are_the_same_everywhere():
    oldest = _build.OLDEST
    assert f'requires-python = ">={words(oldest["python"])},<3.{_build.NEWEST_PYTHON[1] + 1}"' in PROJECT
    assert f'"torch>={words(oldest["torch"])}"' in PROJECT
    assert f'"triton>={words(oldest["triton"])}"' in PROJECT
    assert f'"setuptools>={oldest["setuptools"][0]}"' in PROJECT
    assert re.findall(r"Python :: (3\.\d+)", PROJECT) == [f"3.{minor}" for minor in range(10, 14)]
    page = (ROOT / "docs" / "install.md").read_text()
    stated = (
        f"Python {words(oldest['python'])} to {words(_build.NEWEST_PYTHON)}, torch {words(oldest['torch'])} and newer, "
        f"Triton {words(oldest['triton'])} and newer, setuptools {oldest['setuptools'][0]} and newer"
    )
    assert stated in " ".join(page.split())
    assert _build.TORCH_TARGET_VERSION == "0x020a000000000000"


def test_the_matrix_tries_the_oldest_and_every_python():
    oldest = _build.OLDEST
    rows = matrix.ROWS
    assert {row.python for row in rows} == {f"3.{minor}" for minor in range(10, 14)}
    assert any(row.torch.startswith(words(oldest["torch"]) + ".") for row in rows)
    assert any(row.torch == "newest" for row in rows)
    assert any(row.triton.startswith(words(oldest["triton"]) + ".") for row in rows)
    assert any(row.setuptools.startswith(f"{oldest['setuptools'][0]}.") for row in rows)


@pytest.mark.parametrize(
    ("package", "version", "fits"),
    [
        ("torch", "2.9.1", False),
        ("torch", "1.13", False),
        ("torch", "2.10.0+cu128", True),
        ("torch", "3.0.0a0", True),
        ("triton", "3.3.1", False),
        ("triton", "3.4.0", True),
        ("setuptools", "76.1", False),
        ("setuptools", "84.2", True),
    ],
)
def test_too_old(package, version, fits):
    reason = _build.too_old(package, version)
    assert (reason is None) == fits
    if reason:
        oldest = ".".join(map(str, _build.OLDEST[package]))
        assert reason == f"sfpk_kernels needs {package} {oldest} or newer, {version} is installed"


def test_pythons():
    assert _build.unsupported_python((3, 10)) is None
    assert _build.unsupported_python((3, 13)) is None
    for version in ((3, 9), (3, 14)):
        reason = _build.unsupported_python(version)
        assert reason == f"sfpk_kernels supports Python 3.10 to 3.13, this is {words(version)}"


def test_an_old_torch_is_refused_at_import():
    code = "import torch; torch.__version__ = '2.9.1'; import sfpk_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: sfpk_kernels needs torch 2.10 or newer, 2.9.1 is installed: pip install"
    )


@pytest.mark.parametrize(("package", "version"), [("setuptools", "70.0.0"), ("torch", "2.9.0")])
def test_old_build_tools_are_refused(package, version):
    code = (
        f"import os, sys, {package}; {package}.__version__ = {version!r}; sys.argv = ['setup.py', '--version']; "
        f"os.chdir({str(ROOT)!r}); "
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'), {'__file__': 'setup.py', '__name__': '__main__'})"
    )
    exitcode, _, errors = Forked(code, {**os.environ, "SFPK_BUILD": "none"}).wait()
    assert exitcode == 1
    assert f"setup.py: sfpk_kernels needs {package} " in errors
    assert f"{version} is installed" in errors


def test_an_old_triton_is_a_reason(monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.3.1")
    _triton._missing.cache_clear()
    assert _triton._missing() == "sfpk_kernels needs triton 3.4 or newer, 3.3.1 is installed"
    _triton._missing.cache_clear()
