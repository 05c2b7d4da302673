"""Masked weights, and polarize + apply: ours beside plain PyTorch, the authors' way, and the copy bandwidth.

    python benchmarks/bench_masked_weights.py [--n 10] [--d 4000000] [--rounds 9]

One process; providers take turns, so that drift hits all alike. A provider that disagrees with the reference is
reported as wrong and not timed. Prints medians with p20 and p80 and, for ours, the floor: the bytes of mask, saliency
and weights read and of the result written, at the bandwidth of a copy (bytes read and written) in the same run.
"""

import argparse
import platform
import statistics
import time
from pathlib import Path

import torch

from sfpk_kernels.ops import mask_gradient, masked_weights, pack_mask, topk_mask, topk_threshold

KEPT = 0.2
LAYERS = 20
SCORE = "abs_saliency"


class Case:
    """Particles of one size, their masks in every form, and the right answer."""

    def __init__(self, n, d):
        torch.manual_seed(0)
        self.n, self.d, self.k = n, d, round(KEPT * d)
        self.particles = 1 - 0.5 * torch.rand(n, d)
        self.theta = torch.randn(d)
        self.saliency = self.theta.abs()
        self.cut = topk_threshold(self.particles, self.k, score=SCORE, saliency=self.saliency)
        self.mask = topk_mask(self.particles, self.k, score=SCORE, saliency=self.saliency, backend="reference")
        self.packed = pack_mask(self.mask)
        self.right = torch.where(self.mask, self.theta, 0.0)
        self.out = torch.empty(n, d)
        self.half = torch.empty(n, d, dtype=torch.bfloat16)
        self.bounds = [d * i // LAYERS for i in range(LAYERS + 1)]

    def apply(self, mask, out=None, **options):
        return masked_weights(self.theta, mask, out=self.out if out is None else out, **options)

    def by_cut(self, out=None):
        return self.apply(self.particles, out, cut=self.cut, score=SCORE, saliency=self.saliency)

    def polarize_and_apply(self, guess):
        cut = topk_threshold(self.particles, self.k, score=SCORE, saliency=self.saliency, guess=guess)
        return self.apply(self.particles, cut=cut, score=SCORE, saliency=self.saliency)

    def authors_way(self):
        """Per particle: score, k-th value; per layer: compare, multiply."""
        for i in range(self.n):
            score = self.particles[i].abs() * self.saliency
            threshold = score.kthvalue(self.d - self.k + 1).values
            for a, b in zip(self.bounds, self.bounds[1:], strict=False):
                self.out[i, a:b] = self.theta[a:b] * (score[a:b] >= threshold).to(torch.float32)
        return self.out

    def per_particle_topk(self):
        """Per particle: score, topk; then one multiplication."""
        for i in range(self.n):
            best = (self.particles[i].abs() * self.saliency).topk(self.k, sorted=False).indices
            mask = torch.zeros(self.d).scatter_(0, best, 1.0)
            torch.mul(self.theta, mask, out=self.out[i])
        return self.out

    def rows(self):
        """Name → what to run, and the bytes it has to move (None: no floor of its own)."""
        n, d = self.n, self.d
        warm, zero = self.cut.threshold * 1.02, torch.zeros(())
        return {
            "ours, cut": (self.by_cut, 8 * n * d + 8 * d),
            "ours, bool": (lambda: self.apply(self.mask), 5 * n * d + 4 * d),
            "ours, packed": (lambda: self.apply(self.packed), 4.125 * n * d + 4 * d),
            "ours, factors": (lambda: self.apply(self.mask_floats()), 8 * n * d + 4 * d),
            "ours, cut, bf16 result": (lambda: self.by_cut(self.half), 6 * n * d + 8 * d),
            "torch.where by bool": (lambda: torch.where(self.mask, self.theta, zero, out=self.out), None),
            "θ * mask.float()": (lambda: torch.mul(self.theta, self.mask.float(), out=self.out), None),
            "ours, polarize + apply, cold": (lambda: self.polarize_and_apply(None), None),
            "ours, polarize + apply, warm": (lambda: self.polarize_and_apply(warm), None),
            "authors' way": (self.authors_way, None),
            "topk and scatter": (self.per_particle_topk, None),
            "ours, mask gradient": (lambda: mask_gradient(self.theta, self.out), 8 * n * d + 4 * d),
        }

    def mask_floats(self):
        if not hasattr(self, "_floats"):
            self._floats = self.mask.float()
        return self._floats

    def is_right(self, name, result):
        if name == "ours, mask gradient":
            return torch.equal(result, self.theta * self.out)
        right = self.right.to(result.dtype)
        if name == "authors' way":  # keeps every tie: no fewer weights, and the same but for those
            return bool((result == right).float().mean() > 1 - 1e-5)
        return torch.equal(result, right)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--d", type=int, default=4_000_000)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ": ?")
    print(f"{cpu.split(':')[1].strip()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"Python {platform.python_version()}")  # fmt: skip
    case = Case(options.n, options.d)
    rows = case.rows()
    for name in list(rows):
        if not case.is_right(name, rows[name][0]()):
            print(f"  {name}: WRONG, not timed")
            del rows[name]
    target = torch.empty_like(case.particles)
    rows["copy"] = (lambda: target.copy_(case.particles), None)
    times = {name: [] for name in rows}
    for round_number in range(options.rounds):
        for name, (run, _) in rows.items():
            if name in ("authors' way", "topk and scatter") and round_number >= 3:
                continue
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    bandwidth = 8 * options.n * options.d / median["copy"]
    print(f"n = {options.n}, d = {options.d:,}, {KEPT:.0%} kept: copy {bandwidth / 1e9:.1f} GB/s")
    warm = median["ours, polarize + apply, warm"]
    for name, (_, floor) in rows.items():
        low, high = (sorted(times[name])[round(q * (len(times[name]) - 1))] for q in (0.2, 0.8))
        line = f"  {name:<30} {1e3 * median[name]:9.2f} ms  [{1e3 * low:.2f}, {1e3 * high:.2f}]"
        if floor:
            line += f"  {median[name] * bandwidth / floor:5.2f} × floor"
        if name in ("authors' way", "topk and scatter"):
            cold = median["ours, polarize + apply, cold"]
            line += f"  {median[name] / cold:5.1f} × ours cold, {median[name] / warm:5.1f} × ours warm"
        print(line)


if __name__ == "__main__":
    main()
