"""Atomic writing and checked state files."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from sfpk_kernels import MaskSet
from sfpk_kernels.utils import files
from sfpk_kernels.utils.files import atomic_write, check_writable, load_state, save_state

from .interruptions import every_moment


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with atomic_write(path) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_after_an_error_all_is_as_before(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")

    def fail():
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(FileNotFoundError, match="existing folder"), atomic_write(tmp_path / "no" / "file"):
        pass
    with pytest.raises(IsADirectoryError, match="wanted a file"), atomic_write(tmp_path):
        pass


def test_order_of_sync_and_rename(tmp_path, monkeypatch):
    """Content first, then the name, then the folder: what makes the new file survive a power cut."""
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("one")
    assert calls == ["file", "rename", "folder"]


def test_a_symbolic_link_stays(tmp_path):
    (tmp_path / "real").write_text("one")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_text("two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "two"


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    code = (
        "import os, signal, sys\n"
        "from sfpk_kernels.utils.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "one"


def test_state_round_trip_and_refusals(tmp_path):
    path = tmp_path / "state"
    state = {"a": torch.randn(3, 4).bfloat16(), "b": [1, 2.5, None, "x"], "c": {"d": torch.arange(3)}}
    save_state(path, "kind-1", state)
    loaded = load_state(path, "kind-1")
    assert torch.equal(loaded["a"], state["a"])
    assert loaded["b"] == state["b"]
    with pytest.raises(ValueError, match="wanted a file of format kind-2, got"):
        load_state(path, "kind-2")
    with pytest.raises(FileNotFoundError, match="which is no file"):
        load_state(tmp_path / "none", "kind-1")
    good = path.read_bytes()
    for size in (0, 3, 10, 40, 80, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with pytest.raises(ValueError, match="was cut or altered|wanted a file of format"):
            load_state(path, "kind-1")
    for place in (20, 100, len(good) // 2, len(good) - 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ValueError, match="was cut or altered"):
            load_state(path, "kind-1")


def specials(folder):
    """Everything that is no regular file, by name; a socket, too, where one can be made."""
    os.mkfifo(folder / "fifo")
    (folder / "link-to-fifo").symlink_to("fifo")
    (folder / "circle").symlink_to("circle")
    (folder / "folder").mkdir()
    (folder / "link-to-folder").symlink_to("folder")
    (folder / "link-to-null").symlink_to("/dev/null")
    paths = [*sorted(folder.iterdir()), "/dev/null", "/dev/zero"]
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "socket"))
    server.close()
    return [*paths, folder / "socket"]


def test_what_is_no_regular_file_is_never_replaced(tmp_path):
    (tmp_path / "in").mkdir()
    paths = specials(tmp_path / "in")
    before = {str(path): os.lstat(path).st_mode for path in paths}
    for path in paths:
        for write in (
            lambda path: save_state(path, "kind", {}),
            lambda path: check_writable(path, "save"),
            lambda path: MaskSet({"w": torch.ones(3, dtype=torch.bool)}).save(path),
        ):
            with pytest.raises((FileExistsError, IsADirectoryError), match=r"^(path|save): wanted .*, got the \w+"):
                write(path)
    assert {str(path): os.lstat(path).st_mode for path in paths} == before
    assert os.listdir(tmp_path) == ["in"]

    def meanwhile():
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("one")
            os.mkfifo(tmp_path / "file")

    with pytest.raises(FileExistsError, match="got the FIFO"):
        meanwhile()
    assert sorted(os.listdir(tmp_path)) == ["file", "in"]
    assert len(os.listdir(tmp_path / "in")) == 7


def test_a_dangling_link_gets_its_file(tmp_path):
    (tmp_path / "link").symlink_to("real")
    save_state(tmp_path / "link", "kind", {"a": 1})
    assert load_state(tmp_path / "real", "kind") == {"a": 1}
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interruption_while_saving_stays_what_it_is(tmp_path, kind):
    """At every call and line of ours and of torch's writer: itself, the old file whole, nothing beside it."""
    path, state = tmp_path / "state", {"a": torch.randn(1000), "b": torch.randn(300).half(), "c": [1, 2]}
    save_state(path, "kind", state)
    names, count = (files.__file__, torch.serialization.__file__), 0
    for raised in every_moment(lambda: save_state(path, "kind", {**state, "c": [3]}), names, kind):
        assert type(raised) is kind
        del raised  # a block that was interrupted before it began to end is ended with its error
        assert os.listdir(tmp_path) == ["state"]
        found = load_state(path, "kind")
        assert torch.equal(found["a"], state["a"])
        assert found["c"] in ([1, 2], [3])
        count += 1
    assert count > 100


@pytest.mark.parametrize(
    "failing", [OSError(28, "No space left on device"), KeyboardInterrupt(), TimeoutError("alarm")]
)
def test_what_a_write_raises_comes_through(tmp_path, monkeypatch, failing):
    """In every one of the writes that torch makes through us."""

    class Failing:
        def __init__(self, file, last):
            self.file, self.left = file, last

        def write(self, content):
            self.left -= 1
            if self.left == -1:
                raise failing
            return self.file.write(content)

    path, writes = tmp_path / "state", []
    write = files._Hashing.write

    def counted(self, content):
        writes.append(len(content))
        return write(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(files._Hashing, "write", counted)
        save_state(path, "kind", {"a": torch.randn(100)})
    made = files._Hashing.__init__
    for last in range(len(writes)):
        with monkeypatch.context() as patch:
            patch.setattr(files._Hashing, "__init__", lambda self, file, last=last: made(self, Failing(file, last)))
            with pytest.raises(type(failing)) as caught:
                save_state(path, "kind", {"a": torch.zeros(100)})
        if type(failing) is OSError:
            assert str(caught.value) == f"[Errno 28] No space left on device: {str(path)!r}"
        else:
            assert caught.value is failing
        assert os.listdir(tmp_path) == ["state"]
        assert load_state(path, "kind")["a"].any()
