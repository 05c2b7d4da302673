"""Export: what is written loads and computes the same; what is reported is right; nothing half-written."""

import copy
import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model
from torch import nn

from benchmarks.models import Gpt, texts
from sfpk_kernels import MaskSet, export, load_exported, prune

from .settings import population
from .snapshot import Snapshot
from .wrappers import WRAPPERS


@pytest.fixture
def pruned(convnet, images):
    config = population(0.8, n_particles=2, n_steps=4)
    return prune(convnet, images, config=config).apply_(convnet)


def test_dense_with_zeros(pruned, images, tmp_path):
    snapshot = Snapshot(pruned)
    path = tmp_path / "model.safetensors"
    report = export(pruned, path, example=images[0], runs=3)
    snapshot.check()
    other = copy.deepcopy(pruned)
    for tensor in (*other.parameters(), *other.buffers()):
        nn.init.zeros_(tensor)
    load_model(other, path)
    assert torch.equal(other(images[0][0]), pruned(images[0][0]))
    assert report.bytes_on_disk == path.stat().st_size
    assert report.parameters == sum(p.numel() for p in pruned.parameters())
    assert report.nonzero == sum(int(p.count_nonzero()) for p in pruned.parameters())
    assert report.kept == round(0.2 * report.prunable)
    # Two multiplications and additions per weight and output place, of 16 images.
    assert report.flops == 16 * 2 * (6 * 2 * 9 * 36 + 8 * 6 * 9 * 9 + 72 * 4)
    places = {"0.weight": 36, "4.weight": 9, "8.weight": 1}
    kept = sum(int(pruned.get_parameter(name).count_nonzero()) * n for name, n in places.items())
    assert report.flops_nonzero == pytest.approx(kept * 32 / report.flops)
    assert report.latency > 0
    assert "outputs" in report.verified
    assert json.loads(json.dumps(report.to_dict()))["kept"] == report.kept
    assert "zeros counted" in str(report)


def test_masks_only(pruned, images, tmp_path):
    path = tmp_path / "masks"
    report = export(pruned, path, kind="masks", example=images[0], runs=1, metadata={"note": 1})
    masks = MaskSet.load(path)
    assert masks == MaskSet.from_model(pruned)
    assert masks.metadata["note"] == 1
    assert report.bytes_on_disk < report.prunable  # bits, not bytes


def test_masks_not_yet_applied(convnet, images, tmp_path):
    masks = prune(convnet, images, config=population(0.8, n_particles=2, n_steps=4)).mask
    snapshot = Snapshot(convnet)
    export(convnet, tmp_path / "m", masks=masks)
    snapshot.check()
    other = copy.deepcopy(convnet)
    load_model(other, tmp_path / "m")
    assert MaskSet.from_model(other).kept <= masks.kept
    assert all((other.get_parameter(name)[~masks[name]] == 0).all() for name in masks)


def test_tied_weights(tmp_path):
    model = Gpt(16, 1, 2, vocabulary=20, tokens=8).eval()
    batch = texts(8, 20)(2)
    export(model, tmp_path / "m", example=batch, runs=1)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.embedding.weight)
    load_model(other, tmp_path / "m")
    assert torch.equal(other(**batch)["logits"], model(**batch)["logits"])


