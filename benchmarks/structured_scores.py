"""Scores and allocations of the structured baselines: the table in docs/api/baselines.md.

    OMP_NUM_THREADS=1 python benchmarks/structured_scores.py [--networks 5]

The demo's networks and data, one shot, test accuracy of the shrunk model after batch-norm re-estimation.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

from sfpk_kernels import recalibrate_batchnorm
from sfpk_kernels.baselines import StructuredBaseline, structured_magnitude, structured_random, structured_snip
from sfpk_kernels.demo.task import TRAINING_BATCH, accuracy, load_digits, train
from sfpk_kernels.structure import find_structure

REMOVED = (0.5, 0.75)  # of the multiply-accumulates
ALLOCATIONS = ("normalized", "uniform", "global")
Method = Callable[..., StructuredBaseline]
SCORES: dict[str, tuple[Method, dict[str, Any]]] = {
    '`structured_magnitude`, `norm="l2"`': (structured_magnitude, {"norm": "l2"}),
    '`structured_magnitude`, `norm="l1"`': (structured_magnitude, {"norm": "l1"}),
    '`structured_snip`, `sensitivity="gate"`': (structured_snip, {"sensitivity": "gate"}),
    '`structured_snip`, `sensitivity="weights"`': (structured_snip, {"sensitivity": "weights"}),
    "`structured_random`": (structured_random, {}),
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", type=int, default=5, help="one per seed")
    networks = parser.parse_args().networks
    digits = load_digits()
    found: dict[tuple[str, str, float], list[float]] = {}
    for seed in range(networks):
        model, batches = train(digits, seed, 15), list(digits.loader(seed))
        x = digits.train_x[:1]
        structure = find_structure(model, x)
        for name, (method, options) in SCORES.items():
            data = (batches,) if method is structured_snip else ()
            for allocation in ALLOCATIONS if method is not structured_random else ALLOCATIONS[1:]:
                for removed in REMOVED:
                    result = method(
                        model, *data, removed, example_inputs=x, structure=structure, allocation=allocation, **options
                    )
                    smaller = recalibrate_batchnorm(result.shrink(model), digits.loader(seed, TRAINING_BATCH))
                    found.setdefault((name, allocation, removed), []).append(100 * accuracy(smaller, digits))
        print(f"network {seed + 1} of {networks}", flush=True)
    print("| % of MACs removed: 50, 75 | " + " | ".join(ALLOCATIONS) + " |\n|" + "---|" * (len(ALLOCATIONS) + 1))
    for name in SCORES:
        cells = [
            ", ".join(f"{statistics.mean(found[name, allocation, r]):.1f}" for r in REMOVED)
            if (name, allocation, REMOVED[0]) in found
            else "–"
            for allocation in ALLOCATIONS
        ]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
