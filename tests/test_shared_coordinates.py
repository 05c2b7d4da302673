"""One coordinate governs parts of several tensors: every backend against dense fp64, derivatives, bad layouts."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap

from sfpk_kernels.ops import (
    Blocks,
    mask_gradient,
    masked_weights,
    pack_mask,
    topk_mask,
    topk_threshold,
)
from sfpk_kernels.ops import layout as layouts
from sfpk_kernels.ops.codes import MaskKind

from .emulated import library, mask_gradient_, masked_weights_
from .sparse import sparse
from .test_masked_weights import BACKENDS, FLOATS, ON_GPU, run

# (layout, coordinates): what a piece governs may overlap, be reached by none, and come in any order.
LAYOUTS = {
    "channels of a convolution and a batch-norm": ([Blocks(8, 5, 9), Blocks(1, 5, 1, first=0)], None),
    "overlapping": ([Blocks(2, 4, 3), Blocks(1, 6, 2, 2), Blocks(3, 1, 1, 5), Blocks(1, 7, 1, 1)], None),
    "some governed by none": ([Blocks(2, 3, 1, 4), Blocks(1, 3, 1, 4), Blocks(1, 2, 5, 10)], 15),
    "backwards": ([Blocks(1, 3, 2, 6), Blocks(2, 3, 2, 3), Blocks(1, 3, 1, 0), Blocks(1, 4, 1, 2)], None),
    "single weights": ([Blocks(1, 9000, 1), Blocks(1, 9000, 1, 0), Blocks(1, 5000, 1, 6000)], None),
    "a residual stream": (
        [Blocks(1, 40, 27, 0), Blocks(1, 40, 1, 0), Blocks(30, 40, 9, 0), Blocks(1, 30, 9, 40), Blocks(40, 30, 1, 40),
         Blocks(1, 40, 30, 0), Blocks(1, 40, 1, 0), Blocks(1, 2000, 1)], None),
    "not shared, spelled out": ([Blocks(1, 7, 1, 0), Blocks(2, 3, 4, 7), Blocks(5, 1, 2, 10)], None),
    "one by three": ([Blocks(1, 1, 2500), Blocks(1, 1, 1, 0), Blocks(40, 1, 3, 0)], None),
}  # fmt: skip
by_layout = pytest.mark.parametrize("name", list(LAYOUTS))


def index_of(layout, coordinates):
    """The coordinate of every weight, and how many coordinates there are."""
    following, parts, reach = 0, [], 0
    for outer, groups, inner, first in layout:
        begin = following if first is None else first
        parts.append(torch.arange(begin, begin + groups).view(1, groups, 1).expand(outer, groups, inner).flatten())
        following = begin + groups
        reach = max(reach, following)
    return torch.cat(parts), coordinates or reach


def governed(layout, coordinates):
    """(weights, coordinates) fp64: 1 where a coordinate governs a weight."""
    index, d = index_of(layout, coordinates)
    return torch.nn.functional.one_hot(index, d).double()


def split(flat, layout):
    """As the tensors of a list, one per blocks."""
    return list(flat.split([blocks.numel for blocks in layout], dim=-1))


@by_layout
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_reach_every_weight(backend, name):
    layout, coordinates = LAYOUTS[name]
    index, d = index_of(layout, coordinates)
    theta, values = torch.randn(index.numel()), torch.randint(-9, 10, (3, d)).float()
    options = {"layout": layout, "coordinates": coordinates, "backend": backend}
    mask, borders = topk_mask(values, [0, d // 2, d]), [0, d // 3, d]
    kept = torch.where(mask[:, index], theta, 0.0)
    assert torch.equal(run(masked_weights, theta, mask, **options), kept)
    for kind in ("uint8", "int32"):
        assert torch.equal(run(masked_weights, theta, pack_mask(mask, kind), **options), kept)
    for segments in (None, borders):
        cut = topk_threshold(values, [0, d // 2, d], segments=segments)
        by_cut = torch.where(topk_mask(values, [0, d // 2, d], segments=segments)[:, index], theta, 0.0)
        assert torch.equal(run(masked_weights, theta, values, cut=cut, segments=segments, **options), by_cut)
    for dtype in FLOATS:
        result = run(masked_weights, theta, values.to(dtype), **options)
        assert torch.equal(result, theta * values.to(dtype)[:, index].float())
    listed = run(masked_weights, split(theta, layout), mask, **options)
    assert torch.equal(torch.cat(listed, dim=1), kept)
    assert torch.equal(run(masked_weights, theta, mask[1], **options), kept[1])


def check_sums(result, theta, grads, layout, coordinates):
    """One rounding for each product, one for the sum."""
    if theta.numel() > 10_000:  # the dense matrix would be large
        index, d = index_of(layout, coordinates)
        products = theta.double() * grads.double()
        expected, scale = (torch.zeros(3, d).double().index_add(1, index, p) for p in (products, products.abs()))
    else:
        terms = theta.double(), grads.double(), governed(layout, coordinates)
        expected = torch.einsum("w,nw,wd->nd", *terms)
        scale = torch.einsum("w,nw,wd->nd", *(t.abs() for t in terms))
    assert result.shape == expected.shape
    assert ((result - expected).abs() <= 2**-23 * scale).all()


@by_layout
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_summed_over_all_weights(backend, name):
    layout, coordinates = LAYOUTS[name]
    index, _ = index_of(layout, coordinates)
    options = {"layout": layout, "coordinates": coordinates, "backend": backend}
    number = list(LAYOUTS).index(name)
    for dtype in FLOATS if ON_GPU or backend != "triton" else [FLOATS[number % 3]]:  # interpreted, it takes its time
        theta, grads = torch.randn(index.numel()).to(dtype), torch.randn(3, index.numel()).to(dtype)
        result = run(mask_gradient, theta, grads, **options)
        assert result.dtype == torch.float32
        check_sums(result, theta, grads, layout, coordinates)
        assert torch.equal(run(mask_gradient, split(theta, layout), split(grads, layout), **options), result)
        assert torch.equal(run(mask_gradient, theta, grads[0], **options), result[0])
        exact = mask_gradient(theta.double(), grads, layout=layout, coordinates=coordinates)
        assert exact.dtype == torch.float64
        torch.testing.assert_close(exact.float(), result, rtol=1e-5, atol=1e-5)


@by_layout
def test_threads_change_no_bit(name):
    layout, coordinates = LAYOUTS[name]
    index, _ = index_of(layout, coordinates)
    theta, grads = torch.randn(index.numel()), torch.randn(3, index.numel())
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(mask_gradient(theta, grads, layout=layout, coordinates=coordinates, backend="cpp"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return library(tmp_path_factory.mktemp("emulated"))


@by_layout
def test_the_cuda_kernels(kernels, name):
    """Piece after piece as the op launches them."""
    layout, coordinates = LAYOUTS[name]
    index, d = index_of(layout, coordinates)
    theta, grads, mask = torch.randn(index.numel()), torch.randn(3, index.numel()), torch.rand(3, d) > 0.5
    flat, _ = layouts.normalize("test", layout, [theta.numel()], coordinates)
    pieces = layouts.pieces(flat, [theta.numel()])
    sums = torch.zeros(3, d, dtype=torch.float64)
    for piece in pieces:
        blocks = Blocks(piece.outer, piece.groups, piece.inner, piece.first)
        weights, of_piece = piece.of(theta).clone(), piece.of(grads).contiguous()
        out = torch.full(of_piece.shape, -7.0)
        masked_weights_(kernels, weights, mask, blocks, out, kind=MaskKind.BOOL)
        assert torch.equal(out, torch.where(piece.of(mask[:, index]), weights, 0.0))
        mask_gradient_(kernels, weights, of_piece, blocks, sums)
    check_sums(sums.float(), theta, grads, layout, coordinates)


def test_the_cuda_kernels_behind_32_bits(kernels):
    """Coordinates beyond 2^32, of a few weights."""
    first = 2**32 + 5
    sums, out = sparse(2, first + 3, dtype=torch.float64), torch.empty(2, 3)
    theta, grads = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]])
    factors = sparse(2, first + 3)
    factors[:, first:] = grads
    masked_weights_(kernels, theta, factors, Blocks(1, 3, 1, first), out, kind=MaskKind.FACTORS)
    assert torch.equal(out, theta * grads)
    mask_gradient_(kernels, theta, grads, Blocks(1, 3, 1, first), sums)
    mask_gradient_(kernels, theta, grads, Blocks(3, 1, 1, first + 1), sums)
    products = (theta * grads).double()
    products[:, 1] += (theta * grads).sum(dim=1)
    assert torch.equal(sums[:, first:], products)


def test_cpp_behind_32_bits():
    first = 2**32 + 5
    sums, factors, out = sparse(1, first + 3, dtype=torch.float64), sparse(1, first + 3), torch.empty(1, 3)
    theta, grads = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[2.0, 3.0, 4.0]])
    factors[:, first:] = grads
    numbers, borders = [1, 3, 1, first], torch.tensor([0, first + 3])
    torch.ops.sfpk_cpp.masked_weights_(
        [theta], factors, MaskKind.FACTORS.value, 0, None, None, None, borders, numbers, [out]
    )
    assert torch.equal(out, theta * grads)
    torch.ops.sfpk_cpp.mask_gradient_([theta, theta], [grads, grads], [*numbers, 3, 1, 1, first + 1], sums)
    assert sums[0, first:].tolist() == [2, 6 + 20, 12]


DERIVED = {
    "overlapping": ([Blocks(2, 3, 1), Blocks(1, 2, 2, 1), Blocks(1, 3, 1, 0)], None),
    "some governed by none": ([Blocks(1, 3, 1, 2), Blocks(2, 2, 1, 3)], 6),
}


def dense(weights, factors, layout, coordinates):
    """θ ⊙ m with a coordinate's factor at each of its weights."""
    return weights * factors[..., index_of(layout, coordinates)[0]]


