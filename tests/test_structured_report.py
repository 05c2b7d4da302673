"""What a structured run says of itself: costs, groups and times, as tables, in the page and its picture."""

import json
import re
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from sfpk_kernels import prune
from sfpk_kernels import report as reports
from sfpk_kernels.export.measure import Latency, resized
from sfpk_kernels.structure import Costs, find_structure, shrink

from .html_page import Page
from .settings import population
from .snapshot import Snapshot
from .structured_nets import NETS, Residual, make
from .structured_runs import images, structured

pytest.importorskip("torch_pruning")

DRAWN = pytest.mark.skipif(not find_spec("matplotlib"), reason="needs matplotlib")


def held(model):
    """Bytes of parameters and buffers."""
    return sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))


@pytest.fixture(scope="module")
def run():
    torch.manual_seed(1)
    model = Residual()
    result = prune(model, images(), config=structured(n_steps=4), example_inputs=torch.randn(2, 3, 8, 8))
    return model, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in NETS if name != "signal"])
def test_bytes_are_those_of_the_smaller_model(name, dtype):
    net, x = make(name)
    structure = find_structure(net, x, check=False)
    net, x = net.to(dtype), x.to(dtype)
    costs = Costs(net, structure, (x,))
    keep = torch.rand(structure.size) > 0.4
    for group in structure.groups:
        keep[group.first] = True
    assert costs.bytes(keep) == held(shrink(net, structure, keep))
    assert costs.bytes(torch.ones_like(keep)) == held(net)


def test_tables_in_words(run):
    model, result = run
    text, small = str(result), result.shrink(model)
    assert result.costs_before["bytes"] == held(model)
    assert result.costs_after["bytes"] == held(small)
    for title, which in [("parameters", "params"), ("multiply-accumulates", "macs"), ("coordinates", "channels")]:
        before, after = result.costs_before[which], result.costs_after[which]
        assert re.search(rf"^{title} +{before:,} +{after:,} +{100 * after / before:.1f} %$", text, re.M), text
    assert re.search(r"^bytes +[\d.]+ kB +[\d.]+ kB +\d\d\.\d %$", text, re.M)
    for name, (kept, size) in result.kept_of_groups().items():
        assert re.search(rf"^{name} +channel +{kept} +{size} +{100 * kept / size:.1f} %$", text, re.M), text
    assert "\n" not in repr(result)
    assert text.startswith(repr(result))


def test_latency_is_that_of_both_models_with_so_many_rows(run):
    model, result = run
    seen = []
    handle = model.stem.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape[:2])))
    snapshot = Snapshot(model)
    rows = result.latency(model, torch.randn(2, 3, 8, 8), batches=(1, 5), runs=3)
    handle.remove()
    snapshot.check()
    left = result.kept_of_groups()["stem"][0]
    calls = 3 + 3  # to warm up, and behind the median
    # Hooks go with the copy: both models are seen, by turns.
    assert seen == [(1, 8), (1, left)] * calls + [(5, 8), (5, left)] * calls
    assert [(row.batch, row.runs, row.device) for row in rows] == [(1, 3, "cpu"), (5, 3, "cpu")]
    assert all(row.dense > 0 and row.shrunk > 0 and row.speedup == row.dense / row.shrunk for row in rows)
    assert re.fullmatch(
        r"batch 1: .* ms dense, .* ms shrunk \(.* ×\), medians of 3 \(cpu, \d+ threads?\)", str(rows[0])
    )


def test_rows_are_repeated_or_cut_along_the_batch_alone():
    x, mask, table = torch.arange(6).view(3, 2), torch.tensor([True, False, True]), torch.ones(7, 2)
    (first, second), named = resized(((x, table), {"mask": mask, "scale": torch.tensor(2.0), "n": 4}), 4)
    assert torch.equal(first, torch.cat([x, x[:1]]))
    assert second is table
    assert torch.equal(named["mask"], torch.tensor([True, False, True, True]))
    assert (named["scale"], named["n"]) == (torch.tensor(2.0), 4)
    assert len(resized(x, 2)) == 2


