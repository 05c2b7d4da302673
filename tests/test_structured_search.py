"""Runs over channels, heads and neurons: budgets, the smaller model, masks, resuming, what is refused."""

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import sfpk_kernels
from sfpk_kernels import Execution, GradualPruner, SFPKConfig, SFPKPruner, plan, prune
from sfpk_kernels.structure import Costs, ShrinkRecipe, gated_call
from sfpk_kernels.structure.cost import multiplications

from .interruptions import every_moment
from .settings import both
from .snapshot import Snapshot
from .structured_nets import Dense, Residual, Scaled, SqueezeExcite
from .test_states import equal, refused_or_whole
from .test_structure_adapters import transformer, vit

pytest.importorskip("torch_pruning")


def images(classes=4, count=6, size=8):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(8, 3, size, size, generator=generator), torch.randint(0, classes, (8,), generator=generator))
        for _ in range(count)
    ]


def structured(sparsity=0.5, **options):
    return SFPKConfig(sparsity, **{"granularity": "group", "budget": "macs", "n_steps": 12, **options})


def counted(model, x):
    """Parameters, and multiplications as torch counts them."""
    return sum(p.numel() for p in model.parameters()), multiplications(model, (x,))[1][""]


def mlp():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 4)
    )


@pytest.mark.parametrize("make", [Residual, SqueezeExcite, Dense, Scaled])
@pytest.mark.parametrize("budget", ["macs", "params"])
def test_a_run_meets_its_budget_as_counted_on_the_smaller_model(make, budget):
    torch.manual_seed(1)
    model, x = make(), torch.randn(2, 3, 8, 8)
    before = Snapshot(model)
    result = prune(model, images(), config=structured(budget=budget, n_particles=2), example_inputs=x)
    before.check()
    small = result.shrink(model)
    before.check()
    dense, left = counted(model, x), counted(small, x)
    which = ("params", "macs").index(budget)
    assert left == (result.costs_after["params"], result.costs_after["macs"])
    assert dense == (result.costs_before["params"], result.costs_before["macs"])
    assert left[which] <= round(0.5 * dense[which])
    # One more coordinate of any group would not fit.
    costs = Costs(model, result.structure, (x,))
    for coordinate in (~result.keep).nonzero().flatten().tolist():
        more = result.keep.clone()
        more[coordinate] = True
        assert costs.cost(more, budget) > round(0.5 * dense[which])
    model.eval()
    masked, shrunk = gated_call(model, result.structure, result.keep, (x,)), small.eval()(x)
    torch.testing.assert_close(shrunk, masked, rtol=0, atol=1e-5 * float(masked.detach().abs().max()))
    assert all(kept >= 1 for kept, _ in result.kept_of_groups().values())


