"""``python -m benchmarks``: options, exit codes, files."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import command, record, registry, report, smoke
from benchmarks.command import main
from benchmarks.registry import NAIVE, Provider

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "tests" / "data" / "bench_sample.jsonl"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "apply", "fly"], "--op: wanted some of transition, .*, end_to_end, got fly"),
        (["--group", "all"], "--group: wanted some of ops, scaling, end_to_end, structured, structured_step, got all"),
        (["--time-limit", "0"], "--time-limit: wanted seconds > 0, got 0"),
        (["--time-limit", "nan"], "--time-limit: wanted seconds > 0, got nan"),
        (["--results", str(SAMPLE)], "--results: wanted a folder, got the file"),
        (["--report", "--page", "no-such-file"], "--page: wanted a file, got no-such-file"),
        (["--op", "apply", "--group", "scaling"], "wanted at least one op, got none of apply"),
    ],
)
def test_wrong_usage(arguments, words, capsys):
    assert main([*arguments]) == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--quick", "--full"], ["--device", "tpu"], ["--time-limit", "soon"]])
def test_wrong_options(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main([*arguments])
    assert caught.value.code == 2
    assert "usage: python -m benchmarks" in capsys.readouterr().err


def test_no_such_device(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--device", "cuda", "--results", str(tmp_path)]) == 1
    assert "there is no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_measure_append_report(capsys, tmp_path):
    arguments = ["--results", str(tmp_path), "--device", "cpu"]
    for _ in range(2):
        assert main(["--op", "pack", "--quick", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "a bool mask as bits" in printed
    assert "np.packbits" in printed
    (path,) = tmp_path.glob("*.jsonl")
    first, second = record.read([path])
    assert first.facts["command"] == second.facts["command"] == "python -m benchmarks --device cpu --op pack --quick"
    assert not first.facts["complete"]
    assert {row["op"] for row in first.rows} == {"pack"}
    readme = tmp_path / "README.md"
    readme.write_text("text\n" + "\n".join(report.markers("bench-short")) + "\n")
    assert main(["--report", "--page", str(readme), *arguments]) == 0
    assert "No complete run" in readme.read_text()
    assert "np.packbits" in (tmp_path / "report.md").read_text()
    capsys.readouterr()
    assert main(["--op", "pack", "--quick", "--quiet", *arguments]) == 0
    assert main(["--report", "--quiet", *arguments]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["--op", "pack", "--quick", "--json", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == record.read([path])[-1].rows
    assert found["file"] == str(path)
    assert main(["--report", "--json", *arguments]) == 0
    assert str(tmp_path / "report.md") in json.loads(capsys.readouterr().out)["files"]


def test_report_renders_the_committed_sample(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    shutil.copy(SAMPLE, tmp_path / "sample.jsonl")
    assert main(["--report", "--results", str(tmp_path)]) == 0
    assert "scaling-cpu.png" in capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"sample.jsonl", "report.md", "speedup-cpu.png", "roofline-cpu.png", "scaling-cpu.png"}


def test_report_of_other_results_leaves_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "\nold\n".join(report.markers("bench"))
    Path("README.md").write_text(text)
    Path("other").mkdir()
    shutil.copy(SAMPLE, "other/sample.jsonl")
    assert main(["--report", "--results", "other"]) == 0
    assert Path("README.md").read_text() == text
    (Path("benchmarks") / "results").mkdir(parents=True)
    shutil.copy(SAMPLE, "benchmarks/results/sample.jsonl")
    assert main(["--report"]) == 0
    assert Path("README.md").read_text() != text


def test_report_without_results_and_with_broken_ones(tmp_path, capsys):
    assert main(["--report", "--results", str(tmp_path)]) == 1
    assert "no results in" in capsys.readouterr().err
    (tmp_path / "broken.jsonl").write_text('{"kind": "row"}\n')
    assert main(["--report", "--results", str(tmp_path)]) == 1
    assert "broken.jsonl:1: run: wanted the id of a run, got nothing" in capsys.readouterr().err


def test_a_wrong_backend_of_ours_fails_the_command(tmp_path, monkeypatch, capsys):
    op = registry.all_ops()["pack"]
    liar = Provider("ours[liar]", lambda case: lambda: case.inputs.packed ^ 1)
    broken = registry.Op("pack", op.what, op.shapes, op.build, (*op.providers, liar))
    monkeypatch.setattr("benchmarks.suite.all_ops", lambda: {"pack": broken})
    assert main(["--op", "pack", "--quick", "--device", "cpu", "--results", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "pack, ours[liar]: wrong: " in captured.err
    (run,) = record.read(tmp_path.glob("*.jsonl"))
    assert {row["provider"]: row["status"] for row in run.rows}["ours[liar]"] == "wrong", "recorded all the same"


def test_list(capsys):
    assert main(["--list", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in registry.all_ops())
    assert NAIVE in printed
    assert main(["--list", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["op"] for row in found] == list(registry.all_ops())
    assert NAIVE in found[0]["providers"]


def test_its_options_import_nothing_heavy():
    code = (
        "import sys; from benchmarks import command\n"
        "command.parser()\n"
        "print([m for m in ('matplotlib', 'triton', 'benchmarks.registry') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
    assert Path("benchmarks/results") == command.RESULTS


def test_it_can_be_interrupted(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_list", interrupted)
    assert main(["--list"]) == 130
    assert capsys.readouterr().err == "python -m benchmarks: interrupted\n"


def test_smoke(capsys, monkeypatch):
    assert smoke.main(["--device", "cpu", "--backend", "cpp", "reference"]) == 0
    assert "0 wrong" in capsys.readouterr().out
    assert smoke.main(["--device", "cpu", "--backend", "cuda", "--op", "apply"]) == 1, "nothing could run"
    assert "it runs on CUDA devices" in capsys.readouterr().out


def test_smoke_interprets_triton():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.smoke", "--device", "cpu", "--backend", "triton", "--op", "apply"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("triton     ok") == 2, "within a program and beyond one"


@pytest.mark.slow
def test_pytest_benchmark_gets_the_same_rounds(tmp_path):
    pytest.importorskip("pytest_benchmark")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/test_suite.py", "--bench-size", "quick", "--bench-device", "cpu",
         "-k", "apply_cut or pack", "-p", "no:cacheprovider", f"--benchmark-json={tmp_path / 'out.json'}"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    names = {entry["extra_info"]["provider"] for entry in found}
    assert {"copy ceiling", "ours[cpp]", NAIVE, "np.packbits"} <= names
    assert all(entry["stats"]["rounds"] >= 3 for entry in found)
