"""Packed files: small, read back bit for bit, in the memory of one tensor; whole or not at all."""

import copy
import json
import math
import re
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.models import Gpt, texts
from sfpk_kernels import MaskSet, export, load_exported
from sfpk_kernels.baselines import magnitude
from sfpk_kernels.cli import main
from sfpk_kernels.demo.task import build_model
from sfpk_kernels.export import loading, packed_reading

from .interruptions import every_moment
from .processes import python
from .snapshot import Snapshot

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(INTEGERS[tensor.element_size()])


def same_bits(one, other):
    """Whether two state dicts are the same, bit for bit."""
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return all(one[n].dtype == other[n].dtype and torch.equal(bits(one[n]), bits(other[n])) for n in one)


def wiped(model):
    """A copy without any value of its own."""
    other = copy.deepcopy(model)
    for value in other.state_dict().values():
        value.fill_(7)
    return other


def wide():
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))


@pytest.fixture
def masked(mlp):
    """(model, masks) with some of a tensor, all of another one kept."""
    masks = MaskSet({"0.weight": torch.rand(12, 8) > 0.7, "2.weight": torch.ones(4, 12, dtype=torch.bool)})
    return masks.apply_(mlp), masks


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("given", [True, False])
def test_every_bit_comes_back(dtype, given, tmp_path):
    model = nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7), nn.Conv1d(7, 5, 3), nn.Linear(4, 4)).to(dtype)
    masks = magnitude(model, 0.6)
    masks.apply_(model)
    odd = bits(model[0].weight)  # the parameter's memory
    kept, removed = (at.flatten().nonzero()[:, 0] for at in (masks["0.weight"], ~masks["0.weight"]))
    sign = torch.iinfo(odd.dtype).min
    nan = int(bits(torch.tensor([math.nan], dtype=dtype)))
    odd[kept[0]], odd[kept[1]], odd[kept[2]] = nan | 5, sign | nan | 1, sign  # NaN with payloads, −0.0
    odd[removed[0]] = sign
    smallest = bits(model[2].weight)
    smallest[masks["2.weight"].flatten().nonzero()[0, 0]] = 1  # subnormal
    model[0].bias.data[0] = -0.0
    before = copy.deepcopy(model.state_dict())
    report = export(model, tmp_path / "m", kind="packed", masks=masks if given else None)
    assert all(torch.equal(bits(v), bits(before[n])) for n, v in model.state_dict().items())
    other = wiped(model)
    assert load_exported(other, tmp_path / "m") is other
    assert same_bits(other, model)
    assert report.verified == "every tensor, exactly"
    assert "; the dense model has" in str(report)  # names and digest are more than these few weights


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.999])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (257, 3)])
def test_every_size(sparsity, shape, tmp_path):
    model = nn.Sequential(nn.Linear(*shape), nn.Linear(4, 2))
    masks = MaskSet({"0.weight": torch.rand(shape[::-1]) > sparsity})
    expected = masks.apply_(copy.deepcopy(model))
    snapshot = Snapshot(model)
    export(model, tmp_path / "m", kind="packed", masks=masks)  # not applied: a copy is masked and written
    snapshot.check()
    assert same_bits(load_exported(wiped(model), tmp_path / "m"), expected)


def test_bits_are_those_of_mask_files_and_other_tensors_are_as_they_are(masked, tmp_path):
    model, masks = masked
    export(model, tmp_path / "m.safetensors", kind="packed", masks=masks, metadata={"note": 1})
    masks.save(tmp_path / "masks.safetensors")
    stored, packed = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "masks.safetensors")
    assert torch.equal(stored.pop(".bits"), torch.cat([packed["0.weight"], packed["2.weight"]]))
    values = [model.get_parameter(name).detach()[masks[name]] for name in masks]
    assert torch.equal(stored.pop(".kept.float32"), torch.cat(values))
    assert {n: v.tolist() for n, v in stored.items()} == {f"{n}.bias": model[n].bias.tolist() for n in (0, 2)}
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        facts = json.loads(file.metadata()["sfpk"])
    assert (facts["fingerprint"], facts["metadata"]) == (masks.fingerprint(), {"note": 1})


