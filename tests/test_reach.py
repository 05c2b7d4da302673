"""include=, what is covered without it, what a run says of the rest, and the sparsity of the whole model."""

import json
import logging

import pytest
import torch
from torch import nn

from sfpk_kernels import (
    Coordinates,
    Execution,
    GradualPruner,
    MaskSet,
    SFPKConfig,
    SFPKPruner,
    baselines,
    export,
    load_exported,
    plan,
    prune,
)
from sfpk_kernels.baselines.select import allocated, lamp, select
from sfpk_kernels.cli import main
from sfpk_kernels.coordinates import coverage

from .reach_nets import Bare, D, Mixture, Own, OwnLinear, Recurrent, Transposed, flat, sequences
from .settings import population

QUICK = {"n_particles": 1, "n_steps": 2}


def names(model, **options):
    return [tensor.name for tensor in Coordinates(model, **options).tensors]


class Lookup(nn.Module):
    """Mostly an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.norm(self.embed(x)).mean(1))


def tokens():
    return torch.randint(100, (6, 5)), torch.randint(4, (6,))


def is_square(name, parameter):
    return parameter.dim() == 2 and parameter.shape[0] == parameter.shape[1]


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        (["first"], ["first"]),
        (["more"], ["more.0", "more.1"]),
        (["more.1", "first"], ["first", "more.1"]),
        (["re:.*out"], ["named.out"]),
        ([nn.ParameterList], ["more.0", "more.1"]),
        ([is_square], ["more.0", "more.1"]),
        ([lambda name, parameter: name == "first"], ["first"]),
        (["scale"], ["scale"]),
        ([Bare], ["first", "more.0", "more.1", "named.out"]),
    ],
)
def test_included(entries, found):
    """Whole modules give their matrices, parameters themselves whatever they are; the model's order."""
    assert names(Bare(), include=entries) == found


def test_included_by_instance():
    model = Bare()
    assert names(model, include=[model.more]) == ["more.0", "more.1"]
    assert names(model, include=[model]) == ["first", "more.0", "more.1", "named.out"]
    assert names(model, include=iter(["first"])) == ["first"]


def test_included_beats_kinds_and_ignored_beats_included():
    model = Lookup()
    assert names(model) == ["head.weight"]
    assert names(model, include=["embed"]) == ["embed.weight", "head.weight"]
    assert names(model, include=["norm.weight", "head.bias"]) == ["norm.weight", "head.weight", "head.bias"]
    assert names(model, include=["embed"], ignored_layers=["embed", "head.bias"]) == ["head.weight"]
    assert names(model, ignored_layers=[lambda name, one: one.numel() > 50], include=["head"]) == ["head.weight"]


def test_a_tied_weight_is_included_by_any_of_its_names():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "mix": nn.Linear(4, 4), "out": nn.Linear(4, 10)})
    model["out"].weight = model["embed"].weight
    for name in ("embed.weight", "out", "out.weight"):
        (tied, _) = Coordinates(model, include=[name]).tensors
        assert (tied.name, tied.aliases) == ("embed.weight", ("out.weight",))


@pytest.mark.parametrize("entry", ["nope", "re:nope", nn.Linear(1, 1), lambda name, parameter: False])
def test_including_what_is_not_there_is_an_error(mlp, entry):
    with pytest.raises(ValueError, match="include: .*matches no parameter"):
        Coordinates(mlp, include=[entry])


def test_bad_includes(mlp):
    with pytest.raises(TypeError, match="include: wanted a list, got '0': put it in a list"):
        Coordinates(mlp, include="0")
    with pytest.raises(TypeError, match="include: wanted a list, got 3"):
        Coordinates(mlp, include=3)
    with pytest.raises(TypeError, match="include: wanted modules, module types, names or functions, got 3"):
        Coordinates(mlp, include=[3])
    with pytest.raises(TypeError, match="include: wanted modules, module types, names or functions, got <class 'int'>"):
        Coordinates(mlp, include=[int])
    with pytest.raises(ValueError, match="include: wanted a valid pattern"):
        Coordinates(mlp, include=["re:("])
    mlp.register_parameter("codes", nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False))
    with pytest.raises(ValueError, match="include: wanted weights that can be pruned, got 'codes', codes: dtype int64"):
        Coordinates(mlp, include=["codes"])
    nn.utils.prune.random_unstructured(mlp[0], "weight", amount=0.5)
    with pytest.raises(ValueError, match=r"got '0', 0.weight_orig: already under .*call prune.remove first"):
        Coordinates(mlp, include=["0"])


