"""One set of flags for the ahead-of-time build (setup.py) and the just-in-time build (_extension.py).

setup.py loads this file by its path, in environments without torch: keep it free of imports beyond the
standard library.
"""

from __future__ import annotations

import os
from pathlib import Path

BUILD_MODES = ("auto", "cpu", "cuda", "none")

# The oldest torch whose stable ABI we call; the macro makes newer, unavailable calls a compile error.
TORCH_TARGET_VERSION = "0x020a000000000000"

# What wheels are built for, unless TORCH_CUDA_ARCH_LIST says otherwise.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def build_mode() -> str:
    """``SFPK_BUILD``, checked: auto | cpu | cuda | none."""
    mode = os.environ.get("SFPK_BUILD", "auto")
    if mode not in BUILD_MODES:
        raise ValueError(f"SFPK_BUILD: wanted one of {', '.join(BUILD_MODES)}, got {mode!r}")
    return mode


def source_dir() -> Path:
    """Where the C++ sources lie: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "registration.cpp").is_file():
            return folder
    raise FileNotFoundError(f"csrc/registration.cpp: not in {package} nor beside it")


def wants_cuda() -> bool:
    """Whether the extension is built with its CUDA kernels: a torch with CUDA and nvcc are there, and nobody objects.

    Raises:
        RuntimeError: ``SFPK_BUILD=cuda`` without one of the two.
    """
    mode = build_mode()
    if mode in ("cpu", "none"):
        return False
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    missing = "a torch with CUDA" if torch.version.cuda is None else "nvcc" if CUDA_HOME is None else None
    if mode == "cuda" and missing:
        raise RuntimeError(f"SFPK_BUILD=cuda: wanted nvcc and a torch with CUDA, got no {missing.split()[-1]}")
    return missing is None


def sources(folder: Path, cuda: bool) -> list[Path]:
    """Every source of the extension, in a fixed order."""
    files = [*sorted(folder.glob("*.cpp")), *sorted((folder / "cpu").glob("*.cpp"))]
    if cuda:
        files += [*sorted((folder / "cuda").glob("*.cpp")), *sorted((folder / "cuda").glob("*.cu"))]
    return files


def headers(folder: Path) -> list[Path]:
    """Every header, in a fixed order; a change of one of them must rebuild the extension."""
    return [*sorted(folder.rglob("*.h")), *sorted(folder.rglob("*.cuh"))]


def cpp_flags(cuda: bool) -> list[str]:
    """The host compiler's flags: no -march=native and no fast-math, wheels must travel."""
    flags = [
        "-O3",
        "-std=c++17",
        "-ffp-contract=fast",  # fused multiply-add, the same with every compiler
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",  # torch's and pybind11's own headers
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
    ]
    return [*flags, "-DUSE_CUDA", "-DSFPK_CUDA"] if cuda else flags


def cuda_flags() -> list[str]:
    """nvcc's flags; torch adds the architectures of ``TORCH_CUDA_ARCH_LIST``."""
    return ["-O3", "-std=c++17", "-Xcompiler", "-Wall,-Wextra,-fvisibility=hidden"]


def put_ninja_on_path() -> None:
    """The pip package ``ninja`` keeps its program in the environment's bin, which need not be on PATH."""
    try:
        import ninja
    except ImportError:
        return
    path = os.environ.get("PATH", "")
    if ninja.BIN_DIR not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (ninja.BIN_DIR, path)))
