"""``sfpk prune --granularity``: inputs from the first batch, a recipe beside the masks."""

import json
import re

import pytest
import torch
from torch import nn

from sfpk_kernels import MaskSet, SFPKConfig, load_exported, prune
from sfpk_kernels.cli import main
from sfpk_kernels.structure import ShrinkRecipe

from .cli_task import small

pytest.importorskip("torch_pruning")

STRUCTURED = ["--granularity", "neuron", "--budget", "params", "--n-steps", "6"]
HALF = ["tests.cli_task:without_eval", "--sparsity", "0.5", *STRUCTURED]


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 1)

    def forward(self, x, y):
        out = self.b(torch.tanh(self.a(x)))
        return {"loss": (out - y).square().mean(), "out": out}


def dicts():
    torch.manual_seed(0)
    return Named(), lambda model, batch: model(**batch)["loss"], [{"x": torch.randn(4, 6), "y": torch.randn(4, 1)}] * 3


def normed():
    torch.manual_seed(0)
    batches = [(torch.randn(16, 6) + 1, torch.randint(4, (16,))) for _ in range(3)]
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4))
    return model, None, batches


class OfFour(Named):
    def forward(self, x, y):
        if len(x) != 4:
            raise ValueError("four rows")
        return super().forward(x, y)


def of_four():
    _, loss_fn, batches = dicts()
    return OfFour(), loss_fn, batches


def iterator():
    model, loss_fn, batches = dicts()
    return model, loss_fn, iter(batches)


@pytest.mark.usefixtures("undrawn")
def test_a_run(tmp_path, capsys):
    assert main(["prune", *HALF, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model, _, batches, _ = small()
    config = SFPKConfig(0.5, granularity="neuron", budget="params", n_steps=6)
    expected = prune(model, batches, config=config, example_inputs=batches[0][0])
    assert MaskSet.load(tmp_path / "mask.safetensors") == expected.mask
    assert found["costs_after"] == expected.costs_after
    assert str(tmp_path / "recipe.json") in found["files"]
    saved = json.loads((tmp_path / "recipe.json").read_text())
    smaller, x = ShrinkRecipe.from_dict(saved["recipe"]).shrink(model), batches[0][0]
    assert torch.equal(smaller(x), expected.shrink(model)(x))
    assert sum(p.numel() for p in smaller.parameters()) == saved["costs_after"]["params"]
    assert main(["prune", *HALF, "--plan"]) == 0
    assert "1 particles of 12 coordinates" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_the_smaller_model_and_its_times(tmp_path, capsys):
    arguments = ["prune", f"{__name__}:normed", "--sparsity", "0.5", *STRUCTURED, "--shrunk", "--latency"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
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
    # Its own batches' statistics, not those that the dense model came with.
    torch.testing.assert_close(smaller[1].running_mean, smaller[0](x).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_times_that_cannot_be_measured_are_said_and_lose_nothing(tmp_path, capsys, caplog):
    arguments = ["prune", f"{__name__}:of_four", "--sparsity", "0.5", *STRUCTURED, "--latency", "--json"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "latency was not measured: ValueError: four rows" in caplog.text
    assert "latency" not in json.loads(capsys.readouterr().out)
    assert (tmp_path / "report.json").is_file()


@pytest.mark.usefixtures("undrawn")
def test_batches_of_named_inputs(tmp_path, capsys):
    task = f"{__name__}:dicts"
    assert main(["prune", task, "--sparsity", "0.5", *STRUCTURED, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["costs_after"]
    assert 0 < found["params"] <= round(0.5 * 81)  # dense: 6·10 + 10 + 10 + 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*HALF, "--budget", "weights"], "--budget: wanted 'params', 'macs', 'channels' with granularity='neuron'"),
        ([*HALF, "--granularity", "head"], "--granularity: wanted what the model has, neurons, got 'head'"),
        ([*HALF, "--offload", "cpu"], "--offload: wanted None"),
        ([*HALF, "--include-biases"], "--include-biases: wanted False"),
        ([*HALF, "--granularity", "weight"], "--budget: wanted 'weights' with granularity='weight'"),
        (["tests.cli_task:small", "--sparsity", "0.5", "--shrunk"], "--shrunk: wanted with --granularity channel"),
        (["tests.cli_task:small", "--sparsity", "0.5", "--latency"], "--latency: wanted with --granularity channel"),
        ([*HALF[:3], "--method", "magnitude", "--shrunk"], "--shrunk: wanted without --method magnitude"),
        ([*HALF, "--sparsity", "0.99"], "--sparsity: wanted at most"),
        ([f"{__name__}:iterator", *HALF[1:]], "TASK: loader: wanted one that can be read again with --granularity"),
        (["tests.cli_task:empty", *HALF[1:]], "TASK: loader: wanted batches, got an empty iterable"),
    ],
)
def test_what_is_wrong_is_named_as_an_option(arguments, words, tmp_path, capsys):
    assert main(["prune", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