@pytest.mark.parametrize(("make", "inputs", "dim"), [(lambda: OwnLinear(6, 4), 6, 1), (lambda: Transposed(6, 4), 6, 0)])
def test_own_classes_by_their_sizes(make, inputs, dim):
    layer = make()
    (tensor,) = Coordinates(layer).tensors
    assert (tensor.name, tensor.inputs, tensor.input_dim) == ("weight", inputs, dim)
    layer.weight = nn.Parameter(torch.randn(3, 4))  # another shape than its sizes say
    with pytest.raises(ValueError, match="weight .*include=\\['weight'\\] prunes it"):
        Coordinates(layer)


def test_biases_of_own_classes_and_rnns():
    assert "last.bias" in names(Own(), include_biases=True)
    assert {"rnn.bias_ih_l0", "rnn.bias_hh_l1_reverse"} <= set(names(Recurrent(), include_biases=True))
    assert "rnn.weight_hr_l0" in names(Recurrent(proj_size=3))


def test_each_expert_is_a_tensor_of_its_own():
    model = Mixture()
    with torch.no_grad():
        model.mlp.up[1] *= 100  # one expert of another scale
    coordinates = Coordinates(model)
    assert coordinates.segments == [3 * D, *[12 * D] * 6, 4 * D]
    normalized = coordinates.normalize_(coordinates.flatten(model).abs())
    parts = dict(zip((tensor.name for tensor in coordinates.tensors), coordinates.split(normalized), strict=True))
    torch.testing.assert_close(parts["mlp.up"].mean(dim=(1, 2)), torch.ones(3))
    torch.testing.assert_close(parts["mlp.down"].mean(dim=(1, 2)), torch.ones(3))
    assert "3 matrices" in coordinates.describe()


@pytest.mark.parametrize("allocation", ["uniform", "erk", "lamp"])
def test_allocation_goes_by_experts(allocation):
    """As over a model that holds every expert's matrix by itself."""
    model = Mixture()
    with torch.no_grad():
        model.mlp.up[1] *= 100
    coordinates = Coordinates(model)
    score = coordinates.flatten(model).abs()
    apart = nn.Module()
    held = coordinates.parameters(model)
    split = [one for parameter in held for one in (parameter if parameter.dim() > 2 else [parameter])]
    apart.parts = nn.ParameterList([nn.Parameter(one.detach().clone()) for one in split])
    other = Coordinates(apart, include=["parts"])
    assert torch.equal(other.flatten(apart).abs(), score)
    assert torch.equal(select(coordinates, score, 0.6, allocation).flat(), select(other, score, 0.6, allocation).flat())
    if allocation == "lamp":
        assert torch.equal(lamp(coordinates, score), lamp(other, score))
    else:
        assert allocated(coordinates, 0.6, allocation) == allocated(other, 0.6, allocation)


