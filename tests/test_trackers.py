"""Trackers: what they hold after a run is what the run's history says, read back with their own readers."""

import builtins
import dataclasses
import importlib
import importlib.util
import json
import math
import struct

import pytest
import torch
from torch import nn

from sfpk_kernels import prune
from sfpk_kernels.baselines import magnitude
from sfpk_kernels.integrations import _tracked

from .settings import population

STEPS = 4
CURVES = {
    "sfpk/energy": lambda record: record.energy,
    "sfpk/density": lambda record: record.density,
    "sfpk/scheduled_density": lambda record: record.scheduled_density,
    "sfpk/alarms": lambda record: len(record.alarms),
}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 8, generator=generator), torch.randint(4, (16,), generator=generator)) for _ in range(3)]


LAYERS = ["0.weight", "2.weight"]


def tracked(callback, net, batches):
    """The result of a run that a callback followed to its end, and one alarm more."""
    result = prune(net, batches, config=population(0.75, n_particles=2, n_steps=STEPS), callbacks=[callback])
    callback(dataclasses.replace(result.history[-1], step=STEPS + 1, alarms=["something is wrong", "and more"]))
    callback.finish(result, {"accuracy": 0.5, "loss": 2})
    return result


def check(curves, last, result):
    """``curves``: values by step by name; ``last``: numbers of the end by name."""
    for name, of in CURVES.items():
        found = dict(curves[name])
        assert list(found) == list(range(1, STEPS + 2))
        assert [found[record.step] for record in result.history] == pytest.approx([of(r) for r in result.history])
    assert dict(curves["sfpk/alarms"])[STEPS + 1] == 2
    for number, name in enumerate(LAYERS):
        found = dict(curves[f"sfpk/layer_density/{name}"])
        assert [found[r.step] for r in result.history] == pytest.approx(
            [r.layer_densities[number] for r in result.history]
        )
    assert last["sfpk/sparsity"] == pytest.approx(result.mask.sparsity)
    assert (last["sfpk/kept"], last["sfpk/prunable"]) == (result.mask.kept, result.mask.prunable)
    assert (last["sfpk/evaluation/accuracy"], last["sfpk/evaluation/loss"]) == (0.5, 2)
    assert last["sfpk/alarms_in_all"] == len(result.alarms)


@pytest.mark.parametrize("own", [True, False])
def test_tensorboard(net, batches, tmp_path, own):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    from sfpk_kernels.integrations.tensorboard import TensorBoardCallback

    writer = tmp_path if own else SummaryWriter(str(tmp_path))
    result = tracked(TensorBoardCallback(writer, LAYERS), net, batches)
    if not own:
        writer.add_scalar("of the user", 1.0, 0)  # it was left open
        writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    scalars = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    check(scalars, {name: values[0][1] for name, values in scalars.items()}, result)
    assert ("of the user" in scalars) is not own
    words = events.Tensors("sfpk/alarms/text_summary")
    said = [(e.step, e.tensor_proto.string_val[0].decode()) for e in words]
    assert said[-2:] == [(STEPS + 1, "something is wrong"), (STEPS + 1, "and more")]


def test_mlflow(net, batches, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from sfpk_kernels.integrations.mlflow import MLflowCallback

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    try:
        with pytest.raises(ValueError, match="run_id: wanted that of a run, got None and no active run"):
            MLflowCallback()
        with mlflow.start_run() as run:
            result = tracked(MLflowCallback(layers=LAYERS), net, batches)
        client, run_id = mlflow.MlflowClient(), run.info.run_id
        found = client.get_run(run_id).data
        curves = {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in found.metrics}
        check(curves, found.metrics, result)
        assert found.tags[f"sfpk.alarms.{STEPS + 1}"] == "something is wrong; and more"
        assert mlflow.active_run() is None
        MLflowCallback(run_id).finish(result.mask, 0.25)  # of a run that is over, by its id
        assert client.get_run(run_id).data.metrics["sfpk/evaluation/eval"] == 0.25
    finally:
        mlflow.set_tracking_uri(before)


def test_wandb(net, batches, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from sfpk_kernels.integrations.wandb import WandbCallback

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(ValueError, match="run: wanted a run of Weights & Biases, got none in progress"):
        WandbCallback()
    run = wandb.init(dir=tmp_path, project="test", mode="offline")
    try:
        run.log({"of the user": 1.0})
        result = tracked(WandbCallback(layers=LAYERS), net, batches)
        summary = {name: run.summary[name] for name in run.summary.keys()}  # noqa: SIM118
    finally:
        run.finish()
    curves, alerts = written(next(tmp_path.glob("**/*.wandb")))
    check(curves, summary, result)
    assert alerts[-2:] == [f"step {STEPS + 1}: something is wrong", f"step {STEPS + 1}: and more"]


def records(path):
    """What a file of a run that was offline holds: a log of LevelDB behind 7 bytes, in blocks of 32 KiB."""
    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if kind == 0 or (1 << 15) - at % (1 << 15) < 7:  # the rest of a block, too short for another piece
            at += (1 << 15) - at % (1 << 15)
            continue
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of it, or its last piece
            yield whole
            whole = b""


def written(path):
    """(curves, alerts) of a run that was offline."""
    from wandb.proto import wandb_internal_pb2

    curves, alerts = {}, []
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
        for name, value in row.items() if "sfpk/step" in row else ():
            curves.setdefault(name, []).append((row["sfpk/step"], value))
        if record.HasField("alert"):
            alerts.append(record.alert.text)
    return curves, alerts


@pytest.mark.parametrize(
    ("module", "name", "package"),
    [("tensorboard", "TensorBoardCallback", "tensorboard"), ("wandb", "WandbCallback", "wandb"),
     ("mlflow", "MLflowCallback", "mlflow-skinny")],
)  # fmt: skip
def test_modules_load_nothing_and_say_what_is_missing(module, name, package, monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == module else real(n, *a))
    real_import = builtins.__import__

    def refusing(wanted, globals=None, locals=None, fromlist=(), level=0):
        if level == 0 and wanted.split(".")[0] == module:
            raise AssertionError(f"{wanted} is imported")
        return real_import(wanted, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", refusing)
    found = importlib.import_module(f"sfpk_kernels.integrations.{module}")
    with pytest.raises(ImportError, match=f"{name} needs {package}: pip install {package}"):
        getattr(found, name)(*([tmp_path] if module == "tensorboard" else []))


def test_numbers_of_steps_and_of_the_end(net, batches):
    result = prune(net, batches, config=population(0.75, n_particles=2, n_steps=2))
    record = dataclasses.replace(result.history[0], energies=[math.nan, math.nan])
    assert "sfpk/energy" not in _tracked.of_step(record)
    assert not any(name.startswith("sfpk/layer_density/") for name in _tracked.of_step(record, ["only one"]))
    masks = magnitude(net, 0.5)
    assert _tracked.of_end(masks, 1) == {
        "sfpk/sparsity": 0.5, "sfpk/kept": 72.0, "sfpk/prunable": 144.0, "sfpk/evaluation/eval": 1.0,
    }  # fmt: skip
    assert "sfpk/evaluation/eval" not in _tracked.of_end(masks, None)
    with pytest.raises(TypeError, match="result: wanted a PruneResult or a MaskSet, got dict"):
        _tracked.of_end({}, None)
    for wrong in ("good", {"accuracy": "good"}, True):
        with pytest.raises(TypeError, match="evaluation: wanted a number, or numbers by name"):
            _tracked.of_end(masks, wrong)
