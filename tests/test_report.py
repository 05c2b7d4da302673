"""report.json, the pictures and the page."""

import errno
import itertools
import json
import os
import re
import stat
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from sfpk_kernels import prune
from sfpk_kernels import report as reports
from sfpk_kernels.report import charts
from sfpk_kernels.utils.plain import plain

from .html_page import Page
from .settings import population

PNG = b"\x89PNG\r\n\x1a\n"
ROWS = [
    {"method": "magnitude", "sparsity": 0.5, "accuracy_mean": 0.8},
    {"method": "sfpk", "sparsity": 0.5, "accuracy_mean": 0.9, "accuracy_std": 0.01},
]


@pytest.fixture
def result(mlp, vectors):
    config = population(0.8, n_particles=3, n_steps=10)
    return prune(mlp, vectors, config=config, waypoints=[0.5])


def test_contents(result, tmp_path):
    page = result.report(tmp_path / "new" / "report", ROWS, dense_accuracy=0.95)
    folder = page.parent
    names = ["baselines.png", "layers.png", "loss.png", "particles.png", "report.html", "report.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    for name in names[:4]:
        assert (folder / name).read_bytes().startswith(PNG)
        assert (folder / name).stat().st_size > 5000
    saved = json.loads((folder / "report.json").read_text())
    assert saved["summary"]["kept"] == round(0.2 * 144)
    assert saved["summary"]["fingerprint"] == result.mask.fingerprint()
    assert len(saved["history"]) == len(saved["curve"]) == 10
    assert saved["waypoints"][0]["kept"] == 72
    assert saved["layer_densities"] == result.mask.layer_densities()
    assert saved["config"]["n_particles"] == 3
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", html), "nothing is loaded from elsewhere"
    assert [row[1].text for row in Page(html).tables["Prunable tensors"][1:]] == ["0.weight", "2.weight"]
    assert f"{round(0.2 * 144):,} of 144" in html


def test_rendered_again_from_json_alone(result, tmp_path):
    page = result.report(tmp_path)
    before = page.read_text()
    assert not (tmp_path / "baselines.png").exists()
    for path in tmp_path.glob("*"):
        if path.name != "report.json":
            path.unlink()
    assert reports.render(tmp_path) == page
    assert page.read_text() == before


def test_one_particle_has_no_band_and_no_spread(mlp, vectors, tmp_path):
    config = population(0.8, n_particles=3, n_steps=10)
    prune(mlp, vectors, config=config).report(tmp_path, ROWS)
    html = prune(mlp, vectors, config=config.replace(n_particles=1)).report(tmp_path).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layers.png", "loss.png", "report.html", "report.json"]
    assert html.count("data:image/png;base64,") == 2
    assert "each step sees another batch" in html
    assert "effective particles" not in html
    assert "particles from their mean" not in html
    for particles, labels in ((1, ["the particle"]), (2, ["lowest to highest particle", "mean of the particles"])):
        _, axes = charts._figure(1)
        charts._losses(axes, [0, 1], [1, 2], [1, 2], [1, 2], particles)
        assert sorted(axes.get_legend_handles_labels()[1]) == labels


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "damage",
    [{"history": 3}, {"summary": {}}, {"curve": ["x"]}, {"config": None}, {"baselines": [{}]}, {"layer_densities": []}],
)
def test_a_damaged_report_changes_nothing(result, tmp_path, damage):
    result.report(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**report, **damage}))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"report.json: wanted a report of format sfpk-report-1, got a damaged one: "):
        reports.render(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_series_differ_without_colours():
    assert len({charts._style(number)[1:] for number in range(36)}) == 36


def test_the_end_of_a_run_is_not_one_line():
    cubic = [100 * (1 - 0.02 - 0.98 * (1 - k / 100) ** 3) for k in range(101)]
    figure, axes = charts._figure(1)
    axes.plot(cubic, cubic)
    charts._sparsity_axis(axes, cubic)
    figure.canvas.draw()
    places = axes.transData.transform([(x, 1.0) for x in (0, 97, 98)])[:, 0]
    assert places[2] - places[1] > 0.08 * (places[2] - places[0]), "from left to right; linear it would be 0.01"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "50", "80", "90", "95", "98"]
    for values in ([0.0, 90.0], [95.5, 96.5], [], [50.0]):
        figure, axes = charts._figure(1)
        charts._sparsity_axis(axes, values)
        assert axes.get_xscale() == "linear"
        assert axes.get_xlabel() == "soft sparsity (% removed)"
    charts._sparsity_axis(axes, [0.0, 100.0])
    figure.canvas.draw()


