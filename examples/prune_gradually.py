"""Gradual pruning to 99 %, retraining in between, against one shot and the same retraining.

The short form takes about ten seconds on one core; ``--full`` runs more particles, steps and epochs.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from sfpk_kernels import GradualPruner, RetrainConfig, SFPKConfig, prune, recalibrate_batchnorm, retrain
from sfpk_kernels.demo.task import TRAINING_BATCH, accuracy, load_digits, train

SPARSITY = 0.99


def main(arguments: Sequence[str] = ()) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="more steps and epochs: minutes")
    full = parser.parse_args(arguments).full
    digits = load_digits()
    dense = train(digits, 0, 40 if full else 5)
    config = SFPKConfig(SPARSITY, n_steps=1000 if full else 32)
    retraining = RetrainConfig(epochs=40 if full else 4)

    def test(model: nn.Module) -> float:
        return accuracy(recalibrate_batchnorm(model, digits.loader(0, TRAINING_BATCH)), digits)

    figures = {"dense": accuracy(dense, digits)}

    # One shot: search once, retrain once. The masks hold in every optimizer step.
    one = copy.deepcopy(dense)
    mask = prune(one, digits.loader(0), config=config).mask
    retrain(one, digits.loader(0, TRAINING_BATCH), mask, retraining)
    figures["one shot"] = test(one)

    # Gradually: the same passes and the same epochs in four shots. The particles go on from shot to shot.
    def pruner(model: nn.Module) -> GradualPruner:
        loader, training = digits.loader(0), digits.loader(0, TRAINING_BATCH)
        return GradualPruner(model, loader, config=config, shots=4, retrain=retraining, retrain_loader=training)

    gradual = copy.deepcopy(dense)
    with tempfile.TemporaryDirectory() as folder:
        # Written after every shot: a killed run goes on with resume=path.
        result = pruner(gradual).run(save=Path(folder) / "gradual.sfpk")
    for record in result.history:
        print(f"shot {record.shot.number}: {record.kept:,} weights, {record.returned} of them came back")
    figures["gradual"] = test(gradual)

    print(f"{SPARSITY:.0%} of the weights removed, {retraining.epochs:g} epochs of retraining; test accuracy in %:")
    for name, value in figures.items():
        print(f"{name:<10} {100 * value:5.1f}")
    return figures


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
