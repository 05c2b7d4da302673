"""What no machine without a GPU can show: sizes beyond 32 bits on a real card, and a second card.

    python benchmarks/gpu_large.py [--device cuda] [--scale full] [--only NAME …]

``--scale small`` runs the same checks at sizes for a test; ``--device cpu`` works, too. One line per check; exit code 1
if one failed. A check that needs a second card says so where there is one only.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sfpk_kernels import Execution, SFPKConfig, prune
from sfpk_kernels.ops import masked_weights, topk_mask, topk_threshold, transition_

BILLIONS = 2**31  # entries in all that offsets of 32 bits do not reach
SIZES = {"full": 85_000_000, "small": 30_011}
ROWS = {"full": 10, "small": 4}


class Skipped(Exception):
    """Why a check cannot be made here."""


def parts(d: int, size: int = 1 << 22) -> list[slice]:
    """Columns in pieces: fp64 copies of everything would not fit."""
    return [slice(begin, min(begin + size, d)) for begin in range(0, d, size)]


def random(device: torch.device, *shape: int) -> Tensor:
    return torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(0))


def fitting(device: torch.device, wanted: int, bytes_each: float) -> int:
    """How many rows of so many bytes the device has room for."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 8e9
    return max(1, min(wanted, int(0.8 * free / bytes_each)))


