"""``sfpk prune --method``: other methods than the search, the same files."""

import json

import pytest

from sfpk_kernels import MaskSet, baselines
from sfpk_kernels.cli import main
from sfpk_kernels.cli._methods import METHODS
from sfpk_kernels.report import render

from .cli_task import small

TASK = "tests.cli_task:small"


def test_every_baseline_that_returns_masks_alone_is_a_method():
    masks = {name for name in baselines.__all__ if not name.endswith("_") and "structured" not in name.lower()}
    assert set(METHODS) == masks


def expected(name, **options):
    model, _, batches, _ = small()
    if name in ("magnitude", "random"):
        return getattr(baselines, name)(model, 0.8, **options)
    if name == "synflow":
        return baselines.synflow(model, 0.8, example=batches[0])
    return getattr(baselines, name)(model, batches, 0.8, **options)


@pytest.mark.parametrize("name", METHODS)
def test_each_writes_its_mask(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sfpk_kernels.report.write_method", lambda result, folder, **evaluation: folder / "report.html")
    passes = ["--passes", "6"] if "passes" in METHODS[name] else []
    assert main(["prune", TASK, "--method", name, "--sparsity", "0.8", *passes, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    masks = MaskSet.load(tmp_path / "mask.safetensors")
    assert masks == expected(name, **({"passes": 6} if passes else {}))
    assert found["fingerprint"] == masks.fingerprint()
    assert found["pruned_eval"] > found["dense_eval"] == 0
    assert masks.metadata == {"method": name, "sparsity": 0.8, **({"passes": 6} if passes else {})}
    assert found["files"] == [str(tmp_path / "mask.safetensors"), str(tmp_path / "report.html")]


def test_options_reach_the_method(tmp_path, capsys):
    out = ["--sparsity", "0.8", "--out", str(tmp_path), "--quiet"]
    for name, words, options in (
        ("magnitude", ["--allocation", "erk"], {"allocation": "erk"}),
        ("random", ["--seed", "5"], {"seed": 5}),
        ("snip", ["--ignore", "0"], {"ignored_layers": ["0"]}),
        ("magnitude", ["--include-biases"], {"include_biases": True}),
    ):
        assert main(["prune", TASK, "--method", name, *words, *out]) == 0
        assert MaskSet.load(tmp_path / "mask.safetensors") == expected(name, **options)
    assert capsys.readouterr().out == ""


def test_a_report_without_a_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "loss.png").write_bytes(b"of an earlier run")
    arguments = ["prune", TASK, "--method", "magnitude", "--allocation", "lamp", "--sparsity", "0.8"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "layers.png", "mask.safetensors", "report.html", "report.json",
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert said.startswith("MaskSet(29 of 144 weights kept")
    assert "eval: 0 dense, " in said
    text = (tmp_path / "report.html").read_text()
    for words in ("magnitude", "29 of 144 prunable", "allocation", "lamp", "Prunable tensors", "Evaluation"):
        assert words in text, words
    for words in ("article", "knee", "predicted", "None"):  # of a run
        assert words not in text.partition("<h2>")[0], words
    assert render(tmp_path).read_text() == text
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["summary"]["fingerprint"] == MaskSet.load(tmp_path / "mask.safetensors").fingerprint()
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "magnitude"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "magnitude"], "--sparsity: wanted a fraction in (0, 1), got none"),
        (["--method", "wanda", "--sparsity", "1.8"], "--sparsity: wanted a number in (0, 1), got 1.8"),
        (["--method", "snip", "--sparsity", "0.5", "--n-steps", "3"], "--n-steps: wanted without --method snip"),
        (["--method", "snip", "--sparsity", "0.5", "--seed", "3"], "--seed: wanted without --method snip"),
        (["--method", "snip", "--sparsity", "0.5", "--plan"], "--plan: wanted without --method snip"),
        (["--method", "snip", "--sparsity", "0.5", "--waypoints", "0.3"], "--waypoints: wanted without --method snip"),
        (["--method", "snip", "--sparsity", "0.5", "--preset", "paper"], "--preset: wanted without --method snip"),
        (["--method", "ste", "--sparsity", "0.5", "--passes", "0"], "--passes: wanted ≥ 1, got 0"),
        (["--method", "grasp", "--sparsity", "0.5", "--allocation", "lamp"], "--allocation: wanted one of global"),
        (["--method", "wanda", "--sparsity", "0.5", "--allocation", "erk"], "--allocation: wanted without --method"),
        (["--sparsity", "0.5", "--passes", "3", "--n-steps", "3"], "--passes: wanted it or --n-steps, got 3 beside 3"),
        (["--sparsity", "0.5", "--passes", "0"], "--passes: wanted ≥ 1, got 0"),
        (["--sparsity", "0.5", "--bn-batches", "-1", "--method", "random"], "--bn-batches: wanted ≥ 0, got -1"),
        (["--method", "snip", "--sparsity", "0.5", "--ignore", "re:"], "--ignore: wanted patterns that leave"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(arguments, words, tmp_path, capsys):
    assert main(["prune", TASK, *arguments, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"sfpk prune: {words}")
    assert said.out == ""
    assert not (tmp_path / "mask.safetensors").exists()


@pytest.mark.parametrize("name", ["snip", "synflow", "wanda"])
def test_a_task_without_batches(name, tmp_path, capsys):
    task = ["prune", "tests.cli_task:empty", "--method", name, "--sparsity", "0.5", "--out", str(tmp_path)]
    assert main(task) == 2
    assert "TASK: loader: wanted batches, got an empty iterable" in capsys.readouterr().err


def test_a_failing_evaluation_loses_no_mask(tmp_path, capsys):
    task = ["prune", "tests.cli_task:fails_when_pruned", "--method", "magnitude", "--sparsity", "0.5"]
    assert main([*task, "--out", str(tmp_path)]) == 1
    assert "the second evaluation fails" in capsys.readouterr().err
    assert MaskSet.load(tmp_path / "mask.safetensors").kept == 72
    assert (tmp_path / "report.json").is_file()
