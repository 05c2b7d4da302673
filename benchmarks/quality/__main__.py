"""``python -m benchmarks.quality``: measure what is missing, print the tables; or write the page of what is there."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .methods import METHODS, STUDIED
from .pages import PAGE, write
from .protocols import PROTOCOLS
from .records import ONE_SHOT, read
from .study import TASKS, cells, run
from .tables import tables

RESULTS = Path(__file__).parents[1] / "results" / "quality" / "cpu.jsonl"
PASSES = (60, 300, 1000)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=STUDIED, metavar="METHOD",
                        help="default: all but the ablations")  # fmt: skip
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=[ONE_SHOT], metavar="PROTOCOL",
                        help=f"of {', '.join(PROTOCOLS)} (default: {ONE_SHOT})")  # fmt: skip
    parser.add_argument("--sparsities", nargs="+", type=float, metavar="S", help="default: those of each task")
    parser.add_argument("--passes", nargs="+", type=int, default=list(PASSES), metavar="COUNT")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, 60 passes, one sparsity of each task: at most 15 minutes on two cores",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="appended to")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--tables", action="store_true", help="only print the tables of what is there")
    only.add_argument("--pages", type=Path, metavar="DOCS",
                      help=f"only write {PAGE} and its pictures into this folder, and the table of the README beside it"
                      )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.quick:
        options.passes, options.seeds = [60], 1
    if options.pages is not None:
        try:
            written = write(read(options.out), options.passes, options.pages)
        except ValueError as error:
            parser.error(str(error))
        print("\n".join(map(str, written)))
        return 0
    if not options.tables:
        wanted = cells(
            options.tasks, options.methods, options.sparsities, options.passes, range(options.seeds),
            options.protocols, telling=options.quick and options.sparsities is None,
        )  # fmt: skip
        run(wanted, options.out, lambda line: print(line, file=sys.stderr, flush=True))
    print(tables(read(options.out), options.passes, options.protocols))
    return 0


if __name__ == "__main__":  # only there: both are of the whole process
    logging.getLogger("sfpk_kernels").setLevel(logging.ERROR)  # alarms of settings that are poor on purpose
    torch.set_num_threads(1)  # the same sums on every machine with other cores
    sys.exit(main())
