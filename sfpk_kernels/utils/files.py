"""Files that are whole or not there: atomic writing, and checked state files."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import stat
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
    symbolic link at ``path`` stays, and the file it points to is replaced. What is no regular file is never replaced.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: ``path`` is a folder.
        FileExistsError: ``path`` is a device, a FIFO, a socket, or a link to one.
    """
    target = _target(path, "path")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        try:
            yield temporary
            _sync(temporary, os.O_RDWR)
            _check_regular(target, path, "path")  # what has come there meanwhile
            os.replace(temporary, target)
            _sync(target.parent, os.O_RDONLY)
        finally:
            temporary.unlink(missing_ok=True)
    finally:  # an interruption may have hit the line above
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str], argument: str) -> None:
    """That :func:`atomic_write` can write there, known before hours of work.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: ``path`` is a folder.
        FileExistsError: ``path`` is a device, a FIFO, a socket, or a link to one.
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


def check_place(path: str | os.PathLike[str], argument: str) -> None:
    """That a file may be written under this name: its folder exists, and nothing but a regular file is there.

    Raises:
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: ``path`` is a folder.
        FileExistsError: ``path`` is a device, a FIFO, a socket, or a link to one.
    """
    _target(path, argument)


def remove_regular(path: Path) -> None:
    """Remove a regular file, or a link to one; leave anything else."""
    if path.is_file():
        path.unlink(missing_ok=True)


def _target(path: str | os.PathLike[str], argument: str) -> Path:
    """The file behind links, in a folder that exists."""
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{argument}: wanted a file in an existing folder, got {os.fspath(path)!r}")
    _check_regular(target, path, argument)
    return target


_SPECIAL = {
    stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device",
    stat.S_IFLNK: "link in a circle",
}  # fmt: skip


def _check_regular(target: Path, path: str | os.PathLike[str], argument: str) -> None:
    """That a file may take this place: nothing is there, or a regular file."""
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{argument}: wanted a file, got the folder {os.fspath(path)!r}")
    if not stat.S_ISREG(mode):
        what = _SPECIAL.get(stat.S_IFMT(mode), "special file")
        raise FileExistsError(
            f"{argument}: wanted a regular file to replace, or a new name, got the {what} {os.fspath(path)!r}"
        )


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
        OSError: it cannot be written: no such folder, no room, …; what was there stays, as after an interruption
            (KeyboardInterrupt), which passes through.
    """
    header = f"{kind}\n".encode()
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(header + 65 * b"\0")
        hashing = _Hashing(file)
        try:
            torch.save(dict(state), cast(IO[bytes], hashing))
        except BaseException as error:
            caught = hashing.error
            hashing.error = caught or error  # no more writing
            if not isinstance(error, Exception):
                raise
            # torch.save hides what went wrong, such as a full disk or Ctrl-C, behind an error of its own.
            first = caught or _behind(error)
            if first is None:
                raise
            if isinstance(first, OSError) and first.errno is not None:
                raise OSError(first.errno, f"{first.strerror or first}: {os.fspath(path)!r}") from error
            raise first from None
        file.seek(len(header))
        file.write(f"{hashing.digest.hexdigest()}\n".encode())


def _behind(error: BaseException) -> BaseException | None:
    """What an error of torch's writer came after: it says of every end before the last write that it came too early."""
    found: BaseException = error
    while "inline_container" in str(found) and found.__context__ is not None:
        found = found.__context__
    return None if found is error else found


class _Hashing(io.RawIOBase):
    """Passes on what is written and hashes it: a state is never in memory twice.

    After an error it takes everything and writes nothing: torch's writer ends its archive even then, when it is deleted
    at the latest, and an error there would end the process.
    """

    def __init__(self, file: Any):
        self.digest = hashlib.sha256()
        self.error: BaseException | None = None  # the first
        self._file = file

    def write(self, content: Any) -> int:
        if self.error is not None:
            return len(content)
        try:
            self.digest.update(content)
            return self._file.write(content)
        except BaseException as error:
            self.error = error
            raise

    def writable(self) -> bool:
        return True


def load_state(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read what :func:`save_state` wrote, tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, one that was cut or altered, or one that holds other things.
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
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (MemoryError, OSError):
            raise
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"path: {os.fspath(path)!r}: wanted tensors and plain values, got what cannot be read: {reason}"
            ) from error
    if not isinstance(state, dict):
        raise ValueError(f"path: {os.fspath(path)!r}: wanted a dict, got {type(state).__name__}")
    return state