def test_patterns_along_the_inputs_of_experts():
    model = Mixture()
    mask = baselines.magnitude(model, 0.5, pattern=(2, 4), ignored_layers=["head"])
    assert (mask["mlp.up"].movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()
    assert (mask["mlp.down"].movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()
    bare = Bare()
    with pytest.raises(ValueError, match=r"pattern: .*got first of shape \(8, 12\) whose inputs nothing tells: leave"):
        baselines.magnitude(bare, 0.5, pattern=(2, 4), include=["first"])


def test_methods_that_need_linear_layers_name_all_others():
    x = [sequences()]
    with pytest.raises(ValueError, match=r"got rnn.weight_ih_l0 \(LSTM\), .* and 5 more") as caught:
        baselines.wanda(Recurrent(), x, 0.5)
    left_out = str(caught.value).partition("ignored_layers=")[2]
    ignored = json.loads(left_out.replace("'", '"'))
    assert baselines.wanda(Recurrent(), x, 0.5, ignored_layers=ignored).shapes.keys() == {"head.weight"}


@pytest.mark.parametrize("method", ["snip", "grasp", "force", "woodfisher"])
@pytest.mark.parametrize("make", [Recurrent, Mixture, Bare], ids=["lstm", "experts", "bare"])
def test_baselines_by_gradients_take_them(method, make):
    model, batch = make(), sequences() if make is Recurrent else flat()
    options = {"include": ["first", "more"]} if make is Bare else {}
    mask = getattr(baselines, method)(model, [batch, batch], 0.5, **options)
    assert mask.shapes == {tensor.name: tensor.shape for tensor in Coordinates(model, **options).tensors}
    assert 0.4 < mask.sparsity < 0.6


@pytest.fixture
def said(monkeypatch, caplog):
    """Warnings of a process that has said nothing yet."""
    monkeypatch.setattr(coverage, "_said", set())
    caplog.set_level(logging.WARNING, logger=coverage.logger.name)
    return lambda: caplog.messages


def test_a_run_that_covers_little_says_so_once(said):
    model, batch = Lookup(), tokens()
    config = population(0.5, **QUICK)
    Coordinates(model)
    assert said() == [], "looking is no run"
    prune(model, [batch], config=config)
    plan(model, [batch], config=config)
    baselines.snip(model, [batch], 0.5)
    assert said() == [
        "4% of the model's weights are covered, 32 of 852: the sparsity is of these alone, the others stay. The "
        "largest: embed.weight of 100×8 (embedding: include_embeddings=True prunes it); norm.weight of 8 (norm: "
        "include_norms=True prunes it); norm.bias of 8 (norm: include_norms=True prunes it); and 1 more"
    ]
    baselines.magnitude(Bare(), 0.5, include=["first"])
    assert len(said()) == 2
    assert "more.0 of 12×12 (no matrix that its ParameterList is known to multiply by: include=['more.0']" in said()[1]


@pytest.mark.parametrize(
    "options",
    [{"include_embeddings": True}, {"include": ["embed"]}, {"ignored_layers": ["embed", "norm"]}],
)
def test_nothing_is_said_of_what_was_asked_for(said, options):
    """What was left out on purpose is not missed."""
    baselines.magnitude(Lookup(), 0.5, **options)
    assert said() == []


@pytest.mark.parametrize("make", [lambda m, b, c: prune(m, b, config=c), lambda m, b, c: GradualPruner(
    m, b, config=c, shots=2, retrain=1).run()], ids=["prune", "gradual"])  # fmt: skip
def test_sparsity_of_the_whole_model(make):
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))  # 144 of 160
    batches = [(torch.randn(16, 8), torch.randint(4, (16,))) for _ in range(3)]
    result = make(model, batches, population(0.45, sparsity_of="model", n_particles=1, n_steps=4))
    assert result.mask.prunable - result.mask.kept == 72, "of 160"
    assert (result.config.sparsity, result.config.sparsity_of) == (0.5, "covered")


def test_results_say_both_sparsities():
    model, batch = Lookup(), tokens()
    result = prune(model, [batch], config=population(0.5, **QUICK))
    assert result.model_sparsity == pytest.approx(16 / 852)
    assert result.summary()["model_sparsity"] == result.model_sparsity
    assert "sparsity 0.5000" in repr(result)
    assert "0.0188 of the whole model" in repr(result)


def test_waypoints_are_of_what_the_sparsity_is_of(mlp, vectors):
    config = population(0.45, sparsity_of="model", n_particles=1, n_steps=20)
    result = prune(mlp, vectors, config=config, waypoints=[0.225])
    (waypoint,) = result.waypoints
    assert waypoint.sparsity == pytest.approx(0.25)
    assert waypoint.mask.kept == 108
    with pytest.raises(ValueError, match="waypoints: wanted sparsities above 0 and up to the run's 0.45, got 0.48"):
        SFPKPruner(mlp, config=config, waypoints=[0.48])


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
def test_a_sparsity_beyond_what_is_covered(mlp, vectors, sparsity):
    config = SFPKConfig(sparsity, sparsity_of="model")
    words = r"sparsity: wanted less than 0.9 of the whole model, of which 144 of 160 weights are covered"
    for call in (lambda: SFPKPruner(mlp, config=config), lambda: plan(mlp, vectors, config=config),
                 lambda: GradualPruner(mlp, vectors, config=config, retrain=1)):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
    assert SFPKPruner(mlp, config=config, include_biases=True).config.sparsity == sparsity, "all is covered"


