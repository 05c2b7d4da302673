"""Every op once per backend at a tiny shape, compared with the reference: what compute-sanitizer watches.

    python -m sfpk_kernels.bench.smoke [--device cuda] [--backend cuda triton]

Nothing is timed, so Triton's interpreter will do (``TRITON_INTERPRET=1``, on a CPU). Exit code 1 if a backend is wrong
or none could run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence

import torch

from .. import _triton
from .gate import Verdict, judge
from .registry import Op, Provider, all_ops

BACKENDS = ("cpp", "cuda", "triton", "reference")
COORDINATES = 2_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sfpk_kernels.bench.smoke", description="Run every op once.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--op", nargs="+", choices=[op.name for op in _ops()], metavar="OP")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    ran = wrong = 0
    for op in _ops():
        if options.op and op.name not in options.op:
            continue
        case = op.build({**op.shapes["quick"][0], "d": COORDINATES}, device)
        for provider in _of(op, options.backend):
            if "triton" in provider.name and _triton.interpreted():
                provider = Provider(provider.name, provider.make)  # the clock refuses it, a check need not
            verdict: Verdict = judge(case, provider, device)
            ran += verdict.status == "ok"
            wrong += verdict.status == "wrong"
            reason = f": {verdict.reason}" if verdict.reason else ""
            print(f"{op.name:<20} {provider.name:<22} {verdict.status}{reason}")
    print(f"{ran} ran and agree with the reference, {wrong} wrong")
    return 1 if wrong or not ran else 0


def _ops() -> list[Op]:
    return [op for op in all_ops().values() if op.group == "ops"]


def _of(op: Op, backends: Iterable[str]) -> list[Provider]:
    return [p for p in op.providers if any(p.name.startswith(f"ours[{backend}]") for backend in backends)]


if __name__ == "__main__":
    sys.exit(main())
