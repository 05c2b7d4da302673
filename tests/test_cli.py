"""The command: prune, masks, report; exit codes and messages."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sfpk_kernels import Execution, MaskSet, SFPKConfig, prune
from sfpk_kernels.cli import main

from .cli_task import small

TASK = "tests.cli_task:small"
QUICK = ["--sparsity", "0.8", "--n-particles", "3", "--n-steps", "6", "--energy-mode", "sequential"]


def test_prune_writes_masks_report_and_says_what(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert main(["prune", TASK, *QUICK, "--out", str(out), "--json", "--waypoints", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, loss_fn, batches, _ = small()
    config = SFPKConfig(0.8, n_particles=3, n_steps=6)
    expected = prune(model, batches, loss_fn=loss_fn, config=config, waypoints=[0.5])
    assert found["fingerprint"] == expected.mask.fingerprint()
    assert found["dense_eval"] == 0
    assert found["pruned_eval"] > 0.5
    assert MaskSet.load(out / "mask.safetensors") == expected.mask
    assert MaskSet.load(out / "mask.safetensors").metadata["config"]["n_steps"] == 6
    assert MaskSet.load(out / "mask-0.5.safetensors") == expected.waypoints[0].mask
    assert (out / "report.html").is_file()
    assert all(path in found["files"] for path in (str(out / "mask.safetensors"), str(out / "report.html")))
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    assert main(["report", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["fingerprint"] == found["fingerprint"]
    assert again["files"] == [str(out / "report.html")]
    assert (out / "report.html").read_text() == before
    assert main(["report", str(out), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"


@pytest.mark.usefixtures("undrawn")
def test_lines_without_a_terminal_and_quiet(tmp_path, capsys):
    assert main(["prune", "tests.cli_task:without_eval", *QUICK, "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert re.search(r"step 6 of 6: loss [\d.]+, sparsity 0\.8000, ", said.err)
    assert said.out.startswith("MaskSet(29 of 144 weights kept")
    assert main(["prune", "tests.cli_task:without_eval", *QUICK, "--out", str(tmp_path), "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.out == said.err == ""


@pytest.mark.usefixtures("undrawn")
def test_json_is_all_there_is_on_stdout(tmp_path, capsys):
    """Whatever the task prints, and whatever number it evaluates to."""
    for quiet in ([], ["--quiet"]):
        assert main(["prune", "tests.cli_task:talks", *QUICK, "--out", str(tmp_path), "--json", *quiet]) == 0
        said = capsys.readouterr()
        found = json.loads(said.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert found["dense_eval"] is found["pruned_eval"] is None
        assert said.err.count("hello from eval_fn") == 2


@pytest.mark.parametrize(
    ("arguments", "where"),
    [(["info"], "| true"), (["prune", TASK, *QUICK, "--json"], "| true"),
     (["prune", "tests.cli_task:talks", *QUICK, "--json"], "2>&1 >/dev/null | true")],
)  # fmt: skip
def test_a_reader_that_has_gone_is_no_failure(arguments, where, tmp_path):
    out = ["--out", str(tmp_path)] if "prune" in arguments else []
    command = shlex.join([sys.executable, "-m", "sfpk_kernels.cli", *arguments, *out])
    script = f"set -o pipefail; {command} {where}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "rror" not in done.stderr
    assert (tmp_path / "mask.safetensors").is_file() == bool(out)


def test_errors_of_other_files_leave_stdout_alone(tmp_path):
    script = (
        "from sfpk_kernels.cli import main; from sfpk_kernels.utils import files; import sys\n"
        "def fail(*a): raise OSError(5, 'the disk fails')\n"
        "import sfpk_kernels.report; sfpk_kernels.report.render = fail\n"
        "print(main(['report', sys.argv[1]])); print('still here')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "1\nstill here\n"
    assert done.stderr == "sfpk report: [Errno 5] the disk fails\n"


def test_output_that_cannot_be_written(tmp_path):
    command = [sys.executable, "-m", "sfpk_kernels.cli", "info"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "sfpk info: [Errno 28] No space left on device\n")


@pytest.mark.usefixtures("undrawn")
def test_masks_of_an_earlier_run_are_named(tmp_path, capsys, caplog):
    command = ["prune", "tests.cli_task:without_eval", *QUICK, "--out", str(tmp_path), "--quiet", "--waypoints"]
    assert main([*command, "0.2", "0.4"]) == 0
    assert not caplog.records
    assert main([*command, "0.4", "0.6"]) == 0
    assert caplog.messages == [f"{tmp_path} also holds masks of another run: mask-0.2.safetensors"]
    metadata = MaskSet.load(tmp_path / "mask-0.6.safetensors").metadata
    assert (metadata["sparsity"], metadata["config"]["n_steps"]) == (0.6, 6)


@pytest.mark.usefixtures("undrawn")
def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    arguments = ["prune", "tests.cli_task:without_eval", *QUICK, "--out", str(tmp_path)]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert re.search(r"SFPK: 100%.* 6/6 .*loss=[\d.]+, sparsity=0\.8000", said.err)
    assert "3 particles of 144 coordinates" in said.err, "the plan"
    assert "step 6 of 6" not in said.err
    assert "SFPK" not in said.out
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_plan_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sfpk_kernels.search.pruner.SFPKPruner.run", lambda *a, **k: pytest.fail("ran"))
    out = tmp_path / "out"
    assert main(["prune", TASK, *QUICK, "--plan", "--out", str(out)]) == 0
    assert "3 particles of 144 coordinates" in capsys.readouterr().out
    assert main(["prune", TASK, *QUICK, "--plan", "--json", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["coordinates"] == 144
    assert main(["prune", TASK, *QUICK, "--plan", "--quiet", "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    assert main(["prune", TASK, *QUICK, "--plan", "--memory-limit", "100", "--out", str(out)]) == 1
    assert not out.exists()


@pytest.mark.usefixtures("undrawn")
def test_save_and_resume(tmp_path, capsys):
    arguments = ["prune", TASK, *QUICK, "--out", str(tmp_path), "--json"]
    assert main([*arguments, "--save-every", "2", "--resume"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert (tmp_path / "run.sfpk").is_file()
    for resume in (["--resume"], ["--resume", str(tmp_path / "run.sfpk")]):
        assert main([*arguments, *resume]) == 0
        assert json.loads(capsys.readouterr().out)["fingerprint"] == first["fingerprint"]
    capsys.readouterr()
    other = tmp_path / "other"
    MaskSet({"a": torch.ones(3, dtype=torch.bool)}).save(tmp_path / "no-run")
    for wrong, words in (
        (["--radius", "3", "--resume", str(tmp_path / "run.sfpk")], "config: wanted that of the saved run, got a "
         "difference in radius"),
        (["--resume", str(tmp_path / "no-run")], f"'{tmp_path / 'no-run'}': wanted a file of format sfpk-run"),
        (["--waypoints", "0.5", "--resume", str(tmp_path / "run.sfpk")], "waypoints: wanted sparsities that the "
         "saved run took"),
        (["--ignore", "2", "--resume", str(tmp_path / "run.sfpk")], "state: wanted one over the same prunable tensors"),
    ):  # fmt: skip
        assert main(["prune", TASK, *QUICK, "--out", str(other), *wrong]) == 2
        assert capsys.readouterr().err.startswith(f"sfpk prune: --resume: {words}")
    assert not other.exists()


def test_every_setting_is_an_option_with_its_description(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["prune", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    groups = ["files:", "method:", "execution:"]
    assert [line for line in text.splitlines() if line in groups] == groups
    for field in (*dataclasses.fields(SFPKConfig), *dataclasses.fields(Execution)):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "fraction of the prunable weights that is REMOVED" in " ".join(text.split())


@pytest.mark.usefixtures("undrawn")
def test_options_reach_the_config(tmp_path, capsys):
    options = ["--preset", "paper", "--no-retract", "--final-score", "none", "--chunk-size", "2", "--radius", "1.7"]
    assert main(["prune", TASK, *QUICK, *options, "--out", str(tmp_path), "--quiet"]) == 0
    metadata = MaskSet.load(tmp_path / "mask.safetensors").metadata
    config = metadata["config"]
    assert (config["retract"], config["final_score"], config["radius"]) == (False, None, 1.7)
    assert metadata["execution"]["chunk_size"] == 2
    assert config["density"] == "l2_squared"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["tests.cli_task", *QUICK], 2, "TASK: wanted package.module:function, got 'tests.cli_task'"),
        (["nowhere_at_all:task", *QUICK], 2, "TASK: wanted a module that can be imported from here"),
        (["tests.cli_task:absent", *QUICK], 2, "'absent', which it does not have"),
        (["tests.cli_task:NUMBER", *QUICK], 2, "a int"),
        (["tests.cli_task:wrong", *QUICK], 2, "got one that returns str"),
        (["tests/cli_task.py:small", *QUICK], 2, "got the path 'tests/cli_task.py': try tests.cli_task:small"),
        (["tests.cli_task:smal", *QUICK], 2, "did you mean small?"),
        (["tests.cli_task:needs_argument", *QUICK], 2, "missing a required argument: 'path'"),
        (["tests.cli_task:bad_loss", *QUICK], 2, "TASK: loss_fn: wanted a function (model, batch) -> scalar or None"),
        (["tests.cli_task:empty", *QUICK, "--plan"], 2, "TASK: loader: wanted batches, got an empty iterable"),
        (["tests.cli_task:bad_eval", *QUICK], 1, "eval_fn: wanted a number or a dict of numbers, got str"),
        ([TASK, *QUICK, "--ignore", "nothing"], 2, "--ignore: 'nothing' matches no parameter"),
        ([TASK, *QUICK, "--save-every", "0"], 2, "--save-every: wanted ≥ 1, got 0"),
        ([TASK, *QUICK, "--bn-batches", "-1"], 2, "--bn-batches: wanted ≥ 0, got -1"),
        (["tests.cli_task:broken", *QUICK], 1, "RuntimeError: the loss is broken"),
        (["tests.cli_task:broken", *QUICK], 1, "cli_task.py:"),
        ([TASK, *QUICK, "--sparsity", "0.9999"], 2, "--sparsity: wanted"),
        ([TASK, *QUICK, "--sparsity", "0.9999", "--plan"], 2, "--sparsity: wanted"),
        (["tests.cli_task:interrupted", *QUICK], 130, "interrupted"),
        ([TASK, *QUICK, "--sparsity", "1.5"], 2, "--sparsity: wanted"),
        ([TASK, *QUICK, "--n-particles", "0"], 2, "--n-particles: wanted"),
        ([TASK, *QUICK, "--resume", "no-such-file"], 2, "--resume: wanted a file"),
        ([TASK, *QUICK, "--out", "README.md"], 2, "--out: wanted a folder"),
        ([TASK, *QUICK, "--out", "README.md/here"], 2, "--out: wanted a folder that can be written or made"),
        ([TASK, *QUICK, "--out", "/proc/here"], 2, "--out: wanted a folder that can be written or made"),
        ([TASK, *QUICK, "--ignore", "re:.*"], 2, "--ignore: wanted patterns that leave something to prune"),
        ([TASK, *QUICK, "--settle"], 2, "--settle: wanted waypoints"),
        ([TASK, *QUICK, "--step-length", "radius"], 2, "--hold: wanted 1 with step_length='radius'"),
        ([TASK, *QUICK, "--step-length", "radius", "--plan"], 2, "--hold: wanted 1 with step_length='radius'"),
        ([TASK, *QUICK, "--merge", "0.9"], 2, "--merge: wanted a fraction that leaves a step for one particle, of"),
        ([TASK, *QUICK, "--settle", "--plan"], 2, "--settle: wanted waypoints"),
        ([TASK, *QUICK, "--settle", "--waypoints", "0.3", "0.5", "--n-steps", "2"], 2, "--n-steps: wanted ≥ 3"),
        ([TASK, *QUICK, "--vote", "masked", "--waypoints", "0.3"], 2, "--waypoints: wanted none below 0.8"),
        (["tests.cli_task:lost_worker", *QUICK], 1, "BrokenPipeError: a worker has died"),
        ([TASK, *QUICK, "--plan", "--waypoints", "0.9"], 2, "--waypoints: wanted sparsities above 0 and up to"),
        ([TASK, *QUICK[:-1], "cudagraph"], 1, "energy_mode='cudagraph' cannot run this model: CUDA graphs need a CUDA"),
        ([TASK, *QUICK, "--waypoints", "0.9"], 2, "--waypoints: wanted sparsities above 0 and up to the run's 0.8"),
    ],
)
def test_wrong_input(arguments, code, words, tmp_path, capsys):
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert main(["prune", *arguments, *out]) == code
    said = capsys.readouterr()
    assert words in said.err
    assert "Traceback" not in said.err
    assert said.out == ""


def test_a_syntax_error_is_placed_in_its_file(tmp_path, capsys, monkeypatch):
    (tmp_path / "half_written.py").write_text("def task(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["prune", "half_written:task", *QUICK, "--out", str(tmp_path / "out")]) == 2
    assert f"at {tmp_path / 'half_written.py'}:1" in capsys.readouterr().err


def test_traceback_on_request(tmp_path, capsys):
    assert main(["prune", "tests.cli_task:broken", *QUICK, "--out", str(tmp_path), "--traceback"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_what_is_pruned_can_be_said(tmp_path, capsys):
    arguments = ["prune", TASK, *QUICK, "--out", str(tmp_path), "--json", "--ignore", "re:2", "--include-biases"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["pruned_eval"] > 0.5
    assert MaskSet.load(tmp_path / "mask.safetensors").shapes == {"0.weight": (12, 8), "0.bias": (12,)}
    assert main([*arguments, "--plan"]) == 0
    assert json.loads(capsys.readouterr().out)["coordinates"] == 108


@pytest.mark.usefixtures("undrawn")
def test_evaluation_by_names(tmp_path, capsys):
    assert main(["prune", "tests.cli_task:named_numbers", *QUICK, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "zeros: 0 dense, " in text
    assert "one: 1 dense, 1 pruned" in text


@pytest.mark.usefixtures("undrawn")
def test_batchnorm_is_estimated_again_before_the_evaluation(tmp_path, capsys):
    arguments = ["prune", "tests.cli_task:batchnorm", *QUICK, "--out", str(tmp_path), "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dense_eval"] == 0
    assert found["pruned_eval"] > 0
    assert main([*arguments, "--bn-batches", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["pruned_eval"] == 0


def test_wrong_options(capsys):
    for arguments in (["prune"], ["prune", TASK, "--sparsity", "x"], ["prune", TASK, *QUICK, "--kernel", "y"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    for name in ("a", "b"):
        MaskSet({"first": torch.rand(4, 3) > 0.5, "second": torch.rand(5) > 0.5}).save(tmp_path / name, {"who": name})
    return tmp_path


def test_masks_show_and_compare(files, capsys):
    a, b = MaskSet.load(files / "a"), MaskSet.load(files / "b")
    assert main(["masks", "show", str(files / "a")]) == 0
    text = capsys.readouterr().out
    assert "first" in text
    assert "4 × 3" in text
    assert "who: a" in text
    assert main(["masks", "show", str(files / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] == a.kept
    assert found["layers"]["first"]["density"] == a.layer_densities()["first"]
    assert main(["masks", "compare", str(files / "a"), str(files / "b"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differ"] == int((a.flat() ^ b.flat()).sum())
    assert found["iou"] == pytest.approx(int((a.flat() & b.flat()).sum()) / int((a.flat() | b.flat()).sum()))
    assert not found["equal"]
    assert main(["masks", "compare", str(files / "a"), str(files / "a")]) == 0
    assert "the same masks" in capsys.readouterr().out
    for arguments in (["show", str(files / "a")], ["compare", str(files / "a"), str(files / "b")]):
        assert main(["masks", *arguments, "--quiet"]) == 0
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_masks_apply(files, suffix, capsys):
    a = MaskSet.load(files / "a")
    state = {"first": torch.randn(4, 3), "second": torch.randn(5), "other": torch.randn(2)}
    weights, out = files / f"weights{suffix}", files / f"out{suffix}"
    save_file(state, weights) if suffix == ".safetensors" else torch.save(state, weights)
    assert main(["masks", "apply", str(files / "a"), str(weights), "--out", str(out)]) == 0
    found = load_file(out) if suffix == ".safetensors" else torch.load(out)
    assert torch.equal(found["first"], state["first"] * a["first"])
    assert torch.equal(found["other"], state["other"])
    assert f"{17 - a.kept} of 17 weights" in capsys.readouterr().out
    out.unlink()
    assert main(["masks", "apply", str(files / "a"), str(weights), "--out", str(out), "--quiet"]) == 0
    assert out.is_file()
    assert capsys.readouterr().out == ""


def test_masks_apply_keeps_what_else_the_file_says(files):
    a = MaskSet.load(files / "a")
    state = {"first": torch.randn(4, 3), "second": torch.randn(5)}
    save_file(state, files / "w.safetensors", {"format": "pt"})
    assert main(["masks", "apply", str(files / "a"), str(files / "w.safetensors"), "--out",
                 str(files / "o.safetensors")]) == 0  # fmt: skip
    with safe_open(files / "o.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    tied = torch.nn.Parameter(state["first"])
    torch.save({**state, "first": tied, "head": tied}, files / "w.pt")
    assert main(["masks", "apply", str(files / "a"), str(files / "w.pt"), "--out", str(files / "o.pt")]) == 0
    found = torch.load(files / "o.pt")
    assert torch.equal(found["head"], state["first"] * a["first"]), "the same weight under another name"
    assert torch.equal(found["head"], found["first"])


def test_masks_wrong_input(files, capsys):
    (files / "text").write_text("no mask")
    torch.save({"first": 3, "second": torch.zeros(5)}, files / "w.pt")
    save_file({"first": torch.randn(4, 2)}, files / "w.safetensors")
    for arguments, words in [
        (["show", str(files / "text")], "no readable safetensors file"),
        (["show", str(files / "absent")], "which is no file"),
        (["apply", str(files / "a"), str(files / "w.safetensors"), "--out", str(files / "o.pt")],
         "--out: wanted the format"),
        (["apply", str(files / "a"), str(files / "w.safetensors"), "--out", str(files / "o.safetensors")],
         "wanted first in shape (4, 3), got (4, 2)"),
        (["apply", str(files / "a"), str(files / "text"), "--out", str(files / "o.pt")], "WEIGHTS:"),
        (["apply", str(files / "a"), str(files / "w.pt"), "--out", str(files / "o.pt")],
         "wanted first in shape (4, 3), got int"),
    ]:  # fmt: skip
        assert main(["masks", *arguments]) == 2
        assert words in capsys.readouterr().err
    assert not (files / "o.safetensors").exists()


def test_report_wrong_input(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from sfpk_kernels.report.contents import PARTS

    assert main(["report", str(tmp_path)]) == 2
    assert "with a report.json" in capsys.readouterr().err
    for text, words in (
        ("{", "wanted a report of format sfpk-report-1, got what is no JSON"),
        ("[]", "wanted a report of format sfpk-report-1, got list"),
        ("{}", "wanted a report of format sfpk-report-1, got one that names none"),
        ('{"format": "other"}', "wanted a report of format sfpk-report-1, got other"),
        ('{"format": "sfpk-report-1", "summary": {}}', "got one without baselines, config, curve"),
        (json.dumps(dict.fromkeys(PARTS, 3) | {"format": "sfpk-report-1"}), "got a damaged one"),
    ):
        (tmp_path / "report.json").write_text(text)
        assert main(["report", str(tmp_path)]) == 2
        assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert facts["ops"]["selection"]["cpu"]["chosen"] in ("cpp", "reference")
    assert "cpu" in facts["ops"]["transition"]


@pytest.mark.usefixtures("undrawn")
def test_demo_json(tmp_path, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from sfpk_kernels.demo import run

    class Quick(run.Demo):
        def __init__(self, out, **options):
            tiny = {"n_particles": 2, "n_steps": 2}
            super().__init__(out, **options, sparsities=(0.5,), seeds=(0,), epochs=1, config=tiny)

    monkeypatch.setattr(run, "Demo", Quick)
    assert main(["demo", "--out", str(tmp_path), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"][-1]["method"] == "sfpk"
    assert found == json.loads((tmp_path / "comparison.json").read_text())
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"] == [str(tmp_path / "report.html")]
    assert main(["demo", "--out", str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("command", [["demo"], ["info"], ["report", "."], ["masks", "show", "a"]])
def test_every_command_can_be_interrupted(command, capsys, monkeypatch, tmp_path):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    for name in ("demo._demo", "info._info", "report._report", "masks._masks"):
        monkeypatch.setattr(f"sfpk_kernels.cli.{name}", interrupted)
    assert main(command) == 130
    assert capsys.readouterr() == ("", f"sfpk {command[0]}: interrupted\n")
