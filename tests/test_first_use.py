"""The extension compiled at first use: once, whoever asks, whatever was killed, and never silently without."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sfpk_kernels import _build, _compile, _extension, _first_use

from .processes import Forked

ROOT = Path(__file__).resolve().parents[1]

# Stands in for `python -m sfpk_kernels._compile`: takes a while, counts itself, leaves what counts as a library.
COMPILER = """
import os, sys, time
from pathlib import Path
folder, counter = Path(sys.argv[1]), Path({counter!r})
with counter.open("a") as file:
    file.write(sys.argv[2] + "\\n")
building = folder.with_name(folder.name + ".building-" + str(os.getpid()))
building.mkdir()
print("compiler says something")
time.sleep({seconds})
if sys.argv[2] in {fails!r}:
    print("error: no such header")
    sys.exit(3)
(building / "_C.so").write_text("")
building.rename(folder)
"""

# A process that asks for the build, with a stand-in for the compiler and for the import of what it built.
ASKS = """
import sys, logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
import sfpk_kernels._first_use as first_use
import subprocess
popen = subprocess.Popen
def start(words, **options):
    return popen([sys.executable, {compiler!r}, *words[3:]] if words[1:3] == ["-m", "sfpk_kernels._compile"] else words,
                 **options)
first_use.subprocess.Popen = start
folder = first_use.cache_dir() / first_use.build_key(False)
try:
    first_use.compiled(cuda=False)
except first_use.BuildFailedError as error:
    print("FAILED", error)
except ImportError:  # the empty file
    print("BUILT", first_use.library(folder) is not None)
