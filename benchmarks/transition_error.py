"""Relative error of the fused transition's move against the fp64 reference, over n and d.

    python benchmarks/transition_error.py [--most 100000000] [--device cpu]

Random particles near 1, three steps each that hand the statistics on; prints the largest error
of a step. ``--most`` bounds n·d.
"""

import argparse
import itertools

import torch

from sfpk_kernels.ops import transition_

PARTICLES = (1, 2, 4, 10, 32, 64, 150)
COORDINATES = (1, 10, 10**3, 10**4, 10**5, 10**6, 10**7, 10**8)
STEPS = 3


def largest_error(n, d, device):
    generator = torch.Generator().manual_seed(n + d)
    masks = (1 - 0.1 * torch.rand(n, d, generator=generator)).to(device)
    worst, state = 0.0, None
    for k in range(STEPS):
        grads = torch.randn(n, d, generator=generator).to(device)
        options = {"step": 0.02, "radius": 2.0, "repulsion": 0.2, "target_density": 0.9 - 0.02 * k}
        options["consensus"] = 0.3 if k == STEPS - 1 else 0.0
        start, exact = masks.double(), masks.double()
        state = transition_(masks, grads, state=state, **options)
        transition_(exact, grads.double(), backend="reference", **options)
        worst = max(worst, float((masks - exact).norm() / (exact - start).norm()))
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=10**8, help="largest n·d")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    worst = 0.0
    for d, n in itertools.product(COORDINATES, PARTICLES):
        if n * d > options.most:
            continue
        error = largest_error(n, d, options.device)
        worst = max(worst, error)
        print(f"n = {n:>3}, d = {d:>11,}: {error:.1e}", flush=True)
    print(f"largest: {worst:.1e}")


if __name__ == "__main__":
    main()
