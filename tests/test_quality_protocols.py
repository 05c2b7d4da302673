"""Fine-tuning and gradual pruning in the study: equal passes, masks held, the model left alone."""

import copy
import dataclasses
import json

import pytest
import torch

from benchmarks.quality import methods, protocols, records, study
from benchmarks.quality.records import Cell
from tests.test_quality import SMALL, small

PASSES = 40


@pytest.fixture
def counted():
    """A problem that counts the batches taken."""
    problem, taken = small(0), []

    def batches(seed):
        for batch in problem.batches(seed):
            taken.append(seed)
            yield batch

    return dataclasses.replace(problem, batches=batches), taken


def go(protocol, name, problem, passes=PASSES, task=SMALL):
    cell = Cell("small", name, 0.8, passes, 0, protocol)
    return protocols.PROTOCOLS[protocol](methods.METHODS[name], task, problem, cell)


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        ("fine-tuned", "sfpk"),
        ("fine-tuned", "straight-through, Adam"),
        ("fine-tuned", "magnitude"),
        ("gradual", "sfpk"),
        ("gradual", "magnitude"),
    ],
)
def test_passes_are_as_many_as_the_cell_says_and_the_mask_holds(protocol, name, counted):
    problem, taken = counted
    before = copy.deepcopy(problem.model.state_dict())
    mask, pruned = go(protocol, name, problem)
    tuned = [seed for seed in taken if seed == protocols._APART]
    assert len(tuned) == (PASSES if name == "magnitude" else PASSES // 2)
    assert len(taken) == PASSES, "a batch a pass"
    assert mask.kept == round(0.2 * 144)
    state = pruned.state_dict()
    assert all(not state[key][~mask[key]].any() for key in mask)
    assert any(not torch.equal(state[key][mask[key]], before[key][mask[key]]) for key in mask), "trained"
    assert all(torch.equal(value, before[key]) for key, value in problem.model.state_dict().items())
    assert not pruned.training
    assert all(parameter.grad is None for parameter in pruned.parameters())


def test_one_shot_changes_no_weight_that_it_keeps():
    problem = small(0)
    mask, pruned = go("one-shot", "sfpk", problem)
    expected = mask.apply_(copy.deepcopy(problem.model)).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in pruned.state_dict().items())


def test_fine_tuning_lowers_the_loss_and_repeats():
    problem, task = small(0), dataclasses.replace(SMALL, rate=1e-2)
    alone = problem.measure(go("one-shot", "magnitude", problem)[1])
    first, again = (problem.measure(go("fine-tuned", "magnitude", problem, 60, task)[1]) for _ in range(2))
    assert first > alone
    assert first == again
    slow = dataclasses.replace(SMALL, rate=1e-5)
    assert problem.measure(go("fine-tuned", "magnitude", problem, 60, slow)[1]) < first


def test_gradual_magnitude_scores_the_trained_weights_shot_by_shot(monkeypatch):
    problem, seen = small(0), []
    plain = methods.METHODS["magnitude"]

    def search(problem, sparsity, passes, seed):
        seen.append((sparsity, copy.deepcopy(problem.model.state_dict())))
        return plain.search(problem, sparsity, passes, seed)

    monkeypatch.setitem(methods.METHODS, "magnitude", dataclasses.replace(plain, search=search))
    go("gradual", "magnitude", problem)
    sparsities = [sparsity for sparsity, _ in seen]
    assert sparsities == sorted(sparsities)
    assert len(sparsities) == protocols.SHOTS
    assert sparsities[0] == pytest.approx(1 - 0.2 ** (1 / 5))
    assert sparsities[-1] == 0.8
    assert not torch.equal(seen[0][1]["0.weight"], seen[1][1]["0.weight"])


def test_cells_of_protocols(monkeypatch):
    monkeypatch.setattr(study, "TASKS", {"small": SMALL})
    names = ["sfpk", "snip", "magnitude", "random"]
    found = list(study.cells(["small"], names, [0.8], [60, 300], [0], list(protocols.PROTOCOLS)))
    assert len(found) == len(set(found))
    there = {protocol: [cell for cell in found if cell.protocol == protocol] for protocol in protocols.PROTOCOLS}
    assert {cell.method for cell in there["gradual"]} == {"sfpk", "magnitude"}
    assert {cell.method for cell in there["fine-tuned"]} == set(names)
    assert {cell.passes for cell in there["one-shot"] if cell.method == "magnitude"} == {0}
    assert {cell.passes for cell in there["fine-tuned"] if cell.method == "magnitude"} == {60, 300}


def test_rows_keep_protocol_and_layers_and_those_without_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "TASKS", {"small": SMALL})
    path = tmp_path / "rows.jsonl"
    wanted = list(study.cells(["small"], ["magnitude"], [0.8], [6], [0], ["one-shot", "fine-tuned"]))
    study.run(wanted, path, lambda line: None)
    rows = records.read(path)
    assert [row.cell for row in rows] == wanted
    for row in rows:
        assert {name: size for name, (_, size) in row.layers.items()} == {"0.weight": 96, "2.weight": 48}
        assert sum(kept for kept, _ in row.layers.values()) == row.kept
    old = json.loads(path.read_text().splitlines()[0])
    del old["protocol"], old["layers"]
    path.write_text(json.dumps(old) + "\n")
    (row,) = records.read(path)
    assert row.cell == wanted[0]
    assert row.cell.protocol == "one-shot"
    assert row.layers is None
