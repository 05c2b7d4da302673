"""Constrained selection: random instances against counting, exhaustive search, and infeasible demands."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from sfpk_kernels.ops import topk_mask, topk_threshold

from .selection_cases import best_selection, candidates, constrained

BACKENDS = ("cpp", "reference")


def kept_of(mask):
    return set(mask.nonzero().flatten().tolist())


def check_instances(seeds):
    for seed in seeds:
        values, k, options = constrained(seed)
        expected = best_selection(values, k, options)
        assert len(expected) == k, f"instance {seed} is not feasible"
        for backend in BACKENDS:
            mask = topk_mask(values, k, backend=backend, **options)
            assert kept_of(mask) == expected, (seed, backend)
            if "pattern" not in options:
                cut = topk_threshold(values, k, backend=backend, **options)
                assert torch.equal(mask_of(values, cut, options), mask), (seed, backend)


def mask_of(values, cut, options):
    """What a cut says, coordinate by coordinate."""
    borders, d = options.get("segments", [0, len(values)]), len(values)
    segment = torch.bucketize(torch.arange(d), torch.tensor(borders[1:-1], dtype=torch.int64), right=True)
    threshold, tie_end = cut.threshold[0, segment], cut.tie_end[0, segment]
    mask = (values > threshold) | ((values == threshold) & (torch.arange(d) < tie_end))
    nothing = torch.zeros(d, dtype=torch.bool)
    # Everything is kept under (-inf, d), the entries equal to -inf among it; nothing under (+inf, 0).
    return (mask & ~options.get("removed", nothing)) | options.get("protected", nothing)


def test_random_instances():
    check_instances(range(1000))


@pytest.mark.slow
def test_ten_thousand_random_instances():
    check_instances(range(1000, 10_000))


def test_the_check_itself_against_all_subsets():
    """Of all feasible kept sets, the one whose ranks, best first, come first lexicographically."""
    tried = 0
    for seed in range(400):
        values, k, options = constrained(seed)
        d = len(values)
        if d > 8:
            continue
        tried += 1
        ranking = sorted(range(d), key=lambda e: (-values[e].item(), e))
        place = {e: i for i, e in enumerate(ranking)}
        nothing = torch.zeros(d, dtype=torch.bool)
        protected = kept_of(options.get("protected", nothing))
        removed = kept_of(options.get("removed", nothing))
        status = ["p" if e in protected else "r" if e in removed else "f" for e in range(d)]
        usable = candidates(values.tolist(), status, options.get("pattern"))
        borders = options.get("segments", [0, d])
        low, high = options.get("min_keep", [0]), options.get("max_keep", [d])
        feasible = []
        for chosen in itertools.combinations(range(d), k):
            inside = [sum(a <= e < b for e in chosen) for a, b in itertools.pairwise(borders)]
            limits = zip(low, inside, high, strict=True)
            if protected <= set(chosen) <= usable | protected and all(a <= c <= b for a, c, b in limits):
                feasible.append(chosen)
        best = min(feasible, key=lambda chosen: sorted(place[e] for e in chosen if e not in protected))
        assert best_selection(values, k, options) == set(best), seed
    assert tried > 50


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_constraints(backend):
    values = torch.tensor([9.0, 8.0, 7.0, 6.0, 1.0, 2.0, 3.0, 4.0])
    golden = [
        (4, {}, [0, 1, 2, 3]),
        (4, {"segments": [0, 4, 8], "min_keep": 1}, [0, 1, 2, 7]),
        (4, {"segments": [0, 4, 8], "max_keep": [2, 8]}, [0, 1, 6, 7]),
        (4, {"segments": [0, 2, 4, 8], "min_keep": [0, 0, 3]}, [0, 5, 6, 7]),
        (4, {"pattern": (2, 4)}, [0, 1, 6, 7]),
        (3, {"pattern": (2, 4)}, [0, 1, 7]),
        (2, {"protected": torch.tensor([0, 0, 0, 0, 1, 0, 0, 0]).bool()}, [0, 4]),
        (2, {"removed": torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]).bool()}, [3, 7]),
        (4, {"pattern": (2, 4), "protected": torch.tensor([0, 0, 1, 1, 0, 0, 0, 0]).bool()}, [2, 3, 6, 7]),
        (6, {"sizes": torch.tensor([3, 2, 2, 1, 1, 1, 1, 1])}, [0, 1]),  # 3 + 2, and 2 more do not fit
        (7, {"sizes": torch.tensor([3.0, 2, 2, 1, 1, 1, 1, 1])}, [0, 1, 2]),
        (2, {"sizes": torch.tensor([3, 2, 2, 1, 1, 1, 1, 1])}, []),
        (99, {"sizes": torch.tensor([3, 2, 2, 1, 1, 1, 1, 1])}, list(range(8))),
        (4, {"sizes": torch.tensor([3, 2, 2, 1, 1, 1, 1, 1]), "protected": values == 1.0}, [0, 4]),
    ]
    for k, options, kept in golden:
        assert sorted(kept_of(topk_mask(values, k, backend=backend, **options))) == kept, (k, options)


def infeasible():
    x = torch.tensor([4.0, 3.0, 2.0, 1.0])
    first_two = torch.tensor([True, True, False, False])
    halves = {"segments": [0, 2, 4]}
    # fmt: off
    return [
        (x, 1, {**halves, "min_keep": 1}, "k: wanted ≥ 2, what min_keep demands, got 1"),
        (x, 3, {**halves, "max_keep": 1}, "k: wanted ≤ 2, what max_keep allows, got 3"),
        (x, 3, {**halves, "min_keep": [3, 0]}, "min_keep: wanted ≤ 2, the candidates of segment 0, got 3"),
        (x, 3, {**halves, "min_keep": 2, "max_keep": 1}, "min_keep: wanted at most max_keep = 1 in segment 0, got 2"),
        (x, 2, {**halves, "max_keep": [1, 2], "protected": first_two}, "max_keep: wanted ≥ 2, the protected"),
        (x, 1, {"protected": first_two}, "k: wanted ≥ 2, the protected entries, got 1"),
        (x, 3, {"removed": first_two}, "k: wanted ≤ 2, the entries that removed and pattern leave, got 3"),
        (x, 3, {"pattern": (1, 2)}, "k: wanted ≤ 2, the entries that removed and pattern leave, got 3"),
        (x, 2, {"pattern": (1, 2), "protected": first_two}, "protected: wanted at most 1 in each group of 2, got 2"),
        (x, 2, {"protected": first_two, "removed": first_two}, "removed: wanted no protected entries, got 2"),
        (x, 2, {"pattern": (1, 3)}, "pattern: wanted an M that divides the last dimension 4, got 3"),
        (x, 2, {"pattern": (3, 2)}, "pattern: wanted 0 ≤ N ≤ M"),
        (x, 2, {"min_keep": 1}, "min_keep: wanted None without segments"),
        (x, 2, {"segments": [0, 3]}, "segments: wanted rising offsets from 0 to 4"),
        (x, 2, {**halves, "min_keep": [1]}, "min_keep: wanted 2 values, one per segment, got 1"),
        (x, 2, {**halves, "min_keep": -1}, "min_keep: wanted ≥ 0, got -1 in segment 0"),
        ([x, x], 2, {"segments": [0, 4, 8]}, "segments: wanted None or 'tensors'"),
        (x, 2, {"sizes": torch.ones(4), **halves}, "sizes: wanted no segments"),
        (x, 2, {"sizes": torch.zeros(4)}, "sizes: wanted integers ≥ 1, got 0"),
        (x, 2, {"sizes": torch.full((4,), 1.5)}, "sizes: wanted integers ≥ 1, got fractions"),
        (x, 2, {"sizes": torch.full((4,), 2), "protected": first_two}, "k: wanted ≥ 4, the weights of the protected"),
        (x, -1, {"sizes": torch.ones(4)}, "k: wanted ≥ 0, got -1"),
        (x, 2, {"score": "abs_saliency"}, "saliency: wanted values to multiply with"),
        (x, 2, {"saliency": x}, "saliency: wanted None with score='value'"),
        (x, 2, {"score": "best"}, "score: wanted one of"),
        ([x], 2, {"score": "mean_abs_saliency", "saliency": [x]}, "score: wanted a score of single entries"),
        (x, 2, {"packed": "int8"}, "packed: wanted one of 'uint8', 'int32'"),
        (x, 2, {"guess": torch.zeros(3)}, "guess: wanted shape"),
        (x, 2, {"protected": torch.zeros(5, dtype=torch.bool)}, "protected: wanted shape"),
        (x * float("nan"), 0, {**halves, "min_keep": 0}, "values: wanted no NaN score, got NaN in row 0"),
        ([x, x * float("nan")], 8, {}, r"values: wanted no NaN score, got NaN in values\[1\]"),
        ([x, x * float("nan")], 4, {"segments": "tensors"}, r"got NaN in values\[1\]"),
        (x * float("nan"), 2, {"pattern": (1, 2)}, "got NaN in row 0"),
        (x * float("nan"), 2, {"sizes": torch.ones(4)}, "got NaN in row 0"),
        (x * float("nan"), 1, {"removed": torch.tensor([False, True, True, True])}, "got NaN in row 0"),
    ]
    # fmt: on


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [SimpleNamespace(v=v, k=k, o=o, words=w) for v, k, o, w in infeasible()])
def test_infeasible_demands_are_named(case, backend):
    with pytest.raises(ValueError, match=case.words) as caught:
        topk_mask(case.v, case.k, backend=backend, **case.o)
    assert str(caught.value).startswith("topk_mask: ")


def test_a_pattern_has_no_threshold():
    with pytest.raises(ValueError, match="topk_threshold: pattern: wanted None"):
        topk_threshold(torch.rand(4), 2, pattern=(2, 4))
