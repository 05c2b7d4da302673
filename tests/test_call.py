"""One call: the same order everywhere, sparsity or config, and how it is computed apart from what decides the mask."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sfpk_kernels
from sfpk_kernels import (
    Execution,
    GradualPruner,
    RetrainConfig,
    SFPKConfig,
    SFPKPruner,
    baselines,
    plan,
    prune,
    retrain,
)  # fmt: skip
from sfpk_kernels.search.energy.choice import VMAP_WEIGHTS

from .processes import python
from .settings import population
from .snapshot import Snapshot

DATA = Path(__file__).parent / "data"
QUICK = SFPKConfig(0.8, n_particles=2, n_steps=3)


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_the_simple_case_is_one_line(mlp, vectors):
    result = prune(mlp, vectors, 0.8, execution=Execution(energy_mode="sequential"))
    assert result.config == SFPKConfig(0.8)
    assert (
        result.mask == prune(mlp, vectors, config=SFPKConfig(0.8), execution=Execution(energy_mode="sequential")).mask
    )
    assert SFPKPruner(mlp, 0.8).config == SFPKConfig(0.8)
    assert SFPKPruner(mlp, 0.8).execution == Execution()
    assert GradualPruner(mlp, vectors, 0.8, retrain=1).config == SFPKConfig(0.8)


OLD = {
    "prune": lambda m, b: prune(m, loss_fn, b, QUICK),
    "prune, no loss": lambda m, b: prune(m, None, b, QUICK),
    "prune, named": lambda m, b: prune(m, loss_fn, b, config=QUICK),
    "prune, config third": lambda m, b: prune(m, b, QUICK),
    "prune, a loss for a loader": lambda m, b: prune(m, loss_fn, 0.8),
    "pruner": lambda m, b: SFPKPruner(m, loss_fn, QUICK),
    "pruner, no loss": lambda m, b: SFPKPruner(m, None, QUICK),
    "pruner, named": lambda m, b: SFPKPruner(m, loss_fn, config=QUICK),
    "pruner, config second": lambda m, b: SFPKPruner(m, QUICK),
    "gradual": lambda m, b: GradualPruner(m, None, b, QUICK, retrain=1),
    "gradual, named": lambda m, b: GradualPruner(m, loss_fn, b, config=QUICK, retrain=1),
    "plan": lambda m, b: plan(m, QUICK, b[0]),
    "plan, named": lambda m, b: plan(m, QUICK, example_batch=b[0]),
    "magnitude": lambda m, b: baselines.magnitude(m, None, None, 0.8),
    "snip": lambda m, b: baselines.snip(m, None, b, 0.8),
    "snip, named": lambda m, b: baselines.snip(m, loss_fn, b, sparsity=0.8),
    "retrain": lambda m, b: retrain(m, None, b, baselines.magnitude(m, 0.5), RetrainConfig(1)),
}


@pytest.mark.parametrize("name", OLD)
def test_the_order_of_earlier_versions_is_an_error_that_shows_the_new_one(mlp, vectors, name):
    snapshot = Snapshot(mlp)
    function = {"pruner": "SFPKPruner", "gradual": "GradualPruner"}.get(name.split(",")[0], name.split(",")[0])
    with pytest.raises(TypeError, match=rf"{function}\(model, |unexpected keyword|multiple values"):
        OLD[name](mlp, vectors)
    snapshot.check()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "sparsity: wanted a number in (0, 1), or config=SFPKConfig(…), got neither; the call is prune(model, "),
        ({"sparsity": 0.8, "config": QUICK}, "sparsity: wanted it in config alone, got 0.8 beside config with spars"),
        ({"config": {"sparsity": 0.8}}, "config: wanted an SFPKConfig, got dict: make one with SFPKConfig(sparsity=…)"),
        ({"config": SFPKConfig}, "config: wanted an SFPKConfig, got the class SFPKConfig: make one"),
        ({"sparsity": 0.8, "execution": "vmap"}, "execution: wanted an Execution, got str: make one with Execution(…)"),
        ({"sparsity": "0.8"}, "sparsity: wanted a number in (0, 1), got str"),
        ({"sparsity": True}, "sparsity: wanted a number in (0, 1), got bool"),
        ({"sparsity": 0.8, "n_steps": 5}, "n_steps: wanted config=SFPKConfig(sparsity=…, n_steps=…); the call is"),
        ({"sparsity": 0.8, "compile": True}, "compile: wanted execution=Execution(compile=…); the call is prune(model"),
        ({"sparsity": 0.8, "checkpoints": [0.5]}, "checkpoints: wanted waypoints=[…]; the call is"),
        ({"sparsity": 0.8, "loss_fn": nn.CrossEntropyLoss()}, "loss_fn: wanted a function (model, batch) -> scalar, "),
    ],
)
def test_settings_that_do_not_go_together_are_named(mlp, vectors, arguments, words):
    with pytest.raises(TypeError, match=re.escape(words)):
        prune(mlp, vectors, **arguments)


@pytest.mark.parametrize("field", ["energy_mode", "chunk_size", "dtype", "microbatch", "compile", "offload", "backend"])
def test_a_field_of_the_execution_is_none_of_the_config(field):
    with pytest.raises(TypeError, match=rf"^{field}: wanted as execution=Execution\({field}=…\), got"):
        SFPKConfig(0.8, **{field: None})
    with pytest.raises(TypeError, match=rf"^{field}: wanted as execution"):
        QUICK.replace(**{field: None})


def test_memory_is_called_update_now(mlp):
    with pytest.raises(TypeError, match="^memory: wanted as update='jacobi'"):
        SFPKConfig(0.8, memory="lean")
    assert SFPKConfig.from_dict({"sparsity": 0.8, "memory": "lean", "energy_mode": "vmap"}).update == "gauss_seidel"
    assert SFPKConfig.from_dict({"sparsity": 0.8, "memory": "auto"}).update == "jacobi"
    with pytest.raises(ValueError, match="energy_mode: wanted another than 'vmap' with update='gauss_seidel'"):
        SFPKPruner(mlp, config=QUICK.replace(update="gauss_seidel"), execution=Execution(energy_mode="vmap"))


# --- how it is computed does not decide the mask ---


@pytest.mark.parametrize(
    "fields", [{}, {"energy_mode": "vmap"}, {"energy_mode": "vmap", "chunk_size": 2}, {"energy_mode": "timed"},
               {"microbatch": 8}, {"offload": "cpu"}, {"memory_limit": 10**9}, {"backend": "reference"}], ids=str,
)  # fmt: skip
def test_the_execution_decides_nothing_but_rounding(mlp, vectors, fields):
    expected = prune(mlp, vectors, config=SFPKConfig(0.8, n_steps=10), execution=Execution(energy_mode="sequential"))
    found = prune(mlp, vectors, config=SFPKConfig(0.8, n_steps=10), execution=Execution(**fields))
    torch.testing.assert_close(found.particles, expected.particles, rtol=1e-3, atol=1e-5)
    assert found.mask.iou(expected.mask) > 0.9


def test_a_micro_batch_whose_statistics_would_decide_is_refused(convnet, images):
    for make in (prune, plan):
        with pytest.raises(ValueError, match="^microbatch: wanted None, or bn='running' beside it, got 4 with"):
            make(convnet, images, 0.8, execution=Execution(microbatch=4))
    config = SFPKConfig(0.8, n_particles=2, n_steps=2, bn="running")
    assert prune(convnet, images, config=config, execution=Execution(microbatch=4)).mask.kept > 0


LINEAR = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 4))
WIDE = nn.Sequential(
    nn.Linear(8, 16), nn.Linear(16, math.ceil(VMAP_WEIGHTS / 16)), nn.Linear(math.ceil(VMAP_WEIGHTS / 16), 4)
)
WITH = {
    "LayerNorm": nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)),
    "BatchNorm1d": nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)),
    "Conv1d": nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(12, 4)),
    "ParametrizationList": nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 16)), nn.Linear(16, 4)),
}


def chosen(model, execution=None, **fields):
    batches = [(torch.randn(8, 8), torch.randint(4, (8,))) for _ in range(2)]
    config = SFPKConfig(0.5, n_particles=2, n_steps=1, **fields)
    return plan(model, batches, config=config, execution=execution).choice


def test_auto_follows_the_written_rule():
    assert chosen(LINEAR).mode == "vmap"
    assert "linear layers alone, of 212 weights" in chosen(LINEAR).reason
    assert chosen(LINEAR, update="gauss_seidel").mode == "sequential"
    assert chosen(LINEAR, Execution(offload="cpu")).mode == "vmap"  # here both devices are the same
    assert chosen(WIDE).mode == "sequential"
    assert re.search(r"a model of 1,\d\d\d,\d\d\d weights, more than 1,048,576", chosen(WIDE).reason)
    for kind, model in WITH.items():
        choice = chosen(model)
        assert choice.mode == "sequential"
        assert choice.reason.startswith(f"a model with {kind.removeprefix('Parametrized')}"), choice.reason


def test_timed_is_a_trial_and_none_where_runs_must_repeat():
    choice = chosen(LINEAR, Execution(energy_mode="timed"))
    assert choice.reason.startswith("per particle sequential ")
    assert set(choice.seconds) == {"sequential", "vmap"}
    torch.use_deterministic_algorithms(True)
    try:
        choice = chosen(LINEAR, Execution(energy_mode="timed"))
        assert (choice.mode, set(choice.seconds)) == ("sequential", {"sequential"})
        assert chosen(LINEAR).mode == "vmap"
    finally:
        torch.use_deterministic_algorithms(False)


def test_defaults_repeat_bit_for_bit_from_process_to_process():
    script = (
        "import torch, sfpk_kernels as sk\n"
        "from torch import nn\n"
        "torch.manual_seed(0)\n"
        "batches = [(torch.randn(16, 1, 8, 8), torch.randint(4, (16,))) for _ in range(5)]\n"
        "heads = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))\n"
        "convs = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))\n"
        "for model in (heads, convs):\n"
        "    result = sk.prune(model, batches, config=sk.SFPKConfig(0.8, n_particles=3, n_steps=6), progress=False)\n"
        "    print(result.plan.choice.mode, result.mask.fingerprint(), float(result.particles.double().sum()))\n"
    )
    where = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(sfpk_kernels.__file__))}
    one = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=where).stdout
    assert one == python(script)
    assert one.split()[::3] == ["vmap", "sequential"]


# --- files of earlier versions ---


def earlier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    return model, [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(6)]


@pytest.mark.parametrize(
    ("name", "update", "mode"), [("fast", "jacobi", "sequential"), ("lean", "gauss_seidel", "auto")]
)
def test_a_run_saved_by_the_version_with_memory_goes_on(name, update, mode):
    """Written with memory="auto" and "lean", half-way; fields of both classes in one."""
    model, batches = earlier()
    how = {"config": population(0.8, n_particles=3, n_steps=6, momentum=0.1, update=update), "waypoints": [0.3, 0.6]}
    pruner = SFPKPruner(model, **how, execution=Execution(energy_mode=mode))
    pruner.load(DATA / f"earlier_run_{name}.sfpk")
    assert len(pruner.history) == 3
    whole = SFPKPruner(model, **how, execution=Execution(energy_mode="sequential"))
    for k in range(6):
        some = [batches[(3 * k + i) % 6] for i in range(3)]
        whole.step(some)
        if k >= 3:
            pruner.step(some)
    result = pruner.result()
    assert result.plan.update == update
    assert result.mask.iou(whole.result().mask) > 0.9  # saved on another machine
    torch.testing.assert_close(result.particles, whole.particles, rtol=0.05, atol=0.05)
    other = {"jacobi": "gauss_seidel", "gauss_seidel": "jacobi"}[update]
    wrong = SFPKPruner(model, config=how["config"].replace(update=other), execution=Execution(energy_mode=mode))
    with pytest.raises(ValueError, match=f"config: .* got a difference in update '{update}'"):
        wrong.load(DATA / f"earlier_run_{name}.sfpk")


def test_a_gradual_run_saved_by_the_version_with_memory_goes_on():
    model, batches = earlier()
    config = population(0.8, n_particles=2, n_steps=6)
    pruner = GradualPruner(
        model, batches, config=config, execution=Execution(energy_mode="sequential"), shots=3,
        retrain=RetrainConfig(1, lr=0.02),
    )  # fmt: skip
    assert pruner.run(resume=DATA / "earlier_gradual.sfpk").mask.kept == round(0.2 * 144)
    assert pruner.finished == 3


# --- the bar ---


def test_the_progress_bar_fits_80_columns(mlp, vectors, capfd):
    prune(mlp, vectors, config=QUICK.replace(n_steps=30), progress=True)
    lines = re.split(r"[\r\n]", capfd.readouterr().err)
    bars = [line for line in lines if line.startswith("SFPK:")]
    assert any("30/30" in line and "loss=" in line and "sparsity=0.8000" in line for line in bars)
    assert all(len(line) <= 80 for line in bars), max(bars, key=len)
