"""One set of flags for the ahead-of-time build (setup.py) and the just-in-time build (_extension.py).

setup.py loads this file by its path, in environments without torch: keep it free of imports beyond the
standard library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# What we support. The requirements in pyproject.toml and the words of docs/install.md say the same; a test compares.
OLDEST = {"python": (3, 10), "torch": (2, 10), "triton": (3, 4), "setuptools": (77, 0)}
NEWEST_PYTHON = (3, 13)

BUILD_MODES = ("auto", "cpu", "cuda", "none")

# The oldest torch's stable ABI; the macro makes newer calls, which it has not, a compile error.
TORCH_TARGET_VERSION = f"0x{OLDEST['torch'][0]:02x}{OLDEST['torch'][1]:02x}000000000000"

# Beside the package's modules: the last lines of a build that failed at installation.
FAILURE_FILE = "_build_failure.log"
LONGEST_BUILD = 1800.0  # seconds, of a build at first use

# What wheels are built for, unless TORCH_CUDA_ARCH_LIST says otherwise.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


def build_mode() -> str:
    """``SFPK_BUILD``, checked: auto | cpu | cuda | none."""
    mode = os.environ.get("SFPK_BUILD", "auto")
    if mode not in BUILD_MODES:
        raise ValueError(f"SFPK_BUILD: wanted one of {', '.join(BUILD_MODES)}, got {mode!r}")
    return mode


def too_old(package: str, version: str) -> str | None:
    """Why a version will not do, or None."""
    oldest, found = OLDEST[package], tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found >= oldest:
        return None
    return f"sfpk_kernels needs {package} {'.'.join(map(str, oldest))} or newer, {version} is installed"


def unsupported_python(version: tuple[int, int] = sys.version_info[:2]) -> str | None:
    """Why a Python will not do, or None."""
    if OLDEST["python"] <= version <= NEWEST_PYTHON:
        return None
    first, last, found = (".".join(map(str, v)) for v in (OLDEST["python"], NEWEST_PYTHON, version))
    return f"sfpk_kernels supports Python {first} to {last}, this is {found}"


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

    missing = "a torch with CUDA" if torch.version.cuda is None else "nvcc" if cuda_home() is None else None
    if mode == "cuda" and missing:
        raise RuntimeError(f"SFPK_BUILD=cuda: wanted nvcc and a torch with CUDA, got no {missing.split()[-1]}")
    return missing is None


def cuda_home() -> str | None:
    """The CUDA toolkit: ``CUDA_HOME`` or ``CUDA_PATH``, else that of the nvcc on PATH, else the usual place.

    nvcc is asked where it belongs: on PATH there may be a link or a wrapper of it, far from its headers.
    """
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if chosen:
        return chosen
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        usual = Path("/usr/local/cuda")
        return str(usual) if (usual / "bin" / "nvcc").is_file() else None
    words = [nvcc, "--dryrun", "-x", "cu", "-E", os.devnull]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        top = re.search(r"^#\$ TOP=(.+)$", said.stderr + said.stdout, re.MULTILINE)
    except (OSError, subprocess.TimeoutExpired):
        top = None
    return str(Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1])


def put_cuda_home() -> None:
    """Have torch's build tools, not imported yet, use :func:`cuda_home`."""
    home = cuda_home()
    if home is not None:
        os.environ["CUDA_HOME"] = home


def cuda_architectures() -> str:
    """What to build for at first use: ``TORCH_CUDA_ARCH_LIST``, else what wheels are built for, else what is there.

    A machine without a GPU (login node, image build) and the ones it builds for share a build.
    """
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if chosen:
        return chosen
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = sorted({torch.cuda.get_device_capability(index) for index in range(count)})
    if all(capability >= (8, 0) for capability in found):
        return CUDA_ARCHITECTURES
    return ";".join(f"{major}.{minor}" for major, minor in found)


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
