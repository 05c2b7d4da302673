"""Weights without a gradient are named once; where none has one, nothing is pruned."""

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfpk_kernels import Execution, SFPKConfig, SFPKPruner, prune
from sfpk_kernels.baselines import snip
from sfpk_kernels.search.unreached import no_gradient_words

from .settings import both


def quick(**overrides):
    return SFPKConfig.preset("population", sparsity=0.8, **{"n_particles": 4, "n_steps": 6, **overrides})


class Frozen(nn.Module):
    """A backbone that runs without gradients."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        with torch.no_grad():
            features = self.body(x).relu()
        return self.head(features)


class Auxiliary(nn.Module):
    """A head that only training uses."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x):
        features = self.body(x).relu()
        return self.head(features) + (self.aux(features) if self.training else 0)


class Cached(nn.Module):
    """A weight that is used through a copy."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.copy = [self.body.weight.detach().clone()]

    def forward(self, x):
        return self.head(F.linear(x, self.copy[0]).relu())


KINDS = {Frozen: ["body.weight"], Auxiliary: ["aux.weight"], Cached: ["body.weight"]}
WAYS = [
    {"energy_mode": "vmap"}, {"energy_mode": "sequential"}, {"update": "gauss_seidel"}, {"offload": "cpu"},
    {"nonfinite": "skip_particle"}, {"update": "gauss_seidel", "nonfinite": "skip_particle"},
    {"particle_dtype": "float16"},
]  # fmt: skip


def said(result):
    return [words for words in result.alarms if "no gradient reaches" in words]


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_a_gradient_are_named_once(kind, options, vectors, caplog):
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="sfpk_kernels"):
        result = prune(kind(), vectors, **both(quick, **options))
    (words,) = said(result)
    assert words.startswith(f"step 1: no gradient reaches {', '.join(KINDS[kind])}: ")
    assert "ignored_layers" in words
    assert sum("no gradient reaches" in record.message for record in caplog.records) == 1


def test_what_has_a_gradient_is_not_named(mlp, convnet, vectors, images):
    assert said(prune(mlp, vectors, config=quick())) == []
    assert said(prune(convnet, images, config=quick())) == []
    assert said(prune(Auxiliary(), vectors, config=quick(model_mode="train"))) == []
    assert said(prune(Frozen(), vectors, config=quick(), ignored_layers=["body"])) == []


def test_one_particle_is_enough(vectors):
    """Such as an expert that few batches are sent to."""

    def loss_fn(model, batch):
        return F.cross_entropy(
            model(batch[0]) if batch[0] is vectors[1][0] else model.head(batch[0].repeat(1, 2)), batch[1]
        )

    torch.manual_seed(0)
    model = nn.Sequential()
    model.body, model.head = nn.Linear(8, 16), nn.Linear(16, 4)
    assert said(prune(model, vectors, loss_fn=loss_fn, **both(quick, energy_mode="sequential"))) == []
    assert len(said(prune(model, [vectors[0]], loss_fn=loss_fn, **both(quick, energy_mode="sequential")))) == 1


def test_a_resumed_run_does_not_say_it_again(vectors, tmp_path):
    torch.manual_seed(0)
    model = Frozen()
    pruner = SFPKPruner(model, config=quick())
    pruner.step(vectors[:4])
    pruner.save(tmp_path / "run")
    result = SFPKPruner(model, config=quick()).run(vectors, resume=tmp_path / "run")
    assert len(said(result)) == 1


def test_many_names_are_cut_short():
    words = no_gradient_words([f"layer{i}.weight" for i in range(20)])
    assert "layer7.weight and 12 more" in words
    assert "layer8" not in words


def constant(model, batch):
    return 0.0 * model(batch[0]).sum()


@pytest.mark.parametrize("n_steps", [1, 6])
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_gradients_that_are_all_zero_raise(options, n_steps, mlp, vectors):
    before = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    pruner, alike = (SFPKPruner(mlp, loss_fn=constant, **both(quick, n_steps=n_steps, **options)) for _ in range(2))
    last = min(n_steps, 2)
    words = f"loss_fn: wanted a loss that changes .* zero for every weight and particle in step {last}"
    with pytest.raises(ValueError, match=words):
        pruner.run(vectors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mlp.state_dict().items())
    assert len(pruner.history) == last - 1
    if options.get("update") == "gauss_seidel":  # particles have moved one by one
        with pytest.raises(RuntimeError, match=f"cannot go on: step {last} stopped half-way"):
            pruner.run(vectors)
    else:
        if n_steps > 1:
            alike.step(vectors[:4])
        assert torch.equal(pruner.particles, alike.particles), "none has moved in the step that failed"


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_loss_that_is_flat_at_the_dense_model(options, mlp, vectors):
    """How far the outputs are from those of the dense model: no gradient in step 1, which nobody need hear of."""
    with torch.no_grad():
        batches = [(x, mlp(x)) for x, _ in vectors]

    def drift(model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    result = prune(mlp, batches, loss_fn=drift, **both(quick, **options))
    assert result.alarms == []
    assert result.history[0].energies == pytest.approx([0.0] * 4, abs=1e-9)
    assert result.history[-1].energy > 0
    assert said(prune(Frozen(), batches, loss_fn=lambda m, b: m(b[0]).square().mean(), **both(quick, **options)))


def test_snip_wants_a_gradient_too(mlp, vectors):
    with pytest.raises(ValueError, match="gradients of zero for every weight and batch"):
        snip(mlp, vectors, 0.5, loss_fn=constant)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("when", [0, 6])  # calls of loss_fn before it fails: in the trial pass, in a step
def test_errors_of_a_loss_name_the_mode_of_the_model(mlp, vectors, mode, when):
    calls = []

    def loss_fn(model, batch):
        calls.append(model.training)
        if len(calls) > when:
            raise KeyError("aux_logits")
        return F.cross_entropy(model(batch[0]), batch[1])

    with pytest.raises(KeyError) as caught:
        prune(
            mlp, vectors, loss_fn=loss_fn, config=quick(model_mode=mode), execution=Execution(energy_mode="sequential")
        )
    assert set(calls) == {mode == "train"}
    other = "eval" if mode == "train" else "train"
    if hasattr(caught.value, "__notes__"):  # Python ≥ 3.11
        words = f"the model was in {mode} mode; SFPKConfig(model_mode={other!r}) puts it into {other} mode"
        assert sum(words in note for note in caught.value.__notes__) == 1


def test_configs_of_earlier_versions_say_dropout():
    assert SFPKConfig.from_dict({"sparsity": 0.5, "dropout": True}).model_mode == "train"
    assert SFPKConfig.from_dict({"sparsity": 0.5, "dropout": False}).model_mode == "eval"
    with pytest.raises(TypeError, match="^dropout: wanted as model_mode"):
        SFPKConfig.from_dict({"sparsity": 0.5, "dropout": "yes"})
