"""What the page of a report says: its numbers against the result, its words, what was not measured; narrow screens."""

import ast
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")

import sfpk_kernels
from sfpk_kernels import PruneResult, prune
from sfpk_kernels import report as reports
from sfpk_kernels.cli import main
from sfpk_kernels.report import charts
from sfpk_kernels.report.markup import STYLE
from sfpk_kernels.report.names import shortened, shortened_apart
from sfpk_kernels.search.records import StepRecord
from sfpk_kernels.utils.smoothing import running_median

from .html_page import Page
from .settings import population

pytestmark = pytest.mark.usefixtures("undrawn")

ROWS = [
    {"method": "magnitude", "sparsity": 0.5, "accuracy_mean": 0.8},
    {"method": "theirs", "sparsity": 0.5, "accuracy_mean": 0.9, "accuracy_std": 0.01},
]
QUICK = {"n_particles": 3, "n_steps": 10}


@pytest.fixture
def result(mlp, vectors):
    return prune(mlp, vectors, config=population(0.8, **QUICK), waypoints=[0.5])


def bent(result):
    """The same with a loss that turns up at about 0.75."""
    history = [
        StepRecord(k, 1 - k / 100, [1 - k / 100] * 3, [max(0.0, k / 100 - 0.7) ** 2 + 0.1] * 3, [0.0] * 3, 0.1,
                   start_density=1 - k / 100, overlaps=[[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]])
        for k in range(1, 100)
    ]  # fmt: skip
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return PruneResult(**{**fields, "history": history})


def read(result, folder, *arguments, **options):
    return Page(result.report(folder, *arguments, **options).read_text("utf-8"))


def cells(page, label):
    return [[cell.text for cell in row] for row in page.tables[label]]


def test_facts_are_the_results(result, tmp_path):
    result = bent(result)
    page = read(result, tmp_path)
    facts = {name: value for name, (value, _) in page.facts.items()}
    assert facts["weights kept"] == f"{result.mask.kept} of 144 prunable"
    assert facts["sparsity"] == f"{100 * result.mask.sparsity:.4f} % removed"
    assert facts["mask fingerprint"] == f"{result.mask.fingerprint()[:16]}…"
    assert facts["steps, particles"] == "99, 3"
    assert facts["time"] == f"{0.1 * 99:.1f} s"
    first, last = result.history[0].energy, result.history[-1].energy
    assert facts["loss"] == f"{first:.4g} at the first step, {last:.4g} at the last"
    assert 0.7 < result.knee() < 0.8
    assert facts["knee of the loss"] == f"{100 * result.knee():.1f} % removed"
    assert facts["effective particles"] == f"{9 / (3 + 6 * 0.25):.2f} of 3 at the last step"
    assert facts["saliency"] == "mask_normalized"
    assert facts["predicted peak memory"] == f"{result.plan.peak_bytes / 1e6:,.1f} MB"
    settings = {name: value for name, (value, _) in page.settings.items()}
    both = {**result.config.to_dict(), **result.execution.to_dict()}
    assert settings == {name: str(value) for name, value in both.items()}


def test_every_word_is_explained_where_it_stands(result, tmp_path):
    page = read(bent(result), tmp_path, ROWS)
    assert all(words for _, words in [*page.facts.values(), *page.settings.values()])
    for name, word in {
        "knee of the loss": "turns up", "effective particles": "1 where all are alike", "saliency": "|m|·|θ|",
        "sparsity": "share of the prunable weights", "energies": "loss of a particle",
    }.items():  # fmt: skip
        assert word in page.facts[name][1]
    assert "Particle: a candidate mask" in page.text
    assert {"smoothed", "soft sparsity", "knee", "mask taken"} <= page.terms["Loss along the run"].keys()
    assert page.terms["Loss along the run"]["knee"].endswith(f"at {100 * bent(result).knee():.1f} % removed.")
    assert {"spread", "effective particles"} <= page.terms["How far apart the particles are"].keys()
    assert page.terms["Accuracy by method"].keys() == {"magnitude"}, "of a method that is not known nothing is said"
    assert not re.search(r"`|:func:", page.text)


