"""The extension compiled at first use: once per machine, whoever asks, and kept.

In the cache folder, by a name that changes with whatever changes the binary::

    NAME/          the library
    NAME.log       what the compilers said
    NAME.failed    a build that failed: why, in a few lines; not tried again while it is there
    NAME.lock      held while somebody compiles; the lock ends with the processes that hold it
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from . import _build, _compile

logger = logging.getLogger(__name__)

_TAIL = 12  # lines of the compilers in an error


class BuildFailedError(RuntimeError):
    """The extension could not be compiled; the message names the log."""


def compiled(cuda: bool) -> ModuleType:
    """The extension with or without its CUDA kernels, compiled now if nobody has before.

    Raises:
        BuildFailedError: it cannot be compiled, or could not be before.
    """
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / build_key(cuda)
    if library(folder) is None:
        with _locked(folder.with_name(folder.name + ".lock")) as lock:
            if library(folder) is None:  # still: nobody has compiled while this process waited
                _build_now(folder, cuda, lock)
    path = library(folder)
    if path is None:
        raise BuildFailedError(f"no library in {folder}")
    spec = importlib.util.spec_from_file_location("sfpk_kernels._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def library(folder: Path) -> Path | None:
    """The library in a folder, or None."""
    return next(iter(sorted(folder.glob("*.so"))), None)


def cache_dir() -> Path:
    """Where builds are kept: ``SFPK_CACHE_DIR``, else the user's cache folder."""
    chosen = os.environ.get("SFPK_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfpk_kernels"


def _build_now(folder: Path, cuda: bool, lock: int | None) -> None:
    log, failed = (folder.with_name(folder.name + ending) for ending in (".log", ".failed"))
    asked_for = _build.build_mode() in ("cpu", "cuda")
    if failed.exists() and not asked_for:
        raise BuildFailedError(failed.read_text(errors="replace"))
    if lock is not None:  # what a killed build has left: nobody else is at it
        for left in folder.parent.glob(_compile.building_folder(folder, "*").name):
            shutil.rmtree(left, ignore_errors=True)
    kind = "cuda" if cuda else "cpu"
    logger.warning("compiling the C++ extension (%s) into %s (once, a minute or two; log: %s)", kind, folder, log)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-m", _compile.__name__, str(folder), kind]
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, pass_fds=() if lock is None else (lock,),
        )  # fmt: skip
        try:
            code: Any = process.wait(timeout=_build.LONGEST_BUILD)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            code = f"none within {_build.LONGEST_BUILD / 60:g} minutes"
    if code == 0:
        failed.unlink(missing_ok=True)
        return
    lines = log.read_text(errors="replace").splitlines()[-_TAIL:]
    told = f"exit code {code}; log: {log}; it is tried again once {failed} is gone, or with SFPK_BUILD={kind}"
    with contextlib.suppress(OSError):  # a full disk
        failed.write_text("\n".join([told, *(f"  | {line}" for line in lines)]))
    raise BuildFailedError("\n".join([told, *(f"  | {line}" for line in lines)]))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    """Alone at it; yields the lock's file descriptor, or None where files cannot be locked.

    Raises:
        BuildFailedError: another process has held it for longer than any build takes.
    """
    end, said = time.monotonic() + _build.LONGEST_BUILD, False
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise BuildFailedError(
                        f"another process has been compiling for too long: it holds {path}"
                    ) from None
                if not said:
                    said = True
                    logger.info("waiting for another process that compiles the extension (%s)", path)
                time.sleep(0.2)
            except OSError:  # such as some network file systems: then several may compile, each by itself
                yield None
                return
        yield file.fileno()


def build_key(cuda: bool) -> str:
    """A name that changes with whatever changes the binary: sources, flags, torch, Python, compilers, GPUs."""
    import torch

    digest, folder = hashlib.sha256(), _build.source_dir()
    for path in (*_build.sources(folder, cuda), *_build.headers(folder)):
        digest.update(path.name.encode() + path.read_bytes())
    facts: list[Any] = [_build.cpp_flags(cuda), torch.__version__, sys.version, _said_by(os.environ.get("CXX", "c++"))]
    # A missing ninja makes a build fail: with one it is another.
    facts.append(importlib.util.find_spec("ninja") is not None or shutil.which("ninja") is not None)
    if cuda:
        nvcc = Path(_build.cuda_home() or "") / "bin" / "nvcc"
        facts += [_build.cuda_flags(), _build.cuda_architectures(), _said_by(str(nvcc))]
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


def _said_by(compiler: str) -> str:
    """A compiler's version as it says it itself, with its name."""
    try:
        done = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return f"{compiler}: none"
    return f"{compiler}: {done.stdout}"
