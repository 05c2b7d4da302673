"""The package as installed: imports, extension, version, command line."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import sfpk_kernels
from sfpk_kernels import _build, _extension
from sfpk_kernels.cli import main

from . import processes

ROOT = Path(__file__).resolve().parent.parent


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_import_is_light():
    heavy = "triton matplotlib sklearn scipy sfpk_kernels._C torch.utils.cpp_extension"
    code = f"import sys, sfpk_kernels; print([m for m in {heavy.split()!r} if m in sys.modules])"
    done = python(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_version_comes_from_one_place():
    assert metadata.version("sfpk_kernels") == sfpk_kernels.__version__
    assert all(hasattr(sfpk_kernels, name) for name in sfpk_kernels.__all__)


def test_every_folder_with_modules_is_a_package():
    """What has no __init__.py, setup.py would leave out."""
    folders = {path.parent for path in (ROOT / "sfpk_kernels").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert 'find_packages(include=["sfpk_kernels", "sfpk_kernels.*"])' in (ROOT / "setup.py").read_text()


def test_extension_is_built_and_copies():
    config = _extension.load().build_config()
    assert {"compiler", "cpp_standard", "openmp", "cuda"} <= set(config)
    for size in (0, 1, 7, 4096, 300_001):
        source, out = torch.randn(size), torch.full((size,), float("nan"))
        torch.ops.sfpk_cpp.copy_(out, source)
        assert torch.equal(out, source)
    torch.library.opcheck(torch.ops.sfpk_cpp.copy_.default, (torch.empty(5), torch.randn(5)), test_utils="test_schema")


@pytest.mark.parametrize(
    ("out", "source", "words"),
    [
        (torch.empty(3), torch.empty(4), "copy_: src: wanted 3, got 4 elements"),
        (torch.empty(3), torch.empty(3).double(), "copy_: src: wanted the dtype of out"),
        (torch.empty(3, 2).t(), torch.empty(2, 3), "copy_: out, src: wanted contiguous tensors"),
    ],
)
def test_extension_names_bad_input(out, source, words):
    _extension.load()
    with pytest.raises(RuntimeError, match=words):
        torch.ops.sfpk_cpp.copy_(out, source)


BLOCK_AOT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "sfpk_kernels._C":
            raise ImportError("no ahead-of-time build here")
sys.meta_path.insert(0, Block())
from sfpk_kernels import _extension
"""


@pytest.mark.slow
def test_extension_is_compiled_at_first_use_and_cached(tmp_path):
    code = BLOCK_AOT + "import torch; m = _extension.load(); print(m.__file__, torch.ops.sfpk_cpp.copy_)"
    for attempt in range(2):
        done = python(code, SFPK_CACHE_DIR=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert str(tmp_path) in done.stdout
        assert ("compiling the C++ extension" in done.stderr) == (attempt == 0)


@pytest.mark.parametrize(
    ("environment", "cause"),
    [({"SFPK_BUILD": "none"}, "switched off by SFPK_BUILD=none"), ({"CXX": "/bin/false"}, "Error")],
)
def test_without_extension_the_error_names_both_causes(tmp_path, environment, cause):
    code = BLOCK_AOT + (
        "import torch, sfpk_kernels\n"
        "for _ in range(2):\n"
        "    try:\n"
        "        _extension.load()\n"
        "    except _extension.ExtensionUnavailableError as error:\n"
        "        print(error)\n"
        "print(sfpk_kernels.ops.topk_mask(torch.tensor([1.0, 2.0]), 1).tolist())"
    )
    said = processes.python(code, SFPK_CACHE_DIR=str(tmp_path), **environment)
    assert said.count("built ahead of time: no ahead-of-time build here") == 2
    assert said.count("built at first use:") == 2
    assert cause in said
    assert "[False, True]" in said, "the package works without it"


def test_build_flags(monkeypatch):
    monkeypatch.setenv("SFPK_BUILD", "fast")
    with pytest.raises(ValueError, match="SFPK_BUILD: wanted one of auto, cpu, cuda, none, got 'fast'"):
        _build.build_mode()
    flags = _build.cpp_flags(cuda=False)
    assert not {"-march=native", "-ffast-math"} & set(flags)
    for mode in ("cpu", "none"):
        monkeypatch.setenv("SFPK_BUILD", mode)
        assert not _build.wants_cuda()
    if torch.version.cuda is None:
        monkeypatch.setenv("SFPK_BUILD", "auto")
        assert not _build.wants_cuda()
        monkeypatch.setenv("SFPK_BUILD", "cuda")
        with pytest.raises(RuntimeError, match="SFPK_BUILD=cuda: wanted nvcc and a torch with CUDA, got no CUDA"):
            _build.wants_cuda()


def test_cli_info(capsys):
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"sfpk_kernels {sfpk_kernels.__version__}" in printed
    assert "extension    compiler" in printed
    assert "transition   on cpu: cpp" in printed
    assert "triton       " in printed


def test_cli_info_says_why_not(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("sfpk_kernels._extension.unavailable", lambda: "not built: no compiler")
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "extension    no: not built: no compiler" in printed
    assert "transition   on cpu: reference" in printed
    assert "not cpp: not built: no compiler" in printed
    assert "not triton: it runs on GPUs" in printed


def test_cli_wrong_usage(capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["fly"])
    assert caught.value.code == 2
    file = tmp_path / "file"
    file.write_text("")
    assert main(["demo", "--out", str(file)]) == 2
    assert "--out: wanted a folder" in capsys.readouterr().err