def test_layers_are_numbered_and_dead_ones_marked(tmp_path, result, monkeypatch):
    names = [f"block.{i}.weight" for i in range(150)]
    page = result.report(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    report["layer_sizes"] = dict.fromkeys(names, 10)
    report["layer_densities"] = {name: 0.0 if i in (3, 77) else 0.2 for i, name in enumerate(names)}
    report["waypoints"] = []
    (tmp_path / "report.json").write_text(json.dumps(report))
    made = []
    figure = charts._figure
    monkeypatch.setattr(charts, "_figure", lambda *arguments: made.append(figure(*arguments)) or made[-1])
    reports.render(tmp_path)
    axes = made[2][1]
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"{n}" for n in range(10, 151, 10)]
    assert axes.get_xticks().tolist() == list(range(9, 150, 10))
    marks = {line.get_label(): line for line in axes.get_lines()}["nothing kept"]
    assert list(marks.get_xdata()) == [3, 77]
    assert [cell.text for cell in Page(page.read_text()).tables["Prunable tensors"][78][:2]] == [
        "78",
        "block.77.weight",
    ]
    for count in (61, 100, 101, 250, 999, 10_000):
        assert 10 <= len(charts._numbers(count)) <= 20


def _boxes(figure, labels):
    return [label.get_window_extent(figure.canvas.get_renderer()) for label in labels if label.get_text()]


@pytest.mark.parametrize(
    "sparsities",
    [[0.5, 0.95, 0.98, 0.99], [0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999], [0.7], [k / 99 for k in range(99)]],
)
@pytest.mark.parametrize("method", ["snip", "a method of a name that is long enough for a line of its own"])
def test_sparsities_and_methods_have_room(sparsities, method):
    rows = [
        {"method": f"{method} {i}", "sparsity": sparsity, "accuracy_mean": 0.9}
        for i in range(5)
        for sparsity in sparsities
    ]
    figure, axes = charts._figure(1)
    charts._accuracies(axes, rows, 0.9)
    figure.canvas.draw()
    boxes = sorted(_boxes(figure, axes.get_xticklabels()), key=lambda box: box.x0)
    assert boxes
    assert all(first.x1 < second.x0 for first, second in itertools.pairwise(boxes))
    ticks = [*axes.get_xticks(), *axes.get_xticks(minor=True)]
    assert sorted(ticks) == pytest.approx([100 * sparsity for sparsity in sparsities])
    assert axes.get_window_extent().width > 0.6 * figure.bbox.width
    legend = axes.get_legend().get_window_extent()
    assert legend.y0 >= 0
    assert legend.x1 <= figure.bbox.width


