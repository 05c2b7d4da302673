"""The ops where there is little or nothing: no rows, few columns, odd strides, NaN of both signs, rows of zeros."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfpk_kernels import ops
from sfpk_kernels.ops import (
    Blocks,
    Cut,
    mask_gradient,
    masked_weights,
    pack_mask,
    topk_mask,
    topk_threshold,
    transition_,
)

from .pairs import pairwise

pytestmark = pytest.mark.usefixtures("one_tile")

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ON_GPU = torch.cuda.is_available()
BACKENDS = ["reference", "cpp", "triton", *(["cuda"] if ON_GPU else [])]
SOME = ["reference", "cpp"]  # of ops without a GPU backend, and of what the GPU backends leave to the reference


def place(value, backend):
    """On the GPU where the backend needs it, with its strides."""
    if isinstance(value, list):
        return [place(v, backend) for v in value]
    if isinstance(value, tuple):
        return type(value)(*(place(v, backend) for v in value))
    if not isinstance(value, torch.Tensor) or not ON_GPU or backend not in ("triton", "cuda"):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda").copy_(value)


def run(function, *arguments, backend, **options):
    """The results on the CPU; None where the backend says that it cannot run."""
    try:
        results = function(
            *(place(a, backend) for a in arguments),
            **{k: place(v, backend) for k, v in options.items()},
            backend=backend,
        )
    except ValueError as error:
        if "cannot run here" in str(error):
            return None
        raise
    return [r.cpu() for r in ([results] if isinstance(results, torch.Tensor) else results)]


def agree(function, *arguments, backends=BACKENDS, **options):
    """Every backend gives what the reference gives for plain copies of the arguments; returns that."""

    def dense(value):
        if isinstance(value, list):
            return [dense(v) for v in value]
        if isinstance(value, tuple) and value and isinstance(value[0], torch.Tensor):
            return type(value)(*map(dense, value))
        return torch.empty(value.shape, dtype=value.dtype).copy_(value) if isinstance(value, torch.Tensor) else value

    expected = run(function, *map(dense, arguments), **{k: dense(v) for k, v in options.items()}, backend="reference")
    for backend in backends:
        results = run(function, *arguments, **options, backend=backend)
        for a, b in zip(results or expected, expected, strict=True):
            assert a.shape == b.shape, backend
            assert a.dtype == b.dtype, backend
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), backend
            assert torch.equal(a.isnan(), b.isnan()), backend
    return expected


def arrangements(tensor):
    """The same values with other strides: every kind of view of rows that torch has."""
    n, d = tensor.shape
    yield tensor.t().contiguous().t()  # columns beside each other
    wide = torch.zeros(n + 2, 2 * d + 3, dtype=tensor.dtype)
    wide[1 : n + 1, 2 : 2 * d + 2 : 2] = tensor
    yield wide[1 : n + 1, 2 : 2 * d + 2 : 2]  # gaps between entries
    padded = torch.zeros(n + 2, d + 5, dtype=tensor.dtype)
    padded[1 : n + 1, 3 : d + 3] = tensor
    yield padded[1 : n + 1, 3 : d + 3]  # gaps between rows
    yield torch.as_strided(padded[1 : n + 1, 3 : d + 3].contiguous(), (n, d), (d if n > 1 else 17, 1 if d > 1 else 9))
    if n:
        yield tensor[:1].expand(n, d)  # one row for all: other values, stride 0
    if d:
        yield tensor[:, :1].expand(n, d)


SHAPES = [(0, 0), (0, 1), (0, 10), (1, 0), (1, 1), (3, 0), (3, 1), (2, 33)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_shapes_and_strides(n, d, dtype):
    """Every op over rows, entries of every arrangement in every backend: as if dense."""
    values = torch.randn(n, d).to(dtype)
    theta, saliency, count = torch.randn(d), torch.rand(2 * d)[::2] + 0.1, min(d, 2)

    def thresholds(v, **options):
        return list(topk_threshold(v, count, **options))

    def of_a_list(v, w, **options):
        return topk_mask([v, w], count, **options)

    def two_tensors(v, w, m, **options):
        return masked_weights([v, w], m, **options)

    some = {"backends": SOME}
    for i, rows in enumerate([values, *arrangements(values)]):
        # Interpreted, Triton takes its time.
        all_of_them = ON_GPU or (i in (0, 2) and dtype == torch.float32)
        full = {"backends": BACKENDS} if all_of_them else some
        agree(topk_mask, rows, [count] * n, **full)
        for score in ("abs_saliency", "value_saliency"):
            agree(topk_mask, rows, count, score=score, saliency=saliency, packed="int32", **full)
        agree(topk_mask, rows, count, segments=[0, d // 2, d], max_keep=d, **some)
        agree(topk_mask, rows, count, sizes=torch.ones(()).expand(d), packed="uint8", **some)
        if n:
            agree(topk_mask, rows, count, score="mean_abs_saliency", saliency=saliency, **full)
        agree(thresholds, rows, **full)
        agree(of_a_list, rows, theta.to(dtype), **full)
        cut = topk_threshold(rows, count)
        weights = (theta, theta.to(dtype), torch.randn(2 * d)[::2], torch.randn(1).expand(d))
        masks = (rows, rows > 0, pack_mask(rows > 0), pack_mask(rows > 0, "int32"))
        for (j, w), (k, mask) in itertools.product(enumerate(weights), enumerate(masks)):
            agree(masked_weights, w, mask, **(full if ON_GPU or j == (k + i // 2) % 4 else some))
        for j, w in enumerate(weights):
            here = full if ON_GPU or j % 2 == i // 2 else some
            agree(masked_weights, w, rows, cut=cut, **here)
            agree(mask_gradient, w, rows, **here)
        if d:
            agree(masked_weights, torch.randn(6 * d), rows, layout=Blocks(2, d, 3), **full)
            agree(mask_gradient, torch.randn(d), rows, layout=Blocks(1, 1, d), **full)
        agree(two_tensors, theta[: d // 2], theta[d // 2 :], rows, **full)
        keep = rows > 0
        for kind in ("uint8", "int32"):
            (packed,) = agree(pack_mask, keep, kind, **some)
            for units in [packed, *arrangements(packed)]:
                dense = units.clone(memory_format=torch.contiguous_format)
                agree(ops.unpack_mask, units, d, **some)
                agree(ops.popcount, units, **some)
                for function in (ops.mask_iou, ops.mask_hamming):
                    agree(function, units, dense, **some)


def test_nothing_at_all():
    """No coordinates, no rows, no weights: empty answers of the right shape."""
    nothing = torch.zeros(0)
    for backend in SOME:
        assert topk_mask(nothing, 0, backend=backend).shape == (0,)
        assert topk_mask(torch.randn(0, 10)[:, ::2], [], backend=backend).shape == (0, 5)
        assert [m.shape for m in topk_mask([nothing, torch.zeros(2, 0)], 0, backend=backend)] == [(0,), (2, 0)]
        assert topk_threshold(torch.zeros(0, 4), [], backend=backend).threshold.shape == (0, 1)
        assert masked_weights(torch.randn(5), torch.randn(0, 10)[:, ::2], backend=backend).shape == (0, 5)
        assert [w.shape for w in masked_weights([nothing, torch.zeros(2, 0)], torch.zeros(3, 0), backend=backend)] == [
            (3, 0), (3, 2, 0)]  # fmt: skip
        assert mask_gradient(torch.randn(5), torch.randn(0, 5), backend=backend).shape == (0, 5)
        assert mask_gradient([torch.randn(2, 3), nothing], [torch.randn(0, 2, 3), torch.zeros(0, 0)]).shape == (0, 6)
        assert mask_gradient(torch.randn(6), torch.randn(0, 6), layout=Blocks(1, 2, 3), backend=backend).shape == (0, 2)
        assert pack_mask(torch.zeros(0, 9, dtype=torch.bool), backend=backend).shape == (0, 2)
        assert ops.mask_iou(torch.zeros(0, 2, dtype=torch.uint8), backend=backend).shape == (0, 0)
    # A backward pass over no rows.
    theta = torch.randn(5, requires_grad=True)
    masked_weights(theta, torch.randn(0, 5)).sum().backward()
    assert torch.equal(theta.grad, torch.zeros(5))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_mask_beside_every_weight(data):
    """Mask kind × dtype of weights × strides × layout × backend: bits of the mask decide, nothing else."""
    draw = data.draw
    d, n = draw(st.integers(1, 40)), draw(st.integers(0, 3))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    keep = torch.rand(n, d, generator=random) > 0.5
    layout = draw(st.sampled_from([None, Blocks(1, d, 1), Blocks(2, d, 1), Blocks(1, d, 3)]))
    count = d if layout is None else layout.numel
    gap = draw(st.integers(1, 3))
    weights = torch.randn(gap * count, generator=random).to(draw(st.sampled_from(FLOATS)))[::gap]
    kind = draw(st.sampled_from(["bool", "uint8", "int32", *FLOATS]))
    mask = keep if kind == "bool" else keep.to(kind) if isinstance(kind, torch.dtype) else pack_mask(keep, kind)
    mask = draw(st.sampled_from([mask, *itertools.islice(arrangements(mask), 4)]))  # those with the same values
    dtype = draw(st.sampled_from([None, *FLOATS]))
    # What the mask says, by torch alone.
    index = torch.arange(d)
    if layout is not None:
        index = index.view(1, d, 1).expand(*layout[:3]).flatten()
    if isinstance(kind, torch.dtype):
        wide = torch.promote_types(torch.promote_types(weights.dtype, kind), torch.float32)
        expected = weights.to(wide) * keep[:, index].to(wide)
    else:
        expected = torch.where(keep[:, index], weights, 0.0)
    expected = expected.to(dtype or weights.dtype)
    for backend in BACKENDS:
        results = run(masked_weights, weights, mask, layout=layout, dtype=dtype, backend=backend)
        assert results is None or torch.equal(results[0], expected), backend
        if results is not None and n == 1:
            assert torch.equal(run(masked_weights, weights, mask[0], layout=layout, dtype=dtype, backend=backend)[0],
                               expected[0])  # fmt: skip


# NaN of both signs, of every payload.

NANS = torch.tensor([0x7FC00000, -0x400000, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)


def test_these_are_nan():
    assert NANS.isnan().all()
    assert NANS.signbit().tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nan", NANS, ids=str)
def test_a_nan_threshold_keeps_nothing(backend, nan):
    values = torch.tensor([[1.0, -2.0, float("inf"), -float("inf"), 0.0, -0.0, nan, -1.0]])
    for threshold, tie_end in itertools.product((nan, nan.double()), (0, 3, 8)):
        cut = Cut(threshold.view(1, 1), torch.tensor([[tie_end]]))
        for layout in (None, Blocks(1, 8, 1), Blocks(2, 8, 1), Blocks(1, 8, 3)):
            theta = torch.ones(8 if layout is None else layout.numel)
            for score in ("value", "abs"):
                (kept,) = run(masked_weights, theta, values, cut=cut, score=score, layout=layout, backend=backend)
                assert not kept.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nan", NANS, ids=str)
def test_a_nan_value_is_never_kept_by_a_cut(backend, nan):
    values, saliency = torch.ones(1, 6), torch.ones(6)
    values[0, 1], saliency[2] = nan, nan
    for threshold in (-float("inf"), 0.5, 1.0):
        cut = Cut(torch.full((1, 1), threshold), torch.full((1, 1), 6))
        for layout in (None, Blocks(2, 6, 1)):
            theta = torch.ones(6 if layout is None else 12)
            for score in ("abs_saliency", "value_saliency"):
                options = {"cut": cut, "score": score, "saliency": saliency, "layout": layout}
                (kept,) = run(masked_weights, theta, values, **options, backend=backend)
                assert kept[0, :6].tolist() == [1, 0, 0, 1, 1, 1]


# Interpreted: each NaN once in fp32, one of each sign in the dtypes to which they are rounded.
ROUNDED = [(backend, nan, dtype) for backend in BACKENDS for i, nan in enumerate(NANS)
           for dtype in (torch.float32, torch.bfloat16, torch.float16)
           if backend in SOME or ON_GPU or dtype == torch.float32 or i < 2]  # fmt: skip


@pytest.mark.parametrize(("backend", "nan", "dtype"), ROUNDED, ids=str)
def test_a_nan_score_is_an_error(backend, nan, dtype):
    fast = backend in SOME or ON_GPU  # unlike the interpreter
    for n, d in ((1, 4), (3, 40), (2, 20_000)) if fast else ((3, 40),):
        values = torch.randn(n, d).to(dtype)
        values[n - 1, d - 1] = nan
        weighted = [{"score": score, "saliency": torch.ones(d)} for score in ("abs_saliency", "value_saliency")]
        for options in ({}, {"score": "abs"}, *weighted):
            for k in (0, 1, d // 2, d) if fast else (1,):
                with pytest.raises(ValueError, match=f"values: wanted no NaN score, got NaN in row {n - 1}"):
                    run(topk_mask, values, k, **options, backend=backend)
        bad = torch.ones(d)
        bad[0] = nan
        with pytest.raises(ValueError, match="wanted no NaN score, got NaN in row 0"):
            run(topk_mask, values[:, :].nan_to_num(), 1, score="abs_saliency", saliency=bad, backend=backend)
        if backend in SOME:
            for options in ({"pattern": (1, 2)}, {"segments": [0, 1, d], "min_keep": 0}, {"sizes": torch.ones(d)}):
                with pytest.raises(ValueError, match="wanted no NaN score"):
                    topk_mask(values, 1, **options, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("nan", NANS, ids=str)
def test_a_nan_guess_changes_nothing(backend, nan):
    for d in (10, 20_000 if backend in SOME or ON_GPU else 100):
        values = torch.randn(2, d)
        guess = torch.tensor([nan, 0.5])
        results = run(topk_mask, values, d // 3, guess=guess, backend=backend)
        assert torch.equal(results[0], topk_mask(values, d // 3, backend="reference"))


# Rows of zeros, and steps along the slope.


# kernel, density, target density, consensus, sizes
CHOICES = ("rbf", "weighted_rbf"), ("l2", "l2_squared"), (None, 0.4), (0.0, 0.3, 1.0), (False, True)


def step_options(backend):
    """Interpreted, every pair of them; else the product."""
    rows = itertools.product(*CHOICES) if backend in SOME or ON_GPU else pairwise(*CHOICES)
    for kernel, density, target, consensus, sized in rows:
        yield {"kernel": kernel, "density": density, "target_density": target, "consensus": consensus}, sized


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_row_of_zeros_stays_whatever_happens_to_the_others(backend, dtype):
    n, d = 4, 33
    for options, sized in step_options(backend):
        masks = (torch.rand(n, d) + 0.5).to(dtype)
        masks[1] = 0
        residual = torch.zeros_like(masks) if dtype == torch.bfloat16 else None
        sizes = torch.randint(1, 9, (d,)).float() if sized else None
        results = run(
            lambda m, g, r, a, c, o=options, **b: [
                m, *transition_(m, g, residual=r, saliency=a, sizes=c, step=0.1, radius=2.0, repulsion=0.2, **o, **b)],
            masks, torch.randn(n, d), residual, torch.rand(d) + 0.1, sizes, backend=backend,
        )  # fmt: skip
        if results is None:
            pytest.skip("not for fp64 particles")
        moved, densities, _, _, _, _, cosines = results
        assert torch.equal(moved[1], torch.zeros(d, dtype=dtype))
        assert densities[1] == 0
        assert cosines[1] == 0
        assert (moved[[0, 2, 3]] != masks[[0, 2, 3]]).any() or moved is masks
        assert moved.isfinite().all()


def test_a_row_of_zeros_counts_in_the_mean_like_one_that_is_skipped():
    masks, grads = torch.rand(3, 20, dtype=torch.float64) + 0.5, torch.randn(3, 20, dtype=torch.float64)
    masks[1] = 0
    options = {"step": 0.1, "radius": 2.0, "repulsion": 0.0}
    free, pulled = masks.clone(), masks.clone()
    transition_(free, grads, **options)
    transition_(pulled, grads, **options, consensus=0.3)
    torch.testing.assert_close(pulled[[0, 2]], torch.lerp(free, free.mean(0).expand_as(free), 0.3)[[0, 2]])


@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-8, 1e-3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_target_is_met_where_nothing_is_tangential(backend, eps):
    """One coordinate, or a gradient along the slope: what is left of it is noise, which eps must not blow up."""
    fast = backend != "triton" or ON_GPU  # unlike the interpreter
    for seed, d, density in itertools.product(range(0, 10, 1 if fast else 4), (1, 7, 300), ("l2", "l2_squared")):
        random = torch.Generator().manual_seed(seed)
        masks = torch.rand(3, d, generator=random) * 1.9 + 0.1
        grads = masks * torch.randn(3, 1, generator=random) * 10.0 ** (seed - 5)
        results = run(
            lambda m, g, k=density, **b: [m, *transition_(m, g, step=0.03, radius=2.0, repulsion=0.0, eps=eps,
                                                          density=k, target_density=0.05, **b)],
            masks, grads, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(results[1], torch.full((3,), 0.05, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", SOME)
def test_eps_still_damps_a_small_tangential_part(backend):
    masks, grads = torch.rand(2, 50) + 0.5, 1e-7 * torch.randn(2, 50)
    plain, damped = masks.clone(), masks.clone()
    options = {"step": 0.1, "radius": 2.0, "repulsion": 0.0, "backend": backend}
    transition_(plain, grads, **options)
    transition_(damped, grads, **options, eps=1e-8)
    assert (damped - masks).norm() < 0.6 * (plain - masks).norm()


# Memory that is not one's own.


@pytest.mark.parametrize("backend", SOME)
def test_what_is_written_owns_its_memory(backend):
    options = {"step": 0.1, "radius": 2.0, "repulsion": 0.0, "backend": backend}
    for masks in (torch.rand(5).expand(3, 5), torch.rand(3, 1).expand(3, 5), torch.rand(9).unfold(0, 5, 2)):
        before = masks.clone()
        with pytest.raises(ValueError, match="masks: wanted memory of its own for every entry|cannot run here"):
            transition_(masks, torch.randn(3, 5), **options)
        assert torch.equal(masks, before)
        if masks.stride() != (2, 1):
            with pytest.raises(ValueError, match="out: wanted memory of its own for every entry"):
                masked_weights(torch.randn(5), torch.rand(3, 5) > 0.5, out=masks, backend=backend)
    for masks in (torch.rand(5, 3).t(), torch.rand(4, 3, 5)[1], torch.rand(1, 5).as_strided((1, 5), (0, 1))):
        if backend == "reference" or masks.stride(1) == 1:
            transition_(masks, torch.randn(masks.shape), **options)
        buffer = masks.clone(memory_format=torch.preserve_format)
        assert torch.equal(masked_weights(torch.ones(5), masks, out=buffer, backend=backend), masks)


# Segments as offsets for a list.


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_takes_the_segments_of_its_cut_as_offsets(backend):
    shapes = [(3, 4), (5,), (), (2, 2, 2)]
    weights = [torch.randn(shape) for shape in shapes]
    flat = torch.cat([w.flatten() for w in weights])
    values = torch.rand(3, flat.numel())
    for segments in ([0, 26], [0, 12, 17, 18, 26], [0, 5, 5, 14, 26], [0, 13, 20, 22, 26]):
        mask, cut = (f(values, 9, segments=segments) for f in (topk_mask, topk_threshold))
        results = run(masked_weights, weights, values, cut=cut, segments=segments, backend=backend)
        assert torch.equal(torch.cat([r.reshape(3, -1) for r in results], 1), torch.where(mask, flat, 0.0))
    cut = topk_threshold(values, 9, segments=[0, 12, 26])
    with pytest.raises(ValueError, match="segments: wanted rising offsets from 0 to 26"):
        masked_weights(weights, values, cut=cut, segments=[0, 12, 25])
    with pytest.raises(
        ValueError, match="segments: wanted None, offsets or 'tensors' for a list of tensors, got 'rows'"
    ):
        masked_weights(weights, values, cut=cut, segments="rows")
    with pytest.raises(ValueError, match="segments: wanted None or 'tensors' for a list of tensors"):
        topk_mask(weights, 9, segments=[0, 12, 26])
