"""The host's side of the GPU path without a GPU: which backend is chosen, on which device, and that nothing waits."""

import logging

import pytest
import torch

from sfpk_kernels import _dispatch

pytest.importorskip("triton")

from .launch_cases import TRANSITIONS, apply, average, differentiate, empty, move, rank
from .recorder import CUDA_OPS, DataDependentOutputException, recorded

DEVICES = ["cuda:0", "cuda:1"]  # cuda:0 is the current one
D = 100_000  # beyond one program of every kernel


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_dispatch, "_said", set())


def check_launches(recording, device, most_rows=65_535):
    """All on their tensors' device, with grids a GPU takes."""
    assert recording.launches
    for launch in recording.launches:
        assert {str(t.device) for t in launch.tensors} == {device}, launch.name
        if launch.device is not None:
            assert str(launch.device) == device, launch.name
        assert all(size > 0 for size in launch.grid)
        assert launch.grid[0] < 2**31
        assert all(size <= most_rows for size in launch.grid[1:])
    assert recording.current == [torch.device("cuda:0")], "the caller's device is current again"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "options"), TRANSITIONS)
def test_the_transition(device, shape, options):
    with recorded() as recording:
        stats = move(device, shape, options, D)
        assert {str(t.device) for t in stats} == {device}
    check_launches(recording, device)
    assert {launch.name for launch in recording.launches} <= {"transition", "combine"}
    stages = [launch.constants["STAGE"] for launch in recording.launches if launch.name == "transition"]
    assert stages[-1] in ("finish", "whole")
    assert ("measure" in stages) == (not options.get("state"))
    assert recording.waits == []


def test_raising_waits_once():
    """That the recorder sees a host read at all."""
    with recorded() as recording, pytest.raises(DataDependentOutputException):
        move("cuda:0", {}, {"nonfinite": "raise"}, D)
    assert recording.waits == ["_local_scalar_dense"]


SELECTIONS = [
    {"output": "cut"},
    {"output": "bool", "score": "abs"},
    {"output": "uint8", "score": "abs_saliency", "saliency": True},
    {"output": "int32", "guess": True},
    {"output": "bool", "values": True},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("given", SELECTIONS)
def test_the_selection(device, backend, given):
    with recorded() as recording:
        given = dict(given)
        if "saliency" in given:
            given["saliency"] = torch.empty(D, device=device)
        if "guess" in given:
            given["guess"] = torch.empty(4, 1, device=device)
        if "values" in given:
            given["values"] = [torch.empty(200, 300, device=device), torch.empty(7, device=device)]
        rank(device, D, backend=backend, **given)
    check_launches(recording, device)
    names = {launch.name for launch in recording.launches}
    assert names == {"topk_device_"} if backend == "cuda" else "count_digits" in names
    assert recording.waits == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("kind", ["cut", "bool", "factors", "packed"])
@pytest.mark.parametrize("lists", [False, True])
def test_masked_weights(device, backend, kind, lists):
    borders = [0, 777, D] if kind == "cut" else None
    with recorded() as recording:
        theta = [empty(device, D - 5000), empty(device, 5000)] if lists else None
        apply(device, D, kind=kind, segments=borders, theta=theta, backend=backend)
        first = list(recording.waits)
        recording.waits.clear()
        apply(device, D, kind=kind, segments=borders, theta=theta, backend=backend)
    check_launches(recording, device)
    names = {launch.name for launch in recording.launches}
    assert names == ({"masked_weights_device_"} if backend == "cuda" else {"apply"})
    assert first == ([] if backend == "triton" else ["_to_copy between devices"]), "the borders, once"
    assert recording.waits == [], "then they are there"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("layout", [[], [10, D // 100, 10, 0]])
def test_mask_gradient(device, backend, layout):
    with recorded() as recording:
        differentiate(device, D, layout=layout, backend=backend)
    check_launches(recording, device)
    assert recording.waits == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", [{}, {"beta": 0.0}, {"averages": False, "beta": 0.0}])
def test_averages_of_gradients(device, given):
    with recorded() as recording:
        assert {str(t.device) for t in average(device, D, **given)} == {device}
    check_launches(recording, device)
    assert [launch.name for launch in recording.launches] == ["average"]
    assert recording.waits == []


def test_a_backend_that_is_built_is_chosen(caplog):
    """The automatic choice: CUDA kernels for selection and masking, Triton's for the transition; nothing is said."""
    with caplog.at_level(logging.WARNING, "sfpk_kernels"), recorded() as recording:
        rank("cuda:1", D)
        apply("cuda:1", D, kind="factors")
        differentiate("cuda:1", D)
        move("cuda:1", {}, {}, D)
    names = {launch.name for launch in recording.launches}
    assert set(CUDA_OPS) <= names
    assert names - set(CUDA_OPS) == {"transition", "combine"}
    assert not caplog.records


def test_without_cuda_kernels_triton_is_chosen_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING, "sfpk_kernels"), recorded(cuda_is_built=False) as recording:
        rank("cuda:1", D)
        apply("cuda:1", D, kind="factors")
    assert {launch.name for launch in recording.launches} & {"apply", "count_digits", *CUDA_OPS} == {
        "apply",
        "count_digits",
    }
    assert any("built without CUDA" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_more_rows_than_a_grid_takes_are_refused(backend):
    with recorded() as recording:
        with pytest.raises(ValueError, match="it ranks up to 65,535 rows, these are 70,000"):
            rank("cuda:0", 100, n=70_000, backend=backend)
        if backend == "triton":  # the CUDA launcher says it itself
            with pytest.raises(ValueError, match="wanted up to 65,535 rows for backend 'triton', got 70,000"):
                differentiate("cuda:0", 100, n=70_000, layout=[2, 5, 10, 0], backend=backend)
    assert not recording.launches


@pytest.mark.parametrize(
    "name", ["transition_", "topk_mask", "masked_weights_out", "mask_gradient", "average_gradients_"]
)
def test_the_implementations_are_registered_for_gpus(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sfpk::{name}", "CUDA")
