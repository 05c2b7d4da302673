"""The C++ selection: bit for bit the reference, whatever the kind of values, guess, threads or instruction set."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfpk_kernels import _extension
from sfpk_kernels.ops import Cut, topk_mask, topk_threshold
from sfpk_kernels.ops.codes import SCORES

from .processes import python
from .selection_cases import DTYPES, INF, KINDS, scores_like

LONG = 40_001  # several chunks, beyond the size that is settled without a sample
NAN = float("nan")


@pytest.fixture
def threads():
    """Gives back the number of threads afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def agree(values, k, **options):
    """Both backends' masks and cuts are equal; returns the mask."""
    packed, pattern = options.pop("packed", None), options.pop("pattern", None)
    guess = options.pop("guess", None)
    cut = None
    if pattern is None:
        cut = topk_threshold(values, k, backend="reference", **options)
        ours = topk_threshold(values, k, backend="cpp", guess=guess, **options)
        assert torch.equal(ours.threshold, cut.threshold)
        assert torch.equal(ours.tie_end, cut.tie_end)
    mask = topk_mask(values, k, backend="reference", packed=packed, pattern=pattern, **options)
    ours = topk_mask(values, k, backend="cpp", packed=packed, pattern=pattern, guess=guess, **options)
    pairs = [(ours, mask)] if isinstance(mask, torch.Tensor) else list(zip(ours, mask, strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    return mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_rows(kind, dtype):
    generator = torch.Generator().manual_seed(1)
    values = scores_like(kind, LONG, generator).to(dtype)[None]
    for k in (0, 1, LONG // 2, LONG - 1, LONG):
        assert int(agree(values, k, score="abs" if k == LONG // 2 else "value").sum()) == k


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_equals_the_reference(data):
    kinds = st.sampled_from(KINDS)
    n, d = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([0, 1, 7, 31, 32, 33, 255, 1024, 1025, 20_000]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    values = torch.stack([scores_like(data.draw(kinds), d, generator) for _ in range(n)])
    score = data.draw(st.sampled_from(SCORES))
    options = {"score": score, "packed": data.draw(st.sampled_from([None, "uint8", "int32"]))}
    if score.endswith("saliency"):
        values = torch.where(values.abs() > 1e30, 1.0, values)  # inf · 0 is NaN
        options["saliency"] = torch.rand(d, generator=generator).round(decimals=data.draw(st.integers(1, 6)))
    values = values.to(data.draw(st.sampled_from(DTYPES)))
    rows = 1 if score == "mean_abs_saliency" else n
    least, most = [0] * rows, [d] * rows
    constraint = data.draw(st.sampled_from(["none", "segments", "sizes", "aside", "pattern"]))
    if constraint == "segments":
        inner = sorted(data.draw(st.lists(st.integers(0, d), max_size=5)))
        borders = [0, *inner, d]
        lengths = [b - a for a, b in itertools.pairwise(borders)]
        floors, caps = [length // 3 for length in lengths], [length - length // 4 for length in lengths]
        options |= {"segments": borders, "min_keep": floors, "max_keep": caps}
        least, most = [sum(floors)] * rows, [sum(caps)] * rows
    elif constraint == "sizes":
        options["sizes"] = torch.randint(1, 9, (d,), generator=generator)
        most = [6 * d] * rows
    elif constraint == "aside":
        place = torch.rand(rows, d, generator=generator)
        place = place[0] if score == "mean_abs_saliency" else place
        options |= {"protected": place < 0.1, "removed": place > 0.8}
        least, most = (place < 0.1).sum(-1).view(rows).tolist(), (place <= 0.8).sum(-1).view(rows).tolist()
    elif constraint == "pattern" and d % 8 == 0:
        options["pattern"] = data.draw(st.sampled_from([(2, 4), (1, 8), (4, 4), (3, 8)]))
        most = [d * options["pattern"][0] // options["pattern"][1]] * rows
    agree(values, [data.draw(st.integers(low, high)) for low, high in zip(least, most, strict=True)], **options)


def test_a_list_equals_its_concatenation():
    generator = torch.Generator().manual_seed(3)
    shapes = [(90, 70), (5,), (0,), (20_000,), (7, 3, 3), (2, 0, 4), (), (2_001,)]
    flat = scores_like("few", sum(torch.Size(s).numel() for s in shapes), generator)
    flat += (torch.rand(flat.shape, generator=generator) < 0.5) * torch.randn(flat.shape, generator=generator)
    saliency = torch.rand(flat.shape, generator=generator)
    lengths = [torch.Size(s).numel() for s in shapes]

    def as_list(vector):
        return [part.reshape(s) for part, s in zip(vector.split(lengths), shapes, strict=True)]

    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    caps = [max(length // 2, 1) for length in lengths]
    for k in (0, 5000, 14_000):
        for extra, list_extra in [
            ({}, {}),
            ({"score": "abs_saliency", "saliency": saliency}, {"score": "abs_saliency", "saliency": as_list(saliency)}),
            ({"segments": borders, "max_keep": caps}, {"segments": "tensors", "max_keep": caps}),
            ({"removed": saliency > 0.9}, {"removed": as_list(saliency > 0.9)}),
            ({"sizes": torch.full(flat.shape, 2)}, {"sizes": as_list(torch.full(flat.shape, 2))}),
        ]:
            masks = agree(as_list(flat), k, **list_extra)
            assert torch.equal(torch.cat([m.flatten() for m in masks]), agree(flat, k, **extra))
    packed = agree(as_list(flat), 14_000, packed="int32")
    assert [p.shape for p in packed] == [(90, 3), (1,), (0,), (625,), (7, 3, 1), (2, 0, 1), (1,), (63,)]
    spread = torch.randn(40, 60, generator=generator).t()  # not contiguous: its flat order is the logical one
    assert torch.equal(agree([spread], 600)[0], agree(spread.flatten(), 600).view(60, 40))


@pytest.mark.parametrize(("packed", "width"), [("uint8", 8), ("int32", 32)])
def test_packed_bits(packed, width):
    generator = torch.Generator().manual_seed(4)
    for d in (1, 8, 31, 32, 33, 1000, 3000):
        values = torch.randn(2, d, generator=generator)
        mask = topk_mask(values, d // 2)
        bits = agree(values, d // 2, packed=packed)
        assert bits.shape == (2, -(-d // width))
        for row in range(2):
            words = [int(word) % 2**width for word in bits[row]]
            unpacked = [(words[e // width] >> e % width) & 1 for e in range(len(words) * width)]
            assert unpacked == mask[row].int().tolist() + [0] * (len(words) * width - d)


def test_rows_in_poisoned_memory():
    for dtype in DTYPES:
        for d in (1, 17, 1023, 20_000):
            poison = torch.full((5, 2 * d + 3), NAN, dtype=dtype)
            values = torch.randn(3, d).to(dtype)
            rows = poison[1:4, 2 : 2 + d]
            rows.copy_(values)
            saliency = torch.rand(d)
            for options in ({}, {"score": "mean_abs_saliency", "saliency": saliency}, {"packed": "int32"}):
                assert torch.equal(agree(rows, d // 3, **options), agree(values, d // 3, **options))


def test_no_guess_changes_the_result():
    generator = torch.Generator().manual_seed(5)
    for kind in KINDS:
        values = scores_like(kind, LONG, generator)[None]
        for k in (1, LONG // 7, LONG - 1):
            exact = topk_threshold(values, k, backend="reference")
            right = float(exact.threshold)
            for guess in (right, right * 1.02, right * 2, -right, 0.0, INF, -INF, NAN, 1e-45, 3.4e38, -3.4e38):
                ours = topk_threshold(values, k, guess=torch.tensor([guess]), backend="cpp")
                assert torch.equal(ours.threshold, exact.threshold), (kind, k, guess)
                assert torch.equal(ours.tie_end, exact.tie_end), (kind, k, guess)
            assert torch.equal(topk_mask(values, k, guess=exact), topk_mask(values, k, backend="reference"))
    segments = [0, 100, 30_000, LONG]
    first = topk_threshold(values, 9000, segments=segments, min_keep=100)
    agree(values, 9000, segments=segments, min_keep=100, guess=Cut(first.threshold * 1.01, first.tie_end))


def test_misleading_samples():
    """What a sample cannot see: rare values, and many equal ones next to the cut."""
    for rare in (1, 3, 100):
        values = torch.zeros(LONG)
        values[torch.arange(rare) * 97 + 13] = torch.arange(1.0, rare + 1)
        for k in (1, rare, rare + 1, LONG - 1):
            agree(values, k)
            agree(-values, k)
    two = (torch.arange(LONG) % 2).float()
    for k in (LONG // 2 - 1, LONG // 2, LONG // 2 + 1):
        agree(two, k)
    close = 1.0 + (torch.arange(LONG) % 3) * 2.0**-23  # three neighbouring floats
    for k in (LONG // 3, LONG // 3 + 1, LONG // 2):
        agree(close, k)
    half_spread = torch.where(torch.arange(LONG) % 2 == 0, 0.5, torch.rand(LONG))
    for k in (LONG // 4, LONG // 4 + 5, LONG // 2, 3 * LONG // 4 + 9):
        agree(half_spread, k)


@pytest.mark.slow
def test_more_than_two_to_the_31_coordinates():
    """4.3 GB of fp16: flat indices and counts need 64 bits."""
    d = 2**31 + 5000
    values = torch.zeros(d, dtype=torch.float16)
    places = torch.tensor([3, 2**31 - 1, 2**31, 2**31 + 7, d - 1])
    values[places] = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0], dtype=torch.float16)
    golden = [
        (1, 3.0, d),
        (3, 2.0, 2**31 + 1),  # a tie is cut behind 2³¹
        (4, 2.0, d),
        (5, 1.0, d),
        (6, 0.0, 1),
        (2**31 + 100, 0.0, 2**31 + 99),  # zeros kept: 2³¹ + 95, four others among the first 2³¹ + 99
        (d - 1, 0.0, d - 2),
        (d, -INF, d),
    ]
    for k, threshold, tie_end in golden:
        cut = topk_threshold(values, k, backend="cpp")
        assert (cut.threshold.item(), cut.tie_end.item()) == (threshold, tie_end), k
    (mask,) = topk_mask([values], 3, backend="cpp", packed="uint8")
    assert mask.nonzero().flatten().tolist() == [(2**31 - 1) // 8, 2**31 // 8, (d - 1) // 8]
    assert mask[[(2**31 - 1) // 8, 2**31 // 8, (d - 1) // 8]].tolist() == [128, 1, 1 << (d - 1) % 8]


def fingerprint():
    """One number for many selections on the C++ backend."""
    generator = torch.Generator().manual_seed(6)
    total = 0
    for kind in KINDS:
        for dtype in DTYPES:
            values = torch.stack([scores_like(kind, LONG, generator) for _ in range(2)]).to(dtype)
            values = torch.where(values.abs() > 1e4, 1.0, values)
            saliency = torch.rand(LONG, generator=generator)
            for score in SCORES:
                options = {"score": score, "saliency": saliency} if score.endswith("saliency") else {"score": score}
                words = topk_mask(values, LONG // 3, packed="int32", backend="cpp", **options).to(torch.int64)
                places = torch.arange(1, words.numel() + 1).view(words.shape)
                total = (total * 31 + int((words * places).sum())) % (2**61 - 1)
    return total


def test_the_number_of_threads_changes_nothing(threads):
    prints = set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        prints.add(fingerprint())
    assert len(prints) == 1


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_the_instruction_set_changes_nothing(isa):
    """The set is chosen once per process; here and elsewhere, the reference agrees with the widest one."""
    program = "from tests.test_selection_backends import fingerprint; print(fingerprint())"
    assert int(python(program, SFPK_CPU_ISA=isa)) == fingerprint()


def bits(x):
    return torch.tensor([x], dtype=torch.float32).view(torch.int32).item() % 2**32


def test_keys_keep_the_order_of_scores():
    module = _extension.load()
    scores = [-INF, -3.4e38, -1.0, -1e-38, -1e-45, 0.0, 1e-45, 1e-38, 0.5, 1.0, 3.4e38, INF]
    keys = [module.selection_key(x) for x in scores]
    assert keys == sorted(set(keys))
    assert module.selection_key(-0.0) == module.selection_key(0.0) == 0
    for score, key in zip(scores, keys, strict=True):
        assert bits(module.selection_score(key)) == bits(score)
        assert not module.selection_is_nan_key(key)
        if score > 0:
            assert module.selection_magnitude_key(bits(-score)) == key
    assert module.selection_is_nan_key(module.selection_key(NAN))
    assert module.selection_is_nan_key(module.selection_key(-NAN))


def test_bins_reach_single_keys_in_three_rounds():
    module = _extension.load()
    for key in (-(2**31), -1, 0, 1, 0x3F800000, 2**31 - 1):
        low, high, shifts = -(2**31), 2**31 - 1, []
        while low < high:
            shift = module.selection_bin_shift(low, high)
            shifts.append(shift)
            assert module.selection_key_bin(low, low, shift) == 0
            assert module.selection_key_bin(high, low, shift) < 2048
            begin = low + (module.selection_key_bin(key, low, shift) << shift)
            low, high = begin, min(high, begin + (1 << shift) - 1)
        assert low == high == key
        assert shifts == [21, 10, 0]


def test_the_tie_rule():
    kept = _extension.load().selection_is_kept
    assert kept(5, 2**40, 4, 0)
    assert kept(4, 2**40 - 1, 4, 2**40)
    assert not kept(4, 2**40, 4, 2**40)
    assert not kept(3, 0, 4, 2**40)