def transition_moves_as_it_should(device: torch.device, scale: str) -> str:
    """Two steps: s·Δm = Δt, ‖Δm‖ = r Δt/‖s‖, and the statistics of the state; sums in fp64 by torch."""
    d = SIZES[scale]
    n = fitting(device, ROWS[scale], 4 * 4 * d)
    masks, step, radius = 1 - 0.05 * random(device, n, d), 0.01, 1.5
    grads, state = torch.randn(n, d, device=device), None
    for _ in range(2):
        before = masks.clone()
        old = (sum(before[:, p].double().square().sum(dim=1) for p in parts(d)) / d).sqrt()
        norms = old * d**0.5
        state = transition_(masks, grads, step=step, radius=radius, repulsion=0.2, state=state)
        along = torch.zeros(n, dtype=torch.float64, device=device)
        length, after = torch.zeros_like(along), torch.zeros_like(along)
        for p in parts(d):
            move = masks[:, p].double() - before[:, p].double()
            along -= (before[:, p].double() * move).sum(dim=1)
            length += move.square().sum(dim=1)
            after += masks[:, p].double().square().sum(dim=1)
        slope = norms / (d * old)  # ‖s‖ of ρ = sqrt(Σ m² / d)
        torch.testing.assert_close(along / (d * old), torch.full_like(along, step), rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(length.sqrt(), radius * step / slope, rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(state.densities, (after / d).sqrt(), rtol=1e-6, atol=1e-9)
        del before
    return f"n = {n}, d = {d:,}"


def transition_agrees_with_the_reference(device: torch.device, scale: str) -> str:
    """All columns, in fp64, for as many particles as the reference has room for; with retraction and a pull."""
    d = SIZES[scale]
    n = fitting(device, 3, 20 * 8 * d)
    masks, grads, theta = (
        1 - 0.05 * random(device, n, d),
        torch.randn(n, d, device=device),
        torch.randn(d, device=device),
    )
    options = {"step": 0.01, "radius": 1.5, "repulsion": 0.2, "target_density": 0.9, "consensus": 0.1}
    exact = masks.double()
    transition_(exact, grads.double(), weights=theta.double(), backend="reference", **options)
    transition_(masks, grads, weights=theta, **options)
    worst = max(float((masks[:, p].double() - exact[:, p]).abs().max()) for p in parts(d))
    assert worst < 1e-5, worst
    return f"n = {n}, d = {d:,}, worst difference {worst:.1e}"


def selection_is_exact(device: torch.device, scale: str) -> str:
    """Against a sort."""
    d = SIZES[scale]
    values = torch.randn(2, d, device=device)
    values[1] = (4 * values[1]).round()  # ties all over
    k = d // 5
    cut, mask = topk_threshold(values, k), topk_mask(values, k)
    for row in range(2):
        assert float(cut.threshold[row]) == float(values[row].sort().values[d - k])
        assert int(mask[row].sum()) == k
        places = torch.arange(d, device=device)
        tied = values[row] == cut.threshold[row]
        assert torch.equal(mask[row], (values[row] > cut.threshold[row]) | (tied & (places < cut.tie_end[row])))
    return f"d = {d:,}"


def selection_of_a_long_list(device: torch.device, scale: str) -> str:
    """More than 2^31 entries ranked together."""
    d = SIZES[scale]
    count = fitting(device, BILLIONS // d + 2, 4 * d) if scale == "full" else 3
    if scale == "full" and count * d <= BILLIONS:
        raise Skipped(f"there is room for {count * d:,} entries")
    values = [torch.randn(d, device=device).to(torch.bfloat16) for _ in range(count)]
    k = count * d // 3
    cut, masks = topk_threshold(values, k), topk_mask(values, k)
    assert sum(int(mask.sum()) for mask in masks) == k
    above = sum(int((v.float() > cut.threshold).sum()) for v in values)
    assert above <= k <= above + sum(int((v.float() == cut.threshold).sum()) for v in values)
    return f"{count} × {d:,} = {count * d:,} entries"


def weights_behind_two_to_the_31(device: torch.device, scale: str) -> str:
    """Masked weights of so many rows that offsets exceed 32 bits."""
    d = SIZES[scale]
    n = fitting(device, BILLIONS // d + 2, 5.5 * d) if scale == "full" else 4
    if scale == "full" and n * d <= BILLIONS:
        raise Skipped(f"there is room for {n * d:,} entries")
    theta, mask = torch.randn(d, device=device), torch.empty(n, d, dtype=torch.bool, device=device)
    for row in mask:
        row.copy_(torch.rand(d, device=device) > 0.5)
    out = masked_weights(theta, mask)
    for row in (0, n // 2, n - 1):
        assert torch.equal(out[row], theta * mask[row])
    return f"n = {n}, d = {d:,}: {n * d:,} entries"


def second_card(device: torch.device, scale: str) -> str:
    """Ops and runs on cuda:1 while cuda:0 is current."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        raise Skipped(f"it needs two cards, there is {torch.cuda.device_count() or 'none'}")
    other = torch.device("cuda", 1)
    values = torch.randn(3, 50_000, device=other)
    near = values.cpu()
    assert torch.equal(topk_mask(values, 5000).cpu(), topk_mask(near, 5000, backend="reference"))
    fits(other)
    assert torch.cuda.current_device() == 0
    return "ops, runs one by one, by vmap and by CUDA graphs"


def runs(device: torch.device, scale: str) -> str:
    """A run in every way of computing energies ends at the same mask, but for rounding."""
    return fits(device)


def fits(device: torch.device) -> str:
    """A small run in every energy mode on a device."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10)).to(device)
    batches = [(torch.randn(32, 64, device=device), torch.randint(10, (32,), device=device)) for _ in range(20)]
    modes = ["sequential", "vmap", "auto", "timed"] + (["cudagraph"] if device.type == "cuda" else [])
    masks = {}
    for mode in modes:
        config = SFPKConfig.preset("population", sparsity=0.8, n_particles=4, n_steps=10)
        masks[mode] = prune(model, batches, config=config, execution=Execution(energy_mode=mode), progress=False).mask
    first = masks["sequential"].flat()
    shares = {mode: float((mask.flat() == first).double().mean()) for mode, mask in masks.items()}
    assert min(shares.values()) > 0.97, shares
    return ", ".join(f"{mode} {share:.4f}" for mode, share in shares.items())


CHECKS: dict[str, Callable[[torch.device, str], str]] = {
    check.__name__: check
    for check in (
        transition_moves_as_it_should,
        transition_agrees_with_the_reference,
        selection_is_exact,
        selection_of_a_long_list,
        weights_behind_two_to_the_31,
        runs,
        second_card,
    )
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks for real cards.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", choices=tuple(SIZES), default="full")
    parser.add_argument("--only", nargs="+", choices=tuple(CHECKS), default=list(CHECKS))
    options = parser.parse_args()
    failed = 0
    for name in options.only:
        started = time.monotonic()
        try:
            said = "ok: " + CHECKS[name](torch.device(options.device), options.scale)
        except Skipped as reason:
            said = f"skipped: {reason}"
        except Exception as error:
            failed += 1
            said = f"FAILED: {type(error).__name__}: {str(error).strip()[:300]}"
        print(f"{name:<38} {time.monotonic() - started:6.1f} s  {said}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(f"{len(options.only)} checks, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
