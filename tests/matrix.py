"""The versions we claim, each tried for real (`make matrix`): build, load, test; the outcome is tests/matrix.md.

    python3 tests/matrix.py [ROW …]

Per row, in an environment of its own: the extension compiled against that torch for the CPU and, where it is a CUDA
build that the machine's nvcc fits, with its CUDA kernels; linked and loaded with every symbol bound at once; its ops
registered; what `sfpk info` and build_config() say compared with what was built; the test suite; Triton's kernels
compiled for sm_80 and sm_90 with that Triton. No GPU is needed. Standard library only.

Downloads are gigabytes and stay in MATRIX_HOME (default: .matrix, with pip's cache). A row that passed is not run again
while the sources are the same; FRESH=1 runs it. JOBS is the number of test processes (default: one per core).
Exit code: 0 all rows passed, 1 one has not.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "matrix.md"
HOME = Path(os.environ.get("MATRIX_HOME") or ROOT / ".matrix").resolve()
# (The interpreters of Triton before 3.8 take no newer NumPy.)
TOOLS = ("wheel", "ninja", "numpy<2.4", "safetensors", "tqdm", "pytest", "pytest-xdist", "hypothesis", "scikit-learn",
         "matplotlib")  # fmt: skip
# What depends on torch and Python: every op and backend, energies, runs from start to resumption, what is saved.
TESTED = (
    "ambient_state", "authors_parity", "average_gradients", "awkward_models", "command", "coordinates",
    "default_loss", "derivatives", "diagnostics", "edges_of_ops", "energy", "energy_models", "enforce", "export",
    "export_packed", "files", "graphed", "interrupted", "lean", "mask_prefixes", "mask_sets", "masked_weights",
    "masks", "model_untouched",
    "naive_agreement", "one_read_per_step", "package", "packed_masks", "particle_dtypes", "pruner",
    "recorded_launches", "registration", "resume", "selection_backends", "selection_constraints",
    "shared_coordinates", "states", "threads", "topk_mask", "transition", "transition_backends", "transition_row",
    "unreached", "wrapped",
)  # fmt: skip
# What depends on Triton: its kernels in its interpreter, and what is read from its intermediate code.
INTERPRETED = ("integer_proof", "huge_sizes", "selection_gpu", "transition_row")
MINUTES = 40.0  # for one command


@dataclass(frozen=True)
class Row:
    """One environment."""

    torch: str
    python: str
    setuptools: str = ""  # the newest
    triton: str = ""  # the one that this torch brings

    @property
    def name(self) -> str:
        return f"torch-{minor(self.torch)}" + (f"-triton-{minor(self.triton)}" if self.triton else "")


ROWS = (
    Row("2.10.0", "3.10", setuptools="77.0.1"),
    Row("2.11.0", "3.12"),
    Row("2.12.1", "3.13"),
    Row("2.13.0", "3.11"),
    Row("2.14.1", "3.12"),
    Row("newest", "3.13"),
    # Triton alone: no torch that we support brings these.
    Row("2.13.0", "3.11", triton="3.4.0"),
)

LOAD = """
import json, sys, torch, sfpk_kernels
from sfpk_kernels import _extension
module = _extension.load()
wanted = sys.argv[1] == "True"
assert "site-packages" in module.__file__ or "tree" in module.__file__, module.__file__
config = module.build_config()
assert config["cuda"] is wanted, config
assert torch._C._dispatch_has_kernel_for_dispatch_key("sfpk_cpp::transition_", "CPU")
assert torch._C._dispatch_has_kernel_for_dispatch_key("sfpk_cpp::topk_device_", "CUDA") is wanted
assert torch._C._dispatch_has_kernel_for_dispatch_key("sfpk_cpp::masked_weights_device_", "CUDA") is wanted
assert (_extension.without_cuda() is None) is wanted
from sfpk_kernels.ops import topk_mask
assert topk_mask(torch.arange(5.0), 2, backend="cpp").tolist() == [False, False, False, True, True]
print(json.dumps(config))
"""


class FailedError(RuntimeError):
    """A command failed; the message names its log."""


@dataclass
class Outcome:
    """What a row came to; plain values."""

    row: str
    facts: dict = field(default_factory=dict)
    cells: dict = field(default_factory=dict)
    failures: list = field(default_factory=list)
    sources: str = ""
    seconds: float = 0.0


def minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def run(log: Path, *words: str, cwd: Path | None = None, **environment: str) -> str:
    """A command's output, also kept in ``log``."""
    # No constraints of the machine's own: here, versions are what is tested.
    surroundings = {**os.environ, "PIP_CONSTRAINT": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment}
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        if name not in environment:
            surroundings.pop(name, None)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        file.write(" ".join([*(f"{k}={v}" for k, v in environment.items()), *words]) + "\n")
        file.flush()
        try:
            code = subprocess.run(
                words, cwd=cwd or HOME, env=surroundings, stdout=file, stderr=subprocess.STDOUT, check=False,
                timeout=60 * MINUTES,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = f"none after {MINUTES:g} minutes"
    text = log.read_text(errors="replace")
    if code != 0:
        raise FailedError(f"exit code {code}, {log}\n" + "\n".join(text.splitlines()[-15:]))
    return text


def find_python(version: str) -> str:
    """An interpreter of a version: on PATH, or where pyenv keeps them."""
    candidates = [shutil.which(f"python{version}"), sys.executable]
    candidates += sorted(map(str, (Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python")))
    for candidate in filter(None, candidates):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([candidate, "-c", code], capture_output=True, text=True, check=False)
        if done.stdout.strip() == version:
            return candidate
    raise FailedError(f"Python {version}: not found on PATH nor in ~/.pyenv/versions")


def newest_torch() -> str:
    """The highest version the package index has for the newest Python we support."""
    words = [find_python("3.13"), "-m", "pip", "index", "versions", "torch"]
    done = subprocess.run(words, capture_output=True, text=True, check=False,
                          env={**os.environ, "PIP_CONSTRAINT": os.devnull})  # fmt: skip
    found = re.search(r"torch \((\d+\.\d+\.\d+)", done.stdout)
    if not found:
        raise FailedError(f"pip index versions torch: no version in its answer\n{done.stdout}{done.stderr}")
    return found.group(1)


def environment(row: Row, logs: Path) -> str:
    """The row's interpreter, with everything but our package installed."""
    folder = HOME / f"torch-{minor(row.torch)}"
    python = str(folder / "bin" / "python")
    setuptools = f"setuptools=={row.setuptools}" if row.setuptools else "setuptools"
    if not Path(python).exists():
        run(logs / "venv.log", find_python(row.python), "-m", "venv", str(folder))
    run(logs / "install.log", python, "-m", "pip", "install", "-q", f"torch=={row.torch}", setuptools, *TOOLS)
    return python


FACTS = """
import json, platform, torch, setuptools
try:
    import triton
    triton = triton.__version__
except ImportError:
    triton = None
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
                  "triton": triton, "setuptools": setuptools.__version__}))
"""


def nvcc_version() -> str | None:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return None
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found.group(1) if found else None


def sources() -> list[Path]:
    """What travels into a row's tree: the files git knows."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
                            check=True)  # fmt: skip
    names = sorted(set(listed.stdout.splitlines()))
    return [Path(name) for name in names if (ROOT / name).is_file() and Path(name) != TABLE.relative_to(ROOT)]


def digest(files: list[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        if file.parts[0] in ("csrc", "sfpk_kernels", "tests") or file.name in ("setup.py", "pyproject.toml"):
            total.update(str(file).encode() + (ROOT / file).read_bytes())
    return total.hexdigest()[:16]


def fresh_tree(folder: Path, files: list[Path]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / file, folder / file)
    return folder


def build_and_load(python: str, tree: Path, mode: str, cuda: bool, logs: Path) -> None:
    """`pip install` with the extension, then load it as a user would: from elsewhere, all symbols bound at once."""
    for built in (*tree.glob("sfpk_kernels/*.so"), tree / "build"):  # of another mode
        shutil.rmtree(built) if built.is_dir() else built.unlink(missing_ok=True)
    run(
        logs / f"build-{mode}.log", python, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps",
        "--force-reinstall", "-e", ".", cwd=tree, SFPK_BUILD=mode,
    )  # fmt: skip
    loaded = {"LD_BIND_NOW": "1", "SFPK_CACHE_DIR": str(logs / "no-cache"), "SFPK_BUILD": "none"}
    run(logs / f"load-{mode}.log", python, "-c", LOAD, str(cuda), **loaded)
    said = run(logs / f"info-{mode}.log", python, "-m", "sfpk_kernels.cli", "info", "--json", **loaded)
    facts = json.loads(said[said.index("{") :])
    extension = facts["extension"]
    if not isinstance(extension, dict) or str(extension.get("cuda")).lower() != str(cuda).lower():
        raise FailedError(f"sfpk info: wanted an extension with cuda {cuda}, got {extension!r:.200}")
    wrong = {op: devices["cpu"]["chosen"] for op, devices in facts["ops"].items() if devices["cpu"]["chosen"] != "cpp"}
    if wrong:
        raise FailedError(f"sfpk info: wanted cpp for every op on the CPU, got {wrong}")


def tests(python: str, tree: Path, logs: Path) -> str:
    """The C++ and reference backends, and everything above them."""
    return pytest(python, tree, logs / "tests.log", "-k", "not triton", *(f"tests/test_{name}.py" for name in TESTED))


def triton_tests(python: str, tree: Path, logs: Path, **extra: str) -> str:
    """Kernels compiled without spills, their sizes proved, and run in the interpreter."""
    compiled = pytest(python, tree, logs / "triton.log", "-m", "", "tests/test_triton_compiles.py", **extra)
    files = (f"tests/test_{name}.py" for name in INTERPRETED)
    return f"{compiled}; {pytest(python, tree, logs / 'interpreted.log', '-k', 'not cpp', *files, **extra)}"


def pytest(python: str, tree: Path, log: Path, *arguments: str, **extra: str) -> str:
    words = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", jobs())
    return counted(run(log, *words, *arguments, cwd=tree, OMP_NUM_THREADS="1", **extra))


def jobs() -> str:
    return os.environ.get("JOBS") or str(os.cpu_count() or 1)


def counted(text: str) -> str:
    """The number of tests that passed; a run in which none did is a failure."""
    found = re.findall(r"(\d+) passed", text)
    if not found or int(found[-1]) == 0:
        raise FailedError("no test passed")
    return f"{found[-1]} passed"


def try_row(row: Row, files: list[Path], nvcc: str | None, tried: set[str]) -> Outcome:
    """Everything for one row; a part that fails does not keep the others from being tried."""
    began = time.monotonic()
    outcome, logs = Outcome(row.name, sources=digest(files)), HOME / f"{row.name}.d"

    def attempt(cell: str, work, *arguments, **options) -> None:
        print(f"  {row.name}: {cell}", flush=True)
        try:
            outcome.cells[cell] = work(*arguments, **options) or "yes"
        except FailedError as error:
            outcome.cells[cell] = "**no**"
            outcome.failures.append(f"{cell}: {error}")

    try:
        python = environment(row, logs)
        extra = {}
        if row.triton:
            target = HOME / f"triton-{row.triton}"
            if not target.exists():
                run(logs / "triton-install.log", python, "-m", "pip", "install", "-q", "--no-deps", "--target",
                    str(target), f"triton=={row.triton}")  # fmt: skip
            extra = {"PYTHONPATH": str(target)}
        outcome.facts = json.loads(run(logs / "facts.log", python, "-c", FACTS, **extra).splitlines()[-1])
    except FailedError as error:
        outcome.failures.append(f"environment: {error}")
        return outcome
    tree = fresh_tree(logs / "tree", files)
    if row.triton:  # built for the row of its torch
        attempt("CPU: built, loaded", build_and_load, python, tree, "cpu", False, logs)
        attempt(COLUMNS[3], triton_tests, python, tree, logs, **extra)
        outcome.seconds = time.monotonic() - began
        return outcome
    cuda, last = outcome.facts["cuda"], "CPU: built, loaded"
    attempt(last, build_and_load, python, tree, "cpu", False, logs)
    if cuda is None or nvcc is None:
        outcome.cells["CUDA: built, linked, loaded"] = "a torch without CUDA" if cuda is None else "no nvcc here"
    elif cuda.split(".")[0] == nvcc.split(".")[0]:
        attempt("CUDA: built, linked, loaded", build_and_load, python, tree, "cuda", True, logs)
    else:  # another major version: torch's build tools refuse it
        attempt("CUDA: built, linked, loaded", build_and_load, python, tree, "auto", False, logs)
        if outcome.cells["CUDA: built, linked, loaded"] == "yes":
            outcome.cells["CUDA: built, linked, loaded"] = f"needs nvcc {cuda.split('.')[0]}; falls back to the CPU's"
    attempt("tests", tests, python, tree, logs)
    if outcome.facts["triton"] is None:  # it brings none: the tests have shown that all else works without
        outcome.cells[COLUMNS[3]] = "–"
    elif outcome.facts["triton"] in tried:
        outcome.cells[COLUMNS[3]] = "as above"
    else:
        attempt(COLUMNS[3], triton_tests, python, tree, logs)
        tried.add(outcome.facts["triton"])
    outcome.seconds = time.monotonic() - began
    return outcome


COLUMNS = ("CPU: built, loaded", "CUDA: built, linked, loaded", "tests", "Triton: compiled; interpreted")


def table(outcomes: list[Outcome], nvcc: str | None) -> str:
    """tests/matrix.md."""
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    head = ["torch", "its CUDA", "Python", "Triton", "setuptools", *COLUMNS]
    of = ", ".join(sorted({o.sources for o in outcomes}))
    lines = [
        "# Versions tried",
        "",
        f"Written by `make matrix`, {datetime.date.today()}, sources {of}; nvcc {nvcc or 'none'}, "
        f"{compiler[0] if compiler else 'no compiler'}; no GPU: of the CUDA kernels nothing ran.",
        "",
        "CUDA: `SFPK_BUILD=cuda`, loaded with `LD_BIND_NOW=1`, ops registered, `build_config()` and `sfpk info` true.",
        "Tests: ops, energies, runs and files (TESTED in tests/matrix.py), without Triton's. Triton: every tiling",
        "compiled for sm_80 and sm_90, no register spilled for want of one; sizes proved to fit; kernels run in its",
        "interpreter.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    for o in outcomes:
        facts = [str(o.facts.get(name) or "–") for name in ("torch", "cuda", "python", "triton", "setuptools")]
        lines.append("| " + " | ".join([*facts, *(o.cells.get(column, "–") for column in COLUMNS)]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    HOME.mkdir(parents=True, exist_ok=True)
    files, nvcc, outcomes, tried = sources(), nvcc_version(), [], set()
    newest = newest_torch()
    rows = [row for row in ROWS if row.torch != "newest" or newest not in {r.torch for r in ROWS}]
    rows = [Row(newest, row.python) if row.torch == "newest" else row for row in rows]
    unknown = set(sys.argv[1:]) - {row.name for row in rows}
    if unknown:
        print(
            f"matrix: wanted some of {', '.join(row.name for row in rows)}, got {', '.join(unknown)}", file=sys.stderr
        )
        return 2
    for row in rows:
        kept = HOME / f"{row.name}.json"
        before = Outcome(**json.loads(kept.read_text())) if kept.exists() else None
        wanted = row.name in sys.argv[1:] or not sys.argv[1:]
        same = before is not None and before.sources == digest(files) and not before.failures
        if wanted and not (same and os.environ.get("FRESH") != "1"):
            print(f"{row.name} (Python {row.python})", flush=True)
            before = try_row(row, files, nvcc, tried)
            kept.write_text(json.dumps(vars(before), indent=1))
            for failure in before.failures:
                print(f"  FAILED {failure}", flush=True)
        if before is not None:
            outcomes.append(before)
            if not before.failures:
                tried.add(before.facts.get("triton"))
    TABLE.write_text(table(outcomes, nvcc), encoding="utf-8")
    print(table(outcomes, nvcc))
    complete = len(outcomes) == len(rows) and len({o.sources for o in outcomes}) == 1
    failed = [o.row for o in outcomes if o.failures]
    print(
        f"failed: {', '.join(failed)}" if failed else "all passed" if complete else "not all rows are of these sources"
    )
    return 1 if failed or not complete else 0


if __name__ == "__main__":
    sys.exit(main())
