"""Masks taken on the way of one run against those of runs of their own: the table in docs/results.md.

    OMP_NUM_THREADS=1 python benchmarks/anytime_masks.py [--networks 6]

The demo's networks and data, one shot to 98 %, test accuracy after batch-norm re-estimation.
"""

import argparse
import copy
import statistics

from sfpk_kernels import MaskSet, SFPKConfig, prune, recalibrate_batchnorm
from sfpk_kernels.demo.task import TRAINING_BATCH, accuracy, load_digits, train

SPARSITIES = (0.80, 0.90, 0.95, 0.98)
RUNS = {
    "as it is": {},
    "pull from 0.25 K": {"consensus_start": 0.25},
    "pull from the start": {"consensus_start": 0.0},
    "settle=True": {"settle": True},
}
OWN = "runs of their own"


def main() -> dict[str, dict[float, list[float]]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=6, help="one per seed")
    networks = parser.parse_args().networks
    digits = load_digits()
    found = {name: {sparsity: [] for sparsity in SPARSITIES} for name in (*RUNS, OWN)}
    for seed in range(networks):
        model = train(digits, seed, 15)

        def search(sparsity: float, checkpoints=(), model=model, seed=seed, **fields):
            config = SFPKConfig.preset("population", sparsity=sparsity, seed=seed, **fields)
            return prune(model, digits.loader(seed), config=config, waypoints=checkpoints, progress=False)

        def measure(name: str, sparsity: float, mask: MaskSet, model=model, seed=seed) -> None:
            pruned = recalibrate_batchnorm(mask.apply_(copy.deepcopy(model)), digits.loader(seed, TRAINING_BATCH))
            found[name][sparsity].append(accuracy(pruned, digits))

        for name, fields in RUNS.items():
            result = search(SPARSITIES[-1], SPARSITIES[:-1], **fields)
            for sparsity in SPARSITIES:
                measure(name, sparsity, result.mask_at(sparsity))
        for sparsity in SPARSITIES:
            measure(OWN, sparsity, search(sparsity).mask)
        print(f"network {seed + 1} of {networks}", flush=True)
    print("| removed | " + " | ".join(found) + " |\n|" + "---|" * (len(found) + 1))
    for sparsity in SPARSITIES:
        cells = (f"{100 * statistics.mean(rows[sparsity]):.2f}" for rows in found.values())
        print(f"| {sparsity:.0%} | " + " | ".join(cells) + " |")
    return found


if __name__ == "__main__":
    main()
