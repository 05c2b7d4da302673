"""The demo, scaled down: what it writes, and that its parts do what the table says."""

import json
import os

import pytest
import torch

from sfpk_kernels import Coordinates, Execution, MaskSet, SFPKConfig, SFPKPruner
from sfpk_kernels.demo.run import Demo
from sfpk_kernels.demo.task import build_model, load_digits, train
from sfpk_kernels.report import render
from sfpk_kernels.search.checkpoint import settings

from .html_page import Page

KEYS = {"method", "sparsity", "accuracy_mean", "accuracy_std", "seeds", "kept", "prunable", "seconds"}


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_data_and_model(digits):
    assert len(digits.train_y) + len(digits.test_y) == 1797
    train_set = {x.numpy().tobytes() for x in digits.train_x}
    leaked = sum(x.numpy().tobytes() in train_set for x in digits.test_x)
    assert leaked == 0, "test images are held out"
    assert Coordinates(build_model()).d >= 60_000
    first, second = ([y.tolist() for _, y in digits.loader(seed=3)] for _ in range(2))
    assert first == second


def test_training_is_deterministic(digits):
    a, b = (train(digits, seed=0, epochs=1).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_demo_writes_what_it_says(tmp_path):
    lines = []
    config = {"n_particles": 2, "n_steps": 4}
    demo = Demo(tmp_path / "out", full=True, progress=False, say=lines.append,
                sparsities=[0.5, 0.95], seeds=[0, 1], epochs=2, config=config)  # fmt: skip
    returned = demo.run()
    report = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert report == returned
    assert report["dense_accuracy"] > 0.5
    methods = ["magnitude", "snip", "straight-through", "sfpk", "sfpk-paper", "sfpk-authors"]
    assert [row["method"] for row in report["results"]] == methods * 2
    for row in report["results"]:
        assert set(row) >= KEYS
        assert row["seeds"] == [0, 1]
        assert row["prunable"] == 77_072
        if row["method"] != "sfpk-authors":  # their thresholds have their own count
            assert row["kept"] == round((1 - row["sparsity"]) * row["prunable"])
        for seed in row["seeds"]:
            masks = MaskSet.load(tmp_path / "out" / f"mask-{row['method']}-{row['sparsity']:g}-seed{seed}.safetensors")
            assert masks.prunable == 77_072
    for picture in ("loss-versus-sparsity.png", "accuracy.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    page = render(tmp_path / "out")  # what `sfpk report` does
    assert page.read_text().count("data:image/png;base64,") == 4
    seeded = [row["accuracies"][0] for row in report["results"] if (row["method"], row["sparsity"]) == ("sfpk", 0.95)]
    table = Page(page.read_text()).tables["Evaluation before and after"]
    assert [cell.text for cell in table[1][:3]] == [
        "test accuracy", f"{report['dense_accuracy_by_seed']['0']:.6g}", f"{seeded[0]:.6g}",
    ], "of the seed whose run is reported, not the mean"  # fmt: skip
    of_a_run = json.loads((tmp_path / "out" / "report.json").read_text())
    assert of_a_run["config"]["sparsity"] == 0.95
    assert of_a_run["baselines"] == report["results"]
    assert of_a_run["dense_accuracy"] == report["dense_accuracy"]
    assert any("95%" in line and "magnitude" in line for line in lines)


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_a_deviation_takes_two_seeds(digits, tmp_path, seeds):
    demo = Demo(tmp_path, progress=False, say=lambda line: None)
    model = build_model().eval()
    search = demo._methods(digits)[0][1]
    row = demo._measure("magnitude", search, 0.5, seeds, dict.fromkeys(seeds, model), digits)
    assert ("accuracy_std" in row) == (len(seeds) > 1)


@pytest.mark.slow
def test_sfpk_beats_the_baselines_at_95_percent(tmp_path):
    """The demo's claim at its own settings, one seed."""
    report = Demo(tmp_path, progress=False, say=lambda line: None, sparsities=[0.95], seeds=[0]).run()
    accuracy = {row["method"]: row["accuracy_mean"] for row in report["results"]}
    assert report["dense_accuracy"] >= 0.97
    assert accuracy["sfpk"] >= report["dense_accuracy"] - 0.02
    assert accuracy["sfpk"] > max(accuracy["magnitude"], accuracy["snip"]) + 0.05


def test_every_step_by_the_fast_and_the_reference_transition_gives_the_same_mask(digits):
    """Up to a few coordinates at the threshold; both start every step from the same particles.

    Over many steps of their own the two may part: one coordinate that rounding moves across a threshold changes the
    next gradients.
    """
    model = train(digits, seed=0, epochs=1)
    batches = list(zip(digits.train_x.split(64), digits.train_y.split(64), strict=True))
    config = SFPKConfig(sparsity=0.95, n_particles=3, n_steps=15)
    fast, reference = (
        SFPKPruner(model, config=config, execution=Execution(backend=name)) for name in ("cpp", "reference")
    )
    while not fast.done:
        fast.load_state_dict({**reference.state_dict(), "config": settings(fast.config, fast.execution)})
        for pruner in (fast, reference):
            pruner.step(batches[3 * (len(pruner.history) % 5) :][:3])
        torch.testing.assert_close(fast.particles, reference.particles, rtol=1e-5, atol=1e-6)  # fp32 sums
        kept, wanted = fast.result().mask, reference.result().mask
        assert kept.hamming(wanted) <= 0.002 * wanted.kept


@pytest.mark.parametrize("name", ["comparison.json", "loss-versus-sparsity.png", "mask-sfpk-0.95-seed2.safetensors"])
def test_what_is_no_regular_file_is_known_before_the_work(tmp_path, monkeypatch, name):
    monkeypatch.setattr("sfpk_kernels.demo.run.load_digits", lambda: pytest.fail("the work has begun"))
    os.mkfifo(tmp_path / name)
    with pytest.raises(
        FileExistsError, match=f"^{name}: wanted a regular file to replace, or a new name, got the FIFO"
    ):
        Demo(tmp_path, say=lambda text: None).run()
    assert os.listdir(tmp_path) == [name]