def test_what_latency_refuses(run, mlp):
    model, result = run
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"model: wanted stem\.weight"):
        result.latency(mlp, x)
    with pytest.raises(ValueError, match="batches: wanted ≥ 1, got 0"):
        result.latency(model, x, batches=(0,))
    with pytest.raises(TypeError, match="runs: wanted an integer"):
        result.latency(model, x, runs=2.0)
    with pytest.raises(TypeError, match="example_inputs: wanted a tensor"):
        result.latency(model, 3)


@DRAWN
@pytest.mark.usefixtures("undrawn")
def test_the_page(run, tmp_path):
    _, result = run
    rows = [Latency(1, 0.002, 0.001, 20, "cpu", 1), Latency(16, 0.03, 0.02, 20, "cpu", 1)]
    page = Page(result.report(tmp_path, latency=rows).read_text("utf-8"))
    after, before = result.costs_after, result.costs_before
    share = f"{100 * after['macs'] / before['macs']:.2f} %"
    assert page.facts["multiply-accumulates"][0] == f"{after['macs']:,} of {before['macs']:,} left ({share})"
    assert set(page.facts) >= {"parameters", "bytes", "coordinates"}
    groups = [[cell.text for cell in row] for row in page.tables["Kept by group"]]
    assert groups[0] == ["no.", "group", "kind", "kept", "of", "share"]
    assert [(row[1], int(row[3]), int(row[4])) for row in groups[1:]] == [
        (name, kept, size) for name, (kept, size) in result.kept_of_groups().items()
    ]
    times = [[cell.text for cell in row] for row in page.tables["Latency before and after"]]
    assert times[1:] == [
        ["1", "2 ms", "1 ms", "2.00 ×", "20", "1", "cpu"],
        ["16", "30 ms", "20 ms", "1.50 ×", "20", "1", "cpu"],
    ]
    assert (tmp_path / "groups.png").is_file()
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["summary"]["groups"]["stem"]["size"] == 8
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "groups.png").unlink()
    reports.render(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    assert (tmp_path / "groups.png").is_file()


@DRAWN
@pytest.mark.usefixtures("undrawn")
def test_what_was_not_measured_or_is_not_there_is_not_shown(run, mlp, vectors, tmp_path):
    _, result = run
    page = Page(result.report(tmp_path).read_text("utf-8"))
    assert "Latency" not in page.headings
    assert "Groups" in page.headings
    weights = prune(mlp, vectors, config=population(0.5, n_particles=2, n_steps=4))
    page = Page(weights.report(tmp_path).read_text("utf-8"))
    assert "Groups" not in page.headings
    assert not (tmp_path / "groups.png").exists()
    for wrong in ([{"batch": 1}], 3):
        with pytest.raises(TypeError, match=r"latency: wanted rows of StructuredResult\.latency, got (dict|int)"):
            result.report(tmp_path / "other", latency=wrong)
    assert not (tmp_path / "other").exists()


@DRAWN
@pytest.mark.parametrize("count", [2, 80])
def test_the_picture_has_a_bar_per_group_and_tells_kinds_apart(count, tmp_path, monkeypatch):
    from sfpk_kernels.report import charts

    made, figure = [], charts._figure
    monkeypatch.setattr(charts, "_figure", lambda *arguments: made.append(figure(*arguments)) or made[-1])
    kinds = ("head", "neuron")
    groups = {f"block.{i}.attn": {"kind": kinds[i % 2], "kept": 1 + i % 4, "size": 4} for i in range(count)}
    with (tmp_path / "x.png").open("wb") as target:
        charts.plot_groups(target, {"summary": {"groups": groups}})
    axes = made[0][1]
    assert len(axes.patches) == count
    assert {bar.get_hatch() for bar in axes.patches} == {"", "//"}
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}
    assert heights == {i: 25 * (1 + i % 4) for i in range(count)}
    assert axes.get_legend_handles_labels()[1] == ["all together", "heads", "neurons"]
    assert bool(axes.get_xlabel()) == (count == 80)


def test_heads_and_neurons_are_named(run):
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))
    x = torch.randn(8, 6)
    batches = [(x, torch.randint(0, 4, (8,)))] * 4
    result = prune(model, batches, config=structured(granularity="neuron", n_steps=4), example_inputs=x)
    assert result.summary()["groups"]["0"] == {"kind": "neuron", "kept": int(result.keep.sum()), "size": 10}
