"""Reports of gradual runs: a row a shot, then what a report of one run has."""

import copy
import json
from importlib.util import find_spec

import pytest
import torch

from sfpk_kernels import GradualPruner, RetrainConfig, SFPKConfig
from sfpk_kernels.report import render

from .html_page import Page
from .settings import population
from .structured_runs import counted, mlp, structured

DRAWN = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")


def batches():
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)) for _ in range(5)]


@pytest.fixture(scope="module")
def weights():
    """Three shots with two particles, merged in the last one."""
    config = population(sparsity=0.8, n_particles=2, n_steps=9, merge=0.8)
    return GradualPruner(mlp(), batches(), config=config, shots=3, retrain=RetrainConfig(6), progress=False).run()


@pytest.fixture(scope="module")
def structure():
    pytest.importorskip("torch_pruning")
    model = mlp()
    config = structured(0.5, n_steps=6)
    pruner = GradualPruner(
        model, batches(), config=config, shots=2, retrain=RetrainConfig(2), example_inputs=batches()[0][0],
        progress=False,
    )  # fmt: skip
    return model, pruner.run()


def read(folder):
    return json.loads((folder / "report.json").read_text())


@DRAWN
def test_of_weights(weights, tmp_path):
    page = weights.report(tmp_path, shot_evals=[0.9, 0.8, 0.75], dense_eval=0.95, pruned_eval=0.75)
    found, history = read(tmp_path), weights.history
    assert [one["sparsity"] for one in found["shots"]] == pytest.approx([1 - 0.2 ** (i / 3) for i in (1, 2, 3)])
    assert [one["kept"] for one in found["shots"]] == [mask.kept for mask in weights.masks]
    assert [one["returned"] for one in found["shots"]] == [one.returned for one in history]
    assert [one["search_loss"] for one in found["shots"]] == [one.search[-1].energy for one in history]
    for row, one in zip(found["shots"], history, strict=True):
        last = one.losses[-max(1, len(one.losses) // 10) :]
        assert row["retraining_loss"] == pytest.approx(sum(last) / len(last))
        assert row["retraining_steps"] == len(one.losses)
    assert [one["evaluation"] for one in found["shots"]] == [{"evaluation": v} for v in (0.9, 0.8, 0.75)]
    assert [one["step"] for one in found["history"]] == list(range(1, 10))
    removed = [point["sparsity"] for point in found["curve"]]
    assert removed == sorted(removed)
    assert [one["fingerprint"] for one in found["waypoints"]] == [mask.fingerprint() for mask in weights.masks[:-1]]
    assert found["summary"] == json.loads(json.dumps(weights.summary()))
    assert found["summary"]["shots"] == 3
    assert found["summary"]["kept"] == round(0.2 * found["summary"]["prunable"])
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "layers.png", "loss.png", "particles.png", "report.html", "report.json",
    ]  # fmt: skip
    text = page.read_text()
    apart = sum(len(record.energies) == 2 for one in history for record in one.search)
    assert 6 < apart < 9
    assert render(tmp_path).read_text() == text
    for words in ("What every shot left", "loss of retraining", "0.95", f"; one after step {apart}", "retrained"):
        assert words in text, words
    for words in ("Masks taken on the way", "predicted", "knee", "None"):  # of a run in one shot
        assert words not in text.partition("<details>")[0], words


def test_it_is_well_formed(weights, tmp_path):
    pytest.importorskip("matplotlib")
    parsed = Page(weights.report(tmp_path).read_text())
    table = parsed.tables["What every shot left"]
    assert len(table) == 1 + 3


@DRAWN
def test_of_a_smaller_model(structure, tmp_path):
    model, result = structure
    x = batches()[0][0]
    rows = result.latency(model, x, runs=1)
    text = result.report(tmp_path, latency=rows).read_text()
    found = read(tmp_path)
    assert [one["costs"] for one in found["shots"]] == result.costs
    smaller = result.shrink(model)
    params, _ = counted(smaller, x)
    held = sum(one.numel() * one.element_size() for one in (*smaller.parameters(), *smaller.buffers()))
    assert found["summary"]["costs_after"]["params"] == params
    assert found["summary"]["costs_after"]["bytes"] == held
    assert found["summary"]["groups"] == {
        name: {"kind": "neuron", "kept": kept, "size": size} for name, (kept, size) in result.kept_of_groups().items()
    }
    assert [one["batch"] for one in found["latency"]] == [1, 16]
    for words in ("multiply-accumulates", "Kept by group", "Latency", f"{result.costs[0]['macs']:,}"):
        assert words in text, words
    assert f"{result.costs_after['params']:,}" in str(result)
    with pytest.raises(ValueError, match="runs: wanted"):
        result.latency(model, x, runs=0)


@DRAWN
def test_without_losses_of_retraining(tmp_path):
    """A function of one's own retrains; numbers by name, and one that is not finite, were measured."""
    config = SFPKConfig(0.5, n_steps=4, n_particles=1)
    pruner = GradualPruner(mlp(), batches(), config=config, shots=2, retrain=lambda *_: None, progress=False)
    result = pruner.run()
    text = result.report(tmp_path, shot_evals=[{"top1": 0.5}, {"top1": float("nan"), "top5": 1}]).read_text()
    found = read(tmp_path)
    assert [one["retraining_loss"] for one in found["shots"]] == [None, None]
    assert found["shots"][1]["evaluation"] == {"top1": None, "top5": 1.0}
    assert "not finite" in text
    assert not (tmp_path / "particles.png").exists()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shot_evals": [1, 2]}, ValueError, "shot_evals: wanted 3, one a shot, or none, got 2"),
        ({"shot_evals": 0.5}, TypeError, "shot_evals: wanted a list of evaluations, one a shot, got float"),
        ({"shot_evals": [1, "2", 3]}, TypeError, r"shot_evals\[1\]: wanted a number or a dict of numbers"),
        ({"dense_accuracy": 2}, ValueError, "dense_accuracy: wanted a fraction"),
        ({"latency": [1]}, TypeError, "latency: wanted rows of"),
        ({"baselines": [{}]}, ValueError, "baselines: wanted rows with method"),
    ],
)
def test_refusals(weights, options, error, words, tmp_path):
    with pytest.raises(error, match=words):
        weights.report(tmp_path / "folder", **options)
    assert not (tmp_path / "folder").exists()


def test_alarms_name_shot_and_step(weights):
    assert weights.alarms == []
    history = copy.deepcopy(weights.history)
    history[1].search[0].alarms.append("something")
    changed = type(weights)(weights.mask, weights.masks, history, weights.particles, weights.config)
    assert changed.summary()["alarms"] == ["shot 2, step 1: something"]
