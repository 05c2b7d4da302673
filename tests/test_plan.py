"""The plan: predicted bytes against measured ones, refusals and their advice, what auto decides."""

import json
import logging
import re
import statistics

import pytest
import torch
from torch import nn

import sfpk_kernels
from benchmarks import peak
from benchmarks.models import images, mlp, resnet
from sfpk_kernels import Execution, SFPKPruner, prune

from .settings import both, population
from .snapshot import Snapshot

SLOW = [
    ("wide-mlp", {"energy_mode": "sequential"}),
    ("wide-mlp", {"energy_mode": "vmap"}),
    ("wide-mlp", {"energy_mode": "sequential", "merge": 0.5}),
    ("wide-resnet-20", {"energy_mode": "sequential"}),
    ("wide-resnet-20", {"energy_mode": "sequential", "update": "gauss_seidel"}),
    ("vit-small", {"energy_mode": "sequential"}),
    ("vit-small", {"energy_mode": "vmap"}),
    ("gpt-small", {"energy_mode": "sequential"}),
    ("gpt-small", {"update": "gauss_seidel", "particle_dtype": "float16"}),
]


@pytest.mark.skipif(not peak.can_measure(), reason="the peak of a process cannot be set back here")
@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("wide-mlp", {"update": "gauss_seidel"}),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_the_predicted_peak_is_the_measured_one_within_15_percent(model, options):
    # The median of three: what the heap keeps in holes differs from run to run by some percent. Where the first two
    # are within, so is the median.
    found = []
    for _ in range(3):
        found.append(peak.measure(model, "ours", **{"n_particles": 5, "n_steps": 2, **options}))
        within = [each["predicted"] == pytest.approx(each["measured"], rel=0.15) for each in found]
        if within == [True, True]:
            break
    measured = statistics.median(each["measured"] for each in found)
    assert measured > 100e6, "too little to tell"
    assert found[0]["predicted"] == pytest.approx(measured, rel=0.15), found


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"update": "jacobi"}, {"update": "gauss_seidel"}, {"energy_mode": "vmap"}])
def test_the_predicted_peak_on_a_gpu(options):
    torch.manual_seed(0)
    model = mlp((64, 2048, 2048, 10)).cuda()
    batches = [images(8, channels=1)(64) for _ in range(5)]
    settings = both(population, 0.9, n_particles=5, n_steps=2, **options)
    prune(model, batches, **settings)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = prune(model, batches, **settings)
    measured = torch.cuda.max_memory_allocated() - before
    assert result.plan.peak_bytes == pytest.approx(measured, rel=0.15), result.plan.parts


def big():
    return mlp((64, 256, 256, 10)), [images(8, channels=1)(8) for _ in range(4)]


def test_plan_before_a_run():
    model, batches = big()
    snapshot = Snapshot(model)
    config = population(0.9, n_particles=4, n_steps=2)
    plan = sfpk_kernels.plan(model, [batches[0]], config=config)
    snapshot.check()
    d = 64 * 256 + 256 * 256 + 256 * 10
    assert (plan.particles, plan.coordinates, plan.update) == (4, d, "jacobi")
    assert plan.parts["particles"] == plan.parts["gradients"] == 4 * d * 4
    assert plan.fits
    assert plan.peak_bytes == sum(plan.parts.values())
    assert plan.seconds_per_step > 0
    assert json.loads(json.dumps(plan.to_dict()))["peak_bytes"] == plan.peak_bytes
    lean = sfpk_kernels.plan(
        model, [batches[0]], config=config.replace(update="gauss_seidel", particle_dtype="float16")
    )
    assert lean.parts["particles"] == 4 * d * 2
    assert lean.parts["gradients"] == d * 4
    assert lean.peak_bytes < plan.peak_bytes
    words = str(plan)
    assert "4 particles of 84,480 coordinates, update='jacobi'" in words
    assert "peak" in words
    assert "s a step" in words
    assert plan.choice.reason in words