def fp64(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", list(DERIVED))
def test_derivatives_of_every_order(name):
    layout, coordinates = DERIVED[name]
    index, d = index_of(layout, coordinates)
    options = {"layout": layout, "coordinates": coordinates}
    theta, factors, grads = fp64(index.numel()), fp64(2, d), fp64(2, index.numel())

    def apply(w, m):
        return masked_weights(w, m, **options)

    def by_mask(w, g):
        return mask_gradient(w, g, **options)

    for function, others in ((apply, factors), (by_mask, grads)):
        assert gradcheck(function, (theta, others), check_forward_ad=True)
        assert gradgradcheck(function, (theta, others))
    ours = torch.autograd.grad(apply(theta, factors).pow(3).sum(), (theta, factors))
    torchs = torch.autograd.grad(dense(theta, factors, layout, coordinates).pow(3).sum(), (theta, factors))
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b)
    weights, mask = theta.detach(), factors.detach()
    torch.testing.assert_close(
        grad(lambda m: apply(weights, m).pow(3).sum())(mask),
        grad(lambda m: dense(weights, m, layout, coordinates).pow(3).sum())(mask),
    )
    _, tangent = jvp(lambda m: apply(weights, m), (mask,), (mask.cos(),))
    torch.testing.assert_close(tangent, dense(weights, mask.cos(), layout, coordinates))
    assert torch.equal(vmap(lambda m: apply(weights, m))(mask), apply(weights, mask))
    assert torch.equal(vmap(lambda g: by_mask(weights, g))(grads.detach()), by_mask(weights, grads.detach()))