def test_words_of_what_is_not_there_are_not_there(mlp, vectors, tmp_path):
    one = prune(mlp, vectors, config=population(0.8, **{**QUICK, "n_particles": 1}))
    page = read(one, tmp_path)
    assert one.knee() is None
    assert page.facts["knee of the loss"][0] == "none found"
    assert page.terms.keys() == {"Loss along the run", "Density by layer"}
    assert not {"knee", "mask taken"} & page.terms["Loss along the run"].keys()
    assert "effective particles" not in page.facts
    assert page.headings == ["SFPK pruning report", "Layers", "Left alone"]


def test_share_of_the_whole_model(convnet, images, tmp_path):
    """All parameters: biases, batch-norm, ignored layers; a tied one once."""
    convnet.append(nn.ReLU())
    convnet.append(nn.Linear(4, 4))
    convnet.append(nn.Linear(4, 4))
    convnet[-1].weight = convnet[-2].weight
    total = sum(parameter.numel() for parameter in convnet.parameters())
    result = prune(convnet, images, config=population(0.5, **QUICK), ignored_layers=["8"])
    prunable = 6 * 2 * 9 + 8 * 6 * 9 + 4 * 4
    page = read(result, tmp_path)
    removed = prunable - result.mask.kept
    assert page.facts["covered by the masks"][0] == (
        f"{100 * prunable / total:.2f} % of the whole model: {prunable:,} of {total:,} parameters"
    )
    assert page.facts["removed of the whole model"][0] == (
        f"{100 * removed / total:.2f} %: {removed:,} of {total:,} parameters"
    )
    header, *rows = cells(page, "Parameters left alone")
    assert header == ["reason", "tensors", "parameters"]
    left = {reason: (int(tensors), int(size.replace(",", ""))) for reason, tensors, size in rows}
    assert sum(size for _, size in left.values()) == total - prunable
    assert left["ignored_layers: 8"] == (2, 72 * 4 + 4)
    assert left["norm: include_norms=True prunes it"] == (4, 2 * (6 + 8))


def test_a_model_covered_in_full(vectors, tmp_path):
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Tanh(), nn.Linear(12, 4, bias=False))
    page = read(prune(model, vectors, config=population(0.8, **QUICK)), tmp_path)
    assert page.facts["covered by the masks"][0].startswith("100.00 % of the whole model: 144 of 144")
    assert "Left alone" not in page.headings


def test_reports_of_earlier_versions_show_what_they_hold(result, tmp_path):
    result.report(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    del report["model"], report["evaluation"]
    (tmp_path / "report.json").write_text(json.dumps(report))
    page = Page(reports.render(tmp_path).read_text())
    assert not {"covered by the masks", "removed of the whole model"} & page.facts.keys()
    assert "Left alone" not in page.headings
    assert page.facts["weights kept"][0] == f"{result.mask.kept} of 144 prunable"


def test_what_was_evaluated(result, tmp_path):
    label = "Evaluation before and after"
    assert cells(read(result, tmp_path, dense_eval=0.975, pruned_eval=torch.tensor(0.5)), label) == [
        ["", "dense", "pruned", "change"], ["evaluation", "0.975", "0.5", "-0.475"],
    ]  # fmt: skip
    dense, pruned = {"top-1": 0.5, "loss": math.nan, "old": 1}, {"top-1": 0.75, "loss": 2.0, "new": 3}
    page = read(result, tmp_path, dense_eval=dense, pruned_eval=pruned)
    assert cells(page, label)[1:] == [
        ["top-1", "0.5", "0.75", "+0.25"], ["loss", "not finite", "2", ""], ["old", "1", "", ""], ["new", "", "3", ""],
    ]  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text())["evaluation"] == {
        "dense": {**dense, "loss": None}, "pruned": pruned
    }  # fmt: skip
    assert cells(read(result, tmp_path, dense_eval=0.975), label) == [["", "dense"], ["evaluation", "0.975"]]
    page = read(result, tmp_path)
    assert label not in page.tables
    assert "Evaluation" not in page.headings


