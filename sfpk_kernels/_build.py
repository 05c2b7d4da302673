"""One set of flags for the ahead-of-time build (setup.py) and the just-in-time build (_extension.py).

setup.py loads this file by its path, in environments without torch: keep it free of imports beyond the
standard library.
"""

from __future__ import annotations

import os
from pathlib import Path

BUILD_MODES = ("auto", "cpu", "none")

# The oldest torch whose stable ABI we call; the macro makes newer, unavailable calls a compile error.
TORCH_TARGET_VERSION = "0x020a000000000000"


def build_mode() -> str:
    """``SFPK_BUILD``, checked: auto | cpu | none."""
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


def sources(folder: Path) -> list[Path]:
    """Every C++ file of the CPU extension, in a fixed order."""
    return [*sorted(folder.glob("*.cpp")), *sorted((folder / "cpu").glob("*.cpp"))]


def headers(folder: Path) -> list[Path]:
    """Every header, in a fixed order; a change of one of them must rebuild the extension."""
    return sorted(folder.rglob("*.h"))


def compile_arguments(folder: Path) -> dict[str, list[str]]:
    """Keyword arguments of ``CppExtension``: no -march=native and no fast-math, wheels must travel."""
    return {
        "include_dirs": [str(folder.resolve())],
        "extra_compile_args": [
            "-O3",
            "-std=c++17",
            "-ffp-contract=fast",  # fused multiply-add, the same with every compiler
            "-fvisibility=hidden",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",  # torch's and pybind11's own headers
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        ],
    }


def put_ninja_on_path() -> None:
    """The pip package ``ninja`` keeps its program in the environment's bin, which need not be on PATH."""
    try:
        import ninja
    except ImportError:
        return
    path = os.environ.get("PATH", "")
    if ninja.BIN_DIR not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join(filter(None, (ninja.BIN_DIR, path)))
