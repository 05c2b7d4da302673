"""Files that are whole or not there: atomic writing, and checked state files."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file so that ``path`` holds either what it held before or all of the new content, at every moment.

    Yields the path of a temporary file in the same folder, to be written by the caller. When the block ends without
    an error the file is synced to disk, renamed to ``path``, and the folder synced. After an error the temporary file
    is deleted and ``path`` untouched. A process killed in between leaves a hidden ``.NAME.*.tmp`` beside it. A
    symbolic link at ``path`` stays, and the file it points to is replaced.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: ``path`` is a folder.
    """
    target = _target(path, "path")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        _sync(temporary, os.O_RDWR)
        os.replace(temporary, target)
        _sync(target.parent, os.O_RDONLY)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str], argument: str) -> None:
    """That :func:`atomic_write` can write there, known before hours of work.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: ``path`` is a folder.
        OSError: the folder takes no files.
    """
    target = _target(path, argument)
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"{argument}: wanted a file in a folder that can be written, got {os.fspath(path)!r}"
        ) from error


def _target(path: str | os.PathLike[str], argument: str) -> Path:
    """The file behind links, in a folder that exists."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{argument}: wanted a file in an existing folder, got {os.fspath(path)!r}")
    if target.is_dir():
        raise IsADirectoryError(f"{argument}: wanted a file, got the folder {os.fspath(path)!r}")
    return target


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_state(path: str | os.PathLike[str], kind: str, state: Mapping[str, Any]) -> None:
    """Write a state dict of tensors and plain values atomically, with its SHA-256 before it.

    Args:
        path: the file.
        kind: names format and version; :func:`load_state` wants the same.
        state: what ``torch.load(weights_only=True)`` can read.

    Raises:
        OSError: it cannot be written: no such folder, no room, …; what was there stays.
    """
    header = f"{kind}\n".encode()
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(header + 65 * b"\0")
        hashing = _Hashing(file)
        try:
            torch.save(dict(state), cast(IO[bytes], hashing))
        except RuntimeError as error:
            if hashing.error is None:
                raise
            # torch.save hides what went wrong, such as a full disk, behind an error of its own.
            reason = hashing.error.strerror or str(hashing.error)
            raise OSError(hashing.error.errno, f"{reason}: {os.fspath(path)!r}") from error
        file.seek(len(header))
        file.write(f"{hashing.digest.hexdigest()}\n".encode())


class _Hashing(io.RawIOBase):
    """Passes on what is written and hashes it: a state is never in memory twice."""

    def __init__(self, file: Any):
        self.digest = hashlib.sha256()
        self.error: OSError | None = None  # the first
        self._file = file

    def write(self, content: Any) -> int:
        self.digest.update(content)
        try:
            return self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise

    def writable(self) -> bool:
        return True


def load_state(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read what :func:`save_state` wrote, tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or one that was cut or altered.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: wanted a file of format {kind}, got {os.fspath(path)!r}, which is no file")
    with open(path, "rb") as file:
        found = file.readline(len(kind) + 1)
        if found != f"{kind}\n".encode():
            raise ValueError(f"path: {os.fspath(path)!r}: wanted a file of format {kind}, got {found!r}")
        digest = file.read(65)
        start, found_digest = file.tell(), hashlib.sha256()
        while part := file.read(1 << 20):
            found_digest.update(part)
        if digest != f"{found_digest.hexdigest()}\n".encode():
            raise ValueError(f"path: {os.fspath(path)!r} was cut or altered: its checksum does not match")
        file.seek(start)
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return state
