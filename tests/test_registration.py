"""Every op is a real torch op: opcheck for all, torch.compile without graph breaks."""

import pytest
import torch

from sfpk_kernels import ops

SPEC = (0.1, 2.0, 0.2, "weighted_rbf", "l2", 0.5, 0.3, 0.0, 7, 1, "hold", -1, 0.1)  # of a step of the transition
SHARD = (20, torch.full((1,), 20.0, dtype=torch.float64), 4)


def state_of(n):
    vectors = [torch.rand(n).double() + 0.5 for _ in range(4)]
    return [*vectors, torch.rand(n, n).double(), torch.zeros(n).double()]


def shards():
    """What the stages of the transition take first, with and without particles of two bytes."""
    for backend in ("reference", "cpp"):
        columns = torch.randn(7), torch.rand(7), torch.ones(7)
        yield torch.rand(3, 7) + 0.5, torch.randn(3, 7), *columns, None, state_of(3), *SPEC, *SHARD, backend
        rest = torch.zeros(3, 7).bfloat16()
        yield (
            torch.ones(3, 7).bfloat16(),
            torch.randn(1, 7),
            *columns,
            rest,
            state_of(3),
            *SPEC[:-2],
            1,
            SPEC[-1],
            *SHARD,
            backend,
        )


def sums_of(rows, n=3):
    return torch.rand(rows, n).double() + 0.5