"""


def said(process):
    """All that it wrote, once it has ended."""
    _, output, errors = process.wait()
    return errors + output


class Cache:
    """A cache folder and processes that build into it."""

    def __init__(self, folder, seconds=0.5, fails=()):
        self.folder, self.counter = folder / "cache", folder / "counter"
        compiler = folder / "compiler.py"
        compiler.write_text(COMPILER.format(counter=str(self.counter), seconds=seconds, fails=list(fails)))
        self.code = ASKS.format(compiler=str(compiler))

    def start(self, **environment):
        inherited = {k: v for k, v in os.environ.items() if k != "SFPK_BUILD"}
        return Forked(self.code, {**inherited, "SFPK_CACHE_DIR": str(self.folder), **environment})

    def ask(self, **environment):
        return said(self.start(**environment))

    @property
    def builds(self):
        return self.counter.read_text().split() if self.counter.exists() else []


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_many_processes_build_once_and_one_says_so(tmp_path):
    cache = Cache(tmp_path, seconds=2)
    processes = [cache.start() for _ in range(4)]
    texts = [said(process) for process in processes]
    assert cache.builds == ["cpu"]
    assert all("BUILT True" in text for text in texts), texts
    assert sum("compiling the C++ extension" in text for text in texts) == 1
    assert "compiling" not in cache.ask(), "it is there now"
    assert not list(cache.folder.glob("*.building-*"))


@pytest.mark.parametrize("victim", ["builder", "both"])
def test_a_killed_build_is_taken_over(tmp_path, victim):
    """The lock ends with the processes that hold it, and what the killed one left is cleared away."""
    cache = Cache(tmp_path, seconds=2)
    first = cache.start()
    wait_for(lambda: list(cache.folder.glob("*.building-*")))
    left = next(cache.folder.glob("*.building-*"))
    compiler = int(left.name.rsplit("-", 1)[1])
    if victim == "both":
        os.killpg(first.pid, signal.SIGKILL)
    os.kill(compiler, signal.SIGKILL)
    text = cache.ask() if victim == "both" else cache.ask(SFPK_BUILD="cpu")
    said(first)
    assert "BUILT True" in text
    assert not left.exists()
    assert len(cache.builds) == 2


def test_an_orphaned_build_is_waited_for(tmp_path):
    """Killing the process that asked does not stop its compiler, which holds the lock: nobody starts a second one."""
    cache = Cache(tmp_path, seconds=2)
    first = cache.start()
    wait_for(lambda: list(cache.folder.glob("*.building-*")))
    os.kill(first.pid, signal.SIGKILL)
    text = cache.ask()
    assert "BUILT True" in text
    assert "waiting for another process" in text
    assert cache.builds == ["cpu"]
    said(first)


def test_a_failed_build_is_remembered_and_named(tmp_path):
    cache = Cache(tmp_path, fails=["cpu"])
    first, second = cache.ask(), cache.ask()
    assert cache.builds == ["cpu"], "the second process does not try again"
    for text in (first, second):
        assert "FAILED exit code 3; log: " in text
        assert "| error: no such header" in text
    log = Path(first.split("log: ")[-1].split(";")[0])
    assert "compiler says something" in log.read_text()
    assert "compiling" not in second
    cache.ask(SFPK_BUILD="cpu")
    assert len(cache.builds) == 2, "who asks for it gets another try"
    next(cache.folder.glob("*.failed")).unlink()
    cache.ask()
    assert len(cache.builds) == 3


def test_a_lock_of_torch_that_was_left_behind_does_not_matter(tmp_path):
    cache = Cache(tmp_path)
    key = _first_use.build_key(False)
    stale = cache.folder / f"{key}.building-12345"
    stale.mkdir(parents=True)
    (stale / "lock").touch()  # torch's own, which it waits for without end
    assert "BUILT True" in cache.ask()
    assert not stale.exists()


def test_a_build_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setenv("SFPK_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_build, "LONGEST_BUILD", 0.3)
    monkeypatch.setattr(_build, "build_mode", lambda: "auto")
    real = subprocess.Popen

    def hang(words, **options):
        return real([sys.executable, "-c", "import time; time.sleep(60)"] if "-m" in words else words, **options)

    monkeypatch.setattr(_first_use.subprocess, "Popen", hang)
    started = time.monotonic()
    with pytest.raises(_first_use.BuildFailedError, match="exit code none within"):
        _first_use.compiled(cuda=False)
    assert time.monotonic() - started < 30


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(_first_use.fcntl, "flock", refuse)
    with _first_use._locked(tmp_path / "x.lock") as lock:
        assert lock is None


def test_the_key_knows_compilers_and_architectures(monkeypatch, tmp_path):
    """Whatever changes the binary."""

    def key(cuda=True, **environment):
        for name in ("CXX", "TORCH_CUDA_ARCH_LIST"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return _first_use.build_key(cuda)

    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    keys = []
    for version in ("12.8", "13.0"):
        nvcc.write_text(f"#!/bin/sh\necho release {version}\n")
        nvcc.chmod(0o755)
        keys += [key(), key(TORCH_CUDA_ARCH_LIST="8.6"), key(CXX="/bin/false")]
    keys += [key(cuda=False), key(cuda=False, CXX="/bin/false")]
    assert len(set(keys)) == len(keys)
    assert key() == key()


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([], _build.CUDA_ARCHITECTURES),
        ([(8, 0)], _build.CUDA_ARCHITECTURES),
        ([(9, 0), (8, 6)], _build.CUDA_ARCHITECTURES),
        ([(12, 0)], _build.CUDA_ARCHITECTURES),
        ([(7, 5), (8, 0)], "7.5;8.0"),
    ],
)
def test_architectures(monkeypatch, devices, expected):
    """No GPU is no error: login nodes and image builds have none."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices[index])
    assert _build.cuda_architectures() == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    assert _build.cuda_architectures() == "9.0a"


