"""θ ⊙ mask from bools, bits, factors and cuts, flat, listed and structured; its gradients; bad input."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfpk_kernels.ops import Blocks, Cut, mask_gradient, masked_weights, pack_mask, topk_mask, topk_threshold
from sfpk_kernels.ops.codes import ENTRY_SCORES

from .processes import python

GPU_BACKENDS = ["triton", pytest.param("cuda", marks=pytest.mark.gpu)]
BACKENDS = ["reference", "cpp", *GPU_BACKENDS]
ON_GPU = torch.cuda.is_available()  # else Triton's kernels are interpreted
HERE = ["reference", "cpp", *(["triton"] if find_spec("triton") else []), *(["cuda"] if ON_GPU else [])]


def run(function, *arguments, backend, **options):
    """The result on the CPU, wherever the backend needs its arguments."""

    def place(value):
        if isinstance(value, torch.Tensor):
            return value.cuda() if ON_GPU and backend in ("triton", "cuda") else value
        if isinstance(value, Cut):
            return Cut(*map(place, value))
        return [place(v) for v in value] if isinstance(value, list) else value

    result = function(*map(place, arguments), **{k: place(v) for k, v in options.items()}, backend=backend)
    return [r.cpu() for r in result] if isinstance(result, list) else result.cpu()


FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("backend", "d"),
    [(backend, d) for backend in ("reference", "cpp") for d in (1, 7, 8, 1023, 1024, 1025, 5000, 70_001)]
    + [("triton", d) for d in (1, 1025, 3000)]
    + [pytest.param("cuda", d, marks=pytest.mark.gpu) for d in (1, 1025, 70_001)],
)
@pytest.mark.parametrize("score", ENTRY_SCORES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_cut_applies_the_mask_of_the_selection(backend, score, d, dtype):
    values, theta = torch.randn(3, d).to(dtype), torch.randn(d)
    saliency = theta.abs() if score.endswith("saliency") else None
    counts = [0, d // 3, d]
    segments = [0, d // 2, d]
    for borders in (None, segments):
        cut = topk_threshold(values, counts, score=score, saliency=saliency, segments=borders)
        mask = topk_mask(values, counts, score=score, saliency=saliency, segments=borders)
        options = {"cut": cut, "score": score, "saliency": saliency, "segments": borders, "backend": backend}
        result = run(masked_weights, theta, values, **options)
        assert torch.equal(result, torch.where(mask, theta, 0.0))
        assert torch.equal(
            run(masked_weights, theta, values[1], **{**options, "cut": Cut(*(c[1:2] for c in cut))}), result[1]
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_infinities_zeros_and_nan(backend):
    inf, nan = float("inf"), float("nan")
    theta = torch.arange(1.0, 8.0)
    values = torch.tensor([[0.0, -0.0, inf, 1.0, -inf, nan, 1.0]])

    def kept(threshold, tie_end, score="value"):
        cut = Cut(torch.tensor([[threshold]]), torch.tensor([[tie_end]]))
        return run(masked_weights, theta, values, cut=cut, score=score, backend=backend)[0].nonzero().flatten().tolist()

    assert kept(inf, 0) == []
    assert kept(inf, 7) == [2]
    assert kept(1.0, 0) == [2]
    assert kept(1.0, 4) == [2, 3]
    assert kept(1.0, 7) == [2, 3, 6]
    assert kept(0.0, 1) == [0, 2, 3, 6]
    assert kept(-0.0, 2) == [0, 1, 2, 3, 6]
    assert kept(-inf, 7) == [0, 1, 2, 3, 4, 6]
    assert kept(inf, 7, "abs") == [2, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cut_of_a_signed_product(backend):
    theta, saliency = torch.arange(1.0, 7.0), torch.tensor([1.0, 1.0, 2.0, 2.0, 0.0, 1.0])
    values = torch.tensor([[0.0, -0.0, -0.5, 1.0, -3.0, -1.0]])  # scores 0, -0, -1, 2, -0, -1

    def kept(threshold, tie_end):
        options = {"cut": Cut(torch.tensor([[threshold]]), torch.tensor([[tie_end]])), "score": "value_saliency"}
        result = run(masked_weights, theta, values, saliency=saliency, backend=backend, **options)
        return result[0].nonzero().flatten().tolist()

    assert kept(0.0, 0) == [3]
    assert kept(-0.0, 2) == [0, 1, 3]
    assert kept(-1.0, 0) == [0, 1, 3, 4]
    assert kept(-1.0, 3) == [0, 1, 2, 3, 4]
    assert kept(-1.0, 6) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["uint8", "int32"])
@pytest.mark.parametrize("d", [1, 8, 31, 33, 1024, 1030, 5003])
def test_packed_masks(backend, kind, d):
    mask, theta = torch.rand(3, d) > 0.5, torch.randn(d)
    assert torch.equal(
        run(masked_weights, theta, pack_mask(mask, kind), backend=backend), torch.where(mask, theta, 0.0)
    )
    parts = [theta[: d // 3], theta[d // 3 :]]  # the second begins within a byte
    listed = run(masked_weights, parts, pack_mask(mask, kind), backend=backend)
    assert torch.equal(torch.cat(listed, dim=1), torch.where(mask, theta, 0.0))


@pytest.mark.parametrize("backend", ["cpp", *GPU_BACKENDS])
@pytest.mark.parametrize("weights_dtype", FLOATS)
@pytest.mark.parametrize("factors_dtype", [torch.bool, *FLOATS])
@pytest.mark.parametrize("out_dtype", FLOATS)
def test_dtypes_agree_bit_for_bit(backend, weights_dtype, factors_dtype, out_dtype):
    special = torch.tensor(
        [float("inf"), -float("inf"), float("nan"), 65519.0, 65520.0, 1e-7, 6e-8, 2.9e-8, -0.0, 3e38]
    )
    theta = torch.cat([special, torch.randn(2000) * torch.logspace(-9, 5, 2000)]).to(weights_dtype)
    factors = torch.rand(2, theta.numel())
    mask = factors > 0.5 if factors_dtype == torch.bool else factors.to(factors_dtype)
    expected = masked_weights(theta, mask, dtype=out_dtype, backend="reference")
    result = run(masked_weights, theta, mask, dtype=out_dtype, backend=backend)
    assert torch.equal(result.isnan(), expected.isnan())
    assert torch.equal(result.nan_to_num(7.0).view(torch.uint8), expected.nan_to_num(7.0).view(torch.uint8))


LAYOUTS = [
    [Blocks(1, 5, 9)],
    [Blocks(4, 6, 1)],
    [Blocks(3, 4, 25)],
    [Blocks(1, 7, 1), Blocks(2, 3, 4), Blocks(5, 1, 2)],
    [Blocks(1, 3, 700), Blocks(50, 3, 1), Blocks(1, 2000, 1)],
]


def expanded(coordinates, layout):
    """The literal index: one coordinate for every weight."""
    first, parts = 0, []
    for outer, groups, inner, _ in layout:
        index = torch.arange(first, first + groups).view(1, groups, 1).expand(outer, groups, inner)
        parts.append(coordinates[..., index.flatten()])
        first += groups
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_structured_layouts(backend, layout):
    d, count = sum(b.groups for b in layout), sum(b.numel for b in layout)
    theta, values = torch.randn(count), torch.rand(3, d)
    mask, cut = topk_mask(values, d // 2), topk_threshold(values, d // 2)
    kept = torch.where(expanded(mask, layout), theta, 0.0)
    assert torch.equal(run(masked_weights, theta, mask, layout=layout, backend=backend), kept)
    assert torch.equal(run(masked_weights, theta, pack_mask(mask), layout=layout, backend=backend), kept)
    assert torch.equal(run(masked_weights, theta, values, cut=cut, layout=layout, backend=backend), kept)
    for dtype in FLOATS:
        factors = values.to(dtype)
        result = run(masked_weights, theta, factors, layout=layout, backend=backend)
        assert torch.equal(result, theta * expanded(factors, layout).float())
    tensors = list(theta.split([b.numel for b in layout]))
    listed = run(masked_weights, tensors, mask, layout=layout, backend=backend)
    assert torch.equal(torch.cat(listed, dim=1), kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("dtype", FLOATS)
def test_mask_gradient(backend, layout, dtype):
    d, count = (2500, 2500) if layout is None else (sum(b.groups for b in layout), sum(b.numel for b in layout))
    theta, grads = torch.randn(count).to(dtype), torch.randn(3, count).to(dtype)
    products = theta.double() * grads.double()
    index = torch.arange(d) if layout is None else expanded(torch.arange(d), layout)
    assert index.numel() == count
    expected = torch.zeros(3, d, dtype=torch.float64).index_add(1, index, products)
    result = run(mask_gradient, theta, grads, layout=layout, backend=backend)
    assert result.dtype == torch.float32
    # One rounding for a product, one for the sum.
    scale = torch.zeros(3, d, dtype=torch.float64).index_add(1, index, products.abs())
    assert ((result - expected).abs() <= 2**-22 * scale).all()
    assert torch.equal(run(mask_gradient, theta, grads[0], layout=layout, backend=backend), result[0])


def test_lists_of_model_shaped_tensors():
    shapes = [(3, 4), (2, 2, 3, 3), (5,), ()]
    weights = [torch.randn(shape) for shape in shapes]
    flat = torch.cat([w.flatten() for w in weights])
    values = torch.rand(4, flat.numel())
    cut = topk_threshold(values, [3, 10, 20, 54], segments=[0, 12, 48, 53, 54])
    result = masked_weights(weights, values, cut=cut, segments="tensors")
    assert [tuple(t.shape) for t in result] == [(4, *shape) for shape in shapes]
    mask = topk_mask(values, [3, 10, 20, 54], segments=[0, 12, 48, 53, 54])
    assert torch.equal(torch.cat([t.reshape(4, -1) for t in result], dim=1), torch.where(mask, flat, 0.0))
    one = masked_weights(weights, mask[1], dtype=torch.bfloat16)
    assert [(tuple(t.shape), t.dtype) for t in one] == [(shape, torch.bfloat16) for shape in shapes]
    buffers = [torch.full((4, *shape), float("nan")) for shape in shapes]
    assert masked_weights(weights, mask, out=buffers)[0] is buffers[0]
    assert all(torch.equal(a, b) for a, b in zip(buffers, result, strict=True))
    grads = [torch.randn(4, *shape) for shape in shapes]
    joined = torch.cat([(g * w).reshape(4, -1) for g, w in zip(grads, weights, strict=True)], dim=1)
    assert torch.equal(mask_gradient(weights, grads), joined)


@pytest.mark.parametrize("backend", ["cpp", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("blocks", [Blocks(7, 30, 1), Blocks(3, 30, 25), Blocks(1, 30, 40)])
def test_blocks_that_cross_segments(backend, blocks):
    """Each coordinate is decided by its own segment's cut, on every backend."""
    device = "cuda" if torch.cuda.is_available() and backend != "cpp" else "cpu"
    if backend == "triton":
        pytest.importorskip("triton")
    theta, values = torch.randn(blocks.numel, device=device), torch.randint(-4, 5, (3, 30), device=device).float()
    borders = [0, 4, 4, 17, 30]
    cut = topk_threshold(values, [5, 9, 20], segments=borders, backend="reference")
    options = {"cut": cut, "score": "value", "segments": borders, "layout": blocks}
    expected = masked_weights(theta, values, backend="reference", **options)
    assert torch.equal(masked_weights(theta, values, backend=backend, **options), expected)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_backends_agree_on_anything(data):
    n, d = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 3000))
    seed = data.draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    dtype = data.draw(st.sampled_from(FLOATS))
    values = torch.randint(-3, 4, (n, d + 5), generator=generator).to(dtype)[:, 2 : d + 2]  # ties, row gaps
    theta = torch.randn(2 * d, generator=generator)[::2]
    cut = Cut(
        torch.randint(-3, 4, (n, 1), generator=generator).float(), torch.randint(0, d + 1, (n, 1), generator=generator)
    )
    score = data.draw(st.sampled_from(["value", "abs"]))
    out_dtype = data.draw(st.sampled_from(FLOATS))
    results = []
    for backend in HERE:
        buffer = torch.full((n, 2 * d), float("nan"), dtype=out_dtype)[:, :d]
        results.append(run(masked_weights, theta, values, cut=cut, score=score, out=buffer, backend=backend))
    assert all(torch.equal(result, results[0]) for result in results)


