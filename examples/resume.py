"""A run that is stopped and goes on, masks on the way, another vote, a report.

``--full`` runs more particles and steps.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfpk_kernels import SFPKConfig, StepRecord, prune
from sfpk_kernels.demo.task import load_digits, train


class Stopped(Exception):
    """Stands for a power cut."""


def main(arguments: Sequence[str] = ()) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="more particles and steps")
    full = parser.parse_args(arguments).full
    digits = load_digits()
    model = train(digits, 0, 40 if full else 4)
    size = {"n_particles": 10, "n_steps": 100} if full else {"n_particles": 2, "n_steps": 16}
    config = SFPKConfig.preset("population", sparsity=0.95, **size)  # several particles, whose votes may differ
    waypoints = [0.5, 0.8, 0.9]

    def stop(record: StepRecord) -> None:
        if record.step == config.n_steps // 2:
            raise Stopped

    whole = prune(model, digits.loader(0), config=config, waypoints=waypoints)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.sfpk"
        try:
            prune(
                model,
                digits.loader(0),
                config=config,
                waypoints=waypoints,
                save_every=5,
                save_path=path,
                callbacks=[stop],
            )
        except Stopped:
            print(f"stopped after step {config.n_steps // 2}; {path.stat().st_size:,} bytes on disk")
        # A new loader from its beginning: the batches used before are passed over.
        result = prune(model, digits.loader(0), config=config, waypoints=waypoints, resume=path)
        print(f"resumed: {result.mask}")
        print("the same mask, bit for bit, as without the stop:", result.mask == whole.mask)

        for waypoint in result.waypoints:
            print(f"on the way, after step {waypoint.step}: {waypoint.mask}")
        hard = result.vote("hard")
        print(f"a hard vote of the same particles shares {100 * hard.iou(result.mask):.0f} % with the soft one")
        print(f"all particles agree on {result.stable_core().kept:,} of {result.mask.kept:,} weights")
        page = result.report(Path(folder) / "report")
        print(f"report: {page.stat().st_size:,} bytes")
    return {"same": result.mask == whole.mask, "waypoints": len(result.waypoints)}


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
