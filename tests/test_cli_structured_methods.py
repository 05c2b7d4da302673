"""``sfpk prune --method structured_…``: baselines over channels, heads and neurons, the files of a search."""

import json
import re

import pytest
import torch
from torch import nn

from sfpk_kernels import MaskSet, baselines, load_exported
from sfpk_kernels.cli import main
from sfpk_kernels.cli._structured_methods import STRUCTURED
from sfpk_kernels.structure import ShrinkRecipe

from .cli_task import small
from .test_cli_structured import normed

pytest.importorskip("torch_pruning")

TASK = "tests.cli_task:small"
NORMED = f"{normed.__module__}:normed"
HALF = ["--sparsity", "0.5"]


def test_every_structured_baseline_is_a_method():
    assert set(STRUCTURED) == {name for name in baselines.__all__ if name.startswith("structured_")}


def found_by(name, sparsity, **options):
    model, loss_fn, batches, *_ = small()
    options["example_inputs"] = batches[0][0]
    if name == "structured_snip":
        return baselines.structured_snip(model, batches, sparsity, loss_fn=loss_fn, **options)
    return getattr(baselines, name)(model, sparsity, **options)


@pytest.mark.parametrize(
    ("name", "words", "options"),
    [
        ("structured_magnitude", [], {}),
        ("structured_magnitude", ["--norm", "l1", "--allocation", "global"], {"norm": "l1", "allocation": "global"}),
        ("structured_snip", ["--budget", "params", "--allocation", "uniform"],
         {"budget": "params", "allocation": "uniform"}),
        ("structured_snip", ["--layer-sparsity", "0=0.25:0.5"], {"layer_sparsity": {"0": (0.25, 0.5)}}),
        ("structured_random", ["--seed", "3", "--min-keep", "2", "--round-to", "4"],
         {"seed": 3, "min_keep": 2, "round_to": 4}),
    ],
    ids=str,
)  # fmt: skip
def test_each_writes_masks_recipe_and_report(name, words, options, tmp_path, capsys):
    assert main(["prune", TASK, "--method", name, *HALF, *words, "--out", str(tmp_path), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    expected = found_by(name, 0.5, **options)
    saved = json.loads((tmp_path / "recipe.json").read_text())
    recipe = ShrinkRecipe.from_dict(saved["recipe"])
    assert recipe == expected.recipe
    assert outcome["costs_after"] == saved["costs_after"] == expected.left
    model, _, batches, _ = small()
    smaller, x = recipe.shrink(model), batches[0][0]
    assert sum(p.numel() for p in smaller.parameters()) == expected.left["params"] < expected.dense["params"]
    mask = MaskSet.load(tmp_path / "mask.safetensors")
    torch.testing.assert_close(mask.apply_(model)(x), smaller(x))
    assert mask.metadata["method"] == name
    assert outcome["fingerprint"] == mask.fingerprint()
    assert outcome["pruned_eval"] > outcome["dense_eval"] == 0
    assert outcome["files"][:2] == [str(tmp_path / "mask.safetensors"), str(tmp_path / "recipe.json")]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["method"] == name
    assert report["summary"]["groups"]["0"] == {"kind": "neuron", "kept": int(expected.keep.sum()), "size": 12}
    assert {"sparsity": 0.5, "granularity": "group", "budget": options.get("budget", "macs")}.items() <= report[
        "config"
    ].items()


def test_the_smaller_model_its_times_and_the_page(tmp_path, capsys):
    arguments = ["prune", NORMED, "--method", "structured_magnitude", *HALF, "--granularity", "neuron", "--shrunk"]
    assert main([*arguments, "--latency", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^parameters +160 +\d\d", said, re.M)  # dense: 6·12 + 12 + 2·12 + 12·4 + 4
    assert re.search(r"^0 +neuron +\d +12 ", said, re.M)
    assert re.search(r"^batch 1: .* ms dense, .* ms shrunk", said, re.M)
    assert str(tmp_path / "shrunk.safetensors") in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["batch"] for row in report["latency"]] == [1, 16]
    model, _, batches = normed()
    smaller = load_exported(model, tmp_path / "shrunk.safetensors")
    assert sum(p.numel() for p in smaller.parameters()) == report["summary"]["costs_after"]["params"]
    x = torch.cat([x for x, _ in batches])
    torch.testing.assert_close(smaller[1].running_mean, smaller[0](x).mean(0), rtol=1e-4, atol=1e-5)


def test_the_page_shows_costs_groups_and_times(tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["prune", TASK, "--method", "structured_random", *HALF, "--latency", "--quiet"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "groups.png").is_file()
    text = (tmp_path / "report.html").read_text()
    for words in ("structured_random", "multiply-accumulates", "Groups", "Latency", "Evaluation"):
        assert words in text, words
    for words in ("Loss along the run", "knee"):  # of a run
        assert words not in text, words


def over_width():
    """LayerNorm goes over what is pruned."""
    torch.manual_seed(0)
    batches = [(torch.randn(16, 6), torch.randint(4, (16,))) for _ in range(3)]
    model = nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 4))
    return model, None, batches, lambda net: float(net(batches[0][0]).detach().square().sum())


@pytest.mark.parametrize("method", [["--method", "structured_snip"], ["--granularity", "group", "--n-steps", "4"]])
def test_the_evaluation_is_of_the_smaller_model_where_norms_see_the_kept_alone(method, tmp_path, capsys):
    arguments = ["prune", f"{__name__}:over_width", *HALF, "--budget", "macs", *method, "--out", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    model, _, _, eval_fn = over_width()
    recipe = ShrinkRecipe.from_dict(json.loads((tmp_path / "recipe.json").read_text())["recipe"])
    smaller = eval_fn(recipe.shrink(model))
    masked = eval_fn(MaskSet.load(tmp_path / "mask.safetensors").apply_(model))
    assert json.loads(capsys.readouterr().out)["pruned_eval"] == pytest.approx(smaller, rel=1e-5)
    assert masked != pytest.approx(smaller, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["structured_magnitude"], "--sparsity: wanted a fraction in (0, 1), got none"),
        (["structured_snip", *HALF, "--norm", "l1"], "--norm: wanted without --method structured_snip"),
        (["magnitude", *HALF, "--norm", "l1"], "--norm: wanted without --method magnitude"),
        (["magnitude", *HALF, "--allocation", "normalized"], "--allocation: wanted one of"),
        (["magnitude", *HALF, "--granularity", "neuron"], "--granularity: wanted without --method magnitude"),
        (["sfpk", *HALF, "--norm", "l1"], "--norm: wanted with --method structured_magnitude"),
        (["structured_random", *HALF, "--allocation", "normalized"], "--allocation: wanted one of global, uniform"),
        (["structured_magnitude", *HALF, "--allocation", "erk"], "--allocation: wanted one of global, normalized"),
        (["structured_magnitude", *HALF, "--seed", "1"], "--seed: wanted without --method structured_magnitude"),
        (["structured_magnitude", *HALF, "--pattern", "2:4"], "--pattern: wanted without"),
        (["structured_magnitude", *HALF, "--n-steps", "3"], "--n-steps: wanted without"),
        (["structured_magnitude", *HALF, "--waypoints", "0.3"], "--waypoints: wanted without"),
        (["structured_magnitude", *HALF, "--packed"], "--packed: wanted without --method structured_magnitude"),
        (["structured_magnitude", *HALF, "--granularity", "weight"], "--granularity: wanted channel, head, neuron"),
        (["structured_magnitude", *HALF, "--granularity", "head"], "--granularity: wanted what the model has, neurons"),
        (["structured_magnitude", *HALF, "--budget", "weights"], "--budget: wanted 'params', 'macs', 'channels'"),
        (["structured_magnitude", "--sparsity", "0.99"], "--sparsity: wanted at most"),
        (["structured_magnitude", *HALF, "--min-keep", "0"], "--min-keep: wanted "),
        (["structured_magnitude", *HALF, "--round-to", "40"], "--sparsity: wanted at most 0.0000 of the macs"),
        (["structured_magnitude", *HALF, "--layer-sparsity", "9=0:1"], "--layer-sparsity: "),
        (["structured_snip", *HALF, "--layer-sparsity", "0=0.7:0.8"], "--sparsity: wanted at least 0.5833 of the macs"),
        (["structured_magnitude", *HALF, "--include-biases"], "--include-biases: wanted False"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_named(arguments, words, tmp_path, capsys):
    assert main(["prune", TASK, "--method", *arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"sfpk prune: {words}"), said.err
    assert said.out == ""
    assert not (tmp_path / "out" / "mask.safetensors").exists()


def test_a_task_without_batches(tmp_path, capsys):
    task = ["prune", "tests.cli_task:empty", "--method", "structured_random", *HALF, "--out", str(tmp_path)]
    assert main(task) == 2
    assert "TASK: loader: wanted batches, got an empty iterable" in capsys.readouterr().err


def test_what_is_refused_stays_where_it_may(tmp_path, capsys):
    arguments = ["prune", f"{__name__}:grouped", "--method", "structured_magnitude", "--sparsity", "0.1", "--quiet"]
    assert main([*arguments, "--out", str(tmp_path)]) != 0
    assert "GroupNorm" in capsys.readouterr().err
    assert main([*arguments, "--out", str(tmp_path), "--on-refusal", "protect"]) == 0
    groups = json.loads((tmp_path / "report.json").read_text())["summary"]["groups"]
    assert list(groups) == ["2"]


def grouped():
    """GroupNorm stands between the first two convolutions: only the second may lose channels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4)
    )
    return model, None, [(torch.randn(4, 3, 8, 8), torch.randint(4, (4,))) for _ in range(2)]
