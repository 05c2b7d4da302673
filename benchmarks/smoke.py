"""Every op once per backend at small shapes, compared with the reference: what compute-sanitizer watches.

    python -m benchmarks.smoke [--device cuda] [--backend cuda triton] [--choice]

Each op runs within one program or block of its kernels and beyond it, so that sums, ties and counts meet across them;
:mod:`.smoke_cases` adds what the suite's shapes have not. Nothing is timed, so Triton's interpreter will do
(``TRITON_INTERPRET=1``, on a CPU). ``--choice`` also checks which backend is chosen where nobody names one. Exit code 1
if a backend is wrong, if one named with ``--backend`` is missing where an op has it, or if none could run.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from sfpk_kernels import _triton
from sfpk_kernels._dispatch import preference

from .gate import judge
from .registry import Op, Provider, all_ops
from .smoke_cases import CASES

BACKENDS = ("cpp", "cuda", "triton", "reference")
WITHIN, BEYOND = 2_000, 20_011  # coordinates: of one program or block of any kernel, and of several
CHOSEN = {
    "cpu": {"transition": "cpp", "selection": "cpp", "masking": "cpp"},
    "cuda": {"transition": "triton", "selection": "cuda", "masking": "cuda"},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description="Run every op once.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="these, and none of them may be missing")
    parser.add_argument("--op", nargs="+", choices=[*(op.name for op in _ops()), *CASES], metavar="OP")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes, each with some of the ops: kernels are compiled"
    )
    parser.add_argument("--choice", action="store_true", help="check the automatic choice of backends, too")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # others look after other ops
    options = parser.parse_args(arguments)
    if options.jobs > 1:
        return _in_processes(options)
    device = torch.device(options.device)
    wanted, ran, wrong, missing = options.backend or BACKENDS, 0, 0, 0
    seen: set[str] = set()
    for name, backend, verdict in _verdicts(device, wanted, options.op):
        seen.add(backend)
        ran += verdict.status == "ok"
        wrong += verdict.status == "wrong"
        missing += verdict.status == "missing" and options.backend is not None
        reason = f": {verdict.reason}" if verdict.reason else ""
        print(f"{name:<42} {backend:<10} {verdict.status}{reason}", flush=True)
    for backend in set(options.backend or ()) - seen:
        missing += not options.part
        print(_lacks(backend))
    if options.choice:
        wrong += _wrong_choices(device)
    print(
        f"{ran} ran and agree with the reference, {wrong} wrong" + (f", {missing} missing" if options.backend else "")
    )
    return 1 if wrong or missing or not (ran or options.part) else 0


def _lacks(backend: str) -> str:
    return f"no op here has the backend {backend}"


def _in_processes(options: argparse.Namespace) -> int:
    """The same, an op a process; 1 if one of them failed."""
    words = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--device", options.device]
    words += ["--backend", *options.backend] if options.backend else []
    ops = options.op or [*(op.name for op in _ops()), *CASES]

    def run(op: str) -> tuple[int, str]:
        done = subprocess.run([*words, "--op", op, "--part"], capture_output=True, text=True, check=False)
        errors = done.stderr.splitlines()[-5:] if done.returncode else []
        print("\n".join([*done.stdout.splitlines()[:-1], *errors]), flush=True)
        return done.returncode, done.stdout

    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(run, ops))
    failed = sum(code != 0 for code, _ in results)
    for backend in options.backend or ():
        if all(_lacks(backend) in said for _, said in results):
            print(_lacks(backend))
            failed += 1
    failed += _wrong_choices(torch.device(options.device)) if options.choice else 0
    print(f"{len(ops)} ops in up to {options.jobs} processes, {failed} failed")
    return 1 if failed else 0


def _verdicts(device: torch.device, backends: Iterable[str], only: Sequence[str] | None) -> Any:
    for op in _ops():
        if only and op.name not in only:
            continue
        for shape in _shapes(op):
            case = op.build(shape, device)
            for provider in op.providers:
                backend = provider.name.removeprefix("ours[").split("]")[0]
                if not provider.ours or backend not in backends:
                    continue
                if backend == "triton" and _triton.interpreted():
                    provider = Provider(provider.name, provider.make)  # the clock refuses it, a check need not
                name = f"{op.name}{provider.name.partition(']')[2]} {tuple(shape.values())}"
                yield name, backend, judge(case, provider, device)
    for name, special in CASES.items():
        if not only or name in only:
            for backend in backends:
                verdict = special(device, backend)
                if verdict is not None:
                    yield name, backend, verdict


def _ops() -> list[Op]:
    return [op for op in all_ops().values() if op.group == "ops"]


def _shapes(op: Op) -> list[dict[str, Any]]:
    quick = dict(op.shapes["quick"][0])
    shapes = [{**quick, "d": WITHIN}, {**quick, "d": BEYOND}]
    if op.name.startswith("transition"):
        shapes.append({**quick, "n": 16, "d": 9_001})  # tiles of rows instead of columns
    if "kind" in quick:
        shapes.append({**quick, "kind": "few distinct", "d": BEYOND})  # ties in several chunks
    return shapes


def _wrong_choices(device: torch.device) -> int:
    """How many ops take another backend than the best one for this device."""
    wrong = 0
    for op, expected in CHOSEN[device.type].items():
        backends = importlib.import_module(f"sfpk_kernels.ops.{op}").BACKENDS
        sample = torch.ones(1, 1, dtype=torch.float32, device=device)
        chosen = next(n for n in preference(device.type) if n in backends and backends[n].why_not(sample) is None)
        print(f"{op:<42} on {device.type}: {chosen}" + ("" if chosen == expected else f", wanted {expected}"))
        wrong += chosen != expected
    return wrong


if __name__ == "__main__":
    sys.exit(main())
