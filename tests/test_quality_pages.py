"""Tables, pictures and pages of the quality study, by hand."""

import dataclasses
import math
from pathlib import Path

import pytest

from benchmarks.quality import __main__ as command
from benchmarks.quality import compare, pages, pictures, records, study, tables
from benchmarks.quality.pages import OURS
from benchmarks.quality.records import Cell, Row
from tests.test_quality import SMALL

ROOT = Path(__file__).parents[1]
ACCURACY = dataclasses.replace(SMALL, metric="accuracy", unit=0.3, sparsities=(0.5, 0.8, 0.9))
LOSS = dataclasses.replace(ACCURACY, metric="loss", higher=False, unit=0.005)


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    for module in (study, tables, pictures, pages):
        monkeypatch.setattr(module, "TASKS", {"small": ACCURACY})


def row(method, value, seed=0, passes=60, sparsity=0.8, **more):
    cell = Cell("small", method, sparsity, passes, seed, more.pop("protocol", "one-shot"))
    return Row(cell, value, 97.0, 10, 1.0, **more)


def rows(**values):
    """By method: values at 80 %, one per seed, passes 60; magnitude without."""
    return [
        row(name, value, seed, 0 if name == "magnitude" else 60)
        for name, seeds in values.items()
        for seed, value in enumerate(seeds)
    ]


def test_values_by_hand():
    found = rows(ours=[90.0, 92.0, 94.0], rival=[91.0, 91.0, 91.0], magnitude=[10.0, 20.0, 30.0])
    lines = tables.table(ACCURACY, found, 60).splitlines()
    assert lines[0] == "| small; accuracy, 60 passes, 3 seeds | 80 % |"
    assert lines[2] == "| dense | 97.0 ± 0.0 |"
    assert lines[3:] == ["| magnitude | 20.0 ± 10.0 |", "| ours | **92.0 ± 2.0** |", "| rival | **91.0 ± 0.0** |"]
    assert "**20.000 ± 10.000**" in tables.table(LOSS, found, 60)
    assert tables.tables(found, [60, 300]).count("60 passes") == 1
    assert tables.tables(found, [60, 300]).count("300 passes") == 0


def test_a_tie_is_one_standard_error_paired_over_seeds():
    # The means are as far apart in both; the differences spread in one.
    steady, spread = {0: 89.5, 1: 91.5, 2: 93.5}, {0: 92.0, 1: 90.0, 2: 92.5}
    top = {0: 90.0, 1: 92.0, 2: 94.0}
    assert not compare.tied(ACCURACY, steady, top)
    assert compare.tied(ACCURACY, spread, top)
    assert compare.tied(ACCURACY, top, top)
    assert not compare.tied(ACCURACY, {0: 89.9}, top), "fewer seeds do not tell"
    assert not compare.tied(LOSS, {0: math.inf, 1: 1.0}, {0: 1.0, 1: 1.0})
    assert compare.best(ACCURACY, {"a": top, "b": {0: 99.0}, "c": {}}) == "a"
    assert compare.best(LOSS, {"a": top, "b": steady}) == "b"
    assert compare.best(LOSS, {}) is None


def test_networks_of_one_seed_trained_elsewhere_are_not_paired():
    given = rows(ours=[90.0, 92.0, 94.0], rival=[89.0, 92.0, 60.0])
    given[-1] = given[-1]._replace(dense=96.0)
    found = compare.difference(
        ACCURACY, *(compare.by_network(r for r in given if r.cell.method == name) for name in ("ours", "rival"))
    )
    assert found.seeds == 2
    assert found.mean == pytest.approx(0.5)


def test_cells_with_fewer_seeds_say_so():
    lines = tables.table(ACCURACY, rows(ours=[90.0, 92.0], rival=[95.0]), 60).splitlines()
    assert "| ours | **91.0 ± 1.4** |" in lines
    assert "| rival | 95.0 (1 seed) |" in lines


