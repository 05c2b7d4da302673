"""Every op is a real torch op: opcheck for all, torch.compile without graph breaks."""

import pytest
import torch

from sfpk_kernels import ops

SAMPLES = {
    "transition_": lambda: [
        (
            torch.rand(3, 7) + 0.5, torch.randn(3, 7), weights, saliency, sizes, None, [],
            0.1, 2.0, 0.2, kernel, "l2", target, 0.3, 0.0, 0, False, backend,
        )
        for backend in ("reference", "cpp")
        for weights, saliency, sizes, kernel, target in [
            (None, None, None, "rbf", None),
            (torch.randn(7), torch.rand(7), torch.ones(7), "weighted_rbf", 0.5),
        ]
    ],
    "topk_mask": lambda: [(torch.randn(3, 7), torch.tensor([0, 3, 7]), "reference")],
    "topk_mask_list": lambda: [([torch.randn(3, 2), torch.randn(4)], torch.tensor([5]), "reference")],
    "masked_weights": lambda: [
        (torch.randn(7, requires_grad=True), torch.rand(3, 7) > 0.5, torch.float32, "reference"),
        (torch.randn(7), torch.rand(7), torch.bfloat16, "reference"),
    ],
    "masked_weights_out": lambda: [(torch.randn(7), torch.rand(3, 7) > 0.5, torch.empty(3, 7), "reference")],
}  # fmt: skip


def registered_ops():
    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("sfpk::") for name in names if name.startswith("sfpk::"))


def test_every_registered_op_has_a_sample():
    assert registered_ops() == sorted(SAMPLES)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_opcheck(name):
    for arguments in SAMPLES[name]():
        torch.library.opcheck(getattr(torch.ops.sfpk, name).default, arguments)


def step_of_arithmetic(masks, grads, theta):
    keep = ops.topk_mask(masks * theta.abs(), 4)
    weights = ops.masked_weights(theta, keep)
    stats = ops.transition_(masks, grads, step=0.1, radius=2.0, repulsion=0.2, weights=theta)
    return weights, stats.densities


def test_compiles_into_one_graph():
    start, grads, theta = torch.rand(3, 10) + 0.5, torch.randn(3, 10), torch.randn(10)
    eager, compiled = start.clone(), start.clone()
    expected = step_of_arithmetic(eager, grads, theta)
    results = torch.compile(step_of_arithmetic, fullgraph=True, backend="aot_eager")(compiled, grads, theta)
    assert torch.equal(eager, compiled)
    for a, b in zip(expected, results, strict=True):
        assert torch.equal(a, b)
