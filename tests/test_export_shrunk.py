"""Shrunk models in a file: a fresh dense model becomes the same one, in another process too, or stays as it is."""

import copy
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from sfpk_kernels import export, load_exported, prune, recalibrate_batchnorm
from sfpk_kernels.baselines import structured_magnitude
from sfpk_kernels.export import loading
from sfpk_kernels.structure import ShrinkRecipe, find_structure, recipe, surgery

from .attention_nets import transformer, vit
from .interruptions import every_moment
from .processes import python
from .settings import population
from .snapshot import Snapshot
from .structured_nets import Residual, make
from .structured_runs import images, mlp, structured
from .wrappers import WRAPPERS

pytest.importorskip("torch_pruning")


def residual():
    torch.manual_seed(1)
    return Residual().eval()


@pytest.fixture(scope="module")
def run():
    """(dense model, result of a run) of a net with a residual."""
    torch.manual_seed(1)
    model = residual()
    return model, prune(model, images(), config=structured(n_steps=4), example_inputs=torch.randn(2, 3, 8, 8))


@pytest.fixture
def file(run, tmp_path):
    model, result = run
    export(model, tmp_path / "m.safetensors", kind="shrunk", recipe=result)
    return tmp_path / "m.safetensors"


def test_a_fresh_dense_model_becomes_the_shrunk_one(run, tmp_path):
    model, result = run
    path, x, before = tmp_path / "m.safetensors", torch.randn(4, 3, 8, 8), Snapshot(model)
    report = export(model, path, kind="shrunk", recipe=result, example=(x,), runs=2, metadata={"note": 1})
    before.check()
    smaller, other = result.shrink(model), Residual().eval()
    assert load_exported(other, path) is other
    assert torch.equal(other(x), smaller(x))
    assert {n: v.shape for n, v in other.state_dict().items()} == {n: v.shape for n, v in smaller.state_dict().items()}
    assert other.a.out_channels == other.a.weight.shape[0]
    assert (report.parameters, report.kept, report.prunable) == (
        result.costs_after["params"], result.costs_after["params"], result.costs_before["params"],
    )  # fmt: skip
    # Two of each multiply-accumulate, of four images; costs are those of the two images of the run's example.
    assert report.flops == 2 * (4 // 2) * result.costs_after["macs"]
    assert report.verified == "every tensor, and the outputs on the example, exactly"
    assert f"{report.kept:,} of the dense model's {report.prunable:,}" in str(report)
    assert "zeros counted" not in str(report)
    other(x).sum().backward()
    assert other.a.weight.grad.shape == smaller.a.weight.shape
    with safe_open(path, framework="pt") as opened:
        assert json.loads(opened.metadata()["sfpk"])["metadata"] == {"note": 1}
    again = export(other, tmp_path / "again", kind="shrunk", recipe=result.recipe())
    assert again.bytes_on_disk <= report.bytes_on_disk


def test_what_was_done_to_the_smaller_model_is_what_comes_back(run, tmp_path):
    model, result = run
    smaller, x = result.shrink(model), torch.randn(4, 3, 8, 8)
    recalibrate_batchnorm(smaller, images())
    with torch.no_grad():
        smaller.a.weight.mul_(1.5)
    before = Snapshot(smaller)
    export(smaller, tmp_path / "m", kind="shrunk", recipe=result, example=(x,), runs=1)
    before.check()
    other = load_exported(residual(), tmp_path / "m")
    assert torch.equal(other(x), smaller.eval()(x))
    assert not torch.equal(other(x), result.shrink(model)(x))
    with torch.no_grad():
        other.a.weight.zero_()
    weight = other.a.weight
    load_exported(other, tmp_path / "m")  # as small already
    assert other.a.weight is weight
    assert torch.equal(other(x), smaller(x))


FRESH = """
import sys, torch
from safetensors.torch import load_file
from sfpk_kernels import load_exported
from tests.structured_nets import Residual

path, inputs, outputs = {paths!r}
torch.save(load_exported(Residual().eval(), path)(load_file(inputs)["x"]), outputs)
assert "torch_pruning" not in sys.modules
"""


def test_in_another_process_every_bit_is_the_same(run, file, tmp_path):
    model, result = run
    x = torch.randn(4, 3, 8, 8)
    save_file({"x": x}, tmp_path / "x")
    python(FRESH.format(paths=[str(path) for path in (file, tmp_path / "x", tmp_path / "y")]))
    assert torch.equal(torch.load(tmp_path / "y"), result.shrink(model)(x))


@pytest.mark.parametrize("name", ["squeeze-excite", "concat", "unet", "two groups", "convnext", "mlp", "signal"])
def test_nets(name, tmp_path):
    net, x = make(name)
    found = structured_magnitude(net, 0.4, example_inputs=x)
    report = export(net, tmp_path / "m", kind="shrunk", recipe=found)
    assert (report.kept, report.prunable) == (found.left["params"], found.dense["params"])
    fresh = load_exported(make(name)[0], tmp_path / "m")
    assert torch.equal(fresh(x), found.shrink(net)(x))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_transformers(name, tmp_path):
    model, inputs, _, _ = transformer(name)
    model.eval()
    found = structured_magnitude(model, 0.2, example_inputs=inputs, budget="params")
    report = export(model, tmp_path / "m", kind="shrunk", recipe=found, example=inputs, runs=1)
    assert (report.kept, report.prunable) == (found.left["params"], found.dense["params"])  # tied ones once
    fresh = load_exported(transformer(name)[0].eval(), tmp_path / "m")
    assert torch.equal(fresh(**inputs).logits, found.shrink(model)(**inputs).logits)
    tied = (fresh.get_output_embeddings().weight, fresh.get_input_embeddings().weight)
    assert (tied[0] is tied[1]) == (name != "llama")


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_models_are_the_model_inside(run, file, wrap, tmp_path):
    model, result = run
    export(wrap(copy.deepcopy(model)), tmp_path / "other", kind="shrunk", recipe=result)
    inner, other, x = residual(), residual(), torch.randn(2, 3, 8, 8)
    load_exported(wrap(inner), file)
    assert torch.equal(inner(x), load_exported(other, tmp_path / "other")(x))
    assert torch.equal(inner(x), result.shrink(model)(x))


def test_a_half_precision_model(run, tmp_path):
    model, result = run
    half = copy.deepcopy(model).bfloat16()
    export(half, tmp_path / "m", kind="shrunk", recipe=result)
    x = torch.randn(2, 3, 8, 8, dtype=torch.bfloat16)
    assert torch.equal(load_exported(residual().bfloat16(), tmp_path / "m")(x), result.shrink(half)(x))


def test_another_model_stays_as_it_is(run, file):
    wider = residual()
    wider.a, wider.b = nn.Conv2d(8, 9, 3, padding=1, bias=False), nn.Conv2d(9, 8, 3, padding=1)
    more = residual()
    more.extra = nn.Linear(2, 2)
    classes = residual()
    classes.head.fc = nn.Linear(8, 7)
    halved = structured_magnitude(residual(), 0.8, example_inputs=torch.randn(1, 3, 8, 8)).shrink(residual())
    for other, words in [
        (mlp(), r"this Sequential, got one of another model: wanted stem\.weight with 8 positions along dim 0, got"),
        (wider, r"a\.weight with 6 positions along dim 0, got shape \(9, 8, 3, 3\); nor is it as small"),
        (halved, "nor is it as small"),
        (more, r"got a file with no extra\.bias, extra\.weight"),
        (classes, r"other shapes or layouts: head\.fc\.bias \(4,\) for \(7,\)"),
    ]:
        before = Snapshot(other)
        kept = [id(tensor) for tensor in (*other.parameters(), *other.buffers())]
        with pytest.raises(ValueError, match=f"path: wanted .*{words}"):
            load_exported(other, file)
        before.check()
        assert kept == [id(tensor) for tensor in (*other.parameters(), *other.buffers())]


def damaged(content):
    """Files that are no more what was written: cut, with a bit of a weight or a word of the recipe changed."""
    changed = bytearray(content)
    changed[-10] ^= 1
    return b"", content[:100], content[:-10], bytes(changed), content.replace(b"slices", b"slides", 1)


def test_a_damaged_file_changes_nothing(file, tmp_path):
    other, content = residual(), file.read_bytes()
    before = Snapshot(other)
    assert b"slices" in content
    for bad in damaged(content):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(ValueError, match="path: wanted an exported model, got .*bad', which is damaged"):
            load_exported(other, tmp_path / "bad")
        before.check()


def test_interrupted_a_model_is_the_dense_or_the_shrunk_one(run, file):
    x, shrunk = torch.randn(2, 3, 8, 8), run[1].shrink(run[0])
    used, count = [], 0

    def work():
        used[:] = [model := residual(), Snapshot(model)]
        load_exported(model, file)

    for error in every_moment(work, [loading.__file__, recipe.__file__, surgery.__file__], step=23):
        assert isinstance(error, KeyboardInterrupt)
        model, before = used
        count += 1
        if model.stem.weight.shape == shrunk.stem.weight.shape:
            assert torch.equal(model(x), shrunk(x))
        else:
            before.check()
            assert (model.stem.out_channels, model.norm.num_features, model.a.in_channels) == (8, 8, 8)
            assert torch.equal(model(x), residual()(x))
    assert count > 25


def test_an_error_leaves_no_file_and_what_was_there(run, file, tmp_path):
    model, result = run
    old = file.read_bytes()
    with pytest.raises(RuntimeError):
        export(model, file, kind="shrunk", recipe=result, example=torch.ones(2, 7))
    assert file.read_bytes() == old
    assert os.listdir(tmp_path) == [file.name]


def test_what_is_no_structured_result(run, mlp, vectors, tmp_path):
    model, result = run
    weights = prune(mlp, vectors, config=population(0.5, n_particles=2, n_steps=2))
    for given, got in [
        (weights, "PruneResult of granularity 'weight'"), (weights.mask, "MaskSet"), (None, "NoneType"), ({}, "dict"),
    ]:  # fmt: skip
        with pytest.raises(TypeError, match=f"recipe: wanted the result of a run with granularity .* got {got}"):
            export(mlp, tmp_path / "m", kind="shrunk", recipe=given)
    with pytest.raises(ValueError, match=r"model: wanted stem\.weight with 8 positions along dim 0, got shape none"):
        export(mlp, tmp_path / "m", kind="shrunk", recipe=result)
    with pytest.raises(ValueError, match="masks: wanted None with kind='shrunk'"):
        export(model, tmp_path / "m", kind="shrunk", recipe=result, masks=result.mask)
    for kind in ("dense", "masks"):
        with pytest.raises(ValueError, match=f"recipe: wanted None with kind='{kind}', got StructuredResult"):
            export(model, tmp_path / "m", kind=kind, recipe=result)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"slices": {}},
        {"slices": {"a.weight": {"0": [0, 99]}}, "sizes": {"a.weight": {"0": 6}}},
        {"slices": {"a.weight": {"0": [2, 1]}}, "sizes": {"a.weight": {"0": 6}}},
        {"slices": {"a.weight": {"0": [-1, 1]}}, "sizes": {"a.weight": {"0": 6}}},
        {"slices": {"a.weight": {"0": []}}, "sizes": {"a.weight": {"0": 6}}},
        {"slices": {"a.weight": {"0": [0.5]}}, "sizes": {"a.weight": {"0": 6}}},
        {"slices": {"a.weight": {"1": [0]}}, "sizes": {"a.weight": {"0": 6}}},
        {"attributes": {"a": {"forward": "x"}}},
        {"groups": {"a": [True]}},
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(run, change):
    with pytest.raises(ValueError, match=r"values: wanted what to_dict\(\) wrote"):
        ShrinkRecipe.from_dict({**run[1].recipe().to_dict(), **change})


def test_numbers_that_modules_keep_are_looked_for():
    model, x = vit()
    keep = torch.ones(find_structure(model, x).size, dtype=torch.bool)
    keep[0] = False
    recipe = ShrinkRecipe.of(find_structure(model, x), keep)
    assert recipe.state_of(model) == "dense"
    assert recipe.state_of(recipe.shrink(model)) == "shrunk"
    other = vit()[0]
    del other[1].attn.num_heads
    with pytest.raises(ValueError, match="model: wanted a module 1.attn that keeps a number num_heads, got none"):
        recipe.shrink(other)
