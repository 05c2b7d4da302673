"""Everything a GPU is needed for, in one command (`make gpu-check`): build, check what only a card can show, test,
sanitize, measure.

    python3 benchmarks/gpu_check.py

Works offline with what the machine has: this Python, its torch and Triton, nvcc and compute-sanitizer; no package is
installed. Needs nothing but the standard library to start, so that it can say what is missing. Environment:

    STAGE   some of build, large, test, sanitize, bench, with blanks or commas between them (default: all)
    OUT     folder for logs and results (default: gpu-out)
    DRY     1: without a GPU. Builds the extension in the same way (into OUT; with CUDA kernels where torch has CUDA),
            compiles all kernels for sm_80 and sm_90, interprets Triton's, runs checks and harness on the CPU
    LIMIT   seconds for everything (default: 530, so that it ends within 9 minutes)

Time that a stage does not use goes to those after it, and a stage given alone has all of it; on a machine where
nothing is compiled yet: STAGE="build large", then "test", "sanitize", "bench". A backend that is missing fails.
Measured rows lie in OUT/results (`python -m benchmarks --report --results OUT/results` shows them); their .jsonl goes
to benchmarks/results to be committed. Exit code: 0 all passed, 1 something failed, 2 wrong usage.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 530.0  # seconds
WEIGHTS = {"build": 140.0, "large": 70.0, "test": 120.0, "sanitize": 90.0, "bench": 110.0}  # shares of the time
STAGES = tuple(WEIGHTS)
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
REQUIRED = ("torch", "numpy", "safetensors", "tqdm")
ARCHITECTURES = ("80", "90")
KERNEL_TESTS = ("test_selection_gpu", "test_masked_weights", "test_transition_backends", "test_transition_row")
# One case per kind of tile, through all passes; the slow tests compile the others.
TRITON_CASES = '[[1, "", []], [10, "theta", []], [16, "weighted gram", []]]'
SPILL_FREE = re.compile(r"\b0 bytes spill stores, 0 bytes spill loads")
SPILLS = re.compile(r"\d+ bytes spill stores, \d+ bytes spill loads")

PROBE = """
import importlib.util, json, platform
has = lambda name: importlib.util.find_spec(name) is not None
found = {name: has(name) for name in ("torch", "numpy", "safetensors", "tqdm", "triton", "pytest", "hypothesis")}
found["xdist"] = has("xdist")
found["python"] = platform.python_version()
if found["torch"]:
    import torch
    found.update(torch_version=torch.__version__, torch_cuda=torch.version.cuda, gpu=None)
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found.update(gpu=torch.cuda.get_device_name(), capability=f"{major}.{minor}")
if found["triton"]:
    import triton
    found["triton_version"] = triton.__version__