@pytest.mark.parametrize(
    ("make", "sparsity", "of_file", "of_weights"),
    [
        (build_model, 0.95, 9.0, 12.0),
        (build_model, 0.98, 12.0, 19.0),  # batch norms are 1.8 % of its bytes, and all of them stay
        (wide, 0.95, 9.0, 12.0),
        (wide, 0.98, 18.0, 19.0),
    ],
)
def test_how_much_smaller(make, sparsity, of_file, of_weights, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    masks = magnitude(model, sparsity)
    masks.apply_(model)
    report = export(model, tmp_path / "packed", kind="packed", masks=masks)
    dense = export(model, tmp_path / "dense", masks=masks)
    assert report.bytes_on_disk == (tmp_path / "packed").stat().st_size
    assert dense.bytes_on_disk / report.bytes_on_disk >= of_file
    with safe_open(tmp_path / "packed", framework="pt") as file:
        length = {name: file.get_slice(name).get_shape()[0] for name in (".bits", ".kept.float32")}
    assert masks.prunable * 4 / (length[".bits"] + 4 * length[".kept.float32"]) >= of_weights
    state = model.state_dict().values()
    assert report.bytes_dense == dense.bytes_dense == sum(v.numel() * v.element_size() for v in state)
    assert f"{report.times_smaller:.1f} × smaller than the dense" in str(report)
    assert dense.size in str(dense)
    assert "dense" not in dense.size
    assert report.to_dict()["times_smaller"] == report.bytes_dense / report.bytes_on_disk


def test_tied_weights_are_written_once(tmp_path):
    model = Gpt(16, 1, 2, vocabulary=20, tokens=8).eval()
    masks = magnitude(model, 0.5, include_embeddings=True)
    assert any(tensor is model.embedding.weight for name, tensor in model.named_parameters() if name in masks)
    masks.apply_(model)
    batch = texts(8, 20)(2)
    report = export(model, tmp_path / "m", kind="packed", masks=masks, example=batch, runs=1)
    assert "outputs" in report.verified
    with safe_open(tmp_path / "m", framework="pt") as file:
        shapes = json.loads(file.metadata()["sfpk_packed"])["shapes"]["float32"]
        assert file.get_slice(".kept.float32").get_shape() == [masks.kept]
    assert len(shapes) == len(masks)
    other = load_exported(wiped(model), tmp_path / "m")
    assert same_bits(other, model)
    assert torch.equal(other(**batch)["logits"], model(**batch)["logits"])


def test_masks_of_both_names_of_a_tied_weight(tmp_path):
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    a, b = torch.rand(6, 6) > 0.4, torch.rand(6, 6) > 0.4
    masks = MaskSet({"0.weight": a, "2.weight": b})
    expected = torch.where(a & b, layer.weight.detach(), 0.0)
    export(model, tmp_path / "m", kind="packed", masks=masks)
    assert torch.equal(load_exported(wiped(model), tmp_path / "m")[2].weight, expected)


def test_other_layouts_and_dtypes_of_the_model_read_into(masked, tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Conv2d(6, 2, 3)).to(memory_format=torch.channels_last)
    masks = magnitude(model, 0.8)
    masks.apply_(model)
    export(model, tmp_path / "m", kind="packed", masks=masks)
    for to in ({"memory_format": torch.channels_last}, {"memory_format": torch.contiguous_format}):
        other = wiped(model).to(**to)
        strides = other[0].weight.stride()
        assert same_bits(load_exported(other, tmp_path / "m"), model)
        assert other[0].weight.stride() == strides
    half = load_exported(wiped(model).double(), tmp_path / "m")
    assert torch.equal(half[0].weight, model[0].weight.double())


def test_sparse_buffers_and_a_mask_beside_them(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4))
    model.register_buffer("adjacency", torch.eye(6).to_sparse())
    model.register_buffer("csr", torch.eye(6).to_sparse_csr())
    masks = magnitude(model, 0.5)
    masks.apply_(model)
    export(model, tmp_path / "m", kind="packed", masks=masks)
    other = nn.Sequential(nn.Linear(8, 4))
    other.register_buffer("adjacency", torch.zeros(6, 6).to_sparse())
    other.register_buffer("csr", torch.eye(6).mul(2).to_sparse_csr())
    load_exported(other, tmp_path / "m")
    assert torch.equal(other.adjacency.to_dense(), torch.eye(6))
    assert torch.equal(other.csr.to_dense(), torch.eye(6))
    assert torch.equal(other[0].weight, model[0].weight)


