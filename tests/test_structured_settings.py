"""What a structured run refuses, by name; the model is as it was."""

import copy

import pytest
import torch

from sfpk_kernels import GradualPruner, SFPKPruner, plan, prune
from sfpk_kernels.baselines import structured_magnitude

from .architectures.refused import GroupNormed
from .attention_nets import vit
from .settings import both
from .snapshot import Snapshot
from .structured_runs import counted, images, mlp, structured

pytest.importorskip("torch_pruning")

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
        (
            {**WEIGHTS, "layer_sparsity": {"0": (0, 1)}},
            "layer_sparsity: wanted None with granularity='weight', got {'0'",
        ),
        ({**WEIGHTS, "round_to": 8}, "round_to: wanted 1 with granularity='weight', got 8"),
        (
            {**WEIGHTS, "on_refusal": "protect"},
            "on_refusal: wanted 'raise' with granularity='weight', got 'protect'",
        ),
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
    with pytest.raises(TypeError, match="example_inputs: wanted what the model is called with, .*, got None"):
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


def test_what_cannot_go_stays_while_the_rest_meets_the_budget():
    torch.manual_seed(3)
    model, batches = GroupNormed(8), images()
    x, before = batches[0][0], Snapshot(model)
    with pytest.raises(ValueError, match=r"model: the outputs of first .* norm \(GroupNorm\)"):
        SFPKPruner(model, config=structured(0.2), example_inputs=x)
    result = prune(model, batches, config=structured(0.2, n_steps=3, on_refusal="protect"), example_inputs=x)
    assert "first" in result.structure.protected
    assert "first" not in result.kept_of_groups()
    smaller = result.shrink(model)
    assert smaller.first.out_channels == 8
    assert counted(smaller, x)[1] <= 0.8 * counted(model, x)[1]
    torch.testing.assert_close(smaller.eval()(x), result.apply_(copy.deepcopy(model)).eval()(x))
    magnitude = structured_magnitude(model, 0.2, example_inputs=x, on_refusal="protect")
    assert "first" in magnitude.structure.protected
    before.check()
