"""Exact selection: golden tables, properties against a stable sort, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfpk_kernels.ops import topk_mask, topk_threshold

INF = float("inf")


def by_stable_sort(scores, k):
    """The definition: sort falling, equal scores in order of index, take the first k."""
    order = torch.sort(scores.double(), stable=True, descending=True).indices
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    mask[order[:k]] = True
    return mask


@pytest.mark.parametrize(
    ("scores", "k", "kept"),
    [
        ([5.0, 1.0, 4.0, 2.0], 2, [1, 0, 1, 0]),
        ([1.0, 1.0, 1.0, 1.0], 3, [1, 1, 1, 0]),  # all equal: lowest indices
        ([1.0, 2.0, 1.0, 2.0, 1.0], 3, [1, 1, 0, 1, 0]),  # ties at the cut
        ([-0.0, 0.0, -0.0], 2, [1, 1, 0]),  # ±0 are equal
        ([0.0, -1.0, -0.0, -2.0], 2, [1, 0, 1, 0]),
        ([INF, 1.0, -INF, INF], 1, [1, 0, 0, 0]),
        ([INF, 1.0, -INF, INF], 3, [1, 1, 0, 1]),
        ([-INF, -INF, 0.0], 2, [1, 0, 1]),
        ([3.0, 2.0, 1.0], 0, [0, 0, 0]),
        ([3.0, 2.0, 1.0], 3, [1, 1, 1]),
        ([1e-45, 0.0, 2e-45], 2, [1, 0, 1]),  # subnormals
        ([7.0], 1, [1]),
    ],
)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_golden_table(scores, k, kept, backend):
    mask = topk_mask(torch.tensor(scores), k, backend=backend)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [bool(x) for x in kept]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_a_stable_sort(data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    values = data.draw(st.lists(st.integers(-3, 3) | st.just(INF) | st.just(-INF), min_size=1, max_size=60))
    scores = torch.tensor([float(v) for v in values]).to(dtype)
    k = data.draw(st.integers(0, len(values)))
    assert torch.equal(topk_mask(scores, k), by_stable_sort(scores, k))


@pytest.mark.parametrize("d", [1, 7, 255, 256, 257, 4096])
def test_rows_with_their_own_k(d):
    scores = torch.randn(5, d).round(decimals=1)
    ks = [0, d, d // 2, 1, d // 3]
    expected = torch.stack([by_stable_sort(row, k) for row, k in zip(scores, ks, strict=True)])
    assert torch.equal(topk_mask(scores, ks), expected)
    assert torch.equal(topk_mask(scores, torch.tensor(ks)), expected)
    assert topk_mask(scores, d // 2).sum(1).tolist() == [d // 2] * 5
    strided = torch.randn(5, 2 * d)[:, ::2]
    assert torch.equal(topk_mask(strided, ks), topk_mask(strided.contiguous(), ks))


def test_a_list_is_ranked_as_one_vector():
    tensors = [torch.randn(3, 4).round(), torch.randn(5).round(), torch.randn(2, 2, 2).round(), torch.randn(0)]
    flat = torch.cat([t.flatten() for t in tensors])
    for k in (0, 1, 10, 25):
        masks = topk_mask(tensors, k)
        assert [m.shape for m in masks] == [t.shape for t in tensors]
        assert torch.equal(torch.cat([m.flatten() for m in masks]), by_stable_sort(flat, k))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("scores", "k", "threshold", "tie_end"),
    [
        ([5.0, 1.0, 4.0, 2.0], 2, 4.0, 4),
        ([1.0, 1.0, 1.0, 1.0], 3, 1.0, 3),
        ([1.0, 2.0, 1.0, 2.0, 1.0], 3, 1.0, 1),
        ([1.0, 2.0, 1.0, 2.0, 1.0], 4, 1.0, 3),
        ([-0.0, 0.0, -0.0], 2, 0.0, 2),
        ([3.0, 2.0, 1.0], 0, INF, 0),
        ([3.0, 2.0, 1.0], 3, -INF, 3),
        ([INF, INF, 1.0], 1, INF, 1),
        ([1.0, -INF, -INF], 2, -INF, 2),
        ([], 0, INF, 0),
    ],
)
def test_golden_cuts(scores, k, threshold, tie_end, backend):
    cut = topk_threshold(torch.tensor(scores), k, backend=backend)
    assert cut.threshold.dtype == torch.float32
    assert cut.threshold.tolist() == [[threshold]]
    assert not torch.signbit(cut.threshold).any() or threshold < 0
    assert cut.tie_end.tolist() == [[tie_end]]


def test_golden_scores():
    values, saliency = torch.tensor([[1.0, -3.0, 2.0], [4.0, 1.0, -1.0]]), torch.tensor([1.0, 1.0, 4.0])
    assert topk_mask(values, 1).int().tolist() == [[0, 0, 1], [1, 0, 0]]
    assert topk_mask(values, 1, score="abs").int().tolist() == [[0, 1, 0], [1, 0, 0]]
    assert topk_mask(values, 1, score="abs_saliency", saliency=saliency).int().tolist() == [[0, 0, 1], [1, 0, 0]]
    signed = {"score": "value_saliency", "saliency": saliency}  # 1, -3, 8; 4, 1, -4
    assert topk_mask(values, 2, **signed).int().tolist() == [[1, 0, 1], [1, 1, 0]]
    assert topk_threshold(values, 2, **signed).threshold.tolist() == [[1.0], [1.0]]
    cut = topk_threshold(values, 2, score="mean_abs_saliency", saliency=saliency)  # 2.5, 2, 6
    assert cut.threshold.tolist() == [[2.5]]
    assert topk_mask(values, 2, score="mean_abs_saliency", saliency=saliency).tolist() == [True, False, True]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("k", "threshold", "tie_end"),
    [(0, INF, 0), (1, 2.0, 8), (2, 0.0, 1), (4, 0.0, 5), (5, 0.0, 8), (6, -1.0, 2), (7, -1.0, 8), (8, -INF, 8)],
)
def test_golden_cuts_of_a_signed_product(k, threshold, tie_end, backend):
    """Below zero the larger product ranks last; a zero of either sign, or one by a saliency of 0, is a tie with 0."""
    values = torch.tensor([0.0, -0.5, -1.0, -0.0, -3.0, 1.0, -INF, 0.0])
    saliency = torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0, 2.0, 1.0, 5.0])
    options = {"score": "value_saliency", "saliency": saliency, "backend": backend}
    cut = topk_threshold(values, k, **options)
    assert (cut.threshold.tolist(), cut.tie_end.tolist()) == ([[threshold]], [[tie_end]])
    assert not torch.signbit(cut.threshold).any() or threshold < 0
    order = [5, 0, 3, 4, 7, 1, 2, 6]
    assert topk_mask(values, k, **options).nonzero().flatten().tolist() == sorted(order[:k])
    assert topk_mask([values], k, **{**options, "saliency": [saliency]})[0].nonzero().flatten().tolist() == sorted(
        order[:k]
    )


def test_empty_rows():
    assert topk_mask(torch.empty(0), 0).shape == (0,)
    assert topk_mask(torch.empty(3, 0), 0).shape == (3, 0)


@pytest.mark.parametrize(
    ("scores", "k", "error", "words"),
    [
        (torch.tensor([1.0, float("nan")]), 1, ValueError, "values: wanted no NaN score, got NaN in row 0"),
        (torch.tensor([[1.0, 2.0], [0.0, float("nan")]]), 0, ValueError, "NaN in row 1"),
        (torch.tensor([1.0, 2.0]), 3, ValueError, "k: wanted 0 ≤ k ≤ 2, got 3"),
        (torch.tensor([1.0, 2.0]), -1, ValueError, "k: wanted 0 ≤ k ≤ 2, got -1"),
        (torch.rand(2, 3), torch.tensor([1, 4]), ValueError, "got 4 in row 1"),
        (torch.tensor([1.0, 2.0]), 1.0, TypeError, "k: wanted an integer"),
        (torch.tensor([1.0, 2.0]), True, TypeError, "k: wanted an integer"),
        (torch.rand(2, 3), [1], ValueError, "k: wanted 2 values"),
        (torch.rand(2, 3), torch.tensor([1.0, 1.0]), TypeError, "k: wanted an int64 tensor"),
        (torch.rand(2, 2, 2), 1, ValueError, "values: wanted shape"),
        (torch.tensor([1, 2]), 1, TypeError, "values: wanted"),
        ([], 1, TypeError, "values: wanted a tensor or a non-empty list"),
        ([torch.rand(2), torch.rand(2).double()], 1, TypeError, r"values\[1\]: wanted"),
        ([torch.rand(2), "x"], 1, TypeError, r"values\[1\]"),
    ],
)
def test_bad_input_is_named(scores, k, error, words):
    with pytest.raises(error, match=words) as caught:
        topk_mask(scores, k)
    assert "topk_mask" in str(caught.value)