def test_accuracies_are_the_rows(result, tmp_path):
    assert cells(read(result, tmp_path, ROWS, 0.95), "Accuracy by method") == [
        ["method", "removed", "accuracy"], ["dense", "0 %", "95.00 %"], ["magnitude", "50 %", "80.00 %"],
        ["theirs", "50 %", "90.00 ± 1.00 %"],
    ]  # fmt: skip
    assert [row[0] for row in cells(read(result, tmp_path, ROWS), "Accuracy by method")[1:]] == ["magnitude", "theirs"]
    assert "Accuracy by method" not in read(result, tmp_path).tables


@pytest.mark.parametrize("name", ["dense_eval", "pruned_eval"])
@pytest.mark.parametrize("value", ["good", True, [0.5], {"a": "b"}, {3: 0.5}, torch.rand(2)])
def test_evaluations_that_are_not_numbers(result, tmp_path, name, value):
    with pytest.raises(TypeError, match=f"^{name}: wanted a number or a dict of numbers by name, got "):
        result.report(tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_the_command_reports_what_the_task_evaluates(tmp_path, capsys):
    arguments = ["--sparsity", "0.8", "--n-particles", "2", "--n-steps", "3", "--energy-mode", "sequential", "--json"]
    label = "Evaluation before and after"
    assert main(["prune", "tests.cli_task:named_numbers", *arguments, "--out", str(tmp_path / "a")]) == 0
    said = json.loads(capsys.readouterr().out)
    page = Page((tmp_path / "a" / "report.html").read_text())
    zeros = said["pruned_eval"]["zeros"]
    assert zeros > 0
    assert cells(page, label)[1:] == [["zeros", "0", f"{zeros:g}", f"+{zeros:g}"], ["one", "1", "1", "+0"]]
    assert main(["prune", "tests.cli_task:without_eval", *arguments, "--out", str(tmp_path / "b")]) == 0
    assert label not in Page((tmp_path / "b" / "report.html").read_text()).tables
    assert main(["prune", "tests.cli_task:fails_when_pruned", *arguments, "--out", str(tmp_path / "c")]) == 1
    assert "the second evaluation fails" in capsys.readouterr().err
    assert (tmp_path / "c" / "mask.safetensors").is_file()
    assert cells(Page((tmp_path / "c" / "report.html").read_text()), label) == [["", "dense"], ["evaluation", "1"]]


def test_the_smoothed_loss_stands_beside_the_raw_one(result, tmp_path, monkeypatch):
    made, figure = [], charts._figure
    monkeypatch.setattr(charts, "_figure", lambda *arguments: made.append(figure(*arguments)) or made[-1])
    result.history[4].energies[:] = [math.nan] * 3
    result.report(tmp_path)
    lines = {line.get_label(): line for line in made[0][1].get_lines()}
    known = [record for record in result.history if math.isfinite(record.energy)]
    raw, smooth = lines["mean of the particles"], lines["smoothed: median of 5 steps"]
    assert list(raw.get_ydata()) == [record.energy for record in known]
    assert list(smooth.get_xdata()) == list(raw.get_xdata()) == [100 * (1 - record.start_density) for record in known]
    assert list(smooth.get_ydata()) == running_median([record.energy for record in known])
    assert smooth.get_linewidth() > raw.get_linewidth()
    _, axes = charts._figure(1)
    charts._losses(axes, [0, 1, 2, 3], [1, 2, 3, 4], [1] * 4, [5] * 4, 1)
    assert [line.get_label() for line in axes.get_lines()] == ["the particle"], "too few to smooth"


def test_running_median():
    values = torch.randn(50, dtype=torch.float64).tolist()
    padded = torch.tensor([values[0]] * 2 + values + [values[-1]] * 2, dtype=torch.float64)
    assert running_median(values) == padded.unfold(0, 5, 1).median(dim=1).values.tolist()
    assert running_median([3.0]) == [3.0]
    assert running_median([]) == []


def test_long_names_are_shortened_in_the_middle(vectors, tmp_path):
    inner = nn.ModuleDict({f"a_block_of_the_encoder_{i}_" + 30 * "x": nn.Linear(8, 8) for i in range(2)})
    model = nn.Module()
    model.a_backbone_that_has_a_long_name_of_its_own = inner
    model.head = nn.Linear(8, 4)
    model.forward = lambda x: model.head(sum(layer(x) for layer in inner.values()))
    result = prune(model, vectors, config=population(0.5, **QUICK))
    page = read(result, tmp_path)
    names = [tensor.name for tensor in result.coordinates.tensors]
    shown = [row[1] for row in page.tables["Prunable tensors"][1:]]
    assert [cell.title or cell.text for cell in shown] == names
    assert [len(cell.text) for cell in shown] == [44, 44, len("head.weight")]
    assert shown[0].text.startswith("a_backbone_that")
    assert shown[0].text.endswith("x.weight")
    assert shown[2] == ("head.weight", None)


@pytest.mark.parametrize("limit", [3, 10, 36, 44])
def test_shortened(limit):
    names = ["head.weight", *(f"encoder.{part}.layers.{i}.attention.projection.weight" for i in range(12)
                              for part in ("image_tower", "text_tower"))]  # fmt: skip
    for name in names:
        short = shortened(name, limit)
        assert len(short) == min(limit, len(name))
        if short != name:
            head, tail = short.split("…")
            assert name.startswith(head)
            assert name.endswith(tail)
            assert len(tail) >= len(head)
    assert len(set(shortened_apart(names, limit))) == len(names)
    assert shortened_apart(["the same name"] * 2, 5) == [shortened("the same name", 5)] * 2


def test_narrow_screens(result, tmp_path):
    """Whatever may be wider than a phone lies in a box that scrolls by itself, also by keyboard."""
    page = read(result, tmp_path, ROWS, 0.9, dense_eval=1, pruned_eval=2)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}, []) in page.tags
    wide = [(tag, around) for tag, _, around in page.tags if tag in ("table", "img")]
    assert len(wide) == 4 + 5
    assert all("scroll" in around for _, around in wide)
    boxes = [found for tag, found, _ in page.tags if tag == "div" and found.get("class") == "scroll"]
    assert len(boxes) == len(wide)
    assert all(box["tabindex"] == "0" and box["role"] == "region" and box["aria-label"] for box in boxes)
    assert "overflow: auto" in STYLE
    assert not {"link", "script", "iframe"} & {tag for tag, _, _ in page.tags}
    assert not re.search(r"url\(|@import|@font-face", STYLE)