def test_straight_through_a_cut():
    layout = DERIVED["overlapping"][0]
    values = torch.rand(2, 3, requires_grad=True)
    theta, upstream = torch.randn(13), torch.randn(2, 13)
    masked_weights(theta, values, cut=topk_threshold(values.detach(), 2), layout=layout).backward(upstream)
    assert torch.equal(values.grad, mask_gradient(theta, upstream, layout=layout))


def test_compiled_with_sizes_that_vary():
    def step(weights, scale, mask):
        channels = mask.shape[1]
        layout = [Blocks(2, channels, 3), Blocks(1, channels, 1, first=0)]
        kept = masked_weights([weights, scale], mask, layout=layout)
        return mask_gradient([weights, scale], kept, layout=layout)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for channels in (4, 6, 9):
        arguments = torch.randn(2, channels, 3), torch.randn(channels), torch.rand(2, channels)
        assert torch.equal(compiled(*arguments), step(*arguments))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layout": [Blocks(1, 3, 1), Blocks(1, 3, 1, -1)]}, ValueError,
         r"layout\[1\]: wanted coordinates ≥ 0, got -1 to 1"),
        ({"layout": [Blocks(1, 3, 1, 2), Blocks(1, 3, 1)], "coordinates": 7}, ValueError,
         r"layout\[1\]: wanted coordinates from 0 to 6, got 5 to 7"),
        ({"layout": [Blocks(1, 3, 1, 0), Blocks(1, 2, 1, 0)]}, ValueError, "layout: wanted blocks of 6 weights"),
        ({"layout": [(1, 3, 1, 0, 2)]}, TypeError, r"layout: wanted a list of Blocks\(outer, groups, inner, first\)"),
        ({"coordinates": 5}, ValueError, "coordinates: wanted ≥ 6, one per weight, got 5"),
        ({"coordinates": 6.0}, TypeError, "coordinates: wanted an integer or None, got 6.0"),
    ],
)  # fmt: skip
def test_bad_layouts_are_named(options, error, words):
    theta = torch.randn(6)
    with pytest.raises(error, match=f"masked_weights: {words}"):
        masked_weights(theta, torch.ones(6), **options)
    with pytest.raises(error, match=f"mask_gradient: {words}"):
        mask_gradient(theta, theta, **options)


