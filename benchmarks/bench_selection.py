"""Exact selection: ours cold and warm / topk / kthvalue / np.partition / sort, beside the copy bandwidth.

    python benchmarks/bench_selection.py [--d 10000000] [--rounds 7] [--kinds random ...] [--kept 0.5 ...]

One process; providers take turns, so that drift hits all alike. A provider is timed only after it has given the
threshold the reference gives. Prints medians and the ratio of each to ours, and ours against one read of the values at
the bandwidth of a copy (bytes read and written) measured in the same run. "threshold" rows give the k-th largest
value, which is all that kthvalue and np.partition give; "mask" rows also write the bool mask.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from sfpk_kernels import _extension
from sfpk_kernels.ops import topk_mask, topk_threshold

KINDS = {
    "random": lambda d: torch.randn(d),
    "nearly sorted": lambda d: torch.arange(d, dtype=torch.float32) / d + 1e-4 * torch.randn(d),
    "few distinct": lambda d: torch.randint(0, 5, (d,)).float(),
    "all equal": lambda d: torch.full((d,), 0.5),
}
SLOW = 3  # rounds of the providers that take long
WARM_ERROR = 1.02


def providers(values, k, right):
    d, array = values.numel(), values.numpy()
    guess = torch.tensor([right * WARM_ERROR])
    return {
        "ours threshold cold": lambda: topk_threshold(values, k, backend="cpp").threshold.item(),
        "ours threshold warm": lambda: topk_threshold(values, k, guess=guess, backend="cpp").threshold.item(),
        "ours mask cold": lambda: topk_mask(values, k, backend="cpp"),
        "ours mask warm": lambda: topk_mask(values, k, guess=guess, backend="cpp"),
        "np.partition": lambda: float(np.partition(array, d - k)[d - k]),
        "torch.kthvalue": lambda: values.kthvalue(d - k + 1).values.item(),
        "torch.topk": lambda: values.topk(k, sorted=False).values,
        "torch.sort": lambda: values.sort().values[d - k].item(),
    }


def is_right(result, values, k, right):
    """The gate. Masks and values are checked by their smallest kept value and their count."""
    if isinstance(result, float):
        return result == right
    kept = values[result] if result.dtype == torch.bool else result
    return kept.numel() == k and float(kept.min()) == right


def measure(values, k, rounds):
    right = float(np.partition(values.numpy(), values.numel() - k)[values.numel() - k])
    target, copy = torch.empty_like(values), torch.ops.sfpk_cpp.copy_
    table = providers(values, k, right)
    for name in list(table):
        if not is_right(table[name](), values, k, right):
            print(f"  {name}: WRONG, not timed")
            del table[name]
    table["copy"] = lambda: copy(target, values)
    times = {name: [] for name in table}
    for round_number in range(rounds):
        for name, run in table.items():
            if name.startswith("torch.") and round_number >= SLOW:
                continue
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def report(kind, d, share, rounds):
    torch.manual_seed(0)
    values = KINDS[kind](d)
    median = measure(values, int(d * share), rounds)
    bandwidth = 2 * 4 * d / median["copy"]
    read = 4 * d / bandwidth
    print(f"{kind}, d = {d:,}, k/d = {share:g}: copy {bandwidth / 1e9:.1f} GB/s, one read {1e3 * read:.2f} ms")
    for name, seconds in median.items():
        if name == "copy":
            continue
        line = f"  {name:<20} {1e3 * seconds:10.2f} ms"
        if name.startswith("ours"):
            line += f"  {seconds / read:6.2f} × one read"
        else:
            cold, warm = (seconds / median[f"ours threshold {state}"] for state in ("cold", "warm"))
            line += f"  {cold:6.1f} × ours cold  {warm:6.1f} × ours warm"
        print(line, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=float, nargs="+", default=[1e5, 1e6, 1e7])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--kept", type=float, nargs="+", default=[0.02, 0.1, 0.5, 0.95], help="k/d")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    _extension.load()
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": ?")
    print(f"{cpu.split(':')[1].strip()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"numpy {np.__version__}, Python {platform.python_version()}")  # fmt: skip
    for d in options.d:
        for kind in options.kinds:
            for share in options.kept:
                report(kind, int(d), share, options.rounds)


if __name__ == "__main__":
    main()
