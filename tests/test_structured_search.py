"""Runs over channels, heads and neurons: budgets, the smaller model, masks, precisions."""

import copy
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from sfpk_kernels import Execution, SFPKPruner, prune
from sfpk_kernels.structure import Costs, ShrinkRecipe, gated_call

from .attention_nets import transformer, vit
from .snapshot import Snapshot
from .structured_nets import Dense, Residual, Scaled, SqueezeExcite
from .structured_runs import counted, images, structured

pytest.importorskip("torch_pruning")


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


@pytest.mark.parametrize(("make", "said"), [(Scaled, True), (Residual, False)])
def test_zeros_that_a_norm_counts_in_are_said(make, said, caplog):
    torch.manual_seed(1)
    model, x = make().eval(), torch.randn(2, 3, 8, 8)
    result = prune(model, images(), config=structured(n_steps=4), example_inputs=x)
    masked = result.apply_(copy.deepcopy(model))(x)
    assert any("norm: the statistics of zeros are counted in" in record.message for record in caplog.records) == said
    assert torch.allclose(masked, result.shrink(model)(x), atol=1e-6) == (not said)


def test_floors_and_multiples():
    torch.manual_seed(1)
    model, x = SqueezeExcite(), torch.randn(2, 3, 8, 8)
    result = prune(model, images(), config=structured(0.6, min_keep=3, round_to=2), example_inputs=x)
    for kept, size in result.kept_of_groups().values():
        assert kept >= min(3, size)
        assert kept % 2 == 0 or kept == size


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
