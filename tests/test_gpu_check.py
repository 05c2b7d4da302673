"""benchmarks/gpu_check.py as far as it goes without a GPU: its plans, its time limits, its dry run."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import smoke
from benchmarks.command import parser

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
FACTS = {"torch": True, "numpy": True, "safetensors": True, "tqdm": True, "triton": True, "pytest": True,
         "hypothesis": True, "python": "3.12.0", "torch_version": "2.11.0", "torch_cuda": "13.0", "gpu": "a GPU",
         "capability": "9.0", "triton_version": "3.6.0"}  # fmt: skip


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_check"]


def machine(check, sanitizer=sys.executable, **facts):
    return check.Machine({**FACTS, **facts}, nvcc="nvcc", sanitizer=sanitizer)


def script(**environment):
    inherited = {k: v for k, v in os.environ.items() if k not in ("STAGE", "DRY", "OUT", "LIMIT")}
    return subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, env={**inherited, **environment}, check=False
    )


@pytest.mark.parametrize("dry", [False, True])
def test_every_command_is_well_formed(check, dry, tmp_path):
    for stage, plan in check.PLANS.items():
        commands, rows = plan(machine(check), tmp_path, dry, 100.0)
        assert commands
        assert not any(row.failed for row in rows)
        for command in commands:
            if command.words[0] != "nvcc":
                assert check.malformed(command) is None, (stage, command)


def test_options_of_our_own_programs_are_known(check, tmp_path):
    for dry in (False, True):
        for command in check.bench_stage(machine(check), tmp_path, dry, 100.0)[0]:
            options = parser().parse_args(list(command.words[command.words.index("benchmarks") + 1 :]))
            assert options.results == tmp_path / "results"
            assert options.report == (command.name == "report")
        assert options.device is None or options.device == ("cpu" if dry else "cuda")
    measure = check.bench_stage(machine(check), tmp_path, False, 100.0)[0][0].words
    limit = measure[measure.index("--time-limit") + 1]
    assert limit == "60", "a part of the stage's time is kept for the case that has begun, and the report"
    names = {op.name for op in smoke._ops()}
    assert {"transition", "selection", "apply", "mask_gradient"} <= names


def test_the_real_plan(check, tmp_path):
    (build, loaded, kernels, _), _ = check.build_stage(machine(check, capability="8.0"), tmp_path, False, 1.0)
    assert build.words[1:] == ("setup.py", "build_ext", "--force", "--inplace")
    assert loaded.environment == {"LD_BIND_NOW": "1"}
    assert loaded.words[-2:] == ("", "True"), "what is installed, with CUDA"
    assert {"--choice", "--jobs", "cuda", "triton"} <= set(kernels.words)
    assert build.environment["SFPK_BUILD"] == "cuda"
    assert build.environment["TORCH_CUDA_ARCH_LIST"] == "8.0", "for the card that is there"
    tests, _ = check.test_stage(machine(check), tmp_path, False, 1.0)
    assert all(command.environment["SFPK_REQUIRE_GPU"] == "1" for command in tests)
    gpu_tests = next(command for command in tests if command.name == "gpu tests")
    assert {"tests/test_selection_gpu.py", "tests/test_masked_weights.py"} <= set(gpu_tests.words)
    sanitize, _ = check.sanitize_stage(machine(check), tmp_path, False, 1.0)
    assert [command.words[2] for command in sanitize] == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert all("--error-exitcode" in command.words and "cuda" in command.words for command in sanitize)


def test_missing_packages_are_said_and_survived(check, tmp_path):
    (command,), (row,) = check.test_stage(machine(check, pytest=False), tmp_path, False, 1.0)
    assert command.name == "each op once"
    assert (row.status, row.failed) == ("skipped", False)
    assert "pytest is not installed" in row.note
    commands, (row,) = check.test_stage(machine(check, hypothesis=False), tmp_path, False, 1.0)
    assert [command.name for command in commands] == ["each op once", "gpu tests", "kernel tests"]
    assert "hypothesis is not installed" in row.note
    for command in commands[1:]:
        assert "tests/test_masked_weights.py" not in command.words
        assert "--ignore=tests/test_masked_weights.py" in command.words
    commands, (row,) = check.sanitize_stage(machine(check, sanitizer=None), tmp_path, False, 1.0)
    assert (commands, row.status, row.failed) == ([], "not run", True)
    commands, rows = check.build_stage(machine(check, triton=False), tmp_path, True, 1.0)
    assert [row.name for row in rows] == ["Triton kernels"]
    assert not [c.name for c in commands if "triton" in c.name]


def test_malformed_commands_are_seen(check):
    def wrong(*words, **environment):
        return check.malformed(check.Command("x", words, environment))

    assert wrong(sys.executable, "-c", "pass") is None
    assert "no such program" in wrong("no-such-program-here")
    assert wrong(sys.executable, "-m", "benchmarks.fly") == "-m benchmarks.fly: no such module"
    assert wrong(sys.executable, "tests/test_fly.py") == "tests/test_fly.py: no such file"
    assert "not texts" in wrong(sys.executable, JOBS=3)


def run_python(check, tmp_path, code, seconds=60.0, **options):
    return check.run("test", check.Command("some code", (sys.executable, "-c", code), **options), tmp_path, seconds)


def test_commands_leave_logs_and_rows(check, tmp_path):
    row = run_python(check, tmp_path, "import os; print('one'); print(os.environ['X'], 'last')", environment={"X": "y"})
    assert (row.status, row.note) == ("ok", "y last")
    log = (tmp_path / "test-some-code.log").read_text()
    assert log.startswith("X=y ")
    assert "one\ny last" in log
    row = run_python(check, tmp_path, "import sys; sys.exit(3)")
    assert (row.status, row.failed) == ("FAILED", True)
    assert "exit code 3" in row.note
    row = run_python(check, tmp_path, "import time; time.sleep(60)", seconds=0.3)
    assert (row.status, row.failed) == ("OUT OF TIME", True)
    assert row.seconds < 30


@pytest.mark.parametrize(
    ("text", "free"),
    [
        ("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", True),
        ("0 bytes spill stores, 0 bytes spill loads\n8 bytes spill stores, 0 bytes spill loads", False),
        ("0 bytes spill stores, 10 bytes spill loads", False),
        ("10 bytes spill stores, 0 bytes spill loads", False),
        ("nothing was compiled", False),
    ],
)
def test_spills_are_seen(check, text, free, tmp_path):
    assert check.spill_free(text) == free
    row = run_python(check, tmp_path, f"print({text!r})", no_spills=True)
    assert row.failed != free


def test_time_that_is_left_over_goes_to_the_next_stages(check, tmp_path, monkeypatch):
    given = {}

    def plan(machine, out, dry, seconds):
        stage = check.STAGES[len(given)]
        given[stage] = seconds
        return [check.Command(stage, (sys.executable, "-c", "pass"))], []

    monkeypatch.setattr(check, "PLANS", dict.fromkeys(check.STAGES, plan))
    rows = check.run_stages(list(check.STAGES), machine(check), tmp_path, False, 530.0)
    assert [row.status for row in rows] == ["ok"] * 5
    assert given["build"] == pytest.approx(check.WEIGHTS["build"], abs=5)
    assert given["bench"] > 500, "the others took none"


def test_a_sanitizer_that_takes_too_long_leaves_the_others_their_time(check, tmp_path, monkeypatch):
    def plan(machine, out, dry, seconds):
        naps = {"memcheck": 60, "racecheck": 0, "initcheck": 0}
        return [check.Command(n, (sys.executable, "-c", f"import time; time.sleep({s})")) for n, s in naps.items()], []

    monkeypatch.setattr(check, "PLANS", {**check.PLANS, "sanitize": plan})
    rows = check.run_stages(["sanitize"], machine(check), tmp_path, False, 6.0)
    assert [row.status for row in rows] == ["OUT OF TIME", "ok", "ok"]


def test_the_dry_build_is_the_real_one_elsewhere(check, tmp_path):
    """The same setup.py, into a folder of its own; with CUDA kernels where this torch has CUDA."""
    for torch_cuda, mode in ((None, "cpu"), ("13.0", "cuda")):
        (build, loaded, *_), _ = check.build_stage(machine(check, torch_cuda=torch_cuda), tmp_path, True, 1.0)
        assert build.words[1:4] == ("setup.py", "build_ext", "--force")
        assert str(tmp_path / "lib") in build.words
        assert build.environment["SFPK_BUILD"] == mode
        assert loaded.words[-2:] == (str(tmp_path / "lib"), str(mode == "cuda"))


def test_what_was_built_is_looked_at(check, tmp_path):
    """Here without CUDA: wanting it fails."""
    for cuda, status in (("False", "ok"), ("True", "FAILED")):
        loaded = check.Command("loaded", (sys.executable, "-c", check.LOADED, "", cuda), {"LD_BIND_NOW": "1"})
        assert check.run("build", loaded, tmp_path, 100.0).status == status


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_backend_that_was_asked_for_and_is_missing_fails(backend, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ops = ["apply", "masking by segments"]
    assert smoke.main(["--device", "cpu", "--backend", backend, "--op", *ops]) == 1
    said = capsys.readouterr().out
    assert "missing: " in said
    assert "0 ran and agree with the reference, 0 wrong, 3 missing" in said
    assert smoke.main(["--device", "cpu", "--op", *ops]) == 0, "nobody asked: cpp and the reference ran"
    assert smoke.main(["--device", "cpu", "--backend", "cpp", "cuda", "--op", "transition"]) == 1
    assert "no op here has the backend cuda" in capsys.readouterr().out


def test_another_choice_than_the_best_fails(capsys, monkeypatch):
    arguments = ["--device", "cpu", "--backend", "cpp", "--op", "apply", "--choice"]
    assert smoke.main(arguments) == 0
    monkeypatch.setitem(smoke.CHOSEN["cpu"], "selection", "cuda")
    assert smoke.main(arguments) == 1
    assert "on cpu: cpp, wanted cuda" in capsys.readouterr().out


def test_ops_in_processes(capsys):
    arguments = ["--device", "cpu", "--jobs", "2", "--op"]
    assert smoke.main([*arguments, "apply", "masking by layouts", "transition", "--backend", "cpp"]) == 0
    assert "3 ops in up to 2 processes, 0 failed" in capsys.readouterr().out
    assert smoke.main([*arguments, "apply", "--backend", "cuda"]) == 1
    assert "missing" in capsys.readouterr().out
    assert smoke.main([*arguments, "transition", "--backend", "cpp", "cuda"]) == 1, "as in one process"


def test_a_process_that_dies_fails(monkeypatch, capsys):
    """Whatever it said before."""
    died = subprocess.CompletedProcess([], -6, "apply ok\n1 ran\n", "an illegal memory access was encountered")
    monkeypatch.setattr(smoke.subprocess, "run", lambda *arguments, **options: died)
    assert smoke.main(["--device", "cpu", "--jobs", "2", "--op", "apply", "--backend", "cpp"]) == 1
    assert "illegal memory access" in capsys.readouterr().out


def test_each_large_check_has_its_own_time(check, tmp_path):
    """One that hangs must not take that of the others."""
    for dry in (False, True):
        commands, _ = check.large_stage(machine(check), tmp_path, dry, 100.0)
        assert len(commands) == 7
        assert {"transition_moves_as_it_should", "second_card"} <= {command.name for command in commands}


def test_large_checks_at_a_small_scale():
    words = [sys.executable, str(ROOT / "benchmarks" / "gpu_large.py"), "--device", "cpu", "--scale", "small"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" ok: ") == 6
    assert "second_card" in done.stdout
    assert done.stdout.splitlines()[-1] == "7 checks, 0 failed"


def test_a_failed_build_ends_its_stage_alone(check, tmp_path, monkeypatch):
    def build(machine, out, dry, seconds):
        fails = (sys.executable, "-c", "raise SystemExit(1)")
        return [check.Command(name, fails) for name in ("extension", "info")], []

    monkeypatch.setattr(check, "PLANS", {**check.PLANS, "build": build})
    rows = check.run_stages(["build"], machine(check), tmp_path, False, 60.0)
    assert [(row.name, row.status) for row in rows] == [("extension", "FAILED")]
    text = check.summary(rows, machine(check), False)
    assert text.splitlines()[-1] == "failed: build"
    assert "a GPU; Python 3.12.0, torch 2.11.0, CUDA 13.0, Triton 3.6.0" in text
    passed = check.summary([check.Row("build", "x", "ok")], machine(check, gpu=None), True)
    assert passed.splitlines()[-1] == "all passed, as far as a dry run goes"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"STAGE": "fly"}, "STAGE: wanted some of build, large, test, sanitize, bench, got fly"),
        ({"DRY": "yes"}, "DRY: wanted 0 or 1, got 'yes'"),
        ({"LIMIT": "soon"}, "LIMIT: wanted seconds > 0, got 'soon'"),
        ({"LIMIT": "-1"}, "LIMIT: wanted seconds > 0, got '-1'"),
    ],
)
def test_wrong_usage(environment, words):
    done = script(**environment)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = script(STAGE="bench")
    assert done.returncode == 1
    assert "torch sees no GPU here. DRY=1" in done.stderr


@pytest.mark.slow
def test_dry_run_of_the_fastest_stage(tmp_path):
    """Each op once, through the script itself."""
    done = script(STAGE="sanitize", DRY="1", OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "all passed, as far as a dry run goes"
    assert "processes, 0 failed" in done.stdout
    assert (tmp_path / "out" / "summary.txt").read_text().strip() in done.stdout
    assert (tmp_path / "out" / "sanitize-each-op-once.log").is_file()


@pytest.mark.slow
def test_dry_run(tmp_path):
    done = script(DRY="1", OUT=str(tmp_path), LIMIT="900")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "results").glob("*.jsonl"))
    assert (tmp_path / "results" / "report.md").is_file()
