"""Calls of the GPU implementations on fake tensors, by the functions registered for CUDA; see recorder.py."""

from __future__ import annotations

from unittest import mock

import torch

from sfpk_kernels.ops import averaging, transition
from sfpk_kernels.ops._named import by_name
from sfpk_kernels.ops.masking import _ops as masking
from sfpk_kernels.ops.selection import _ops as selection

# (shape, options) of transition_: every tiling and what it can be asked for.
TRANSITIONS = [
    ({}, {}),
    ({"n": 16, "sizes": True, "theta": True}, {"target_density": 0.5, "consensus": 0.1}),
    ({"n": 10, "theta": True}, {"target_density": 0.5, "consensus": 0.1, "nonfinite": "skip"}),
    ({"n": 8}, {"target_density": 0.5, "consensus": 0.1}),
    ({"n": 20, "sizes": True}, {"target_density": 0.5, "consensus": 0.1}),
    ({"n": 40}, {}),
    ({"n": 100, "theta": True, "saliency": True}, {"kernel": "weighted_rbf", "consensus": 0.1, "target_density": 0.9}),
    ({"n": 200}, {}),
    ({"n": 10, "theta": True}, {"target_density": 0.5, "consensus": 0.1, "angle": 0.1}),
    ({"n": 10, "dtype": torch.bfloat16}, {"state": True}),
    ({"n": 20, "dtype": torch.bfloat16, "sizes": True}, {"state": True}),
    ({"n": 10, "dtype": torch.float16, "theta": True}, {"state": True, "row": 3}),
]
FEW = 3  # of them in the group "few"


def empty(device, *size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device=device)


def move(device, shape, options, d):
    """transition_."""
    n, dtype = shape.get("n", 10), shape.get("dtype", torch.float32)
    options = {
        "kernel": "rbf", "target_density": None, "consensus": 0.0, "nonfinite": "hold", "row": None, "angle": None,
        **options,
    }  # fmt: skip
    masks = empty(device, n, d, dtype=dtype)
    residual = empty(device, n, d, dtype=dtype) if dtype == torch.bfloat16 else None
    row = options["row"]
    vectors = [empty(device, d) if shape.get(name) else None for name in ("theta", "saliency", "sizes")]
    state = [empty(device, *size, dtype=torch.float64) for size in ((n,), (n,), (n,), (n,), (n, n), (n,))]
    # Constants of a run are looked at once, before it.
    with mock.patch.object(transition.check, "at_least"):
        return transition._named.by_name("sfpk::transition_", transition._transition_)(
            masks, empty(device, n if row is None else 1, d), *vectors, residual, state if options.get("state") else [],
            0.01, 2.0, 0.2, options["kernel"], "l2", options["target_density"], options["consensus"], 0.0, 7, 0,
            options["nonfinite"], -1 if row is None else row, options["angle"], "",
        )  # fmt: skip


def rank(device, d, n=4, output="bool", values=None, backend="", **given):
    """topk_mask or topk_threshold; k lies on the device."""
    values = empty(device, n, d) if values is None else values
    k = empty(
        device, 1 if isinstance(values, list) or given.get("score") == "mean_abs_saliency" else n, dtype=torch.int64
    )
    arguments = {"score": "value", "saliency": None, "sizes": None, "segments": [], "min_keep": [], "max_keep": [],
                 "pattern": [], "protected": None, "removed": None, "guess": None, **given}  # fmt: skip
    op = "sfpk::topk_mask_list" if isinstance(values, list) else "sfpk::topk_mask"
    run = by_name(op, lambda call: selection._select("topk_mask", call, call.pattern, call.packed))
    return run(values, k, *arguments.values(), output, backend)