def test_models_that_hook_into_loading(masked, tmp_path):
    model, masks = masked

    class Renaming(nn.Sequential):
        """Says what was loaded, as modules that convert old files do."""

        def _load_from_state_dict(self, state_dict, prefix, *args):
            self.seen = sorted(state_dict)
            super()._load_from_state_dict(state_dict, prefix, *args)

    export(model, tmp_path / "m", kind="packed", masks=masks)
    other = Renaming(*wiped(model))
    assert same_bits(load_exported(other, tmp_path / "m"), model)
    assert other.seen == sorted(model.state_dict())
    weight = nn.utils.parametrizations.weight_norm(copy.deepcopy(model[0]))
    with pytest.raises(ValueError, match="path: wanted the tensors of this"):
        load_exported(weight, tmp_path / "m")


class Own(nn.Module):
    """Whose state dict is not its parameters' memory."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.layer = nn.Linear(4, 4)
        self._register_state_dict_hook(lambda module, state, prefix, metadata: state.update(
            {f"{prefix}weight": state[f"{prefix}weight"] * 2}))  # fmt: skip
        self._register_load_state_dict_pre_hook(lambda state, prefix, *args: state.update(
            {f"{prefix}weight": state[f"{prefix}weight"] / 2}))  # fmt: skip


def test_state_dicts_of_a_models_own_making(tmp_path):
    model = Own()
    export(model, tmp_path / "m", kind="packed", masks=MaskSet({"layer.weight": torch.rand(4, 4) > 0.5}))
    other = load_exported(Own(), tmp_path / "m")
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(ValueError, match="model: wanted weight in its state dict as it is in the model"):
        export(model, tmp_path / "other", kind="packed", masks=MaskSet({"weight": torch.rand(4, 4) > 0.5}))
    assert not (tmp_path / "other").exists()


def test_another_model_or_a_damaged_file_changes_nothing(masked, tmp_path):
    model, masks = masked
    export(model, tmp_path / "m", kind="packed", masks=masks)
    for other, words in [
        (nn.Sequential(nn.Linear(8, 12)), r"also 2\.bias, 2\.weight"),
        (nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 5)), r"2\.weight \(4, 12\) for \(5, 12\)"),
        (nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)), r"no 1\.bias, 1\.weight; also 2\.bias, 2\.weight"),
    ]:
        snapshot = Snapshot(other)
        with pytest.raises(ValueError, match=f"path: wanted the tensors of this Sequential, .*{words}"):
            load_exported(other, tmp_path / "m")
        snapshot.check()
    content, other = (tmp_path / "m").read_bytes(), wiped(model)
    snapshot = Snapshot(other)
    start = 8 + int.from_bytes(content[:8], "little")
    damaged = [content[:-1], content[:50], b"", content.replace(b"[12,8]", b"[8,12]"), content.replace(b"F32", b"I32")]
    damaged += [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in range(start, len(content), 7)]
    for each in damaged:
        assert each != content
        (tmp_path / "bad").write_bytes(each)
        with pytest.raises(ValueError, match="which is damaged"):
            load_exported(other, tmp_path / "bad")
    snapshot.check()
    for meta in (wiped(model).to("meta"), copy.deepcopy(model).to("meta")):
        with pytest.raises(ValueError, match="model: wanted one with memory, got 0.weight on the meta device"):
            load_exported(meta, tmp_path / "m")


def test_bits_and_values_that_do_not_fit_each_other(masked, tmp_path, monkeypatch):
    """Whoever writes the digest anew: the counts are checked before anything is written into the model."""
    model, masks = masked
    export(model, tmp_path / "m", kind="packed", masks=masks)
    with safe_open(tmp_path / "m", framework="pt") as file:
        stored, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    other = wiped(model)
    snapshot = Snapshot(other)
    for name, change in [(".kept.float32", lambda v: v[:-1]), (".bits", lambda v: v[:-1]), (".bits", lambda v: v ^ 1)]:
        changed = {**stored, name: change(stored[name])}
        digest = packed_reading.digest_of(metadata["sfpk_packed"], sorted(changed.items()))
        save_file(changed, tmp_path / "bad", {**metadata, "sfpk_digest": digest})
        with pytest.raises(ValueError, match="which is damaged: .*wanted"):
            load_exported(other, tmp_path / "bad")
    snapshot.check()


def test_interrupted_a_model_is_wholly_old_or_wholly_new(masked, tmp_path):
    model, masks = masked
    export(model, tmp_path / "m", kind="packed", masks=masks)
    used, found = [], set()

    def work():
        used[:] = [other := wiped(model), Snapshot(other)]
        load_exported(other, tmp_path / "m")

    for error in every_moment(work, [loading.__file__, packed_reading.__file__]):
        assert isinstance(error, KeyboardInterrupt)
        assert torch.is_grad_enabled()
        new = same_bits(used[0], model)
        found.add(new)
        if not new:
            used[1].check()
    assert found == {True, False}
    assert same_bits(used[0], model)


def test_a_tensor_that_cannot_be_written_is_said(masked, tmp_path, monkeypatch):
    model, masks = masked
    export(model, tmp_path / "m", kind="packed", masks=masks)

    def full(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(packed_reading, "unpack_mask", full)
    with pytest.raises(RuntimeError, match="model: its tensors could not all be read, load it again: no room"):
        load_exported(wiped(model), tmp_path / "m")


def test_errors_leave_the_file_that_was_there(masked, tmp_path):
    model, masks = masked
    (tmp_path / "m").write_text("old")
    with pytest.raises(RuntimeError):
        export(model, tmp_path / "m", kind="packed", masks=masks, example=torch.ones(2, 7))
    with pytest.raises(ValueError, match="recipe: wanted None with kind='packed'"):
        export(model, tmp_path / "m", kind="packed", recipe=3)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m", "old")]


MEASURED = """
import re
from pathlib import Path
import torch
from torch import nn
from sfpk_kernels import load_exported
from sfpk_kernels.export import packed_reading

