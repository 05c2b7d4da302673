"""One step of mask arithmetic (pytest-benchmark): naive, vectorised eager, torch.compile of it, ours, and a copy."""

import pytest
import torch
from bench_transition import agrees, providers

SHAPES = [(n, d) for d in (100_000, 1_000_000) for n in (1, 4, 10, 32)] + [(10, 10_000_000)]


@pytest.mark.parametrize(("n", "d"), SHAPES)
@pytest.mark.parametrize("name", ["copy", "naive", "eager", "compiled", "ours"])
def test_step(benchmark, name, n, d):
    """Gate first: a provider that leaves the fp64 reference is not timed."""
    benchmark.group = f"n = {n}, d = {d:,}"
    torch.manual_seed(0)
    masks, grads = 1 - 0.05 * torch.rand(n, d), torch.randn(n, d)
    if name == "copy":
        target = torch.empty_like(masks)
        benchmark.pedantic(target.copy_, args=(masks,), rounds=9, warmup_rounds=2)
        return
    run = providers(n, d).get(name)
    if run is None:
        pytest.skip("takes minutes at this size")
    assert agrees(name, run, masks, grads)
    benchmark.pedantic(run, args=(masks, grads), rounds=3 if name == "naive" else 9, warmup_rounds=2)