def test_where_the_whole_model_does_not_count(mlp):
    with pytest.raises(ValueError, match="sparsity_of: wanted 'covered' with a pattern"):
        SFPKConfig(0.5, pattern=(2, 4), sparsity_of="model")
    with pytest.raises(ValueError, match="sparsity_of: wanted one of 'covered', 'model', got 'all'"):
        SFPKConfig(0.5, sparsity_of="all")
    config = SFPKConfig(0.5, granularity="neuron", budget="params", sparsity_of="model")
    with pytest.raises(ValueError, match="sparsity_of: wanted 'covered' with granularity='neuron', got 'model'"):
        SFPKPruner(mlp, config=config, example_inputs=torch.randn(2, 8))
    config = SFPKConfig(0.5, granularity="neuron", budget="params")
    with pytest.raises(ValueError, match=r"include: wanted nothing with granularity='neuron'.*got \['0'\]"):
        SFPKPruner(mlp, config=config, example_inputs=torch.randn(2, 8), include=["0"])


def test_files_of_before_are_of_the_covered_weights():
    before = {name: value for name, value in SFPKConfig(0.5).to_dict().items() if name != "sparsity_of"}
    assert SFPKConfig.from_dict(before).sparsity_of == "covered"


def test_export_and_files(tmp_path):
    for make, options in ((Bare, {"include": ["first", "more"]}), (Recurrent, {}), (Mixture, {})):
        model = make()
        mask = baselines.magnitude(model, 0.7, **options)
        mask.apply_(model)
        for kind in ("dense", "masks"):
            path = tmp_path / f"{make.__name__}-{kind}.safetensors"
            export(model, path, kind=kind, masks=mask)
        twin = make()
        load_exported(twin, tmp_path / f"{make.__name__}-dense.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
        assert MaskSet.from_model(twin, **options) == mask


def test_from_the_shell(tmp_path, capsys):
    task = ["tests.cli_task:bare", "--out", str(tmp_path), "--n-particles", "1", "--n-steps", "2", "--json"]
    assert main(["prune", *task, "--sparsity", "0.5", "--include", "first", "--include", "re:more"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    total = sum(parameter.numel() for parameter in Bare().parameters())
    assert outcome["prunable"] == 8 * 12 + 2 * 144
    assert outcome["model_sparsity"] == pytest.approx((8 * 12 + 2 * 144) / 2 / total)
    assert main(["prune", *task, "--sparsity", "0.4", "--include", "first", "--include", "re:more",
                 "--sparsity-of", "model"]) == 0  # fmt: skip
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["model_sparsity"] == pytest.approx(0.4, abs=1 / total)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["model"]["sparsity"] == outcome["model_sparsity"]
    assert main(["prune", *task[:-1], "--sparsity", "0.5", "--include", "first"]) == 0
    assert "of the whole model" in capsys.readouterr().out
    assert main(["prune", *task, "--sparsity", "0.5", "--include", "nope"]) == 2
    assert "--include: 'nope' matches no parameter" in capsys.readouterr().err
    assert main(["prune", *task[:3], "--json", "--method", "magnitude", "--sparsity", "0.5", "--include", "first"]) == 0
    assert json.loads(capsys.readouterr().out)["prunable"] == 8 * 12


def test_ways_of_computing_agree_on_what_is_included():
    batch = flat()
    masks = [
        prune(seeded_bare(), [batch], config=population(0.5, n_particles=3, n_steps=4), include=["first", "more"],
              execution=Execution(energy_mode=mode)).mask
        for mode in ("sequential", "vmap")
    ]  # fmt: skip
    assert masks[0].iou(masks[1]) > 0.95


def seeded_bare():
    torch.manual_seed(3)
    return Bare()