def test_many_masks_methods_and_layers(mlp, vectors, tmp_path):
    config = population(0.9, n_particles=2, n_steps=4)
    few = prune(mlp, vectors, config=config, progress=False)
    many = prune(mlp, vectors, config=config, progress=False, waypoints=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    few.report(tmp_path / "few", ROWS)
    many.report(tmp_path / "many", [{**ROWS[0], "method": f"method {i}"} for i in range(7)])
    for name in ("layers", "baselines"):
        small, large = ((tmp_path / folder / f"{name}.png").stat().st_size for folder in ("few", "many"))
        assert large > small
    assert prune(mlp, vectors, config=config.replace(n_steps=1, n_particles=1)).report(tmp_path / "one step").is_file()


@pytest.mark.usefixtures("undrawn")
def test_numbers_that_are_not_finite(result, tmp_path):
    result.history[3].energies[0] = float("nan")
    result.report(tmp_path, [{**ROWS[1], "accuracy_mean": np.float32(0.5)}])
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["history"][3]["energies"][0] is None
    assert saved["baselines"][0]["accuracy_mean"] == 0.5


@pytest.mark.usefixtures("undrawn")
def test_numbers_of_torch_and_numpy_in_rows(result, tmp_path):
    row = {**ROWS[0], "accuracy_mean": torch.tensor(0.5), "accuracy_std": np.float32(0.25), "seeds": np.int64(3)}
    result.report(tmp_path, [row], dense_accuracy=np.array(0.75))
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["baselines"] == [{**ROWS[0], "accuracy_mean": 0.5, "accuracy_std": 0.25, "seeds": 3}]
    assert saved["dense_accuracy"] == 0.75


@pytest.mark.usefixtures("undrawn")
def test_markup_in_names_is_text(result, tmp_path):
    result.history[0].alarms.append("<script>alert(1)</script>")
    assert "<script>" not in result.report(tmp_path).read_text()


@pytest.mark.usefixtures("undrawn")
def test_wrong_input(result, tmp_path):
    with pytest.raises(
        ValueError, match="baselines: wanted rows with method, sparsity and accuracy_mean, got one without"
    ):
        result.report(tmp_path, [{"method": "x"}])
    with pytest.raises(ValueError, match="baselines: wanted rows"):
        result.report(tmp_path, ["x"])
    for name in ("sparsity", "accuracy_mean", "accuracy_std"):
        with pytest.raises(ValueError, match=rf"^baselines: {name}: wanted a fraction in \[0, 1\], got 95"):
            result.report(tmp_path, [{**ROWS[1], name: 95}])
    for name, value in {"accuracy_mean": torch.rand(2), "sparsity": torch.tensor(95), "accuracy_std": "low"}.items():
        with pytest.raises(ValueError, match=rf"^baselines: {name}: wanted a fraction in \[0, 1\], got"):
            result.report(tmp_path, [{**ROWS[1], name: value}])
    for extra in (torch.tensor(1.0), {1, 2}, [object()]):
        with pytest.raises(TypeError, match="^baselines: extra: wanted numbers, text, lists and dicts of them, got"):
            result.report(tmp_path, [{**ROWS[1], "extra": extra}])
    with pytest.raises(TypeError, match=r"^baselines: method: wanted a name, got \['x'\]"):
        result.report(tmp_path, [{**ROWS[1], "method": ["x"]}])
    with pytest.raises(ValueError, match=r"^dense_accuracy: wanted a fraction in \[0, 1\], got 'high'"):
        result.report(tmp_path, dense_accuracy="high")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="folder: wanted a folder"):
        result.report(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="with a report.json"):
        reports.render(tmp_path)
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="wanted a report of format"):
        reports.render(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(ValueError, match="wanted a report of format"):
        reports.render(tmp_path)


def test_plain_numbers():
    found = plain({"a": np.int64(2**60 + 1), "b": np.float32("nan"), "c": (np.bool_(True), True, 3, 0.5)})
    assert found == {"a": 2**60 + 1, "b": None, "c": [True, True, 3, 0.5]}
    assert json.loads(json.dumps(found)) == found
    assert [type(value) for value in found["c"]] == [bool, bool, int, float]


NAMES = ["report.json", "loss.png", "particles.png", "layers.png", "baselines.png", "report.html"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_regular_file_stays(mlp, vectors, tmp_path, name):
    """Also a picture that this report has none of, which would be removed."""
    result = small(mlp, vectors)
    os.mkfifo(tmp_path / name)
    with pytest.raises(
        FileExistsError, match=f"{name}: wanted a regular file .* got the FIFO.*nothing is lost"
    ) as caught:
        result.report(tmp_path)
    assert "result.mask.save(path)" in str(caught.value)
    assert f"result.report({str(tmp_path)!r})" in str(caught.value)
    assert os.listdir(tmp_path) == [name]
    assert stat.S_ISFIFO(os.lstat(tmp_path / name).st_mode)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(IsADirectoryError, match="nothing is lost"):
        result.report(tmp_path)
    (tmp_path / name).rmdir()
    assert result.report(tmp_path).exists()
    if name != "report.json":
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        with pytest.raises(FileExistsError, match=f"{name}: wanted a regular file"):
            reports.render(tmp_path)
        with pytest.raises(FileExistsError, match=f"{name}: wanted a regular file"):
            result.report(tmp_path)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("failing", NAMES)
def test_a_report_that_cannot_be_written_names_what_is_safe(mlp, vectors, tmp_path, monkeypatch, failing):
    result, replace = small(mlp, vectors), os.replace

    def full(source, target):
        if os.path.basename(target) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    if failing == "baselines.png":
        pytest.skip("there are none")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="nothing is lost") as caught:
            result.report(tmp_path)
    words = str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert "result.mask.save(path)" in words
    if failing == "report.json":
        assert f"result.report({str(tmp_path)!r})" in words
        assert os.listdir(tmp_path) == []
    else:
        assert f"`sfpk report {tmp_path}` draws page and pictures" in words
        assert reports.render(tmp_path).read_text("utf-8")
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_without_matplotlib_the_numbers_are_there(mlp, vectors, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="nothing is lost: .*report.json' holds the numbers"):
        small(mlp, vectors).report(tmp_path)
    assert os.listdir(tmp_path) == ["report.json"]


def small(model, batches):
    return prune(model, batches, config=population(0.5, n_particles=2, n_steps=3))