print(json.dumps(found))
"""


# Loads what was built, from FOLDER or as it is installed, with every symbol bound at once.
LOADED = """
import importlib.util, sys, torch
from pathlib import Path
folder, cuda = sys.argv[1], sys.argv[2] == "True"
if folder:
    path = next(Path(folder).rglob("_C*.so"))
    spec = importlib.util.spec_from_file_location("sfpk_kernels._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
else:
    from sfpk_kernels import _extension
    module = _extension.load()
    assert (_extension.without_cuda() is None) is cuda, _extension.without_cuda()
config = module.build_config()
assert config["cuda"] is cuda, config
for op, key, there in (("transition_", "CPU", True), ("topk_device_", "CUDA", cuda)):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sfpk_cpp::{op}", key) is there, (op, key)
print(config)
"""


@dataclass(frozen=True)
class Machine:
    """What there is to work with."""

    facts: dict
    python: str = sys.executable
    nvcc: str | None = None
    sanitizer: str | None = None

    @property
    def gpu(self) -> str | None:
        return self.facts.get("gpu")


@dataclass(frozen=True)
class Command:
    """One process of a stage."""

    name: str
    words: tuple[str, ...]
    environment: dict = field(default_factory=dict)
    no_spills: bool = False  # its output lists what the assembler spilled: it must be nothing


@dataclass(frozen=True)
class Row:
    """One line of the summary."""

    stage: str
    name: str
    status: str  # "ok", "FAILED", "OUT OF TIME", "not run" (counts as a failure), "skipped" (does not)
    seconds: float = 0.0
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.status not in ("ok", "skipped")


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit, on PATH or where the toolkit usually is."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    beside = [str(Path(home) / folder) for home in homes if home for folder in ("bin", "compute-sanitizer")]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(beside))


def probe() -> Machine:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{sys.executable} cannot even be asked what it has:\n{done.stderr[-2000:]}")
    facts = json.loads(done.stdout.splitlines()[-1])
    return Machine(facts, nvcc=find_tool("nvcc"), sanitizer=find_tool("compute-sanitizer"))


def build_stage(machine: Machine, out: Path, dry: bool, seconds: float) -> tuple[list[Command], list[Row]]:
    """The extension for this card, loaded and chosen, and Triton's kernels; dry: all kernels for two architectures."""
    jobs = str(os.cpu_count() or 2)
    cuda = not dry or bool(machine.facts.get("torch_cuda") and machine.nvcc)
    setup = (machine.python, "setup.py", "build_ext", "--force")
    setup += ("--build-lib", str(out / "lib"), "--build-temp", str(out / "temp")) if dry else ("--inplace",)
    environment = {"SFPK_BUILD": "cuda" if cuda else "cpu", "MAX_JOBS": jobs}
    if not dry:
        environment["TORCH_CUDA_ARCH_LIST"] = machine.facts.get("capability", "9.0")
    loaded = (machine.python, "-c", LOADED, str(out / "lib") if dry else "", str(cuda))
    commands = [Command("extension", setup, environment), Command("loaded", loaded, {"LD_BIND_NOW": "1"})]
    if not dry:
        # Kernels in parallel, into the cache that later stages read; what was built must also be what is chosen.
        warm = smoke_command(machine, dry, {}, "--jobs", jobs, "--choice")
        info = Command("info", (machine.python, "-m", "sfpk_kernels.cli", "info"))
        return [*commands, Command("kernels", warm.words, warm.environment), info], []
    rows = []
    if machine.nvcc is None:
        rows.append(Row("build", "CUDA kernels", "not run", note="nvcc was not found"))
    else:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            for architecture in ARCHITECTURES:
                commands.append(compile_cuda(machine.nvcc, source, architecture, out))
    if not machine.facts.get("triton"):
        rows.append(Row("build", "Triton kernels", "not run", note="Triton is not installed"))
    else:
        for architecture in ARCHITECTURES:
            for module, *arguments in (("compile_triton", TRITON_CASES), ("compile_triton_masks",)):
                words = (machine.python, "-m", f"tests.{module}", architecture, *arguments, "--jobs", jobs)
                commands.append(Command(f"{module} sm_{architecture}", words, {"TRITON_INTERPRET": "0"}))
    return commands, rows


def large_stage(machine: Machine, out: Path, dry: bool, seconds: float) -> tuple[list[Command], list[Row]]:
    """Sizes beyond 32 bits and a second card; dry: the same checks, small, on the CPU."""
    how = ("--device", "cpu", "--scale", "small") if dry else ("--device", "cuda")
    source = (ROOT / "benchmarks" / "gpu_large.py").read_text()
    names = re.findall(r"^        (\w+),$", source[source.index("for check in (") :], re.MULTILINE)
    script = (machine.python, "benchmarks/gpu_large.py", *how, "--only")
    return [Command(name, (*script, name)) for name in names], []


def compile_cuda(nvcc: str, source: Path, architecture: str, out: Path) -> Command:
    """nvcc with the build's own flags, warnings as errors."""
    spec = importlib.util.spec_from_file_location("_sfpk_build", ROOT / "sfpk_kernels" / "_build.py")
    flags = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(flags)
    target = out / f"{source.stem}-sm{architecture}.o"
    words = (nvcc, "-c", *flags.cuda_flags(), f"-I{ROOT / 'csrc'}", "-gencode",
             f"arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v", "-Werror", "all-warnings",
             str(source.relative_to(ROOT)), "-o", str(target))  # fmt: skip
    return Command(f"{source.stem} sm_{architecture}", words, no_spills=True)


def test_stage(machine: Machine, out: Path, dry: bool, seconds: float) -> tuple[list[Command], list[Row]]:
    """The GPU tests, and the kernels' tests on the GPU; dry: the latter in Triton's interpreter, a few."""
    commands, rows = [], []
    environment = {"TRITON_INTERPRET": "1"} if dry else {"SFPK_REQUIRE_GPU": "1"}
    if not machine.facts.get("pytest"):
        rows.append(Row("test", "pytest", "skipped", note="pytest is not installed; each op is run once instead"))
        return [smoke_command(machine, dry, environment)], rows
    ignored = [] if machine.facts.get("hypothesis") else tests_with_hypothesis()
    if ignored:
        names = " ".join(path.stem for path in ignored)
        rows.append(Row("test", names, "skipped", note="hypothesis is not installed; each op is run once instead"))
        commands.append(smoke_command(machine, dry, environment))
    skips = [f"--ignore=tests/{path.name}" for path in ignored]
    together = ("-n", "4") if machine.facts.get("xdist") and not dry else ()
    pytest = (machine.python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *together, *skips)
    files = [f"tests/{name}.py" for name in KERNEL_TESTS if f"{name}.py" not in {path.name for path in ignored}]
    if dry:
        chosen = [file for file in files if "selection" in file or "row" in file]
        return [*commands, Command("kernel tests", (*pytest, "-m", "not slow and not gpu", *chosen), environment)], rows
    # Not the whole folder: other files may need packages this machine lacks.
    marked = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    gpu_files = [f"tests/{path.name}" for path in marked if path not in ignored]
    commands += [
        Command("gpu tests", (*pytest, "-m", "gpu and not slow", *gpu_files), environment),
        Command("kernel tests", (*pytest, "-m", "not slow and not gpu", *files), environment),
    ]
    return commands, rows


def tests_with_hypothesis() -> list[Path]:
    """Test files that cannot be imported without it."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [path for path in files if re.search(r"^(from|import) hypothesis", path.read_text(), re.MULTILINE)]


def smoke_command(machine: Machine, dry: bool, environment: dict, *more: str) -> Command:
    """Every op on every backend of the device, none of which may be missing, compared with the reference."""
    backends = ("cpp", "triton") if dry else ("cuda", "triton")
    device = "cpu" if dry else "cuda"
    words = (machine.python, "-m", "benchmarks.smoke", "--device", device, "--backend", *backends, *more)
    return Command("each op once", words, environment)


def sanitize_stage(machine: Machine, out: Path, dry: bool, seconds: float) -> tuple[list[Command], list[Row]]:
    """compute-sanitizer over each op once; dry: the same script without it."""
    if dry:
        note = "found" if machine.sanitizer else "not found on this machine"
        rows = [Row("sanitize", "compute-sanitizer", "skipped", note=f"it needs a GPU; {note}")]
        jobs = ("--jobs", str(os.cpu_count() or 2))
        return [smoke_command(machine, dry, {"TRITON_INTERPRET": "1"}, "--choice", *jobs)], rows
    if machine.sanitizer is None:
        return [], [Row("sanitize", "compute-sanitizer", "not run", note="it was not found; the CUDA toolkit has it")]
    smoke = smoke_command(machine, dry, {})
    # Each allocation its own, so that one past the end is seen.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Command(tool, (machine.sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *smoke.words),
                environment)
        for tool in TOOLS
    ], []  # fmt: skip


def bench_stage(machine: Machine, out: Path, dry: bool, seconds: float) -> tuple[list[Command], list[Row]]:
    """The suite and its report; dry: tiny shapes on the CPU."""
    results = ("--results", str(out / "results"))
    suite = (machine.python, "-m", "benchmarks")
    # Cases that have begun are finished: leave them time.
    limit = ("--time-limit", f"{max(1.0, 0.6 * seconds):.0f}")
    how = ("--device", "cpu", "--quick", "--group", "ops", "scaling") if dry else ("--device", "cuda")
    return [Command("measure", (*suite, *how, *limit, *results)), Command("report", (*suite, "--report", *results))], []


PLANS = {
    "build": build_stage,
    "large": large_stage,
    "test": test_stage,
    "sanitize": sanitize_stage,
    "bench": bench_stage,
}


def malformed(command: Command) -> str | None:
    """What is wrong with a command that can be known without running it, or None."""
    if shutil.which(command.words[0]) is None:
        return f"{command.words[0]}: no such program"
    for before, word in zip(command.words, command.words[1:], strict=False):
        place = ROOT / word.replace(".", "/")
        if (
            before == "-m"
            and ("." in word or word == "benchmarks")
            and not any(path.is_file() for path in (place.with_suffix(".py"), place / "__main__.py"))
        ):
            return f"-m {word}: no such module"
        if re.fullmatch(r"(tests|csrc|benchmarks)/\S+\.\w+|setup\.py", word) and not (ROOT / word).is_file():
            return f"{word}: no such file"
    if any(not isinstance(value, str) for value in (*command.environment, *command.environment.values())):
        return f"{command.environment}: not texts"
    return None


def run(stage: str, command: Command, out: Path, seconds: float) -> Row:
    """One command, killed with its children when the time is over; its output goes to a log."""
    log = out / f"{stage}-{re.sub(r'[^A-Za-z0-9]+', '-', command.name)}.log"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, **command.environment}
    if environment.get("TRITON_INTERPRET") == "0":
        del environment["TRITON_INTERPRET"]
    print(f"{stage}: {command.name} (at most {seconds:.0f} s)", flush=True)
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        file.write(" ".join([*(f"{k}={v}" for k, v in command.environment.items()), *command.words]) + "\n\n")
        file.flush()
        process = subprocess.Popen(
            command.words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    took, text = time.monotonic() - started, log.read_text(encoding="utf-8", errors="replace")
    last = next((line.strip() for line in reversed(text.splitlines()[1:]) if line.strip()), "")[:100]
    if code is None:
        return Row(stage, command.name, "OUT OF TIME", took, str(log))
    if code:
        print("\n".join(text.splitlines()[-15:]), flush=True)
        return Row(stage, command.name, "FAILED", took, f"exit code {code}, {log}")
    if command.no_spills and not spill_free(text):
        return Row(stage, command.name, "FAILED", took, f"registers spill, {log}")
    return Row(stage, command.name, "ok", took, "" if command.no_spills or last.startswith(("[", "{")) else last)


def spill_free(text: str) -> bool:
    """Whether the assembler reported on some kernel, and spilled in none."""
    reports = SPILLS.findall(text)
    return bool(reports) and all(SPILL_FREE.search(report) for report in reports)


def run_stages(stages: list[str], machine: Machine, out: Path, dry: bool, limit: float) -> list[Row]:
    """All commands of some stages, each stage within its share of the time that is left."""
    end, rows = time.monotonic() + limit, []
    for i, stage in enumerate(stages):
        left = end - time.monotonic()
        own = left * WEIGHTS[stage] / sum(WEIGHTS[name] for name in stages[i:])
        stage_end = time.monotonic() + own
        commands, notes = PLANS[stage](machine, out, dry, own)
        rows += notes
        for place, command in enumerate(commands):
            wrong, seconds = malformed(command), stage_end - time.monotonic()
            if stage in ("large", "sanitize"):  # what takes too long leaves the others their time
                seconds /= len(commands) - place
            rows.append(
                Row(stage, command.name, "FAILED", note=wrong) if wrong else run(stage, command, out, seconds)
            )  # fmt: skip
            if stage == "build" and not dry and rows[-1].failed and command.name in ("extension", "loaded"):
                break
        if dry:  # the commands of the real run are at least well-formed, all but the programs this machine lacks
            real = PLANS[stage](Machine({**machine.facts, "capability": "9.0"}, machine.python, "nvcc",
                                        machine.sanitizer or machine.python), out, False, own)[0]  # fmt: skip
            wrong = next(filter(None, map(malformed, real)), None)
            rows.append(Row(stage, "commands with a GPU", "FAILED" if wrong else "ok",
                            note=wrong or f"{len(real)} well-formed"))  # fmt: skip
    return rows


def summary(rows: list[Row], machine: Machine, dry: bool) -> str:
    """The table that comes last."""
    facts = machine.facts
    head = (
        f"{machine.gpu or 'NO GPU (dry run)'}; Python {facts['python']}, torch {facts.get('torch_version')}, CUDA "
        f"{facts.get('torch_cuda')}, Triton {facts.get('triton_version')}, nvcc {'yes' if machine.nvcc else 'no'}"
    )
    width = max(len(row.name) for row in rows)
    lines = [f"{r.stage:<9} {r.name:<{width}} {r.status:<11} {r.seconds:6.1f} s  {r.note}".rstrip() for r in rows]
    failed = [stage for stage in STAGES if any(row.failed for row in rows if row.stage == stage)]
    verdict = f"failed: {', '.join(failed)}" if failed else "all passed" + (", as far as a dry run goes" if dry else "")
    return "\n".join(["", head, *lines, verdict])


def main() -> int:
    wanted = re.split(r"[\s,]+", os.environ.get("STAGE", "").strip()) if os.environ.get("STAGE", "").strip() else []
    unknown = [name for name in wanted if name not in STAGES]
    if unknown:
        print(f"gpu-check: STAGE: wanted some of {', '.join(STAGES)}, got {unknown[0]}", file=sys.stderr)
        return 2
    dry = os.environ.get("DRY", "")
    if dry not in ("", "0", "1"):
        print(f"gpu-check: DRY: wanted 0 or 1, got {dry!r}", file=sys.stderr)
        return 2
    try:
        limit = float(os.environ.get("LIMIT", LIMIT))
    except ValueError:
        limit = 0.0
    if not limit > 0:
        print(f"gpu-check: LIMIT: wanted seconds > 0, got {os.environ['LIMIT']!r}", file=sys.stderr)
        return 2
    started = time.monotonic()
    try:
        machine = probe()
    except (RuntimeError, subprocess.SubprocessError, OSError) as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 1
    missing = [name for name in REQUIRED if not machine.facts[name]]
    if missing:
        print(f"gpu-check: {sys.executable} lacks {', '.join(missing)}: nothing can be run", file=sys.stderr)
        return 1
    if machine.gpu is None and dry != "1":
        print("gpu-check: torch sees no GPU here. DRY=1 does what can be done without one.", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT") or ROOT / "gpu-out").resolve()
    out.mkdir(parents=True, exist_ok=True)
    stages = [name for name in STAGES if name in wanted] or list(STAGES)
    rows = run_stages(stages, machine, out, dry == "1", limit - (time.monotonic() - started))
    text = summary(rows, machine, dry == "1")
    (out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 1 if any(row.failed for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
