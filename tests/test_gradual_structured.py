"""Gradual pruning of channels, heads and neurons: shots, what removed ones keep, resume, the smaller model."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sfpk_kernels import GradualPruner, MaskSet, RetrainConfig, SFPKConfig, export, prune, retrain
from sfpk_kernels.structure import ShrinkRecipe, find_structure

from .attention_nets import vit
from .snapshot import Snapshot
from .structured_nets import Residual, Scaled
from .structured_runs import images, mlp, structured

pytest.importorskip("torch_pruning")

ROOT = Path(__file__).resolve().parent.parent


def residual():
    torch.manual_seed(4)
    return Residual(), torch.randn(2, 3, 8, 8)


def go(model, x, config, data=None, shots=3, retraining=None, **options):
    retraining = RetrainConfig(2, lr=0.02) if retraining is None else retraining
    return GradualPruner(
        model, images() if data is None else data, config=config, shots=shots, retrain=retraining, example_inputs=x,
        **options,
    )  # fmt: skip


def agree(model, values):
    return all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("budget", ["macs", "params", "channels"])
def test_every_shot_meets_its_part_of_the_budget(budget):
    model, x = residual()
    before = [id(p) for p in model.parameters()]
    config = structured(0.6, budget=budget, n_steps=9, layer_sparsity={"stem": (0.25, 0.75)})
    result = go(model, x, config).run()
    dense = result.costs_before[budget]
    for record, costs, keep, mask in zip(result.history, result.costs, result.keeps, result.masks, strict=True):
        limit = round(0.4 ** (record.shot.number / 3) * dense)
        assert 0.75 * limit <= costs[budget] <= limit
        assert 2 <= int(keep[:8].sum()) <= 6
        assert record.kept == mask.kept
    assert [id(p) for p in model.parameters()] == before
    assert [len(record.losses) for record in result.history] == [3, 4, 5]
    assert str(result).startswith("StructuredGradualResult(params ")
    assert result.kept_of_groups() == {"stem": (int(result.keep[:8].sum()), 8), "a": (int(result.keep[8:].sum()), 6)}
    assert [len(result.recipe(shot).groups["stem"]) for shot in (1, 2, 3)] == [int(k[:8].sum()) for k in result.keeps]
    for wrong, error in [(0, ValueError), (4, ValueError), ("1", TypeError)]:
        with pytest.raises(error, match="shot: wanted"):
            result.recipe(wrong)
    smaller = result.shrink(model)
    torch.testing.assert_close(smaller(x), model(x))
    torch.testing.assert_close(smaller.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in smaller.parameters()) == result.costs_after["params"]


def test_one_shot_is_prune_and_retrain():
    model, x = residual()
    other, config = copy.deepcopy(model), structured(seed=2)
    result = go(model, x, config, shots=1).run()
    pruned = prune(other, images(), config=config.replace(seed=2 * 10_007 + 1), example_inputs=x)
    retrain(other, images(), pruned.mask, RetrainConfig(2, lr=0.02), seed=2 * 10_007 + 1)
    assert result.mask == pruned.mask
    assert torch.equal(result.keep, pruned.keep)
    gone = {"norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "stem.bias", "b.bias"}
    for name, value in model.state_dict().items():
        kept = result.keep[:8] if name in gone else torch.ones((), dtype=torch.bool)
        assert torch.equal(torch.where(kept, value, 0), torch.where(kept, other.state_dict()[name], 0)), name


@pytest.mark.parametrize("granularity", ["head", "neuron", "group"])
def test_attention(granularity):
    model, x = vit()
    share = {"head": 0.05, "neuron": 0.1, "group": 0.2}[granularity]
    config = structured(share, granularity=granularity, budget="params", n_steps=4)

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    data = [(torch.randn(2, 6, 5), torch.randint(0, 3, (2, 6))) for _ in range(3)]
    result = go(model, x, config, data, shots=2, loss_fn=loss_fn).run()
    assert result.costs_after["params"] <= round((1 - share) * result.costs_before["params"])
    smaller = result.shrink(model)
    torch.testing.assert_close(smaller(x), model(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in smaller.parameters()) == result.costs_after["params"]


def test_norms_are_retrained_with_the_statistics_of_the_kept():
    """Every step under the mask is that of the smaller model, a norm over a pruned width among its layers."""
    torch.manual_seed(1)
    model, x = Scaled().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    data = [(a.double(), b) for a, b in images()]
    small = []

    def train(model, masks, shot):
        keep = pruner.coordinates.keep_of(masks)
        smaller = ShrinkRecipe.of(pruner.coordinates.structure, keep).shrink(model)
        small.append((smaller, shot))
        for one, enforced in ((smaller, None), (model, masks)):
            one.train()
            optimizer = torch.optim.SGD(one.parameters(), 0.05)
            enforcer = None if enforced is None else enforced.enforce(optimizer, one)
            for a, b in data[:3]:
                optimizer.zero_grad()
                F.cross_entropy(one(a), b).backward()
                optimizer.step()
            if enforcer is not None:
                enforcer.remove()

    pruner = go(model, x, structured(0.5, n_steps=4), data, shots=2, retraining=train)
    assert pruner.coordinates.structure.norms
    result = pruner.run()
    assert all("forward" not in module.__dict__ for module in model.modules())
    shrunk, trained = result.shrink(model), small[-1][0]
    for (name, value), other in zip(shrunk.state_dict().items(), trained.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-11, msg=name)


def test_a_channel_returns_with_all_that_it_had():
    """Weights, biases and norm of before its removal, however they were trained meanwhile; others as trained."""
    model, x = residual()
    dense = copy.deepcopy(model.state_dict())

    def train(model, masks, shot):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(0.5).add_(0.01)

    config = SFPKConfig.preset(
        "population",
        sparsity=0.6,
        granularity="group",
        budget="channels",
        n_particles=1,
        n_steps=4,
        radius=1.01,
        consensus=0.0,
        layer_sparsity={"stem": (0.25, 0.5)},
    )
    pruner = go(model, x, config, shots=2, retraining=train)
    pruner.shot()
    first = pruner.result().keep
    back = int((~first[:8]).nonzero()[0])
    assert not model.stem.weight[back].any()
    pruner._particles.copy_(torch.where(first, 1.0, 0.05))
    pruner._particles[:, back] = 2.0
    pruner._particles.mul_(pruner.shots[0].density / pruner._particles.square().mean().sqrt())
    pruner._retrain = lambda *_: None
    record = pruner.shot()
    second = pruner.result().keep
    assert second[back]
    assert record.returned > 0
    both = (first & second)[:8]
    assert both.any()
    inputs = second[:8].view(1, -1, 1, 1)
    for name in ("stem.weight", "stem.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"):
        now, then = model.state_dict()[name], dense[name]
        assert torch.equal(now[back], then[back]), name
        assert torch.equal(now[both], (then * 0.5 + 0.01)[both]), name
    read = [i for i in range(6) if second[8 + i]]
    assert torch.equal(model.a.weight[read][:, back], dense["a.weight"][read][:, back])
    assert torch.equal(model.a.weight != 0, (dense["a.weight"] != 0) & inputs & second[8:].view(-1, 1, 1, 1))


def test_removed_channels_have_gradients_in_the_next_shot():
    """What computes them is read from the model, and is there again while it searches."""
    model, x = residual()
    seen = []

    def loss_fn(model, batch):
        seen.append([float(channel.abs().sum()) for channel in model.stem.weight])
        return F.cross_entropy(model(batch[0]), batch[1])

    pruner = go(model, x, structured(0.6, n_steps=6), shots=2, retraining=lambda *_: None, loss_fn=loss_fn)
    while not pruner.done:
        pruner.shot()
    assert len(seen) > 6
    assert min(min(row) for row in seen) > 0
    assert not model.stem.weight[~pruner.result().keep[:8]].any()


@pytest.mark.parametrize("options", [{}, {"n_particles": 3, "merge": 0.5, "vote": "hard", "momentum": 0.2}], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(options, tmp_path):
    dense, x = residual()
    config = structured(0.6, n_steps=9, layer_sparsity={"re:a": (0.1, 0.9)}, **options)
    whole = copy.deepcopy(dense)
    expected = go(whole, x, config).run(save=tmp_path / "whole")
    for finished in range(3):  # every shot in a pruner of its own
        model = copy.deepcopy(dense)
        pruner = go(model, x, config)
        if finished:
            pruner.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        assert pruner.finished == finished
        pruner.shot()
        torch.save(pruner.state_dict(), tmp_path / "state")
    result = pruner.result()
    assert result.masks == expected.masks
    assert torch.equal(result.particles, expected.particles)
    assert [record.losses for record in result.history] == [record.losses for record in expected.history]
    assert result.costs == expected.costs
    assert agree(model, whole.state_dict())
    again = copy.deepcopy(dense)
    assert go(again, x, config).run(resume=tmp_path / "whole").mask == expected.mask
    assert agree(again, whole.state_dict())


def test_another_or_altered_run_is_not_resumed():
    model, x = residual()
    config = structured(0.5, n_steps=4)
    pruner = go(model, x, config, shots=2)
    pruner.shot()
    state = pruner.state_dict()
    fresh, _ = residual()
    before = Snapshot(fresh)
    for changes, words in [
        ({"config": config.replace(layer_sparsity={"a": (0, 0.5)})}, "config: "),
        ({"config": config.replace(granularity="channel", budget="params")}, "config: "),
        ({"x": torch.randn(1, 3, 8, 8)}, "structure: "),
        ({"ignored_layers": ["a"]}, "structure: "),
    ]:
        options = {"config": config, "x": x, **changes}
        other = go(fresh, options.pop("x"), options.pop("config"), shots=2, **options)
        with pytest.raises(ValueError, match=f"state: settings: wanted one of a run with the same .*{words}"):
            other.load_state_dict(state)
    for altered in range(20):
        masks = MaskSet.from_bytes(state["masks"][0].numpy().tobytes())
        flipped = {name: masks[name].clone() for name in masks}
        name = list(flipped)[altered % len(flipped)]
        flipped[name].view(-1)[altered] ^= True
        content = torch.frombuffer(bytearray(MaskSet(flipped).to_bytes()), dtype=torch.uint8)
        other = go(fresh, x, config, shots=2, structure=pruner.coordinates.structure)
        with pytest.raises(ValueError, match="state: masks.0.: wanted masks of whole channels"):
            other.load_state_dict({**state, "masks": [content]})
    before.check()


@pytest.mark.parametrize("fails_in", ["search", "retraining"])
def test_after_an_error_the_model_is_as_after_the_last_shot(fails_in):
    torch.manual_seed(1)
    model, x = Scaled(), torch.randn(2, 3, 8, 8)
    broken, calls = [False], [0]

    def loss_fn(model, batch):
        calls[0] += 1
        if broken[0] and calls[0] == {"search": 3, "retraining": 6}[fails_in]:
            raise KeyboardInterrupt
        return F.cross_entropy(model(batch[0]), batch[1])

    whole = copy.deepcopy(model)
    expected = go(whole, x, structured(0.5, n_steps=6), shots=2, loss_fn=loss_fn).run()
    pruner = go(model, x, structured(0.5, n_steps=6), shots=2, loss_fn=loss_fn)
    pruner.shot()
    before, calls[0], broken[0] = Snapshot(model), 0, True
    with pytest.raises(KeyboardInterrupt):
        pruner.shot()
    before.check()
    assert all("forward" not in module.__dict__ for module in model.modules())
    broken[0] = False
    assert pruner.run().mask == expected.mask
    assert agree(model, whole.state_dict())


def test_refusals():
    model, x = residual()
    before = Snapshot(model)
    config = structured(0.5)
    with pytest.raises(TypeError, match="example_inputs: wanted what the model is called with"):
        GradualPruner(model, images(), config=config, shots=2, retrain=1)
    with pytest.raises(ValueError, match="sparsity: wanted at most"):
        go(model, x, structured(0.9999))
    with pytest.raises(ValueError, match="pattern: wanted None with granularity='group'"):
        go(model, x, structured(0.5, pattern=(2, 4)))
    with pytest.raises(ValueError, match="sparsity: wanted at least 0.*demands, got 0.2"):
        go(model, x, structured(0.2, layer_sparsity={"re:": (0.8, 1.0)}))
    structure = find_structure(model, x)
    with pytest.raises(TypeError, match="ignored_layers: wanted only without structure="):
        go(model, x, config, structure=structure, ignored_layers=["a"])
    with pytest.raises(TypeError, match="structure: wanted a Structure or None, got str"):
        go(model, x, config, structure="stem")
    with pytest.raises(ValueError, match="structure: wanted one of this model, got one of "):
        go(mlp(), torch.randn(2, 6), config, structure=structure)
    with pytest.raises(ValueError, match="structure: wanted None with granularity='weight'"):
        GradualPruner(model, images(), config=SFPKConfig(0.5), shots=2, retrain=1, structure=structure)
    before.check()


def test_a_ceiling_is_no_error_in_the_first_shots():
    """They remove less than it demands of all; its layer is below it from the first one on."""
    model, x = residual()
    config = structured(0.8, budget="channels", n_steps=4, layer_sparsity={"re:": (0.5, 1.0)})
    result = go(model, x, config, shots=4).run()
    assert int(result.keeps[0].sum()) == 7
    assert result.costs_after["channels"] == round(0.2 * 14)


def task():
    """Classes of vectors that a few neurons tell apart."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 6, generator=generator) * 1.5
    y = torch.randint(0, 4, (256,), generator=generator)
    x = centres[y] + torch.randn(256, 6, generator=generator)
    return [(x[i : i + 32], y[i : i + 32]) for i in range(0, 256, 32)]


