"""Lazy loader of the C++ extension: the ahead-of-time build if there is one, else compiled now and cached."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import sys
import threading
from pathlib import Path
from types import ModuleType

from . import _build

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_module: ModuleType | None = None
_failure: str | None = None


class ExtensionUnavailableError(ImportError):
    """The C++ extension can neither be imported nor compiled; the message names both causes."""


def load() -> ModuleType:
    """The extension module, with its ops registered under ``torch.ops.sfpk_cpp``.

    The first call may compile (tens of seconds); the outcome, good or bad, is kept for the process.

    Raises:
        ExtensionUnavailableError: neither the ahead-of-time nor the just-in-time build can be had.
    """
    global _module, _failure
    with _lock:
        if _module is None and _failure is None:
            _module, _failure = _load()
        if _module is None:
            raise ExtensionUnavailableError(_failure)
        return _module


def unavailable() -> str | None:
    """Why the extension cannot be had, or None once it is loaded. Compiles it if need be."""
    try:
        load()
    except ExtensionUnavailableError as error:
        return str(error)
    return None


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("sfpk_kernels._C"), None
    except ImportError as error:
        ahead_of_time = str(error)
    if _build.build_mode() == "none":
        just_in_time = "switched off by SFPK_BUILD=none"
    else:
        try:
            return _compile(), None
        except Exception as error:
            just_in_time = f"{type(error).__name__}: {error}"
    return None, (
        "the C++ extension of sfpk_kernels is not available.\n"
        f"  built ahead of time: {ahead_of_time}\n"
        f"  built at first use:  {just_in_time}\n"
        "To build it: install a C++17 compiler, the Python headers and ninja (pip install ninja), then "
        "pip install --no-build-isolation --force-reinstall --no-deps sfpk_kernels"
    )


def _compile() -> ModuleType:
    import torch
    from torch.utils import cpp_extension

    folder, cuda = _build.source_dir(), _build.wants_cuda()
    directory = cache_dir() / _build_key(folder, torch.__version__, cuda)
    directory.mkdir(parents=True, exist_ok=True)
    if not any(directory.glob("*.so")):
        logger.warning("compiling the C++ extension into %s (once, about a minute)", directory)
    _build.put_ninja_on_path()
    return cpp_extension.load(
        name="_C",
        sources=[str(path) for path in _build.sources(folder, cuda)],
        extra_include_paths=[str(folder.resolve())],
        extra_cflags=_build.cpp_flags(cuda),
        extra_cuda_cflags=_build.cuda_flags(),
        build_directory=str(directory),
        with_cuda=cuda,
    )


def without_cuda() -> str | None:
    """Why the CUDA kernels cannot be had, or None."""
    reason = unavailable()
    if reason is None and not load().build_config()["cuda"]:
        reason = (
            "the extension was built without CUDA; with nvcc and a torch with CUDA: "
            "SFPK_BUILD=cuda pip install --no-build-isolation --force-reinstall --no-deps sfpk_kernels"
        )
    return reason


def cache_dir() -> Path:
    """Where just-in-time builds are kept: ``SFPK_CACHE_DIR``, else the user's cache folder."""
    chosen = os.environ.get("SFPK_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfpk_kernels"


def _build_key(folder: Path, torch_version: str, cuda: bool) -> str:
    """A name that changes with whatever changes the binary: sources, flags, torch, Python, compiler."""
    digest = hashlib.sha256()
    for path in (*_build.sources(folder, cuda), *_build.headers(folder)):
        digest.update(path.name.encode() + path.read_bytes())
    flags = (
        (_build.cpp_flags(cuda), _build.cuda_flags(), os.environ.get("TORCH_CUDA_ARCH_LIST"))
        if cuda
        else (_build.cpp_flags(cuda))
    )
    digest.update(repr((flags, torch_version, sys.version, os.environ.get("CXX"))).encode())
    return digest.hexdigest()[:16]
