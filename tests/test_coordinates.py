"""Which weights are prunable, in which order, and why the others are not."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sfpk_kernels import Coordinates

from .wrappers import WRAPPERS


def names(model, **options):
    return [tensor.name for tensor in Coordinates(model, **options).tensors]


def reasons(model, **options):
    return {skip.name: skip.reason for skip in Coordinates(model, **options).skipped}


class Zoo(nn.Module):
    """One layer of every kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.conv1 = nn.Conv1d(4, 4, 3)
        self.conv2 = nn.Conv2d(2, 4, 3)
        self.conv3 = nn.Conv3d(1, 2, 3)
        self.up = nn.ConvTranspose2d(2, 2, 2)
        self.attention = nn.MultiheadAttention(4, 2)
        self.bn = nn.BatchNorm2d(4)
        self.ln = nn.LayerNorm(4)
        self.rnn = nn.LSTM(4, 4)
        self.scale = nn.Parameter(torch.ones(3))
        self.counts = nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
        self.head = nn.Linear(4, 10)


def test_kinds_of_layers():
    model = Zoo()
    expected = [
        "conv1.weight", "conv2.weight", "conv3.weight", "up.weight",
        "attention.in_proj_weight", "attention.out_proj.weight", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight",
    ]  # fmt: skip
    assert names(model) == expected
    assert "embed.weight" in names(model, include_embeddings=True)
    assert {"head.bias", "conv1.bias", "attention.in_proj_bias", "rnn.bias_hh_l0"} <= set(
        names(model, include_biases=True)
    )
    assert {"bn.weight", "bn.bias", "ln.weight", "ln.bias"} <= set(names(model, include_norms=True))
    why = reasons(model)
    assert why["embed.weight"] == "embedding: include_embeddings=True prunes it"
    assert why["head.bias"] == "bias: include_biases=True prunes it"
    assert why["bn.weight"] == "norm: include_norms=True prunes it"
    assert why["rnn.bias_ih_l0"] == "bias: include_biases=True prunes it"
    assert why["scale"] == "no prunable layer type (Zoo)"
    assert why["counts"] == "dtype int64"
    parameters = {name for name, _ in model.named_parameters()}
    assert {*expected, *why} == parameters


def test_flat_order_and_views(mlp):
    coordinates = Coordinates(mlp)
    assert coordinates.d == 144
    theta = coordinates.flatten(mlp)
    assert torch.equal(theta, torch.cat([mlp[0].weight.flatten(), mlp[2].weight.flatten()]))
    first, second = coordinates.split(theta)
    assert torch.equal(first, mlp[0].weight)
    assert torch.equal(second, mlp[2].weight)
    theta.zero_()
    assert mlp[0].weight.abs().sum() > 0, "flatten must copy"
    assert second.abs().sum() == 0, "split must be views"


def test_normalize_divides_by_each_tensors_mean(mlp):
    saliency = Coordinates(mlp).flatten(mlp).abs()
    parts = Coordinates(mlp).split(Coordinates(mlp).normalize_(saliency.clone()))
    assert [float(part.mean()) for part in parts] == pytest.approx([1, 1])
    assert torch.equal(Coordinates(mlp).normalize_(torch.zeros(144)), torch.zeros(144))


@pytest.mark.parametrize(
    ("entry", "left"),
    [
        ("0", ["2.weight"]),
        ("0.weight", ["2.weight"]),
        (r"re:.*2\.weight$", ["0.weight"]),
        ("re:0", ["2.weight"]),
    ],
)
def test_ignored_by_name(mlp, entry, left):
    assert names(mlp, ignored_layers=[entry]) == left


def test_ignored_by_module_and_type(mlp, convnet):
    assert names(mlp, ignored_layers=[mlp[2]]) == ["0.weight"]
    assert names(convnet, ignored_layers=[nn.Conv2d]) == ["8.weight"]
    assert names(mlp, ignored_layers=[nn.Conv2d]) == ["0.weight", "2.weight"]
    assert reasons(mlp, ignored_layers=["0"])["0.weight"] == "ignored_layers: 0"
    block = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    assert names(block, ignored_layers=[block[1]]) == ["0.weight"]