def test_differences_are_better_where_positive():
    ours, theirs = {0: 90.0, 1: 92.0, 2: 94.0}, {0: 91.0, 1: 91.0, 2: 91.0, 3: 0.0}
    found = compare.difference(ACCURACY, ours, theirs)
    assert found == (pytest.approx(1.0), pytest.approx(2 / math.sqrt(3)), 3)
    assert not found.clear
    assert compare.difference(LOSS, ours, theirs).mean == pytest.approx(-1.0)
    assert compare.difference(ACCURACY, ours, {7: 1.0}) is None
    assert compare.difference(ACCURACY, {0: -math.inf}, {0: 1.0}) is None
    assert not compare.difference(ACCURACY, {0: 1.0}, {0: 0.0}).clear, "one seed is none"
    given = rows(ours=[90.0, 92.0, 94.0], rival=[91.0, 91.0, 91.0], magnitude=[10.0, 12.0, 15.0])
    lines = tables.differences(given, "ours", ["rival", "magnitude", "nobody"], 60).splitlines()
    assert lines[2] == "| small, 80 % | +1.0 ± 1.2 | **+79.7 ± 0.3** |  |"
    assert lines[3].endswith("| 0 better, 0 worse, of 1 | 1 better, 0 worse, of 1 | 0 better, 0 worse, of 0 |")
    assert tables.differences(given, "nobody", ["rival"], 60) == ""


def test_changes_are_better_where_positive():
    given = rows(ours=[90.0, 92.0, 94.0], other=[91.0, 91.0, 91.0], half=[93.0, 95.0, 97.5])
    lines = tables.changes(given, "ours", ["other", "half", "nobody"], 60).splitlines()
    assert lines[0] == "| 60 passes | small, 80 % |"
    assert lines[2:] == ["| other | -1.0 ± 1.2 |", "| half | **+3.2 ± 0.2** |"]
    assert tables.changes(given, "ours", ["nobody"], 60) == ""
    assert tables.changes(given, "ours", ["other"], 300) == ""


def test_passes_to_equal_quality_by_hand():
    curve = {10: 50.0, 100: 70.0, 1000: 80.0}
    assert compare.passes_to(ACCURACY, curve, 60.0) == ("", pytest.approx(10**1.5))
    assert compare.passes_to(ACCURACY, curve, 70.0) == ("", pytest.approx(100))
    assert compare.passes_to(ACCURACY, curve, 40.0) == ("≤", 10)
    assert compare.passes_to(ACCURACY, curve, 90.0) == (">", 1000)
    falling = {count: -value for count, value in curve.items()}
    assert compare.passes_to(LOSS, falling, -60.0) == ("", pytest.approx(10**1.5))
    given = [row("ours", value, passes=count) for count, value in curve.items()]
    given += [row("rival", 60.0, passes=1000), row("better", 90.0, passes=1000), row("other", 60.0, 5, 1000)]
    lines = tables.equal_quality(given, "ours", ["rival", "better", "other"]).splitlines()
    assert lines[2] == "| small, 80 % | 32 for 1,000 (31.6 ×) | > 1,000 for 1,000 |  |"
    assert tables.equal_quality(given, "nobody", ["rival"]) == ""


def test_protocols_have_rows_of_their_own():
    given = [row("sfpk", 90.0), row("sfpk", 95.0, protocol="fine-tuned"), row("magnitude", 93.0, protocol="fine-tuned")]
    assert "95.0" not in tables.tables(given, [60])
    lines = tables.tables(given, [60], ["one-shot", "fine-tuned"]).splitlines()
    assert lines[3:] == ["| sfpk | 90.0 |", "| sfpk, fine-tuned | **95.0** |", "| magnitude, fine-tuned | 93.0 |"]


def study_rows():
    values = {
        OURS: 90.0,
        "sfpk, population": 85.0,
        "straight-through, SGD": 88.0,
        "magnitude": 40.0,
        "woodfisher": 50.0,
    }
    layers = {"a": (10, 100), "b": (0, 50)}
    return [
        row(name, value - 100 * (sparsity - 0.5) + seed + 3 * math.log(max(passes, 1)), seed, passes, sparsity,
            layers=layers, about={"torch": "2.13"})
        for name, value in values.items()
        for sparsity in ACCURACY.sparsities
        for passes in ((0,) if name == "magnitude" else (60, 300))
        for seed in (0, 1)
    ] + [row(name, 93.0, protocol="fine-tuned") for name in (OURS, "magnitude")]  # fmt: skip