def test_the_toolkit_is_found(monkeypatch, tmp_path):
    """Through links and wrappers on PATH, whose folder has no headers."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    real = tmp_path / "toolkit" / "bin" / "nvcc"
    real.parent.mkdir(parents=True)
    real.write_text("#!/bin/sh\necho '#$ TOP='$(dirname $0)/.. >&2\n")
    real.chmod(0o755)
    folder = tmp_path / "path" / "bin"
    folder.mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    (folder / "nvcc").write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    (folder / "nvcc").chmod(0o755)
    assert _build.cuda_home() == str(tmp_path / "toolkit")
    (folder / "nvcc").unlink()
    real.write_text("#!/bin/sh\n")  # one that says nothing
    (folder / "nvcc").symlink_to(real)
    assert _build.cuda_home() == str(tmp_path / "toolkit")
    monkeypatch.setenv("CUDA_HOME", "/chosen")
    assert _build.cuda_home() == "/chosen"


@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_without_cuda_kernels_the_cpu_build_is_taken(monkeypatch, caplog, mode):
    """Where only nvcc fails; who insists on CUDA gets the error."""

    def compiled(cuda):
        if cuda:
            raise _first_use.BuildFailedError("exit code 1; log: /somewhere.log")
        return "the CPU's"

    monkeypatch.setattr(_build, "build_mode", lambda: mode)
    monkeypatch.setattr(_build, "wants_cuda", lambda: True)
    monkeypatch.setattr(_first_use, "compiled", compiled)
    monkeypatch.setattr(_extension, "_why_no_cuda", None)
    if mode == "cuda":
        with pytest.raises(_first_use.BuildFailedError):
            _extension._compile()
        return
    assert _extension._compile() == "the CPU's"
    assert [record.getMessage() for record in caplog.records] == [
        "the CUDA kernels could not be compiled: exit code 1; log: /somewhere.log"
    ]
    assert "/somewhere.log" in _extension._why_no_cuda


def test_a_failure_at_installation_is_said_with_its_file(monkeypatch, caplog, tmp_path):
    log = tmp_path / _build.FAILURE_FILE
    log.write_text("the extension with CUDA kernels was not built")
    monkeypatch.setattr(_extension, "installation_failure", lambda: log)
    monkeypatch.setattr(_extension, "_why_no_cuda", None)
    module, failure = _extension._load()
    assert module is not None
    assert failure is None
    (record,) = caplog.records
    assert str(log) in record.getMessage()
    assert str(log) in _extension._why_no_cuda


def test_a_missing_extension_is_said_once_for_all_ops(caplog, monkeypatch):
    from sfpk_kernels import _dispatch, ops

    monkeypatch.setattr(_dispatch, "_said", set())
    monkeypatch.setattr(_extension, "unavailable", lambda: "not built: no compiler")
    for _ in range(2):
        ops.topk_mask(torch.rand(5), 2)
        ops.masked_weights(torch.rand(5), torch.rand(5) > 0.5)
        ops.pack_mask(torch.rand(5) > 0.5)
    assert [record.getMessage() for record in caplog.records] == [
        "topk_mask (and what else needs it) runs on a slower backend than cpp: not built: no compiler"
    ]


@pytest.mark.slow
def test_a_real_build(tmp_path):
    """Compiled, imported and given its name, in the process that does it."""
    folder = tmp_path / "name"
    _ = subprocess.run(
        [sys.executable, "-m", _compile.__name__, str(folder), "cpu"], check=True, cwd=ROOT, capture_output=True
    )
    assert _first_use.library(folder) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def install_build(folder, **environment):
    """What pip runs of setup.py, into a folder."""
    words = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "temp")]
    inherited = {k: v for k, v in os.environ.items() if k != "SFPK_BUILD"}
    return subprocess.run(
        words, capture_output=True, text=True, check=False, cwd=ROOT, env={**inherited, **environment}
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_a_compiler_that_fails_at_installation(tmp_path, mode):
    """auto: the package is installed, with the compiler's last words in it; asked for: the installation fails."""
    compiler = tmp_path / "c++"
    real = os.environ.get("CXX", "c++")
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *.cpp*) echo no such header, really; exit 7;; esac\nexec {real} "$@"\n'
    )
    compiler.chmod(0o755)
    done = install_build(tmp_path / "lib", SFPK_BUILD=mode, CXX=str(compiler), CC=str(compiler))
    failure = tmp_path / "lib" / "sfpk_kernels" / _build.FAILURE_FILE
    if mode == "cpu":
        assert done.returncode != 0
        assert not failure.exists()
        return
    assert done.returncode == 0, done.stderr
    assert "the extension for the CPU was not built" in failure.read_text()
    assert "no such header, really" in failure.read_text()
    assert "no such header, really" in done.stdout + done.stderr, "also seen while it runs"


@pytest.mark.slow
def test_a_good_build_forgets_the_failed_one(tmp_path):
    failure = tmp_path / "sfpk_kernels" / _build.FAILURE_FILE
    failure.parent.mkdir()
    failure.write_text("of before")
    done = install_build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert not failure.exists()
    assert list(failure.parent.glob("_C*.so"))