@pytest.mark.parametrize("entry", ["nope", "re:nope", nn.Linear(1, 1)])
def test_ignoring_what_is_not_there_is_an_error(mlp, entry):
    with pytest.raises(ValueError, match="ignored_layers: .*matches no parameter"):
        Coordinates(mlp, ignored_layers=[entry])


def test_bad_ignored_layers(mlp):
    with pytest.raises(TypeError, match="ignored_layers: wanted a list"):
        Coordinates(mlp, ignored_layers="0")
    with pytest.raises(TypeError, match="ignored_layers: wanted modules"):
        Coordinates(mlp, ignored_layers=[3])
    with pytest.raises(ValueError, match="wanted a valid pattern"):
        Coordinates(mlp, ignored_layers=["re:("])


def test_tied_tensors_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    coordinates = Coordinates(model)
    assert coordinates.d == 16 + 8
    assert coordinates.tensors[0].aliases == ("1.weight",)
    assert names(model, ignored_layers=["1"]) == ["2.weight"], "an ignored use protects the shared tensor"
    shared = nn.Linear(4, 4)
    assert Coordinates(nn.Sequential(shared, shared)).d == 16


def test_a_head_tied_to_an_embedding_is_pruned_only_on_request():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "mix": nn.Linear(4, 4), "head": nn.Linear(4, 10)})
    model["head"].weight = model["embed"].weight
    assert names(model) == ["mix.weight"]
    assert names(model, include_embeddings=True) == ["embed.weight", "mix.weight"]


def test_describe_is_a_complete_table(mlp):
    table = Coordinates(mlp, ignored_layers=["2.weight"]).describe()
    lines = table.splitlines()
    assert len(lines) == 1 + 4 + 1
    assert any(line.startswith("0.weight") and "12×8" in line and "yes (Linear)" in line for line in lines)
    assert any("2.weight" in line and "no: ignored_layers: 2.weight" in line for line in lines)
    assert lines[-1] == "prunable: 96 of 160 weights in 1 tensors"


def test_masked_and_parametrized_layers_say_what_to_do(mlp):
    prune.random_unstructured(mlp[0], "weight", amount=0.5)
    parametrizations.orthogonal(mlp[2])
    with pytest.raises(ValueError, match="at least one prunable tensor") as caught:
        Coordinates(mlp)
    assert "call prune.remove first" in str(caught.value)
    assert "remove_parametrizations" in str(caught.value)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_names_are_those_of_the_model_inside(mlp, wrap):
    wrapped = wrap(mlp)
    assert names(wrapped) == ["0.weight", "2.weight"]
    assert names(wrapped, ignored_layers=["0"]) == names(wrapped, ignored_layers=[mlp[0]]) == ["2.weight"]
    assert Coordinates(mlp).parameters(wrapped) == [mlp[0].weight, mlp[2].weight]


def test_refused_models(mlp):
    with pytest.raises(TypeError, match="model: wanted an nn.Module, got str"):
        Coordinates("model")
    with pytest.raises(ValueError, match="model: wanted at least one prunable tensor"):
        Coordinates(nn.BatchNorm1d(3))
    with pytest.raises(ValueError, match="model: wanted all on one device, got cpu, meta"):
        Coordinates(nn.Sequential(mlp, nn.Linear(2, 2, device="meta")))
    with pytest.raises(ValueError, match="meta device"):
        Coordinates(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="lazy"):
        Coordinates(nn.LazyLinear(2))


def test_dtype_of_the_simulation():
    assert Coordinates(nn.Linear(2, 2).bfloat16()).dtype == torch.float32
    assert Coordinates(nn.Linear(2, 2).double()).dtype == torch.float64