@pytest.mark.usefixtures("undrawn")
def test_masks_of_weights_give_the_same_outputs_and_everything_goes_on_with_them(tmp_path):
    torch.manual_seed(1)
    model, x = SqueezeExcite().eval(), torch.randn(2, 3, 8, 8)
    result = SFPKPruner(
        model, config=structured(granularity="channel"), example_inputs=(x,), waypoints=[0.2, 0.35]
    ).run(images())
    masked = result.apply_(copy.deepcopy(model))
    small = result.shrink(model).eval()
    torch.testing.assert_close(masked(x), small(x), rtol=0, atol=1e-6)
    # The zeros are those rows and columns that the recipe does not list.
    for name, dims in result.recipe().slices.items():
        if name in result.mask:
            wanted = torch.ones(result.mask.shapes[name], dtype=torch.bool)
            for dim, positions in dims.items():
                gone = sorted(set(range(wanted.shape[dim])) - set(positions))
                wanted.index_fill_(dim, torch.tensor(gone, dtype=torch.int64), False)
            assert torch.equal(result.mask[name], wanted), name
    assert torch.equal(result.keep_at(0.5), result.keep)
    assert result.keep_at(0.2).sum() >= result.keep_at(0.35).sum() >= result.keep.sum()
    limit = round(0.8 * result.costs_before["macs"])
    assert counted(result.shrink(model, 0.2), x)[1] <= limit
    again = ShrinkRecipe.from_dict(result.recipe().to_dict()).shrink(SqueezeExcite())
    again.load_state_dict(small.state_dict())
    assert torch.equal(again.eval()(x), small(x))
    if find_spec("matplotlib"):
        assert result.report(tmp_path).is_file()
    assert "macs" in repr(result)
    assert result.summary()["costs_after"] == result.costs_after
    assert set(result.agreement()) == {group.name for group in result.structure.groups}
    assert result.stable_core().kept <= result.mask.prunable
    for rule in ("mean", "hard", "best"):
        assert result.vote(rule).sparsity > 0


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("granularity", ["head", "neuron", "group"])
def test_transformers(name, granularity):
    model, inputs, heads, neurons = transformer(name)
    model.eval()
    batches = [{**inputs, "labels": inputs["input_ids"]}] * 4
    share = {"head": 0.05, "neuron": 0.1, "group": 0.2}[granularity]
    config = structured(share, granularity=granularity, budget="params", n_steps=4)
    result = prune(model, batches, config=config, example_inputs=inputs)
    kinds = {"head": {heads}, "neuron": {neurons}, "group": {heads, neurons}}[granularity]
    assert {group.size for group in result.structure.groups} == kinds
    small = result.shrink(model)
    assert sum(p.numel() for p in small.parameters()) == result.costs_after["params"]
    assert result.costs_after["params"] <= round((1 - share) * result.costs_before["params"])
    masked = gated_call(model, result.structure, result.keep, (), inputs).logits
    torch.testing.assert_close(small(**inputs).logits, masked, rtol=0, atol=1e-5 * float(masked.detach().abs().max()))
    pruned = result.apply_(copy.deepcopy(model))(**inputs).logits
    torch.testing.assert_close(pruned, masked, rtol=0, atol=1e-5 * float(masked.detach().abs().max()))


def test_floors_and_multiples():
    torch.manual_seed(1)
    model, x = SqueezeExcite(), torch.randn(2, 3, 8, 8)
    result = prune(model, images(), config=structured(0.6, min_keep=3, round_to=2), example_inputs=x)
    for kept, size in result.kept_of_groups().values():
        assert kept >= min(3, size)
        assert kept % 2 == 0 or kept == size


@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.2, "vote": "hard"}, {"vote": "masked", "merge": 0.5}], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(update, options, tmp_path):
    model, data, x = mlp(), [(torch.randn(8, 6), torch.randint(0, 4, (8,))) for _ in range(6)], torch.randn(2, 6)
    config = structured(granularity="neuron", n_particles=3, n_steps=6, update=update, **options)
    waypoints = [] if options.get("vote") == "masked" else [0.2]

    def make():
        return SFPKPruner(model, config=config, example_inputs=x, waypoints=waypoints)

    whole = make()
    result = whole.run(data)
    first = make()
    for number in range(3):
        first.step([data[(3 * number + i) % 6] for i in range(3)])
        if number == 1:
            first.save(tmp_path / "run")
    second = make()
    again = second.run(data, resume=tmp_path / "run") if not options else None
    second = make()
    second.load_state_dict(first.state_dict())
    assert equal(second.state_dict(), first.state_dict())
    if again is not None:
        assert again.history[-1].step == 6
    batches = [[data[(3 * number + i) % 6] for i in range(3)] for number in range(6)]
    for pruner in (first, second):
        for number in range(3, 6):
            pruner.step(batches[number][: len(pruner.particles)])
    assert torch.equal(first.particles, second.particles)
    assert torch.equal(first.result().score, second.result().score)
    assert torch.equal(first.result().keep, second.result().keep)
    if not options:
        assert torch.equal(first.particles, result.particles)
        assert first.result().mask == result.mask
        assert [w.mask for w in second.result().waypoints] == [w.mask for w in result.waypoints]


def test_another_structure_is_refused():
    model, x = mlp(), torch.randn(2, 6)
    config = structured(granularity="neuron")
    state = SFPKPruner(model, config=config, example_inputs=x).state_dict()
    SFPKPruner(model, config=config, example_inputs=x).load_state_dict(state)
    words = "state: structure: wanted the same channels, heads and neurons at the same costs"
    with pytest.raises(ValueError, match=words):
        SFPKPruner(model, config=config, example_inputs=torch.randn(3, 6)).load_state_dict(state)
    with pytest.raises(ValueError, match="names"):
        SFPKPruner(model, config=config, example_inputs=x, ignored_layers=["3"]).load_state_dict(state)
    with pytest.raises(ValueError, match="names"):
        SFPKPruner(model, config=SFPKConfig(0.5)).load_state_dict(state)