def held(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

path, how = ARGUMENTS
model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(20)])
load_exported(model[:1], path + ".one")  # what the first call loads is not counted
if how == "whole":
    packed_reading._is_plain = lambda *_: False
Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
before = held("VmRSS")
load_exported(model, path)
print((held("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_no_second_model_is_in_memory(tmp_path):
    model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(20)])
    for part, name in ((model, "m"), (model[:1], "m.one")):
        masks = magnitude(part, 0.95)
        export(part, tmp_path / name, kind="packed", masks=masks, verify=False)
    peaks = {}
    for how in ("apart", "whole"):
        code = MEASURED.replace("ARGUMENTS", repr((str(tmp_path / "m"), how)))
        peaks[how] = float(python(code, OMP_NUM_THREADS="1"))
    # The file's pages (8 % of the model) and a tensor (5 %), beside the control: all of the state dict.
    assert peaks["apart"] < 0.3
    assert peaks["whole"] > 0.9


def normed():
    """A task with batch norm, for the command."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 400), nn.BatchNorm1d(400), nn.ReLU(), nn.Linear(400, 3))
    data = [(torch.randn(16, 6), torch.randint(3, (16,))) for _ in range(4)]
    return model, None, data, lambda pruned: float(pruned[1].running_mean.sum())


RUNS = {
    "sfpk": ["--sparsity", "0.75", "--n-particles", "1", "--n-steps", "4"],
    "magnitude": ["--sparsity", "0.75", "--method", "magnitude"],
}


@pytest.mark.parametrize("method", RUNS)
def test_the_command_writes_what_it_evaluates(method, tmp_path, capsys):
    task, out = f"{__name__}:normed", str(tmp_path)
    assert main(["prune", task, *RUNS[method], "--packed", "--out", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    path = tmp_path / "packed.safetensors"
    assert str(path) in found["files"]
    assert found["packed"]["bytes_on_disk"] == path.stat().st_size
    model, _, _, evaluate = normed()
    masks, dense = MaskSet.load(tmp_path / "mask.safetensors"), evaluate(model)
    expected = masks.apply_(copy.deepcopy(model))
    load_exported(model, path)
    assert torch.equal(model[3].weight, expected[3].weight)
    assert evaluate(model) == pytest.approx(found["pruned_eval"]) != dense
    assert main(["prune", task, *RUNS[method], "--packed", "--out", out]) == 0
    assert re.search(r"^packed\.safetensors: .*B, [\d.]+ × smaller than the dense", capsys.readouterr().out, re.M)


def test_the_command_refuses_it_for_channels(tmp_path, capsys):
    arguments = ["--sparsity", "0.5", "--granularity", "group", "--budget", "macs", "--packed", "--out", str(tmp_path)]
    assert main(["prune", f"{__name__}:normed", *arguments]) == 2
    assert "--packed: wanted without --granularity group, got both" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_on_a_gpu(dtype, tmp_path):
    model = wide().to(dtype)
    masks = magnitude(model, 0.9)
    masks.apply_(model)
    export(copy.deepcopy(model).cuda(), tmp_path / "gpu", kind="packed", masks=masks)
    export(model, tmp_path / "cpu", kind="packed", masks=masks)
    assert (tmp_path / "gpu").read_bytes() == (tmp_path / "cpu").read_bytes()
    assert same_bits(load_exported(wiped(model).cuda(), tmp_path / "cpu").cpu(), model)