def test_streamed_outputs():
    """Outputs beyond the caches take another way; odd offsets into memory, too."""
    theta, mask = torch.randn(3_000_001), torch.rand(3, 3_000_001) > 0.5
    expected = torch.where(mask, theta, 0.0)
    assert torch.equal(masked_weights(theta, mask), expected)
    buffer = torch.full((3, 3_000_007), float("nan"))
    masked_weights(theta, mask, out=buffer[:, 3:-3])
    assert torch.equal(buffer[:, 3:-3], expected)
    assert buffer[:, :3].isnan().all()
    assert buffer[:, -3:].isnan().all()


SCRIPT = """
import hashlib, torch
from sfpk_kernels.ops import Blocks, mask_gradient, masked_weights, topk_threshold
torch.manual_seed(0)
values, theta = torch.randn(3, 400_000), torch.randn(400_000)
cut = topk_threshold(values, 1000)
results = [masked_weights(theta, values, cut=cut, dtype=t) for t in (torch.float32, torch.bfloat16, torch.float16)]
results.append(masked_weights(theta, values.half()))
results.append(mask_gradient(theta, values, layout=[Blocks(100, 10, 200), Blocks(1, 200_000, 1)]))
digest = hashlib.sha256()
for result in results:
    digest.update(result.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_threads_and_instruction_sets_change_nothing():
    digests = set()
    for threads, isa in ((1, {}), (2, {}), (3, {"SFPK_CPU_ISA": "avx2"}), (2, {"SFPK_CPU_ISA": "baseline"})):
        digests.add(python(f"import torch\ntorch.set_num_threads({threads})\n{SCRIPT}", **isa))
    assert len(digests) == 1


def test_straight_through_gradients():
    theta = torch.randn(6, dtype=torch.float64, requires_grad=True)
    factors = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    layout = [Blocks(2, 3, 1)]
    assert torch.autograd.gradcheck(lambda w, m: masked_weights(w, m, layout=layout), (theta, factors))
    grads = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, g: mask_gradient(w, g, layout=layout), (theta, grads))
    assert torch.autograd.gradgradcheck(lambda w, g: mask_gradient(w, g, layout=layout), (theta, grads))
    lists = [torch.randn(2, 2, dtype=torch.float64, requires_grad=True), torch.randn(3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda w, m: masked_weights([w, lists[1]], m), (lists[0], torch.rand(2, 7).double())
    )
    # Through the cut: as if the mask were the values.
    values = torch.rand(2, 6, requires_grad=True)
    cut = topk_threshold(values.detach(), 2)
    weights = torch.randn(6, requires_grad=True)
    upstream = torch.randn(2, 6)
    masked_weights(weights, values, cut=cut).backward(upstream)
    assert torch.equal(values.grad, upstream * weights.detach())
    assert torch.allclose(weights.grad, (upstream * topk_mask(values.detach(), 2)).sum(dim=0))


@pytest.mark.parametrize("shape", [(9,), (4, 9), (0, 9), (1, 9)])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_and_dtypes(shape, dtype):
    theta, mask = torch.randn(9), torch.rand(shape) > 0.5
    result = masked_weights(theta, mask, dtype=dtype)
    assert result.dtype == (dtype or torch.float32)
    assert torch.equal(result, torch.where(mask, theta, 0.0).to(result.dtype))


def test_removed_weights_are_zero_whatever_they_were():
    theta = torch.tensor([float("nan"), float("inf"), 2.0])
    mask = torch.tensor([False, False, True])
    assert torch.equal(masked_weights(theta, mask), torch.tensor([0.0, 0.0, 2.0]))


def test_float_masks_multiply():
    theta, mask = torch.randn(9), torch.rand(3, 9)
    assert torch.equal(masked_weights(theta, mask), theta * mask)


def test_writes_into_the_callers_buffer():
    theta, mask = torch.randn(9), torch.rand(4, 9) > 0.5
    buffer = torch.full((4, 20), float("nan"))
    out = buffer[:, :9]
    assert masked_weights(theta, mask, out=out) is out
    assert torch.equal(out, torch.where(mask, theta, 0.0))
    assert buffer[:, 9:].isnan().all()


@pytest.mark.parametrize("shape", [(9,), (4, 9)])
def test_gradient_by_the_weights(shape):
    theta = torch.randn(9, dtype=torch.float64, requires_grad=True)
    for mask in (torch.rand(shape) > 0.5, torch.rand(shape, dtype=torch.float64)):
        assert torch.autograd.gradcheck(lambda w, m=mask: masked_weights(w, m), theta)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((torch.rand(2, 2), torch.ones(2, 2)), ValueError, r"weights: wanted shape \(d,\)"),
        ((torch.rand(3), torch.ones(4, dtype=torch.bool)), ValueError, "mask: wanted shape"),
        ((torch.rand(3), torch.ones(3, dtype=torch.int16)), TypeError, "mask: wanted bool"),
        ((torch.rand(3), torch.ones(3, device="meta")), ValueError, "mask: wanted device cpu"),
        ((torch.ones(3, dtype=torch.int), torch.ones(3)), TypeError, "weights: wanted"),
    ],
)
def test_bad_input_is_named(arguments, error, words):
    with pytest.raises(error, match=words):
        masked_weights(*arguments)


def test_bad_buffers_are_named():
    theta, mask = torch.rand(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(TypeError, match="dtype: wanted a float dtype"):
        masked_weights(theta, mask, dtype=torch.int32)
    with pytest.raises(TypeError, match="dtype: wanted None together with out"):
        masked_weights(theta, mask, dtype=torch.float32, out=torch.empty(3))
    with pytest.raises(ValueError, match="out: wanted shape"):
        masked_weights(theta, mask, out=torch.empty(4))
    with pytest.raises(ValueError, match="out: wanted memory of its own, got memory shared with weights"):
        masked_weights(theta, mask, out=theta)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"score": "abs"}, ValueError, "score: wanted None without a cut"),
        ({"cut": 3}, TypeError, "cut: wanted a Cut"),
        ({"cut": Cut(torch.zeros(2, 1), torch.zeros(2, 1))}, TypeError, "cut.tie_end: wanted int64"),
        (
            {"cut": Cut(torch.zeros(1, 1), torch.zeros(1, 1).long())},
            ValueError,
            r"cut.threshold: wanted shape \(2, 1\)",
        ),
        ({"cut": "good", "score": "mean_abs_saliency"}, ValueError, "score: wanted one of 'value'"),
        ({"cut": "good", "score": "abs_saliency"}, ValueError, "saliency: wanted values"),
        ({"cut": "good", "segments": [0, 3]}, ValueError, "segments: wanted rising offsets from 0 to 6"),
        ({"layout": [Blocks(1, 2, 2)]}, ValueError, "layout: wanted blocks of 6 weights"),
        ({"layout": [Blocks(1, 0, 2)]}, ValueError, "layout: wanted numbers ≥ 1"),
        ({"layout": "rows"}, TypeError, "layout: wanted a list of Blocks"),
        ({"out": [torch.empty(2, 6)]}, TypeError, "out: wanted one"),
        ({"out": torch.empty(2, 6), "backend": "tensor cores"}, ValueError, "backend: wanted one of"),
    ],
)
def test_bad_options_are_named(options, error, words):
    theta, values = torch.randn(6), torch.rand(2, 6)
    if options.get("cut") == "good":
        options = {**options, "cut": topk_threshold(values, 2)}
    with pytest.raises(error, match=words):
        masked_weights(theta, values, **options)


def test_bad_gradients_are_named():
    theta = torch.randn(6)
    with pytest.raises(TypeError, match="weight_grads: wanted a tensor, got list"):
        mask_gradient(theta, [theta])
    with pytest.raises(ValueError, match=r"weight_grads: wanted shape \(6,\)"):
        mask_gradient(theta, torch.randn(5))
    with pytest.raises(ValueError, match="layout: wanted blocks of 6 weights"):
        mask_gradient(theta, theta, layout=Blocks(1, 4, 1))
