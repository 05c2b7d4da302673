"""Recorded results: their schema, and what is rendered from them."""

import copy
import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks import record, report, suite
from benchmarks.registry import TARGETS, all_ops
from benchmarks.suite import Plan

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "tests" / "data" / "bench_sample.jsonl"
LINES = [json.loads(text) for text in SAMPLE.read_text().splitlines()]


@pytest.fixture
def run():
    """The sample's run, as if it had been a whole one of the usual shapes."""
    facts, *rows = copy.deepcopy(LINES)
    for row in rows:
        if row["group"] == "ops":
            op = all_ops()[row["op"]]
            row["shape"] = dict(op.shapes_for("default", torch.device("cpu"))[0])
    return record.Run({**facts, "size": "default"}, rows)


def test_committed_results_fit_the_schema():
    runs = record.read(sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")))
    assert all(found.rows for found in runs)
    (sample,) = record.read([SAMPLE])
    assert {row["status"] for row in sample.rows} == {"ok", "missing"}
    assert {row["group"] for row in sample.rows} == {"ops", "scaling"}


def line(kind, **changes):
    found = copy.deepcopy(next(line for line in LINES if line["kind"] == kind and line.get("status") in ("ok", None)))
    return {**found, **changes}


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"kind": "table"}, "kind: wanted an object with kind 'run' or 'row'"),
        ([1], "kind: wanted an object"),
        (line("run", date="yesterday"), "date: wanted an ISO date with time zone, got 'yesterday'"),
        (line("run", date="2026-01-01T00:00:00"), "date: wanted an ISO date with time zone"),
        (line("run", device="tpu"), "device: wanted one of cpu, cuda|device: wanted 'cpu' or 'cuda', got 'tpu'"),
        (line("run", threads=True), "threads: wanted an integer, got True"),
        (line("run", schema=2), "schema: wanted 1, got 2"),
        (line("run", ceilings={"copy": {"rate": 0, "unit": "bytes/s"}}), "ceilings: wanted rates > 0"),
        ({k: v for k, v in line("run").items() if k != "torch"}, "torch: wanted a text, got nothing"),
        (line("row", status="fast"), "status: wanted one of ok, wrong, missing, got 'fast'"),
        (line("row", median_s=float("nan")), "median_s: wanted a number > 0 or null, got nan"),
        (line("row", median_s=-1.0), "median_s: wanted a number > 0 or null, got -1.0"),
        (line("row", median_s=None), "median_s: wanted a time with status ok"),
        (line("row", status="wrong", reason="off"), "median_s: wanted a time with status ok and none else"),
        (line("row", reason="odd"), "reason: wanted one unless status is ok"),
        (line("row", median_s=1e3), "median_s: wanted p20 ≤ median ≤ p80"),
        (line("row", shape={}), "shape: wanted numbers and texts by name"),
        (line("row", bytes=1.5), "bytes: wanted an integer or null"),
        (line("row", speed=3), "speed: wanted no such field"),
    ],
)
def test_broken_lines_are_named(broken, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        record.check_line(broken)
    with pytest.raises(ValueError, match=words):
        record.append(tmp_path / "results.jsonl", [line("run"), broken])
    assert not (tmp_path / "results.jsonl").exists(), "nothing is written when one line is broken"


def test_files_are_appended_to_and_read_back(tmp_path, run):
    path = tmp_path / "new" / "results.jsonl"
    record.append(path, [run.facts, *run.rows])
    record.append(path, [{**run.facts, "id": "later", "date": "2999-01-01T00:00:00+00:00"}])
    first, second = record.read([path])
    assert (first.facts, first.rows) == (run.facts, run.rows)
    assert (second.facts["id"], second.rows) == ("later", [])
    for text, words in (
        ("{broken", "results.jsonl:109: "),
        (json.dumps(run.facts), "109: id: wanted one of its own"),
        (json.dumps({**run.rows[0], "run": "nobody"}), "109: run: wanted the id of a run above, got 'nobody'"),
    ):
        other = tmp_path / "other" / "results.jsonl"
        other.parent.mkdir(exist_ok=True)
        other.write_text(path.read_text() + text + "\n")
        with pytest.raises(ValueError, match=words):
            record.read([other])


def test_facts_say_who_measured_where():
    facts = record.facts(torch.device("cpu"), command=["sfpk", "bench"], size="quick", complete=False, ceilings={})
    assert facts["device"] == "cpu"
    assert facts["driver"] is None
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert record.file_of(facts).startswith("cpu-")
    assert (
        record.file_of({"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3"}) == "cuda-nvidia-h100-80gb-hbm3.jsonl"
    )


@pytest.mark.parametrize(
    ("page", "tables"),
    [
        ("README.md", ["bench-short"]),
        ("docs/benchmarks.md", ["bench", "bench-structured", "bench-structured-step"]),
    ],
)
def test_pages_are_in_sync_with_the_committed_results(page, tables):
    text = (ROOT / page).read_text(encoding="utf-8")
    runs = record.read(sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")))
    assert report.tables_in(text) == tables
    assert report.into_page(text, runs) == text, "run `python -m benchmarks --report`"


def test_pages_show_the_latest_complete_run_of_each_device(run):
    def dated(day, **changes):
        return record.Run(
            {**run.facts, "date": f"2026-01-{day}T00:00:00+00:00", "commit": f"c{day}", **changes}, run.rows
        )

    runs = [dated("01"), dated("02"), dated("03", size="quick"), dated("04", complete=False),
            dated("05", device_name="other", size="quick")]  # fmt: skip
    table = report.full_table(runs)
    assert "commit c02" in table
    assert not any(f"commit c0{i}" in table for i in (1, 3, 4, 5))
    assert [found.facts["commit"] for found in report.shown(runs)] == ["c02", "c05"]
    assert "No complete run" in report.full_table(runs[2:])
    assert "No complete run" in report.full_table([])


def test_the_table_of_shrunk_models_has_the_ratios_of_the_latest_run(run):
    shape = {"model": "resnet-18", "batch": 16, "image": 160, "threads": 1}

    def measured(day, ratio, **changes):
        facts = {**run.facts, "date": f"2026-01-{day}T00:00:00+00:00", "complete": False, **changes}
        rows = [
            record.row("id", "structured", "shrunk", shape, provider, median_s=1 / factor, ratio_to_naive=factor)
            for provider, factor in (("naive", 1.0), ("ours, half removed", ratio))
        ]
        return record.Run(facts, rows)

    table = report.structured_table([measured("01", 2.0), measured("02", 1.75), measured("03", 9.0, size="quick"), run])
    assert "| dense / shrunk | half removed |" in table
    assert "| resnet-18, 160 × 160, batch 16, 1 thread | **1.75 ×** |" in table
    assert "2.00" not in table
    assert "9.00" not in table
    assert "No shrunk models are measured yet" in report.structured_table([run])


def test_the_table_of_structured_steps_has_shares_of_the_latest_run(run):
    shape = {"model": "resnet-18", "batch": 16, "image": 160, "threads": 1, "coordinates": 2880}

    def measured(day, ours, **changes):
        facts = {**run.facts, "date": f"2026-01-{day}T00:00:00+00:00", "complete": False, **changes}
        times = {"naive": 0.3, "ours[cpp]": ours, "ours[reference]": 0.2, "forward and backward": 0.99}
        rows = [
            record.row(
                "id", "structured_step", "structured_step", shape, provider, median_s=seconds, ratio_to_naive=1.0
            )
            for provider, seconds in times.items()
        ]
        return record.Run(facts, rows)

    table = report.structured_step_table(
        [measured("01", 0.11), measured("02", 0.01), measured("03", 0.05, size="quick")]
    )
    row = "| resnet-18, 160 × 160, batch 16, 1 thread | 2,880 | 990 ms | 10.0 ms | **1.0 %** | 300 ms |"
    assert row in table
    assert table.count("resnet-18") == 1
    assert "No steps are measured yet" in report.structured_step_table([run])


def test_the_table_says_machine_command_and_figures(run):
    table = report.full_table([run])
    assert "`sfpk bench --device cpu --quick`" in table
    assert "no GPU was used" in table
    row = next(r for r in run.rows if r["op"] == "apply_cut" and r["provider"] == "ours[cpp]")
    naive = next(r for r in run.rows if r["op"] == "apply_cut" and r["provider"] == "naive")
    text = next(text for text in table.splitlines() if report.what("apply_cut") in text)
    assert f"**{report.duration(row['median_s'])}** (cpp)" in text
    assert report.duration(naive["median_s"]) in text
    assert f"({report.number(naive['median_s'] / row['median_s'])} ×)" in text
    assert report.percent(row["ceiling_share"]) in text
    # Every table has as many cells in each line as in its head.
    for block in table.split("\n\n"):
        if block.startswith("|"):
            assert len({text.count("|") for text in block.splitlines()}) == 1


def test_pages_leave_out_shapes_of_full_runs(run):
    row = next(r for r in run.rows if r["op"] == "transition" and r["provider"] == "ours[cpp]")
    run.rows.append({**row, "shape": {"n": 4, "d": 10_000_000}})
    assert "n = 4, d = 10,000,000" in report.full_table([run]), "measured in a default run"
    run.facts["size"] = "full"
    assert "n = 4, d = 10,000,000" in report.report([run])
    assert "n = 4, d = 10,000,000" not in report.full_table([run])
    assert "n = 10, d = 1,000,000" in report.full_table([run])


@pytest.mark.parametrize("name", report.TABLES)
def test_pages_keep_everything_but_the_table(run, name):
    begin, end = report.markers(name)
    text = f"before\n{begin}\nstale\n{end}\nafter\n"
    new = report.into_page(text, [run])
    assert new == f"before\n{begin}\n{report.TABLES[name]([run])}\n{end}\nafter\n"
    assert report.into_page(new, [run]) == new
    for broken in ("no markers", end + begin):
        with pytest.raises(ValueError, match="markers"):
            report.into_page(broken, [run])


def test_the_short_table_has_one_line_per_headline_at_its_largest_size(run):
    row = next(r for r in run.rows if r["op"] == "transition" and r["provider"] == "ours[cpp]")
    run.rows.append({**row, "shape": {"n": 10, "d": 40_000_000}, "median_s": 1.5})
    table, machine = report.short_table([run]).split("\n\n")
    lines = table.splitlines()[2:]
    assert len(lines) == len(report.HEADLINES) == 4
    assert "| n = 10, d = 40,000,000 | **1.50 s** |" in lines[0]
    assert all(report.what(op) in text for op, text in zip(report.HEADLINES, lines, strict=True))
    assert {text.count("|") for text in table.splitlines()} == {6}
    assert "no GPU" in machine


def test_the_report_has_every_row(run):
    text = report.report([run])
    assert text.count("missing: ") == sum(row["status"] == "missing" for row in run.rows)
    assert "Triton kernels run on GPUs; their interpreter is not timed" in text
    for row in run.rows:
        assert f"| {row['provider']} |" in text


def test_exponents(run):
    run.rows[:] = [
        {**line("row"), "group": "scaling", "op": "step_over_d", "shape": {"n": 10, "d": d}, "median_s": 1e-9 * d**1.5,
         "p20_s": None, "p80_s": None, "extra": {"axis": "d"}}
        for d in (10_000, 100, 1000)
    ]  # fmt: skip
    (fit,) = report.fits(run)
    assert fit["exponent"] == pytest.approx(1.5)
    assert [d for d, _ in fit["points"]] == [100, 1000, 10_000]
    assert "| d^1.50 |" in report.scaling_table(run)
    del run.rows[0]
    assert report.fits(run)[0]["exponent"] is None, "two points are no fit"
    assert report.scaling_table(run) == ""


def gpu_row(op, **changes):
    shape = {"n": 10, "d": 25_600_000}
    return {**line("row"), "op": op, "shape": shape, "provider": "ours[triton]", "ceiling_share": 0.85,
            "bytes": 32 * shape["n"] * shape["d"], **changes}  # fmt: skip


def test_targets_judge_gpu_rows_alone(run):
    assert report.target_table(run) == "", "a CPU is not judged by them"
    run.facts.update(device="cuda")
    run.rows[:] = [
        gpu_row("transition"),
        gpu_row("selection", ceiling_share=0.5, provider="ours[cuda]"),
        gpu_row("apply", provider="naive"),
        gpu_row("step", ceiling_share=0.5),  # 8 passes at half of the bandwidth: 16
    ]
    table = dict(zip([target.op for target in TARGETS], report.target_table(run).splitlines()[2:], strict=True))
    assert "| 85 % (ours[triton]) | yes |" in table["transition"]
    assert "| 50 % (ours[cuda]) | no |" in table["selection"]
    assert "not measured" in table["apply"], "rivals are not judged"
    assert "| 16.0 (ours[triton]) | no |" in table["step"]
    run.rows[:] = [gpu_row("step", ceiling_share=0.8)]
    assert "| 10.0 (ours[triton]) | yes |" in report.target_table(run)
    shape = {"model": "resnet-50", "coordinates": 25_502_912, "batch": 256, "particles": 10}
    run.rows[:] = [gpu_row("end_to_end", group="end_to_end", shape=shape, provider="ours", ratio_to_naive=5.5)]
    assert "| 5.50 (ours) | yes |" in report.target_table(run)


FIGURES = {"model": "mlp", "coordinates": 1000, "batch": 16, "particles": 10, "mode": "sequential",
           "seconds_per_step": 0.1, "naive_seconds_per_step": 0.4, "ratio": 4.0, "peak_bytes": 10**9,
           "naive_peak_bytes": 2 * 10**9, "outside_share": 0.2}  # fmt: skip


def test_end_to_end_rows(run, monkeypatch):
    class Module:
        NAMES: ClassVar = {"cpu": {"quick": ("mlp", "broken", "off")}}

        @staticmethod
        def measure(name, *, particles=10, quick=False, device="cuda", memory=True):
            assert (quick, device, memory) == (True, "cpu", False)
            if name == "broken":
                raise ValueError("no such model")
            return {**FIGURES, "agrees": name != "off", "error": 0.25}

    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: name == suite.END_TO_END)
    monkeypatch.setattr(suite.importlib, "import_module", lambda name: Module)
    naive, ours, broken, off = map(
        record.check_line, suite.end_to_end("id", Plan(torch.device("cpu"), "quick"), float("inf"), print)
    )
    assert (naive["provider"], naive["median_s"]) == ("naive", 0.4)
    assert (ours["provider"], ours["median_s"], ours["ratio_to_naive"]) == ("ours", 0.1, 4.0)
    assert ours["shape"] == {"model": "mlp", "coordinates": 1000, "batch": 16, "particles": 10}
    assert ours["extra"] == {"mode": "sequential", "peak_bytes": 10**9, "outside_share": 0.2, "agrees": True,
                             "error": 0.25}  # fmt: skip
    assert (off["status"], off["reason"], off["median_s"]) == ("wrong", "differs from the naive step by 2.5e-01", None)
    assert (broken["status"], broken["reason"]) == ("missing", "raised ValueError: no such model")
    run.rows += [naive, ours, broken]
    assert "| mlp | 1,000 | 16, 10 | **100 ms** | 400 ms | 4.00 × | 1.00 GB, 2.00 GB |" in report.full_table([run])


def test_words():
    assert [report.duration(s) for s in (2.0, 0.0123, 4.5e-6, 3e-9)] == ["2.00 s", "12.3 ms", "4.50 µs", "0.0030 µs"]
    assert (
        report.size({"n": 10, "d": 4_000_000, "kind": "random", "kept": 0.1})
        == "n = 10, d = 4,000,000, random, 10 % kept"
    )
    assert report.rate(2.5e10, "bytes/s") == "25.0 GB/s"
    assert report.rate(9e14, "flop/s") == "900 Tflop/s"


def test_charts(run, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import charts

    paths = charts.draw([run], tmp_path)
    assert [path.name for path in paths] == ["speedup-cpu.png", "roofline-cpu.png", "scaling-cpu.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert charts.draw([record.Run(run.facts)], tmp_path) == [], "nothing measured, nothing drawn"