SAMPLES = {
    "transition_": lambda: [
        (
            torch.rand(3, 7) + 0.5, torch.randn(3 if only < 0 else 1, 7), weights, saliency, sizes, None, [],
            0.1, 2.0, 0.2, kernel, "l2", target, 0.3, 0.0, 7, 1, nonfinite, only, angle, backend,
        )
        for backend, nonfinite, angle in (("reference", "raise", None), ("cpp", "hold", 0.1))
        for only in (-1, 1)
        for weights, saliency, sizes, kernel, target in [
            (None, None, None, "rbf", None),
            (torch.randn(7), torch.rand(7), torch.ones(7), "weighted_rbf", 0.5),
        ]
    ],
    "transition_measure": lambda: [(masks, *given[1:5], *SPEC, given[-1]) for masks, *given in shards()],
    "transition_sample": lambda: list(shards()),
    "transition_sums": lambda: [(*given, sums_of(2), backend) for *given, backend in shards()],
    "transition_plan": lambda: [
        (state_of(n), sums_of(2, n), sums_of(8 if n == 1 else 8 + 6 * n, n), *SPEC, *SHARD, backend)
        for backend in ("reference", "cpp") for n in (1, 3)
    ],
    "transition_apply_": lambda: [(*given, sums_of(6), backend) for *given, backend in shards()],
    "transition_stats": lambda: [(sums_of(7), *SPEC, *SHARD, backend) for backend in ("reference", "cpp")],
    "average_gradients_": lambda: [
        # Without averages (in test_dynamic_shapes.py) the cosines are NaN, which opcheck finds different from NaN.
        (torch.randn(3, 7), torch.randn(3, 7), torch.randn(7), beta, backend)
        for backend in ("reference", "cpp")
        for beta in (0.0, 0.8)
    ],
    "topk_mask": lambda: [
        (torch.randn(3, 8), torch.tensor([0, 3, 6]), score, saliency, sizes, segments, low, high, pattern,
         protected, removed, guess, packed, "reference")
        for score, saliency, sizes, segments, low, high, pattern, protected, removed, guess, packed in [
            ("value", None, None, [], [], [], [], None, None, None, "bool"),
            ("abs_saliency", torch.rand(8), torch.ones(8), [], [], [], [], None, None, None, "uint8"),
            ("abs", None, None, [0, 4, 8], [0, 0], [3, 3], [3, 4], None, torch.arange(8) == 0, torch.ones(3, 2),
             "int32"),
        ]
    ],
    "topk_mask_list": lambda: [
        ([torch.randn(3, 2), torch.randn(4)], torch.tensor([5]), "value", None, None, [], [], [], [], None, None, None,
         "bool", "reference"),
        ([torch.randn(3, 2), torch.randn(4)], torch.tensor([5]), "abs_saliency", [torch.rand(3, 2), torch.rand(4)],
         None, [0, 6, 10], [1, 1], [5, 3], [1, 2], None, None, None, "uint8", "reference"),
    ],
    "topk_cut": lambda: [
        (torch.randn(3, 8), torch.tensor([0, 3, 6]), "value", None, None, [], [], [], None, None, None, "reference"),
        (torch.randn(3, 8), torch.tensor([3]), "mean_abs_saliency", torch.rand(8), None, [0, 4, 8], [1, 1], [],
         torch.arange(8) == 2, None, torch.ones(1, 2), "reference"),
    ],
    "topk_cut_list": lambda: [
        ([torch.randn(3, 2), torch.randn(4)], torch.tensor([5]), "value", None, [torch.ones(3, 2), torch.ones(4)],
         [], [], [], None, None, None, "reference"),
    ],
    "masked_weights": lambda: [
        ([torch.randn(7, requires_grad=True)], torch.rand(3, 7) > 0.5, None, None, "value", None, [], [],
         torch.float32, "reference"),
        ([torch.randn(4), torch.randn(2, 3)], torch.rand(3, 10, requires_grad=True), torch.rand(3, 2),
         torch.ones(3, 2).long(), "abs_saliency", torch.rand(10), [0, 4, 10], [], torch.bfloat16, "reference"),
        ([torch.randn(12)], torch.zeros(1, 1, dtype=torch.uint8), None, None, "value", None, [],
         [2, 2, 1, 0, 1, 2, 4, 2], torch.float32, "reference"),
        ([torch.randn(4, requires_grad=True), torch.randn(4)], torch.rand(2, 5, requires_grad=True), None, None,
         "value", None, [], [2, 2, 1, 1, 1, 4, 1, 0], torch.float32, "reference", 5),
    ],
    "masked_weights_out": lambda: [
        ([torch.randn(7)], torch.rand(3, 7) > 0.5, None, None, "value", None, [], [], [torch.empty(3, 7)], "reference"),
    ],
    "weight_gradient": lambda: [
        ([torch.randn(3, 7, requires_grad=True)], torch.rand(3, 7) > 0.5, None, None, "value", None, [], [],
         torch.float32, "reference"),
        ([torch.randn(3, 4), torch.randn(3, 6)], torch.rand(3, 10, requires_grad=True), None, None, "value", None, [],
         [], torch.float64, "reference"),
        ([torch.randn(2, 4), torch.randn(2, 4)], torch.rand(2, 5, requires_grad=True), None, None, "value", None, [],
         [2, 2, 1, 1, 1, 4, 1, 0], torch.float32, "reference", 5),
    ],
    "mask_gradient": lambda: [
        ([torch.randn(6, requires_grad=True)], [torch.randn(3, 6, requires_grad=True)], [2, 3, 1, 0], "reference"),
        ([torch.randn(4, requires_grad=True), torch.randn(4)], [torch.randn(2, 4), torch.randn(2, 4)],
         [2, 2, 1, 1, 1, 4, 1, 0], "reference", 5),
        ([torch.randn(2, 3), torch.randn(4)], [torch.randn(1, 2, 3), torch.randn(1, 4)], [], "reference"),
    ],
    "pack_mask": lambda: [(torch.rand(3, 9) > 0.5, kind, "reference") for kind in ("uint8", "int32")],
    "unpack_mask": lambda: [(torch.zeros(3, 2, dtype=torch.uint8), 9, "reference")],
    "popcount": lambda: [(torch.zeros(3, 2, dtype=torch.int32), "reference")],
    "mask_overlaps": lambda: [
        (torch.zeros(3, 2, dtype=torch.int32), torch.ones(4, 2, dtype=torch.int32), "reference")
    ],
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


def masked(values, theta, grads):
    cut = ops.topk_threshold(values, 4, score="abs")
    weights = ops.masked_weights(theta, values, cut=cut, score="abs")
    packed = ops.pack_mask(ops.topk_mask(values, 4))
    grouped = ops.masked_weights([theta[:6], theta[6:]], packed, dtype=torch.bfloat16)
    gradient = ops.mask_gradient(theta, grads, layout=ops.Blocks(2, 3, 2))
    return (weights, *grouped, gradient, ops.mask_iou(packed), ops.popcount(packed), ops.unpack_mask(packed, 12))


def test_masked_weights_compile_into_one_graph():
    arguments = torch.randn(3, 12), torch.randn(12), torch.randn(3, 12)
    expected = masked(*arguments)
    results = torch.compile(masked, fullgraph=True, backend="aot_eager")(*arguments)
    for a, b in zip(expected, results, strict=True):
        assert torch.equal(a, b)


def selections(values, saliency, protected):
    kept = ops.topk_mask(values, [2, 3, 4], protected=protected, packed="uint8")
    consensus = ops.topk_mask(values, 4, score="mean_abs_saliency", saliency=saliency, segments=[0, 5, 12], min_keep=1)
    cut = ops.topk_threshold(values, 3, score="abs_saliency", saliency=saliency, sizes=torch.ones(12))
    warm = ops.topk_mask(values, 3, score="abs_saliency", saliency=saliency, guess=cut)
    patterned = ops.topk_mask(values, 3, pattern=(2, 4), removed=protected)
    listed = ops.topk_mask([values, saliency], 9, segments="tensors", max_keep=6)
    both = ops.topk_threshold([values, saliency], 9)
    return (kept, consensus, *cut, warm, patterned, *listed, *both)


def test_selections_compile_into_one_graph():
    arguments = torch.randn(3, 12), torch.rand(12), torch.arange(12) == 7
    expected = selections(*arguments)
    results = torch.compile(selections, fullgraph=True, backend="aot_eager")(*arguments)
    for a, b in zip(expected, results, strict=True):
        assert torch.equal(a, b)


def test_compiles_into_one_graph():
    start, grads, theta = torch.rand(3, 10) + 0.5, torch.randn(3, 10), torch.randn(10)
    eager, compiled = start.clone(), start.clone()
    expected = step_of_arithmetic(eager, grads, theta)
    results = torch.compile(step_of_arithmetic, fullgraph=True, backend="aot_eager")(compiled, grads, theta)
    assert torch.equal(eager, compiled)
    for a, b in zip(expected, results, strict=True):
        assert torch.equal(a, b)


def test_memory_that_nobody_has_written_is_poisoned():
    """As all tests of the ops have it (conftest.py)."""
    assert torch.empty(1000).isnan().all()
    assert torch.empty_like(torch.ones(1000)).isnan().all()
    assert (torch.empty(1000, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
