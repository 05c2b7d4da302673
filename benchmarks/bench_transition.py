"""One step of mask arithmetic: naive / vectorised eager / torch.compile / ours, beside the copy bandwidth.

    python benchmarks/bench_transition.py [--n 10] [--d 4000000] [--rounds 9] [--sweep | --slope]

One process; providers take turns, so that drift hits all alike. A provider that disagrees with the fp64 reference is
reported as wrong and not timed. Prints medians with p20 and p80, the ratio of each to ours, and ours against
the floor: 5·n·d·4 bytes at the bandwidth of a copy (bytes read and written) measured in the same run.
"""

import argparse
import math
import platform
import statistics
import time
from pathlib import Path

import torch
from transition_providers import eager, naive

from sfpk_kernels.ops import transition_

STEP, RADIUS, REPULSION = 1e-3, 2.0, 0.2
GATE = 1e-3  # relative error of the move; the textbook forms lose more digits than ours


OURS = {
    "ours": {},
    "ours weighted": {"kernel": "weighted_rbf"},
    "ours retract + consensus": {"target_density": 0.9, "consensus": 0.3},
}


def options_of(name, d):
    """Arguments of transition_ for one of our rows; the other providers do what plain "ours" does."""
    saliency = torch.rand(d, generator=torch.Generator().manual_seed(1)) + 0.1
    return {"step": STEP, "radius": RADIUS, "repulsion": REPULSION, "saliency": saliency, **OURS.get(name, {})}


def ours(name, d):
    """In place on a copy made once; the state is handed on as in a run."""
    held, options = {}, options_of(name, d)

    def run(masks, grads):
        if "masks" not in held:
            held["masks"] = masks.clone()
        held["state"] = transition_(held["masks"], grads, state=held.get("state"), **options)
        return held["masks"]

    return run


def providers(n, d):
    table = {name: ours(name, d) for name in OURS}
    table["eager"] = lambda m, g: eager(m, g, STEP, RADIUS, REPULSION)
    compiled = torch.compile(eager)
    table["compiled"] = lambda m, g: compiled(m, g, STEP, RADIUS, REPULSION)
    if n * n * d <= 500_000_000:
        table["naive"] = lambda m, g: naive(m, g, STEP, RADIUS, REPULSION)
    return table


def agrees(name, run, masks, grads):
    """The gate: one step from the same start against the fp64 reference, with the provider's own options."""
    exact = masks.double()
    transition_(exact, grads.double(), backend="reference", **options_of(name, masks.shape[1]))
    got = run(masks, grads)
    return float((got - exact).norm() / (exact - masks).norm()) < GATE


def measure(n, d, rounds):
    torch.manual_seed(0)
    masks, grads = 1 - 0.05 * torch.rand(n, d), torch.randn(n, d)
    target = torch.empty_like(masks)
    table = {"copy": lambda m, g: target.copy_(m), **providers(n, d)}
    for name in list(table):
        if name != "copy" and not agrees(name, table[name], masks, grads):
            print(f"  {name}: WRONG, not timed")
            del table[name]
    times = {name: [] for name in table}
    for round_number in range(rounds + 1):
        for name, run in table.items():
            if name == "naive" and round_number > 3:  # seconds each
                continue
            started = time.perf_counter()
            run(masks, grads)
            if round_number:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    return times


def report(n, d, rounds):
    times = measure(n, d, rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    bandwidth = 2 * n * d * 4 / median["copy"]
    floor = 5 * n * d * 4 / bandwidth
    print(f"n = {n}, d = {d:,}: copy {bandwidth / 1e9:.1f} GB/s, floor {1e3 * floor:.2f} ms")
    for name, values in times.items():
        if name == "copy":
            continue
        low, high = (sorted(values)[int(share * (len(values) - 1))] for share in (0.2, 0.8))
        line = f"  {name:<26} {1e3 * median[name]:9.2f} ms  [{1e3 * low:.2f}, {1e3 * high:.2f}]"
        line += f"  {median[name] / median['ours']:7.2f} × ours"
        if name.startswith("ours"):
            line += f"  {median[name] / floor:5.2f} × floor"
        print(line, flush=True)


def slope(n, rounds):
    """Exponent of time over n·d, three decades beyond the caches, by least squares in the logarithms."""
    points = []
    for d in (100_000, 316_000, 1_000_000, 3_160_000, 10_000_000, 31_600_000, 100_000_000):
        masks, grads = 1 - 0.05 * torch.rand(n, d), torch.randn(n, d)
        run, times = ours("ours", d), []
        for _ in range(rounds + 2):
            started = time.perf_counter()
            run(masks, grads)
            times.append(time.perf_counter() - started)
        points.append((math.log(n * d), math.log(statistics.median(times[2:]))))
        del masks, grads, run  # at the end 12 GB for n = 10
        print(f"  n = {n}, d = {d:>11,}: {1e3 * math.exp(points[-1][1]):8.3f} ms", flush=True)
    print(f"  time ~ (n·d)^{statistics.linear_regression(*zip(*points, strict=True)).slope:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--d", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sweep", action="store_true", help="n in 1, 4, 10, 32 and d in 1e5, 1e6, 1e7")
    parser.add_argument("--slope", action="store_true", help="how the time of ours grows with n·d")
    options = parser.parse_args()
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": ?")
    print(f"{cpu.split(':')[1].strip()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"Python {platform.python_version()}")  # fmt: skip
    if options.slope:
        return slope(options.n, options.rounds)
    shapes = [(n, d) for d in (10**5, 10**6, 10**7) for n in (1, 4, 10, 32)] if options.sweep else []
    for n, d in shapes or [(options.n, options.d)]:
        report(n, d, options.rounds)


if __name__ == "__main__":
    main()