def test_what_does_not_fit_is_refused_with_what_would():
    model, batches = big()
    config = population(0.9, n_particles=16, n_steps=2)
    lean = config.replace(update="gauss_seidel")
    jacobi, seidel = (sfpk_kernels.plan(model, batches, config=one) for one in (config, lean))
    assert (jacobi.update, seidel.update) == ("jacobi", "gauss_seidel")
    limit = Execution(memory_limit=int((jacobi.peak_bytes + seidel.peak_bytes) / 2 / 0.9))
    assert not sfpk_kernels.plan(model, batches, config=config, execution=limit).fits
    with pytest.raises(MemoryError, match="update='gauss_seidel': "):  # never silently another method
        prune(model, batches, config=config, execution=limit)
    result = prune(model, batches, config=lean, execution=limit)
    assert (result.plan.update, result.plan.choice.mode) == ("gauss_seidel", "sequential")


def test_a_run_that_will_not_fit_is_refused_with_what_would():
    model, batches = big()
    config = population(0.9, n_particles=16, n_steps=2, update="jacobi")
    fast = sfpk_kernels.plan(model, [batches[0]], config=config)
    lean = sfpk_kernels.plan(model, [batches[0]], config=config.replace(update="gauss_seidel"))
    state = sum(fast.parts[name] for name in ("particles", "gradients", "dense weights, saliency"))
    limit = int((fast.peak_bytes + max(state, lean.peak_bytes)) / 2 / 0.9)
    pruner = SFPKPruner(model, config=config, execution=Execution(memory_limit=limit))
    snapshot = Snapshot(model)
    with pytest.raises(MemoryError) as caught:
        pruner.run(batches)
    snapshot.check()
    words = str(caught.value)
    assert "this run will not fit" in words
    ways = words[words.index("what takes less") :]
    assert "update='gauss_seidel':" in ways
    assert "(still too much)" not in ways.splitlines()[1]
    assert torch.equal(pruner.particles, torch.ones_like(pruner.particles))
    # The advice holds.
    prune(model, batches, config=config.replace(update="gauss_seidel"), execution=Execution(memory_limit=limit))


def test_particles_that_cannot_fit_are_refused_before_anything_is_allocated(monkeypatch):
    model, _ = big()

    def fail(*args, **kwargs):
        raise AssertionError("allocated")

    monkeypatch.setattr("sfpk_kernels.search.run.ParticleSystem", fail)
    with pytest.raises(MemoryError, match="this run will not fit") as caught:
        SFPKPruner(model, config=population(0.9, n_particles=16), execution=Execution(memory_limit=1_000_000))
    assert "n_particles=8" in str(caught.value)
    assert "still too much" in str(caught.value)
    assert re.search(r"time +not measured", str(caught.value))


def test_the_plan_is_logged_and_printed_beside_a_progress_bar(capsys, caplog):
    model, batches = big()
    config = population(0.9, n_particles=2, n_steps=2)
    with caplog.at_level(logging.INFO, logger="sfpk_kernels"):
        result = prune(model, batches, config=config, progress=True)
    assert str(result.plan) in capsys.readouterr().err
    assert str(result.plan) in caplog.text
    prune(model, batches, config=config, progress=False)
    assert capsys.readouterr().err == ""


def test_available_memory_of_a_container(tmp_path):
    from sfpk_kernels.utils.memory import _cgroup_bytes, available_bytes

    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("400000\n")
    assert _cgroup_bytes(tmp_path) == 600_000
    (tmp_path / "memory.max").write_text("max\n")
    assert _cgroup_bytes(tmp_path) is None
    assert _cgroup_bytes(tmp_path / "absent") is None
    found = available_bytes(torch.device("cpu"))
    assert found is None or found > 0


def test_peak_bytes_follows_tensors():
    from sfpk_kernels.utils.memory import peak_bytes

    def work():
        a = torch.ones(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        b.add_(1)
        b.view(10, 100)
        del a
        torch.ones(250)  # 5,000

    assert peak_bytes(work, torch.device("cpu")) == 8000


def test_a_forced_way_that_cannot_run_is_said_by_the_plan():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x):
            x = self.layer(x.flatten(1))
            return x if float(x.detach().sum()) > -1e9 else -x

    with pytest.raises(RuntimeError, match="energy_mode='vmap' cannot run this model"):
        sfpk_kernels.plan(
            Odd(), [images(8, channels=1)(4)], config=population(0.5), execution=Execution(energy_mode="vmap")
        )


def test_a_model_with_batchnorm_is_left_alone_by_the_plan():
    model = resnet(8, 8, channels=1)
    snapshot = Snapshot(model)
    sfpk_kernels.plan(model, [images(8, channels=1)(4)], config=population(0.5, n_particles=3))
    snapshot.check()
