"""torch.compile(dynamic=True) over changing n and d: one graph or two for every op; torch.export with dynamic sizes."""

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from sfpk_kernels import ops
from sfpk_kernels.ops import Blocks, mask_gradient, masked_weights, pack_mask, topk_mask, topk_threshold, transition_

SIZES = [(3, 24), (4, 40), (5, 48), (7, 64), (2, 80), (9, 96), (6, 160), (11, 30), (8, 38), (13, 200)]
# torch sets size 1 apart: a mask of one unit, a row of bits. More than this is one graph per size.
MOST_GRAPHS = 2


def uniform(*shape):
    return torch.rand(*shape) + 0.1


def cut_in_segments(a, b, values):
    segments = [0, a.numel(), a.numel() + b.numel()]
    cut = topk_threshold(values, 4, segments=segments)
    return masked_weights([a, b], values, cut=cut, segments="tensors"), masked_weights(
        [a, b], values, cut=cut, segments=segments
    )


def warm(values):
    cut = topk_threshold(values, 4)
    return *cut, topk_mask(values, 4, guess=cut)


def two_steps(masks, grads, row, index):
    stats = transition_(masks, grads, step=0.1, radius=2.0, repulsion=0.2, step_index=index, seed=3)
    return transition_(
        masks, grads[:1], step=0.1, radius=2.0, repulsion=0.2, state=stats, row=row, step_index=index + 1
    )


def step_with_all(masks, grads, sizes, saliency, weights):
    return transition_(
        masks, grads, step=0.1, radius=2.0, repulsion=0.2, sizes=sizes, saliency=saliency, weights=weights,
        kernel="weighted_rbf", consensus=0.1, target_density=0.5, nonfinite="skip",
    )  # fmt: skip