def apply(device, d, n=10, kind="cut", segments=None, theta=None, layout=(), backend=""):
    """masked_weights with out."""
    theta = [empty(device, d)] if theta is None else theta
    borders = segments or [0, d]
    masks = {"cut": ((n, d), torch.float32), "bool": ((n, d), torch.bool), "factors": ((n, d), torch.float32),
             "packed": ((n, -(-d // 8)), torch.uint8), "words": ((n, -(-d // 32)), torch.int32)}  # fmt: skip
    shape, dtype = masks[kind]
    cut = (None, None)
    if kind == "cut":
        cut = (empty(device, n, len(borders) - 1), empty(device, n, len(borders) - 1, dtype=torch.int64))
    outs = [empty(device, n, t.numel()) for t in theta]
    # Of fakes, the addresses are all alike: what is a view cannot be told by them.
    with mock.patch.object(masking, "_as_rows", lambda out, n, count: out):
        mask, borders = empty(device, *shape, dtype=dtype), borders if kind == "cut" else []
        run = by_name("sfpk::masked_weights_out", masking._masked_weights_out)
        run(theta, mask, *cut, "abs", None, borders, list(layout), outs, backend)


def differentiate(device, d, n=10, layout=(), backend=""):
    """mask_gradient of d weights."""
    run = by_name("sfpk::mask_gradient", masking._mask_gradient)
    return run([empty(device, d)], [empty(device, n, d)], list(layout), backend)


def average(device, d, n=10, averages=True, beta=0.5, backend=""):
    """average_gradients_."""
    run = by_name("sfpk::average_gradients_", averaging._average_gradients_)
    rows = empty(device, n, d) if averages else None
    # Of fakes, the addresses are all alike.
    with mock.patch.object(averaging.check, "share_memory", return_value=False):
        return run(empty(device, n, d), rows, empty(device, d), beta, backend)


def launch_all(group: str, d: int, device: str = "cuda:0") -> None:
    """Every kernel of Triton over d columns; "few": the default suite's."""
    for shape, options in TRANSITIONS[:FEW] if group == "few" else TRANSITIONS:
        move(device, shape, options, d)
    backend = "triton"
    saliency, mask = empty(device, d), empty(device, d, dtype=torch.bool)
    average(device, d, backend=backend)
    rank(device, d, output="cut", backend=backend)
    rank(device, d, output="int32", score="mean_abs_saliency", saliency=saliency, n=10, backend=backend)
    apply(device, d, backend=backend)
    apply(device, d // 8, kind="packed", theta=[empty(device, d // 8 * 8)], layout=(2, d // 8, 4, 0), backend=backend)
    differentiate(device, d, backend=backend)
    differentiate(device, d // 8 * 8, layout=(2, d // 8, 4, 0), backend=backend)
    differentiate(
        device, 2**32 - 2, layout=(1, 2, 2**31 - 1, 0), backend=backend
    )  # the last step of a loop ends beyond
    if group == "few":
        return
    rank(device, d, output="uint8", score="abs_saliency", saliency=saliency, n=200, backend=backend)
    # What is protected or removed has to be counted and checked on the host.
    known = mock.patch.object(selection._device, "knows_all", return_value=True)
    with known, mock.patch.object(selection, "check_values"):
        rank(device, d, n=3, protected=mask, backend=backend)
    rank(device, d, output="bool", values=[empty(device, d), empty(device, 5), empty(device, d // 2)], backend=backend)
    for kind in ("bool", "packed", "words", "factors"):
        apply(device, d, kind=kind, n=200, backend=backend)
    apply(device, d, segments=[0, d // 3, d], backend=backend)
    wide = [empty(device, d // 8 * 8)]
    apply(device, d // 8, segments=[0, d // 20, d // 8], theta=wide, layout=(2, d // 8, 4, 0), backend=backend)
    apply(device, 64, theta=[empty(device, d // 64 * 64)], layout=(1, 64, d // 64, 0), kind="bool", backend=backend)
    apply(device, 64, theta=[empty(device, d // 64 * 64)], layout=(d // 64, 64, 1, 0), kind="bool", backend=backend)
    differentiate(device, d // 64 * 64, layout=(1, 64, d // 64, 0), n=100, backend=backend)
    differentiate(device, d // 64 * 64, layout=(d // 64, 64, 1, 0), n=100, backend=backend)