def test_the_mask_has_every_coordinate():
    layout = [Blocks(1, 3, 1, 0), Blocks(1, 3, 1, 1)]
    with pytest.raises(ValueError, match=r"mask: wanted shape \(4,\) or \(n, 4\), got \(6,\)"):
        masked_weights(torch.randn(6), torch.ones(6), layout=layout)
    with pytest.raises(ValueError, match=r"mask: wanted shape \(9,\) or \(n, 9\), got \(4,\)"):
        masked_weights(torch.randn(6), torch.ones(4), layout=layout, coordinates=9)


def test_the_kernels_check_what_they_are_given():
    theta, grads, out = torch.randn(3), torch.randn(2, 3), torch.zeros(2, 4)
    kernel = torch.ops.sfpk_cpp.mask_gradient_
    with pytest.raises(RuntimeError, match="mask_gradient_: out: wanted fp64 for pieces that share coordinates, got"):
        kernel([theta, theta], [grads, grads], [1, 3, 1, 0, 1, 3, 1, 1], out)
    with pytest.raises(RuntimeError, match="mask_gradient_: layout: wanted coordinates from 0 to 4, got 2 to 5"):
        kernel([theta], [grads], [1, 3, 1, 2], out)
    with pytest.raises(RuntimeError, match="mask_gradient_: layout: wanted 4, got 3 numbers, four a tensor"):
        kernel([theta], [grads], [1, 3, 1], out)


def test_pieces_told_apart():
    """Only what shares coordinates is collected elsewhere; adjacent sums are copied at once."""
    layout = [Blocks(1, 4, 1), Blocks(1, 2, 3, 4), Blocks(1, 2, 1, 5), Blocks(2, 2, 1, 7), Blocks(1, 1, 1, 8)]
    flat, d = layouts.normalize("test", layout, [sum(b.numel for b in layout)], 12)
    parts = layouts.sharing(layouts.pieces(flat, [sum(b.numel for b in layout)]), d)
    assert [piece.first for piece in parts.alone] == [0]
    assert [piece.first for piece in parts.shared] == [0, 1, 3, 4]
    assert parts.places == [(slice(4, 9), slice(0, 5))]
    assert (parts.size, parts.covers) == (5, False)
