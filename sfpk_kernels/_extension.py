"""Lazy loader of the C++ extension: the ahead-of-time build if there is one, else compiled now and cached."""

from __future__ import annotations

import importlib
import logging
import threading
from pathlib import Path
from types import ModuleType

from . import _build, _first_use

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_module: ModuleType | None = None
_failure: str | None = None
_why_no_cuda: str | None = None


class ExtensionUnavailableError(ImportError):
    """The C++ extension can neither be imported nor compiled; the message names both causes."""


def load() -> ModuleType:
    """The extension module, with its ops registered under ``torch.ops.sfpk_cpp``.

    The first call may compile (a minute or two); the outcome, good or bad, is kept for the process.

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


def how() -> str:
    """How the loaded extension was built, and what of it could not be, in words."""
    path = load().__file__ or ""
    when = "ahead of time" if Path(path).parent == Path(__file__).parent else f"at first use, {path}"
    return when if _why_no_cuda is None else f"{when}; without CUDA kernels: {_why_no_cuda}"


def _load() -> tuple[ModuleType | None, str | None]:
    global _why_no_cuda
    failed = installation_failure()
    try:
        module = importlib.import_module("sfpk_kernels._C")
        if failed is not None:
            _why_no_cuda = f"they could not be compiled at installation, see {failed}"
            logger.warning("the CUDA kernels %s", _why_no_cuda.removeprefix("they "))
        return module, None
    except ImportError as error:
        ahead_of_time = str(error)
    if failed is not None:
        ahead_of_time = f"it could not be compiled at installation, see {failed}"
        logger.warning("the C++ extension %s", ahead_of_time.removeprefix("it "))
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
        "To have it: install a C++17 compiler, the Python headers and ninja (pip install ninja); it is then compiled "
        "at first use"
    )


def _compile() -> ModuleType:
    """With CUDA kernels where they can be had; where only they cannot be compiled, and nobody insists, without."""
    global _why_no_cuda
    if not _build.wants_cuda():
        return _first_use.compiled(cuda=False)
    try:
        return _first_use.compiled(cuda=True)
    except _first_use.BuildFailedError as error:
        if _build.build_mode() == "cuda":
            raise
        module = _first_use.compiled(cuda=False)
        _why_no_cuda = f"they could not be compiled: {error}"
        logger.warning("the CUDA kernels %s", _why_no_cuda.removeprefix("they "))
        return module


def installation_failure() -> Path | None:
    """The file with the last lines of a build that failed when the package was installed, or None."""
    path = Path(__file__).with_name(_build.FAILURE_FILE)
    return path if path.is_file() else None


def without_cuda() -> str | None:
    """Why the CUDA kernels cannot be had, or None."""
    reason = unavailable()
    if reason is None and not load().build_config()["cuda"]:
        reason = "the extension was built without CUDA: " + (
            _why_no_cuda
            or "with nvcc and a torch with CUDA, install sfpk_kernels again from where it came: "
            "SFPK_BUILD=cuda pip install --no-build-isolation --force-reinstall --no-deps …"
        )
    return reason