def everything(model):
    return MaskSet({name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if p.dim() > 1})


GOES_ON = """
import sys, torch
from torch.nn import functional as F
from sfpk_kernels import load_exported
from tests.structured_runs import mlp
path, batches, outcome = sys.argv[1:]
data = torch.load(batches, weights_only=True)
x, y = torch.cat([a for a, _ in data]), torch.cat([b for _, b in data])
model = mlp()
assert load_exported(model.eval(), path) is model
with torch.no_grad():
    loaded = model(x)
optimizer = torch.optim.Adam(model.train().parameters(), 3e-3)
for _ in range(10):
    for a, b in data:
        optimizer.zero_grad()
        F.cross_entropy(model(a), b).backward()
        optimizer.step()
with torch.no_grad():
    after = float(F.cross_entropy(model.eval()(x), y))
parameters = sum(p.numel() for p in model.parameters())
torch.save({"loaded": loaded, "before": float(F.cross_entropy(loaded, y)), "after": after, "parameters": parameters},
           outcome)
assert "torch_pruning" not in sys.modules
"""


def test_from_the_first_shot_to_a_smaller_model_that_trains_on(tmp_path):
    """Pruned gradually, shrunk, exported; in a fresh process loaded into a dense module, the same, and trained on."""
    data, model = task(), mlp()
    retrain(model, data, everything(model), RetrainConfig(8, lr=0.1))
    config = structured(0.75, budget="params", granularity="neuron", n_steps=30)
    result = go(model, data[0][0][:2], config, data, retraining=RetrainConfig(1, lr=0.02)).run()
    smaller, (x, _) = result.shrink(model).eval(), (torch.cat(part) for part in zip(*data, strict=True))
    file, batches, outcome = (str(tmp_path / name) for name in ("smaller.safetensors", "batches", "outcome"))
    report = export(smaller, file, kind="shrunk", recipe=result, example=(x,), runs=1)
    torch.save(data, batches)
    subprocess.run(
        [sys.executable, "-c", GOES_ON, file, batches, outcome],
        check=True, cwd=ROOT, timeout=240, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    found = torch.load(outcome, weights_only=True)
    with torch.no_grad():
        assert torch.equal(found["loaded"], smaller(x))
        torch.testing.assert_close(found["loaded"], model.eval()(x), rtol=1e-5, atol=1e-6)
    assert found["after"] < 0.9 * found["before"], found
    assert found["parameters"] == report.parameters == result.costs_after["params"] <= 0.25 * 280


@pytest.mark.slow
def test_the_demo_from_the_first_shot_to_a_smaller_model_that_trains_on(tmp_path):
    pytest.importorskip("sklearn")
    from torch.utils.data import DataLoader, TensorDataset

    from sfpk_kernels import recalibrate_batchnorm
    from sfpk_kernels.demo.task import TRAINING_BATCH, accuracy, build_model, load_digits, train

    digits = load_digits()
    data = TensorDataset(digits.train_x, digits.train_y)
    batches, large = (DataLoader(data, size, shuffle=True, drop_last=True) for size in (64, TRAINING_BATCH))
    model = train(digits, 0, 6)
    dense = accuracy(model, digits)
    config = structured(0.8, budget="macs", n_steps=40)
    result = go(
        model, digits.train_x[:1], config, batches, shots=4, retraining=RetrainConfig(3), retrain_loader=large
    ).run(save=tmp_path / "run")
    smaller = result.shrink(model)
    recalibrate_batchnorm(smaller, large)
    torch.save({"recipe": result.recipe().to_dict(), "weights": smaller.state_dict()}, tmp_path / "smaller")
    saved = torch.load(tmp_path / "smaller", weights_only=True)
    again = ShrinkRecipe.from_dict(saved["recipe"]).shrink(build_model())
    again.load_state_dict(saved["weights"])
    with torch.no_grad():
        assert torch.equal(again.eval()(digits.test_x), smaller.eval()(digits.test_x))
    pruned = accuracy(again, digits)
    losses = retrain(again, batches, everything(again), RetrainConfig(2, lr=0.02))
    assert sum(losses[-20:]) < sum(losses[:20]), (losses[:20], losses[-20:])
    found = accuracy(again, digits)
    assert result.costs_after["macs"] <= 0.2 * result.costs_before["macs"] + 0.5
    assert found >= pruned - 0.01, (dense, pruned, found)
    assert found > 0.9, (dense, pruned, found)


KILLED = """
import os, signal, sys, torch
from torch.nn import functional as F
from sfpk_kernels import GradualPruner
from tests.structured_nets import Residual
from tests.structured_runs import images, structured
torch.manual_seed(4)
model = Residual()
calls = iter(range(10**6))
def loss_fn(model, batch):
    if next(calls) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return F.cross_entropy(model(batch[0]), batch[1])
pruner = GradualPruner(model, images(), loss_fn=loss_fn, config=structured(0.6, n_steps=8), shots=4, retrain=2,
                       progress=False, example_inputs=images()[0][0][:2])
result = pruner.run(save=sys.argv[1], resume=True)
torch.save({"mask": result.mask.fingerprint(), "model": model.state_dict()}, sys.argv[2])
"""


@pytest.mark.slow
def test_killed_runs_resume(tmp_path):
    def outcome(name, kills):
        for kill in [*kills, -1]:
            arguments = [str(tmp_path / f"{name}.run"), str(tmp_path / f"{name}.out"), str(kill)]
            done = subprocess.run([sys.executable, "-c", KILLED, *arguments], env=os.environ, check=False)
            assert done.returncode == (0 if kill == -1 else -signal.SIGKILL)
        return torch.load(tmp_path / f"{name}.out", weights_only=True)

    whole, killed = outcome("whole", []), outcome("killed", [4, 3, 12, 7])
    assert killed["mask"] == whole["mask"]
    assert all(torch.equal(value, whole["model"][name]) for name, value in killed["model"].items())