def test_what_is_read_back_wrong_is_not_left(pruned, images, tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_text("old")
    real = export.__globals__["save_dense"]

    def spoil(model, *args, **kwargs):
        model = copy.deepcopy(model)
        with torch.no_grad():
            model[0].weight.add_(1)
        real(model, *args, **kwargs)

    monkeypatch.setitem(export.__globals__, "save_dense", spoil)
    with pytest.raises(RuntimeError, match="differ"):
        export(pruned, path, example=images[0])
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_models_are_written_as_the_model_inside(pruned, images, tmp_path, wrap):
    report = export(wrap(pruned), tmp_path / "m", example=images[0], runs=1)
    other = copy.deepcopy(pruned)
    nn.init.zeros_(other[0].weight)
    load_model(other, tmp_path / "m")
    assert torch.equal(other(images[0][0]), pruned(images[0][0]))
    plain = export(pruned, tmp_path / "m", example=images[0], runs=1)
    assert (report.flops, report.flops_nonzero) == (plain.flops, plain.flops_nonzero)


def test_attention_counts_and_lstm_is_said_not_to(tmp_path):
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    report = export(layer, tmp_path / "m", example=torch.randn(1, 256, 32), runs=1)
    linear = 256 * 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert report.flops == linear + 2 * 2 * 256 * 256 * 32 == 12_582_912
    assert report.uncounted == ()

    class Recurrent(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.recurrent, self.head = kind(16, 16, batch_first=True), nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.recurrent(x)[0])

    for kind in (nn.LSTM, nn.GRU):
        report = export(Recurrent(kind), tmp_path / "m", example=torch.randn(2, 8, 16), runs=1)
        head = 2 * 8 * 2 * 16 * 4
        counted = report.flops > head  # which of them torch counts depends on its version
        assert report.uncounted == (() if counted else (kind.__name__,))
        assert counted or f"{head:,} per forward pass, zeros counted, {kind.__name__} not counted" in str(report)


def test_a_model_that_cannot_be_copied(mlp, tmp_path):
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = mlp[0]

        def forward(self, x):
            self.last = self.layer(x)
            return self.last

    model = Caching()
    model(torch.ones(2, 8)).sum().backward()
    masks = MaskSet({"layer.weight": torch.rand(12, 8) > 0.5})
    with pytest.raises(RuntimeError, match=r"cannot be copied \(.*\): apply the masks first, .* verify=False"):
        export(model, tmp_path / "m", masks=masks)
    masks.apply_(model)
    with pytest.raises(RuntimeError, match=r"cannot be copied \(.*\): verify=False writes it without"):
        export(model, tmp_path / "m", masks=masks)
    assert not list(tmp_path.iterdir())
    assert export(model, tmp_path / "m", verify=False, masks=masks).verified is None


def test_a_state_dict_with_other_things_than_tensors(mlp, tmp_path):
    class Extra(nn.Sequential):
        def get_extra_state(self):
            return {"scale": torch.ones(2)}

        def set_extra_state(self, state):
            pass

    model = Extra(mlp[0])
    with pytest.raises(ValueError, match="model: wanted a state dict of tensors, .* got _extra_state"):
        export(model, tmp_path / "m", verify=False)
    export(model, tmp_path / "m", kind="masks")


@pytest.mark.parametrize("view", [lambda w: w[:2], lambda w: w.T, lambda w: w, lambda w: w.flatten()[3:7].view(2, 2)])
def test_views_are_refused(tmp_path, view):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 4))
    export(model, tmp_path / "fine")
    model[1].weight = nn.Parameter(view(model[0].weight.detach()))
    for verify in (True, False):
        with pytest.raises(ValueError, match="got [01].weight and [01].weight, which (share memory without|overlap)"):
            export(model, tmp_path / "m", verify=verify)
    assert not (tmp_path / "m").exists()
    model[1].weight = model[0].weight  # the same parameter is written once
    export(model, tmp_path / "m")


def test_an_example_that_does_not_run_leaves_no_file(pruned, tmp_path):
    for verify in (True, False):
        with pytest.raises(RuntimeError):
            export(pruned, tmp_path / "m", verify, example=torch.ones(2, 7))
    assert not list(tmp_path.iterdir())


def test_wrong_input(pruned, mlp, tmp_path):
    with pytest.raises(TypeError, match="recipe: wanted the result of a run with granularity .* got NoneType"):
        export(pruned, tmp_path / "m", kind="shrunk")
    with pytest.raises(ValueError, match="kind: wanted one of"):
        export(pruned, tmp_path / "m", kind="onnx")
    with pytest.raises(ValueError, match=r"path: wanted a safetensors file, got '.*m\.onnx', which"):
        export(pruned, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="wanted the model these masks were made for"):
        export(mlp, tmp_path / "m", masks=MaskSet.from_model(pruned))
    with pytest.raises(TypeError, match="masks: wanted a MaskSet or None, got dict"):
        export(mlp, tmp_path / "m", masks={})
    with pytest.raises(FileNotFoundError, match="existing folder"):
        export(pruned, tmp_path / "no" / "m")
    with pytest.raises(ValueError, match="runs"):
        export(pruned, tmp_path / "m", runs=0)


