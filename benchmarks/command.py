"""``python -m benchmarks``: measure, append the results, render them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")
PAGES = (Path("README.md"), Path("docs/benchmarks.md"))  # of the checkout, with tables


def parser() -> argparse.ArgumentParser:
    """The options."""
    bench = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time the ops beside what else one could use. Without --report: measure and append to the results. "
        "With --report: render tables and charts.",
    )
    bench.add_argument("--op", nargs="+", metavar="OP", help="only these (--list shows them)")
    bench.add_argument(
        "--group", nargs="+", metavar="GROUP", help="only these: ops, scaling, end_to_end, structured, structured_step"
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    size = bench.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="tiny shapes, a few rounds: does it run? (seconds)")
    size.add_argument("--full", action="store_true", help="all shapes, more rounds")
    bench.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS",
                       help="begin nothing after so many seconds")  # fmt: skip
    bench.add_argument("--results", type=Path, default=RESULTS, metavar="DIR",
                       help=f"folder of the *.jsonl files (default: {RESULTS})")  # fmt: skip
    bench.add_argument("--report", action="store_true",
                       help="measure nothing: render the results to report.md and PNGs beside them, and the tables "
                            "of README and docs between their markers")  # fmt: skip
    bench.add_argument("--page", type=Path, nargs="+", metavar="FILE",
                       help="whose tables to renew (default, with the default --results: "
                            f"{', '.join(map(str, PAGES))})")  # fmt: skip
    bench.add_argument("--list", action="store_true", help="print ops, shapes and providers")
    bench.add_argument("--json", action="store_true",
                       help="measurements, ops (--list) or files written (--report) as JSON on stdout")  # fmt: skip
    bench.add_argument("--quiet", action="store_true", help="no progress, no text")
    return bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 cannot run or a provider of ours is wrong, 2 wrong usage, 130 interrupted."""
    options = parser().parse_args(arguments)
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("python -m benchmarks: interrupted", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    from .record import GROUPS
    from .registry import all_ops

    names = [*all_ops(), "end_to_end"]
    for option, given, known in (("--op", options.op, names), ("--group", options.group, list(GROUPS))):
        unknown = [name for name in given or () if name not in known]
        if unknown:
            return _refuse(f"{option}: wanted some of {', '.join(known)}, got {unknown[0]}")
    if options.results.exists() and not options.results.is_dir():
        return _refuse(f"--results: wanted a folder, got the file {options.results}")
    if not options.time_limit > 0:
        return _refuse(f"--time-limit: wanted seconds > 0, got {options.time_limit:g}")
    for page in options.page or ():
        if not page.is_file():
            return _refuse(f"--page: wanted a file, got {page}")
    if options.list:
        return _list(options)
    return _report(options) if options.report else _measure(options)


def _refuse(text: str) -> int:
    print(f"python -m benchmarks: {text}", file=sys.stderr)
    return 2


def _tell(options: argparse.Namespace, found: Any, text: str) -> None:
    if options.json:
        print(json.dumps(found, indent=1))
    elif not options.quiet:
        print(text)


def _size(options: argparse.Namespace) -> str:
    return "quick" if options.quick else "full" if options.full else "default"


def _device(options: argparse.Namespace) -> Any:
    import torch

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _list(options: argparse.Namespace) -> int:
    from .registry import all_ops

    device, size = _device(options), _size(options)
    found, lines = [], []
    for op in all_ops().values():
        shapes, providers = op.shapes_for(size, device), [provider.name for provider in op.providers]
        found.append({"op": op.name, "group": op.group, "what": op.what, "shapes": shapes, "providers": providers})
        lines.append(f"{op.name:<20} {op.group:<8} {op.what}")
        lines += ["    " + ", ".join(f"{name} = {value}" for name, value in shape.items()) for shape in shapes]
        lines.append("    " + ", ".join(providers))
    _tell(options, found, "\n".join(lines))
    return 0


def _measure(options: argparse.Namespace) -> int:
    import torch

    from . import record, report, suite

    device = _device(options)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("python -m benchmarks: --device: there is no CUDA device", file=sys.stderr)
        return 1
    groups = tuple(options.group or record.GROUPS)
    ops = tuple(options.op) if options.op else None
    plan = suite.Plan(device, _size(options), ops, groups, options.time_limit)
    if not plan.chosen() and "end_to_end" not in (ops or ()):
        return _refuse(f"--op, --group: wanted at least one op, got none of {', '.join(ops or ())} in these groups")

    def say(text: str) -> None:
        if not options.quiet:
            print(text, file=sys.stderr, flush=True)

    def keep(facts: record.Line, lines: list[record.Line]) -> None:
        record.append(options.results / record.file_of(facts), lines)

    lines = suite.run(plan, command_line(options), say, keep)
    run = record.Run(lines[0], lines[1:])
    file = options.results / record.file_of(run.facts)
    found = {"facts": run.facts, "rows": run.rows, "file": str(file)}
    _tell(options, found, f"{report.tables(run)}\nappended to {file}")
    wrong = [row for row in run.rows if row["status"] == "wrong"]
    for row in wrong:
        print(f"python -m benchmarks: {row['op']}, {row['provider']}: wrong: {row['reason']}", file=sys.stderr)
    return 1 if wrong else 0


def command_line(options: argparse.Namespace) -> list[str]:
    """What reproduces the run; folders are left out."""
    parts: list[str] = ["python", "-m", "benchmarks", "--device", _device(options).type]
    for name in ("op", "group"):
        given: Sequence[str] | None = getattr(options, name)
        parts += [f"--{name}", *given] if given else []
    parts += ["--quick"] if options.quick else ["--full"] if options.full else []
    return parts if options.time_limit == float("inf") else [*parts, "--time-limit", f"{options.time_limit:g}"]


def _report(options: argparse.Namespace) -> int:
    from . import record, report

    try:
        runs = record.read(sorted(options.results.glob("*.jsonl")))
    except ValueError as error:
        print(f"python -m benchmarks: --results: {error}", file=sys.stderr)
        return 1
    pages = options.page or []
    if options.page is None and options.results == RESULTS:  # the checkout's own
        pages = [page for page in PAGES if page.is_file() and report.tables_in(page.read_text(encoding="utf-8"))]
    for page in pages:
        try:
            text = report.into_page(page.read_text(encoding="utf-8"), runs)
        except ValueError as error:
            return _refuse(f"--page: {page}: {error}")
        page.write_text(text, encoding="utf-8")
    if not runs:
        print(f"python -m benchmarks: --results: no results in {options.results}", file=sys.stderr)
        return 1
    written = [*pages, options.results / "report.md"]
    written[-1].write_text(report.report(runs), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("python -m benchmarks: no charts: they need matplotlib (pip install matplotlib)", file=sys.stderr)
    else:
        from . import charts

        written += charts.draw(report.shown(runs), options.results)
    names = [str(path) for path in written]
    _tell(options, {"files": names}, "\n".join(names))
    return 0