def test_the_page_and_the_readme_are_written_from_the_rows(tmp_path):
    pytest.importorskip("matplotlib")
    docs = tmp_path / "docs"
    docs.mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- quality-short:begin -->\nold\n<!-- quality-short:end -->\nafter\n")
    path = tmp_path / "rows.jsonl"
    for one in study_rows():
        records.append(path, one)
    assert records.read(path) == [one._replace(about=one.about or {}) for one in study_rows()]
    assert command.main(["--pages", str(docs), "--out", str(path), "--passes", "60", "300"]) == 0
    text = (docs / "quality.md").read_text()
    assert f"| {OURS} | **102.8 ± 0.7** | **72.8 ± 0.7** | **62.8 ± 0.7** |" in text, "at 60 passes"
    assert f"{len(study_rows())} measurements" in text
    for head in (
        f"## {OURS} against others",
        "## Passes to equal quality",
        "## Small { #small }",
        "## After fine-tuning",
    ):
        assert head in text
    assert text.count("    python -m benchmarks.quality ") == 4, "a command for each"
    assert f"| {OURS}, fine-tuned | **93.0** |" in text
    for name in ("sparsity", "passes", "layers"):
        assert f"](images/quality-{name}.png)" in text
        picture = (docs / "images" / f"quality-{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 150_000
    new = readme.read_text()
    assert new.startswith("before\n<!-- quality-short:begin -->\n| 300 passes | removed | dense | ")
    assert new.endswith("|\n<!-- quality-short:end -->\nafter\n")
    assert "| small; accuracy | 80 % | 97.0 | **77.6 ± 0.7** | 72.6 ± 0.7 |" in new
    command.main(["--pages", str(docs), "--out", str(path), "--passes", "60", "300"])
    assert readme.read_text() == new


def test_pictures_show_every_method_they_have_rows_for(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    plain = pictures._name_ends
    monkeypatch.setattr(
        pictures, "_name_ends", lambda axes, ends, names: drawn.append(ends) or plain(axes, ends, names)
    )
    given = [one for one in study_rows() if one.cell.method != "woodfisher"]
    names = {name: pictures.Shown(name, number) for number, name in enumerate([OURS, "woodfisher", "magnitude"])}
    assert pictures.over_sparsity(tmp_path / "a.png", given, names, 60)
    ours, woodfisher, magnitude = drawn[-1]
    assert ours == pytest.approx(90 - 40 + 0.5 + 3 * math.log(60)), "the mean at the highest sparsity"
    assert math.isnan(woodfisher)
    assert magnitude == pytest.approx(0.5)
    assert pictures.over_passes(tmp_path / "b.png", given, names)
    assert drawn[-1][0] == pytest.approx(90 - 30 + 0.5 + 3 * math.log(300)), "at the sparsity that tells"
    assert pictures.layer_densities(tmp_path / "c.png", given, names, 60)
    assert drawn[-1][0] == 0.01, "nothing kept"
    without = [one._replace(layers=None) for one in given]
    assert not pictures.layer_densities(tmp_path / "d.png", without, names, 60)
    assert not (tmp_path / "d.png").exists()


def test_pages_of_nothing_are_refused(tmp_path, capsys):
    for given in (["--pages", str(tmp_path)], ["--pages", str(tmp_path / "none")]):
        path = tmp_path / "rows.jsonl"
        if "none" in given[1]:
            records.append(path, row("sfpk", 1.0))
        with pytest.raises(SystemExit):
            command.main([*given, "--out", str(path)])
    words = capsys.readouterr().err
    assert "rows: wanted at least one measurement, got none" in words
    assert f"pages: wanted a folder, got {tmp_path / 'none'}" in words
    assert not (tmp_path / "quality.md").exists()


def test_the_page_is_that_of_the_recorded_rows(monkeypatch):
    monkeypatch.undo()
    page, readme = ROOT / "docs" / pages.PAGE, ROOT / "README.md"
    found = records.read(command.RESULTS)
    assert page.exists() == bool(found), "run `python -m benchmarks.quality --pages docs`"
    if found:
        images = [name for name in ("sparsity", "passes", "layers")
                  if (page.parent / pages.IMAGES / f"quality-{name}.png").exists()]  # fmt: skip
        assert page.read_text(encoding="utf-8") == pages.text(found, command.PASSES, images)
    text = readme.read_text(encoding="utf-8")
    if pages.pages.has_place(text, pages.SHORT):
        assert text == pages.pages.put(text, pages.SHORT, pages.short(found, command.PASSES))