@pytest.mark.parametrize("kind", ["dense", "masks"])
def test_what_is_no_regular_file_is_never_replaced(convnet, images, tmp_path, kind):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/null", tmp_path):
        with pytest.raises((FileExistsError, IsADirectoryError), match="^path: wanted a"):
            export(convnet, path, kind=kind, example=images[0])
    assert stat.S_ISFIFO(os.lstat(tmp_path / "fifo").st_mode)
    assert os.listdir(tmp_path) == ["fifo"]


LAYOUTS = {
    "coo": lambda a: a.to_sparse(),
    "uncoalesced": lambda a: torch.sparse_coo_tensor([[0, 0, 2], [1, 1, 3]], [1.0, 2.0, 3.0], (6, 6)),
    "csr": lambda a: a.to_sparse_csr(),
    "csc": lambda a: a.to_sparse_csc(),
    "bsr": lambda a: a.to_sparse_bsr((2, 3)),
    "bsc": lambda a: a.to_sparse_bsc((2, 3)),
    "int": lambda a: (a * 10).long().to_sparse(),
    "empty": lambda a: torch.zeros(6, 6).to_sparse(),
}


class Graph(nn.Module):
    def __init__(self, adjacency, shared=False):
        super().__init__()
        self.inner = nn.Linear(8, 4)
        self.register_buffer("adjacency", adjacency)
        self.register_buffer("again", adjacency if shared else None)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_buffers_are_written_in_their_parts(tmp_path, layout, shared):
    torch.manual_seed(0)
    make = LAYOUTS[layout]
    model = Graph(make((torch.rand(6, 6) > 0.6).float()), shared)
    before = model.adjacency.to_dense()
    report = export(model, tmp_path / "m", example=(torch.randn(2, 8),))
    assert report.verified == "every tensor, and the outputs on the example, exactly"
    assert torch.equal(model.adjacency.to_dense(), before)
    other = Graph(make(before), shared)
    if other.adjacency.layout == torch.sparse_coo:  # compressed ones take no other number of elements
        other = Graph(torch.zeros_like(other.adjacency), shared)
    assert load_exported(other, tmp_path / "m") is other
    assert torch.equal(other.adjacency.to_dense(), before)
    assert torch.equal(other.inner.weight, model.inner.weight)
    with safe_open(tmp_path / "m", framework="pt") as file:
        assert "adjacency.values" in set(file.keys()) or "adjacency.values" in file.metadata()


def test_a_file_of_another_model_changes_nothing(tmp_path):
    adjacency = torch.eye(6).to_sparse()
    export(Graph(adjacency), tmp_path / "m")
    for other, words in [
        (nn.Sequential(nn.Linear(8, 4)), r"no 0\.bias, 0\.weight; also adjacency, inner\.bias, inner\.weight"),
        (Graph(torch.eye(7).to_sparse()), r"other shapes or layouts: adjacency \(6, 6\) for \(7, 7\)"),
        (Graph(torch.eye(6)), r"other shapes or layouts: adjacency"),
    ]:
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(ValueError, match=f"path: wanted the tensors of this {type(other).__name__}, .*{words}"):
            load_exported(other, tmp_path / "m")
        assert all(torch.equal(v.to_dense(), before[n].to_dense()) for n, v in other.state_dict().items())
    with pytest.raises(FileNotFoundError, match="path: wanted an exported model"):
        load_exported(Graph(adjacency), tmp_path / "none")
    content = (tmp_path / "m").read_bytes()
    for damaged in (b"", content[:100], content[:-10], content.replace(b"sparse_coo", b"sparse_cow")):
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(ValueError, match="which is damaged"):
            load_exported(Graph(adjacency), tmp_path / "bad")


def test_a_batch_norm_under_several_names(tmp_path):
    norm = nn.BatchNorm1d(8)
    model = nn.Sequential(nn.Linear(8, 8), norm, nn.Linear(8, 8), norm)
    model(torch.randn(16, 8))
    export(model, tmp_path / "m", example=torch.randn(4, 8))
    fresh = nn.BatchNorm1d(8)
    other = load_exported(nn.Sequential(nn.Linear(8, 8), fresh, nn.Linear(8, 8), fresh), tmp_path / "m")
    x = torch.randn(4, 8)
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert fresh.num_batches_tracked == norm.num_batches_tracked