# name → the function, and its arguments for n and d.
CASES = {
    "topk_mask": (lambda v: topk_mask(v, 4), lambda n, d: (uniform(n, d),)),
    "topk_mask changing k": (lambda v, k: topk_mask(v, k), lambda n, d: (uniform(n, d), d // 3)),
    "topk_mask tensor k": (
        lambda v, k, a: topk_mask(v, k, score="abs_saliency", saliency=a),
        lambda n, d: (uniform(n, d), torch.full((n,), 3), uniform(d)),
    ),
    "topk_mask one row": (lambda v: topk_mask(v, 4, packed="uint8"), lambda n, d: (uniform(d),)),
    "topk_mask list": (
        lambda a, b: topk_mask([a, b], 4, segments="tensors", min_keep=1), lambda n, d: (uniform(n, d), uniform(d))),
    "topk_mask segments": (
        lambda v: topk_mask(v, 4, segments=[0, 4, v.shape[1]], min_keep=1), lambda n, d: (uniform(n, d),)),
    "topk_mask sizes": (
        lambda v, c: topk_mask(v, 4, sizes=c, packed="int32"), lambda n, d: (uniform(n, d), torch.ones(d))),
    "topk_mask pattern": (lambda v: topk_mask(v, 4, pattern=(2, 4)), lambda n, d: (uniform(n, 4 * d),)),
    "topk_mask mean": (
        lambda v, a: topk_mask(v, 4, score="mean_abs_saliency", saliency=a), lambda n, d: (uniform(n, d), uniform(d))),
    "topk_mask aside": (
        lambda v, p, r: topk_mask(v, 4, protected=p, removed=r),
        lambda n, d: (uniform(n, d), torch.arange(d) == 1, torch.rand(n, d) > 2),
    ),
    "topk_threshold": (warm, lambda n, d: (uniform(n, d),)),
    "topk_threshold list": (lambda a, b: topk_threshold([a, b], 4), lambda n, d: (uniform(n, d), uniform(d))),
    "masked_weights": (lambda w, m: masked_weights(w, m > 0.5), lambda n, d: (uniform(d), uniform(n, d))),
    "masked_weights one row": (lambda w, m: masked_weights(w, m), lambda n, d: (uniform(d), uniform(d))),
    "masked_weights list": (
        lambda a, b, m: masked_weights([a, b], m, dtype=torch.bfloat16),
        lambda n, d: (uniform(n, d), uniform(d), uniform(2, n * d + d)),
    ),
    "masked_weights cut": (
        lambda w, v: masked_weights(w, v, cut=topk_threshold(v, 4)), lambda n, d: (uniform(d), uniform(n, d))),
    "masked_weights segments": (cut_in_segments, lambda n, d: (uniform(d), uniform(n), uniform(3, n + d))),
    "masked_weights layout": (
        lambda w, m: masked_weights(w, m, layout=Blocks(2, m.shape[1], 3)),
        lambda n, d: (uniform(6 * d), uniform(n, d)),
    ),
    "masked_weights packed": (
        lambda w, m: masked_weights(w, pack_mask(m > 0.5)), lambda n, d: (uniform(d), uniform(n, d))),
    "masked_weights out": (
        lambda w, m, out: masked_weights(w, m > 0.5, out=out), lambda n, d: (uniform(d), uniform(n, d), uniform(n, d))),
    "mask_gradient": (lambda w, g: mask_gradient(w, g), lambda n, d: (uniform(d), uniform(n, d))),
    "mask_gradient layout": (
        lambda w, g: mask_gradient(w, g, layout=Blocks(2, w.shape[0] // 2, 1)),
        lambda n, d: (uniform(d), uniform(n, d)),
    ),
    "average_gradients_": (
        lambda g, v, w: ops.average_gradients_(g, v, 0.3, weights=w),
        lambda n, d: (uniform(n, d), uniform(n, d), uniform(d)),
    ),
    "average_gradients_ of none": (
        lambda g, w: ops.average_gradients_(g, None, weights=w).effective_dimensions,
        lambda n, d: (uniform(n, d), uniform(d)),
    ),
    "pack_mask": (lambda m: (pack_mask(m), pack_mask(m, "int32")), lambda n, d: (uniform(n, d + 1) > 0.5,)),
    "unpack_mask": (lambda p, d: ops.unpack_mask(p, d), lambda n, d: (pack_mask(uniform(n, d) > 0.5), d)),
    "popcount": (ops.popcount, lambda n, d: (pack_mask(uniform(n, d) > 0.5),)),
    "mask_iou": (
        lambda a, b: (ops.mask_iou(a, b), ops.mask_hamming(a)),
        lambda n, d: (pack_mask(uniform(n, d) > 0.5), pack_mask(uniform(n + 1, d) > 0.5)),
    ),
    "transition_": (two_steps, lambda n, d: (uniform(n, d), uniform(n, d) - 0.5, n - 1, 7 * n)),
    "transition_ with all": (
        step_with_all, lambda n, d: (uniform(n, d), uniform(n, d) - 0.5, uniform(d) + 1, uniform(d), uniform(d))),
}  # fmt: skip
DIFFERENTIABLE = [name for name in CASES if name.startswith("mask") and "packed" not in name and "out" not in name]
DIFFERENTIABLE.remove("mask_iou")


def flat(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [t for part in results for t in flat(part)] if isinstance(results, list | tuple) else []


def copies(arguments, track=False):
    return [
        a.clone().requires_grad_(track and a.is_floating_point()) if isinstance(a, torch.Tensor) else a
        for a in arguments
    ]


def graphs(function, arguments, *, backward=False, sizes=SIZES):
    """How many were compiled over all sizes; results and what was changed in place are compared with eager ones."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    with torch._dynamo.config.patch(recompile_limit=64):
        for n, d in sizes:
            given = arguments(n, d)
            eager, ours = copies(given, backward), copies(given, backward)
            expected, results = flat(function(*eager)), flat(compiled(*ours))
            if backward:
                for outcome in (expected, results):
                    sum(t.double().pow(2).sum() for t in outcome).backward()
                eager, ours = ([a.grad for a in side if isinstance(a, torch.Tensor)] for side in (eager, ours))
            for a, b in zip(expected + flat(eager), results + flat(ours), strict=True):
                assert torch.equal(a, b), (n, d)
    return counter.frame_count


@pytest.mark.parametrize("name", CASES)
def test_sizes_change_and_the_graph_stays(name):
    assert graphs(*CASES[name]) <= MOST_GRAPHS


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_so_does_that_of_the_backward_pass(name):
    assert graphs(*CASES[name], backward=True) <= MOST_GRAPHS


def test_every_public_op_is_among_them():
    names = {name.split()[0] for name in CASES} | {"mask_hamming"}
    assert names == {name for name in ops.__all__ if name[0].islower()}


def test_error_on_recompile_is_met():
    """What a user who must not recompile would set."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda w, v: masked_weights(w, topk_mask(v, 4)), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for i, (n, d) in enumerate(SIZES):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            compiled(uniform(d), uniform(n, d))


def test_the_numbers_of_a_step_are_compiled_in():
    """torch.compile takes floats of an op as constants: each new value is a graph of its own, as documented."""

    def step(masks, grads, step):
        return transition_(masks, grads, step=step, radius=2.0, repulsion=0.2)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    for number in (0.1, 0.2, 0.3):
        before = counter.frame_count
        for _ in range(3):
            masks, grads = uniform(3, 20), torch.randn(3, 20)
            eager = masks.clone()
            compiled(masks, grads, number)
            step(eager, grads, number)
            assert torch.equal(masks, eager)
        assert counter.frame_count > before
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        pytest.raises(torch._dynamo.exc.RecompileError, match=r"step == 0\.3"),
    ):
        compiled(masks, grads, 0.4)


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *arguments):
        return self.function(*arguments)


def exported(function, arguments, dims):
    return export(Module(function), arguments, dynamic_shapes=(dims,)).module()


# Those that read no number from a size as a Python value of its own.
EXPORTED = [name for name in CASES if name not in ("topk_mask changing k", "unpack_mask", "transition_")]


@pytest.mark.parametrize("name", EXPORTED)
def test_export_with_dynamic_sizes(name):
    function, arguments = CASES[name]
    given = arguments(5, 72)  # more than a unit of bits
    dims = tuple(dict.fromkeys(range(a.dim()), Dim.AUTO) for a in given)
    program = exported(function, given, dims)
    for n, d in SIZES:
        if d > 32:
            eager, ours = copies(arguments(n, d)), None
            ours = copies(eager)
            for a, b in zip(flat(function(*eager)), flat(program(*ours)), strict=True):
                assert torch.equal(a, b), (n, d)


def test_export_says_which_sizes_bits_need():
    """A mask of one unit is a size of its own to torch: the range of d begins behind it, as documented."""
    n = Dim("n", min=2, max=64)
    for kind, unit in (("uint8", 8), ("int32", 32)):

        def packed(m, kind=kind):
            return pack_mask(m > 0.5, kind)

        program = exported(packed, (uniform(3, 72),), ({0: n, 1: Dim("d", min=unit + 1, max=4096)},))
        for d in (unit + 1, 4 * unit, 1001):
            m = uniform(4, d)
            assert torch.equal(program(m), packed(m))
        with pytest.raises(Exception, match="Constraints violated"):
            exported(packed, (uniform(3, 72),), ({0: n, 1: Dim("d", min=unit, max=4096)},))


def test_integers_of_numpy_are_integers():
    values = uniform(3, 16)
    assert torch.equal(topk_mask(values, np.int64(4)), topk_mask(values, 4))
    assert torch.equal(topk_mask(values, np.array([1, 2, 3]).tolist()), topk_mask(values, [1, 2, 3]))
    segments = list(np.array([0, 4, 16]))
    assert torch.equal(topk_mask(values, 4, segments=segments, min_keep=np.int32(1)),
                       topk_mask(values, 4, segments=[0, 4, 16], min_keep=1))  # fmt: skip
    a, b = values.clone(), values.clone()
    options = {"step": np.float64(0.1), "radius": np.float32(2.0), "repulsion": 0.0}
    transition_(a, values.cos()[:1], **options, row=np.int64(1), seed=np.uint64(2**63 + 5), step_index=np.int32(3))
    transition_(b, values.cos()[:1], step=0.1, radius=2.0, repulsion=0.0, row=1)
    assert torch.equal(a, b)


def test_any_integer_seeds_the_rounding():
    masks, grads = uniform(3, 50).half(), torch.randn(3, 50)

    def moved(seed):
        m = masks.clone()
        transition_(m, grads, step=0.1, radius=2.0, repulsion=0.0, seed=seed, step_index=seed)
        return m

    for seed in (0, 5, -1, 2**63 - 1, -(2**63), 2**70 + 5):
        assert torch.equal(moved(seed), moved(seed + 2**64))  # 64 bits of it count, as ever
    assert not torch.equal(moved(0), moved(1))
