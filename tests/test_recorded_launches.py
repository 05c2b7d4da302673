"""The host's side of the GPU path without a GPU: which backend is chosen, on which device, and that nothing waits."""

import logging

import pytest
import torch

from sfpk_kernels import _dispatch
from sfpk_kernels.ops import masking, selection, transition

pytest.importorskip("triton")

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


TRANSITIONS = [
    ({}, {}),
    ({"n": 16, "d": 3000}, {"target_density": 0.5}),
    ({"n": 10, "theta": True}, {"target_density": 0.5, "consensus": 0.1, "nonfinite": "skip"}),
    ({"n": 20, "sizes": True}, {"target_density": 0.5, "consensus": 0.1}),
    ({"n": 100, "theta": True, "saliency": True}, {"kernel": "weighted_rbf", "consensus": 0.1, "target_density": 0.9}),
    ({"n": 10, "dtype": torch.bfloat16}, {"state": True}),
    ({"n": 10, "dtype": torch.float16, "theta": True}, {"state": True, "row": 3}),
]


def move(device, shape, options):
    """transition_ of fake tensors through the implementation registered for CUDA."""
    n, d, dtype = shape.get("n", 10), shape.get("d", D), shape.get("dtype", torch.float32)
    options = {"kernel": "rbf", "target_density": None, "consensus": 0.0, "nonfinite": "hold", "row": None, **options}

    def empty(*size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device=device)

    masks = empty(n, d, dtype=dtype)
    residual = empty(n, d, dtype=dtype) if dtype == torch.bfloat16 else None
    row = options["row"]
    vectors = [empty(d) if shape.get(name) else None for name in ("theta", "saliency", "sizes")]
    state = [empty(n, dtype=torch.float64) for _ in range(4)] + [empty(n, n, dtype=torch.float64), empty(n).double()]
    return transition._transition_(
        masks, empty(n if row is None else 1, d), *vectors, residual, state if options.get("state") else [],
        0.01, 2.0, 0.2, options["kernel"], "l2", options["target_density"], options["consensus"], 0.0, 7,
        options["nonfinite"], -1 if row is None else row, "",
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "options"), TRANSITIONS)
def test_the_transition(device, shape, options, monkeypatch):
    monkeypatch.setattr(transition.check, "at_least", lambda *arguments, **options: None)  # once a run
    with recorded() as recording:
        stats = move(device, shape, options)
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
        move("cuda:0", {}, {"nonfinite": "raise"})
    assert recording.waits == ["_local_scalar_dense"]


def rank(device, n=4, output="bool", **given):
    """A selection of fake tensors through the implementation registered for CUDA; k lies on the device."""
    values = given.pop("values", None)
    if values is None:
        values = torch.empty(n, D, device=device)
    k = torch.empty(1 if isinstance(values, list) else n, dtype=torch.int64, device=device)
    arguments = {"score": "value", "saliency": None, "sizes": None, "segments": [], "min_keep": [], "max_keep": [],
                 "pattern": [], "protected": None, "removed": None, "guess": None, **given}  # fmt: skip
    backend = arguments.pop("backend", "")
    return selection._solve("topk_mask", values, k, *arguments.values(), output, backend)


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
        rank(device, backend=backend, **given)
    check_launches(recording, device)
    names = {launch.name for launch in recording.launches}
    assert names == {"topk_device_"} if backend == "cuda" else "count_digits" in names
    assert recording.waits == []


def weights(device, backend="", kind="cut", segments=None, lists=False):
    def empty(*size, dtype=torch.float32):
        return torch.empty(size, dtype=dtype, device=device)

    theta = [empty(D - 5000), empty(5000)] if lists else [empty(D)]
    borders = segments or [0, D]
    mask = {"cut": empty(10, D), "bool": empty(10, D, dtype=torch.bool), "factors": empty(10, D),
            "packed": empty(10, D // 8, dtype=torch.uint8)}[kind]  # fmt: skip
    cut = (
        (empty(10, len(borders) - 1), empty(10, len(borders) - 1, dtype=torch.int64)) if kind == "cut" else (None,) * 2
    )
    outs = [empty(10, t.numel()) for t in theta]
    masking._masked_weights_out(theta, mask, *cut, "abs", None, borders if kind == "cut" else [], [], outs, backend)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("kind", ["cut", "bool", "factors", "packed"])
@pytest.mark.parametrize("lists", [False, True])
def test_masked_weights(device, backend, kind, lists, monkeypatch):
    # Out of fakes: the same address is taken for a view.
    monkeypatch.setattr(masking, "_as_rows", lambda out, n, count: out)
    with recorded() as recording:
        weights(device, backend, kind, [0, 777, D] if kind == "cut" else None, lists)
        first = list(recording.waits)
        recording.waits.clear()
        weights(device, backend, kind, [0, 777, D] if kind == "cut" else None, lists)
    check_launches(recording, device)
    names = {launch.name for launch in recording.launches}
    assert names == ({"masked_weights_device_"} if backend == "cuda" else {"apply"})
    assert first == ([] if backend == "triton" else ["_to_copy between devices"]), "the borders, once"
    assert recording.waits == [], "then they are there"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("layout", [[], [10, D // 100, 10]])
def test_mask_gradient(device, backend, layout):
    with recorded() as recording:
        masking._mask_gradient(
            [torch.empty(D, device=device)], [torch.empty(10, D, device=device)], layout, backend
        )  # fmt: skip
    check_launches(recording, device)
    assert recording.waits == []


def test_a_backend_that_is_built_is_chosen(caplog):
    """The automatic choice: CUDA kernels for selection and masking, Triton's for the transition; nothing is said."""
    with caplog.at_level(logging.WARNING, "sfpk_kernels"), recorded() as recording:
        rank("cuda:1")
        weights("cuda:1", kind="factors")
        masking._mask_gradient([torch.empty(D, device="cuda:1")], [torch.empty(2, D, device="cuda:1")], [], "")
        move("cuda:1", {}, {})
    names = {launch.name for launch in recording.launches}
    assert set(CUDA_OPS) <= names
    assert names - set(CUDA_OPS) == {"transition", "combine"}
    assert not caplog.records


def test_without_cuda_kernels_triton_is_chosen_and_that_is_said(caplog):
    with caplog.at_level(logging.WARNING, "sfpk_kernels"), recorded(cuda_is_built=False) as recording:
        rank("cuda:1")
        weights("cuda:1", kind="factors")
    assert {launch.name for launch in recording.launches} & {"apply", "count_digits", *CUDA_OPS} == {
        "apply",
        "count_digits",
    }
    assert any("built without CUDA" in record.getMessage() for record in caplog.records)


def test_more_rows_than_a_grid_takes_are_refused_or_placed():
    with recorded() as recording:
        try:
            rank("cuda:0", n=70_000, backend="triton", values=torch.empty(70_000, 100, device="cuda:0"))
        except ValueError as error:
            assert "65,535" in str(error) or "65535" in str(error)  # noqa: PT017
            return
    check_launches(recording, "cuda:0")


@pytest.mark.parametrize("name", ["transition_", "topk_mask", "masked_weights_out", "mask_gradient"])
def test_the_implementations_are_registered_for_gpus(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sfpk::{name}", "CUDA")