def test_altered_states():
    model, x = mlp(), torch.randn(2, 6)
    data = [(torch.randn(8, 6), torch.randint(0, 4, (8,))) for _ in range(6)]
    config = structured(granularity="neuron", n_particles=2, n_steps=5, momentum=0.1)

    def make():
        return SFPKPruner(model, config=config, example_inputs=x, waypoints=[0.1, 0.4])

    first = make()
    for number in range(3):
        first.step(data[number : number + 2])
    refused_or_whole(
        first.state_dict(), make, SFPKPruner.load_state_dict, SFPKPruner.state_dict, lambda p: p.run(data), 1, 150
    )


WEIGHTS = {"granularity": "weight", "budget": "weights"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": "weights"}, "budget: wanted 'params', 'macs', 'channels' with granularity='neuron', got 'weights'"),
        ({"pattern": (1, 2)}, "pattern: wanted None with granularity='neuron'"),
        ({"selection": "threshold"}, "selection: wanted 'exact' with"),
        ({"kernel": "weighted_rbf"}, "kernel: wanted 'rbf' with"),
        ({"energy_mode": "vmap"}, "energy_mode: wanted 'auto', 'timed', 'sequential' with"),
        ({"energy_mode": "cudagraph"}, "energy_mode: wanted"),
        ({"offload": "cpu"}, "offload: wanted None with"),
        ({"compile": True}, "compile: wanted False with"),
        ({"granularity": "head"}, "granularity: wanted what the model has, neurons, got 'head'"),
        ({"sparsity": 0.999}, "sparsity: wanted at most"),
        ({**WEIGHTS, "budget": "macs"}, "budget: wanted 'weights' with granularity='weight', got 'macs'"),
        ({**WEIGHTS, "min_keep": 2}, "min_keep: wanted 1 with granularity='weight', got 2"),
        ({**WEIGHTS, "round_to": 8}, "round_to: wanted 1 with granularity='weight', got 8"),
        (WEIGHTS, "example_inputs: wanted None with granularity='weight'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused_by_name(options, words):
    model = mlp()
    before = Snapshot(model)
    settings = both(structured, **{"granularity": "neuron", **options})
    with pytest.raises(ValueError, match=f"^{words}"):
        SFPKPruner(model, example_inputs=torch.randn(2, 6), **settings)
    with pytest.raises(ValueError, match=f"^{words}"):
        plan(model, [(torch.randn(8, 6), torch.zeros(8).long())], example_inputs=torch.randn(2, 6), **settings)
    before.check()


def test_arguments():
    model, x = mlp(), torch.randn(2, 6)
    before = Snapshot(model)
    with pytest.raises(TypeError, match="example_inputs: wanted what the model is called with, .*, got None"):
        SFPKPruner(model, config=structured())
    with pytest.raises(TypeError, match="example_inputs: wanted a tensor, a tuple"):
        SFPKPruner(model, config=structured(), example_inputs=3)
    with pytest.raises(ValueError, match="include_biases: wanted False with granularity='group'"):
        SFPKPruner(model, config=structured(), example_inputs=x, include_biases=True)
    with pytest.raises(ValueError, match="granularity='weight' in gradual pruning, got 'group'"):
        GradualPruner(model, [], config=structured(), retrain=1)
    with pytest.raises(ValueError, match="ignored_layers"):
        SFPKPruner(model, config=structured(), example_inputs=x, ignored_layers=["nothing"])
    bad = copy.deepcopy(model)
    bad[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        SFPKPruner(bad, config=structured(), example_inputs=x)
    before.check()


def test_an_error_in_the_loss_leaves_the_model_as_it_was():
    model, x = vit()
    before = Snapshot(model)

    def loss_fn(model, batch):
        model(batch).sum()
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        prune(model, [x], config=structured(0.1), example_inputs=x, loss_fn=loss_fn)
    before.check()
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_interrupted_anywhere_it_goes_on_or_says_that_it_cannot(every):
    """In the parts that such a run has alone; a norm over a pruned width has another forward meanwhile."""
    torch.manual_seed(1)
    model, x, data = Scaled(), torch.randn(2, 3, 8, 8), images()
    config = structured(n_steps=3, n_particles=2, update="gauss_seidel")
    whole = SFPKPruner(model, config=config, example_inputs=x, waypoints=[0.3])
    whole.step(data[:2])
    state, snapshot = whole.state_dict(), Snapshot(model)
    for number in (1, 2):
        whole.step(data[2 * number :][:2])
    pruner, counts = SFPKPruner(model, config=config, example_inputs=x, waypoints=[0.3]), {True: 0, False: 0}
    files = [
        "structure/gates", "structure/sums", "structure/select", "search/structured/energy",
        "search/structured/polarizer", "search/structured/coordinates", "modeling/state",
    ]  # fmt: skip

    def work():
        pruner.load_state_dict(state)
        pruner.step(data[2:4])

    first = Path(sfpk_kernels.__file__).parent
    for raised in every_moment(work, [str(first / f"{name}.py") for name in files], step=every):
        assert type(raised) is KeyboardInterrupt
        del raised
        snapshot.check()
        assert all("forward" not in module.__dict__ for module in model.modules())
        broken = pruner._attempt._broken is not None
        counts[broken] += 1
        if broken:
            with pytest.raises(RuntimeError, match="this run cannot go on"):
                pruner.state_dict()
            continue
        for number in range(len(pruner.history), 3):
            pruner.step(data[2 * number :][:2])
        assert torch.equal(pruner.particles, whole.particles)
        assert pruner.result().mask == whole.result().mask
    assert min(counts.values()) * every > 140, counts


def test_all_kinds_or_one():
    model, x = vit()
    sizes = {}
    for kind in ("group", "head", "neuron"):
        pruner = SFPKPruner(model, config=structured(0.1, granularity=kind), example_inputs=x)
        sizes[kind] = [tensor.numel for tensor in pruner.coordinates.tensors]
        assert pruner.particles.shape == (1, sum(sizes[kind]))
    assert sorted(sizes["head"] + sizes["neuron"]) == sorted(sizes["group"])
    assert sizes["head"] == [4, 4]
    assert sizes["neuron"] == [24, 24]


def test_precisions_micro_batches_and_particle_dtypes():
    """Autocast and fp16 particles run; micro-batches give the same gradients; bf16 models keep their dtype."""
    torch.manual_seed(1)
    model, x, data = Residual(), torch.randn(2, 3, 8, 8), images()
    config = structured(0.4, n_steps=5, bn="running")
    whole = SFPKPruner(model, config=config, example_inputs=x)
    parts = SFPKPruner(model, config=config, execution=Execution(microbatch=3), example_inputs=x)
    for batch in data[:3]:
        one, other = whole.step([batch]), parts.step([batch])
        assert one.energy == pytest.approx(other.energy, rel=1e-5)
    torch.testing.assert_close(whole.particles, parts.particles, rtol=1e-3, atol=1e-4)
    for settings in ({"execution": Execution(dtype="bf16")}, {"config": config.replace(particle_dtype="float16")}):
        result = prune(model, data, example_inputs=x, **{"config": config, **settings})
        assert result.costs_after["macs"] <= round(0.6 * result.costs_before["macs"])
    half = copy.deepcopy(model).bfloat16()
    batches = [(x.bfloat16(), y) for x, y in data]
    result = prune(half, batches, config=config, example_inputs=x.bfloat16())
    assert result.shrink(half).stem.weight.dtype == torch.bfloat16


def test_every_removed_channel_has_a_gradient():
    torch.manual_seed(1)
    model, x = SqueezeExcite(), torch.randn(2, 3, 8, 8)
    pruner = SFPKPruner(model, config=structured(n_steps=4, n_particles=1), example_inputs=x)
    seen = torch.zeros(pruner.coordinates.d, dtype=torch.bool)
    for batch in images()[:4]:
        pruner.step([batch])
        seen |= pruner._run.energy.buffer(1)[0] != 0
    removed = ~pruner.result().keep
    assert removed.any()
    assert seen[removed].all()


def test_names_are_those_of_the_model_inside_a_wrapper():
    torch.manual_seed(1)
    model, x = Residual(), torch.randn(2, 3, 8, 8)
    config = structured(n_steps=5)
    plain = prune(model, images(), config=config, example_inputs=x)
    wrapped = prune(nn.DataParallel(model), images(), config=config, example_inputs=x)
    assert plain.mask == wrapped.mask
    assert list(plain.mask) == list(wrapped.mask)
