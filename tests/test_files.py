"""Atomic writing and checked state files."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from sfpk_kernels.files import atomic_write, load_state, save_state


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
        "from sfpk_kernels.files import atomic_write\n"
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