def test_text_is_dark_on_light():
    """At least 4.5 : 1, as WCAG AA wants it, of every colour on every ground."""
    assert "color-scheme: light" in STYLE

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    grounds = re.findall(r"background: (#\w+)", STYLE)
    texts = re.findall(r"(?<![\w-])color: (#\w+)", STYLE)
    assert grounds
    assert texts
    for ground in grounds:
        for text in texts:
            assert (luminance(ground) + 0.05) / (luminance(text) + 0.05) >= 4.5


def test_imports_go_one_way():
    """No module of the report imports that of results, not even for types; that one loads the report when asked to."""
    package = Path(sfpk_kernels.__file__).parent

    def imported(tree):
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                yield from (f"{node.module or ''}.{name.name}" for name in node.names)
            elif isinstance(node, ast.Import):
                yield from (name.name for name in node.names)

    files = sorted((package / "report").glob("*.py"))
    assert len(files) > 4
    for file in files:
        found = [name for name in imported(ast.parse(file.read_text("utf-8"))) if "result" in name.split(".")]
        assert not found, f"{file.name}: {found}"
        assert "PruneResult" not in {name.rpartition(".")[2] for name in imported(ast.parse(file.read_text("utf-8")))}
    top = ast.parse((package / "search" / "result.py").read_text("utf-8"))
    top.body = [node for node in top.body if not isinstance(node, ast.ClassDef | ast.FunctionDef)]
    assert not [name for name in imported(top) if "report" in name.split(".")]
