"""The CUDA kernels: compiled for sm_80 and sm_90 without a GPU, and run on the CPU block by block."""

import re
import shutil
import subprocess
import sysconfig

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from sfpk_kernels import _build
from sfpk_kernels.ops import Blocks, Cut, mask_gradient, masked_weights, pack_mask, topk_mask, topk_threshold
from sfpk_kernels.ops.codes import ENTRY_SCORES, SCORES, MaskKind, score_code

from .emulated import KINDS, ROOT, library, long, mask_gradient_, masked_weights_, pointer
from .sparse import sparse

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_warnings_and_spills(source, architecture, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    flags = _build.cuda_flags()
    done = subprocess.run(
        ["nvcc", "-c", *flags, f"-I{ROOT / 'csrc'}",
         "-gencode", f"arch=compute_{architecture},code=sm_{architecture}", "-Xptxas", "-v", "-Werror", "all-warnings",
         str(source), "-o", str(tmp_path / "kernels.o")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills
    assert set(spills) == {("0", "0")}, done.stderr


@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cpp")), ids=lambda path: path.stem)
def test_the_ops_compile_without_warnings(source, tmp_path):
    """Against this torch's headers, whether it has CUDA or not."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    folders = [ROOT / "csrc", *include_paths(), sysconfig.get_paths()["include"]]
    done = subprocess.run(
        ["nvcc", "-c", "-Xcompiler", ",".join([*_build.cpp_flags(True), "-Werror"]),
         *(f"-I{folder}" for folder in folders), str(source), "-o", str(tmp_path / "op.o")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return library(tmp_path_factory.mktemp("emulated"))


def select(
    kernels, values, k, *, score="value", saliency=None, excluded=None, always=None, guess=None, unit=0, counts=None
):
    """Cut and mask; `counts` splits one row into the tensors of a list."""
    n, d = values.shape
    mean = score == "mean_abs_saliency"
    problems = 1 if mean else n
    wanted, counts = torch.tensor(k), torch.tensor(counts or [d])  # held: the kernels get their addresses
    free = torch.full((problems,), d) if excluded is None else (excluded == 0).sum(dim=1)
    cut = Cut(torch.full((problems, 1), -7.0), torch.full((problems, 1), -7))
    columns = {0: 0, 1: d, 8: -(-d // 8), 32: -(-d // 32)}[unit]
    mask = torch.full((problems, columns), 77, dtype=torch.int32 if unit == 32 else torch.uint8)
    kernels.emulated_select(
        pointer(values), KINDS[values.dtype], score_code(score), long(n if mean else 1), long(values.stride(0)),
        long(problems), long(len(counts)), pointer(counts), pointer(saliency), pointer(excluded), pointer(always),
        pointer(wanted), pointer(free), pointer(guess), unit, pointer(mask),
        long(mask.stride(0) * mask.element_size()), pointer(cut.threshold), pointer(cut.tie_end),
    )  # fmt: skip
    return cut, mask


def same(a, b):
    return torch.equal(a.threshold, b.threshold) and torch.equal(a.tie_end, b.tie_end)


def scores_like(kind, n, d):
    generator = torch.Generator().manual_seed(d)
    if kind == "few":
        return torch.randint(-2, 3, (n, d), generator=generator).float()
    if kind == "equal":
        return torch.full((n, d), 0.5)
    values = torch.randn(n, d, generator=generator)
    if kind == "special":
        values[:, ::3] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-42])[torch.arange(0, d, 3) % 5]
    return values.to({"bf16": torch.bfloat16, "half": torch.float16}.get(kind, torch.float32))


@pytest.mark.parametrize("d", [1, 255, 4097, 50_001])
@pytest.mark.parametrize("kind", ["normal", "few", "equal", "special", "bf16", "half"])
def test_selection(kernels, kind, d):
    values = scores_like(kind, 3, d)
    k = [0, d // 3, d]
    for unit, packing in ((1, None), (8, "uint8"), (32, "int32")):
        cut, mask = select(kernels, values, k, unit=unit)
        assert same(cut, topk_threshold(values, k))
        expected = topk_mask(values, k, packed=packing)
        assert torch.equal(mask.bool() if unit == 1 else mask, expected)


@pytest.mark.parametrize("score", SCORES[1:])
def test_fused_scores(kernels, score):
    values, saliency = torch.randn(4, 20_000), torch.rand(20_000)
    options = {"score": score, "saliency": saliency if "saliency" in score else None}
    k = [7000] if score.startswith("mean") else [0, 10, 7000, 19_999]
    cut, _ = select(kernels, values, k, **options)
    assert same(cut, topk_threshold(values, k if len(k) > 1 else k[0], **options))


@pytest.mark.parametrize("kind", ["normal", "few", "special"])
def test_any_guess_gives_the_same(kernels, kind):
    values = scores_like(kind, 3, 40_000)
    k = [400, 20_000, 39_000]
    right = topk_threshold(values, k)
    finite = right.threshold.nan_to_num(1.0, 1.0, -1.0)
    for factor, offset in ((1.0, 0.0), (1.02, 0.0), (0.5, 0.0), (1.0, 3.0), (1.0, -3.0), (0.0, 0.0), (1e30, 0.0)):
        cut, _ = select(kernels, values, k, guess=(finite * factor + offset).contiguous())
        assert same(cut, right), (factor, offset)


def test_ties_over_chunks_and_lists(kernels):
    values = scores_like("few", 1, 70_000)
    counts = [1, 20_000, 16_384, 3, 33_612]
    parts = list(values[0].split(counts))
    for k in (1, 13_999, 14_000, 30_000, 69_999):
        cut, mask = select(kernels, values, [k], counts=counts, unit=1)
        assert same(cut, topk_threshold(parts, k))
        assert torch.equal(mask[0].bool(), topk_mask(values[0], k))


def test_protected_removed_and_nan(kernels):
    values = scores_like("few", 3, 5000)
    place = torch.rand(3, 5000)
    protected, removed = place < 0.1, place > 0.7
    k = [600, 2000, 2500]
    left = [wanted - int(row.sum()) for wanted, row in zip(k, protected, strict=True)]
    aside = (protected | removed).to(torch.uint8)
    _, mask = select(kernels, values, left, excluded=aside, always=protected.to(torch.uint8), unit=1)
    assert torch.equal(mask.bool(), topk_mask(values, k, protected=protected, removed=removed))
    values[1, 77] = float("nan")
    cut, mask = select(kernels, values, [5000, 3, 10], unit=1)
    assert cut.threshold[1].isnan().all()
    assert mask.sum(dim=1).tolist() == [5000, 0, 10]


LAYOUTS = [Blocks(1, 3000, 1), Blocks(1, 50, 9), Blocks(7, 30, 1), Blocks(3, 40, 25)]


def apply(kernels, theta, values, blocks, out_dtype, *, score="value", **options):
    out = torch.full((values.shape[0], theta.numel() + 3), -7.0).to(out_dtype)
    masked_weights_(kernels, theta, values, blocks, out, score=score_code(score), **options)
    assert (out[:, theta.numel() :] == -7).all()
    return out[:, : theta.numel()]


@pytest.mark.parametrize("blocks", LAYOUTS)
@pytest.mark.parametrize("dtype", list(KINDS))
def test_masked_weights(kernels, blocks, dtype):
    d, theta = blocks.groups, torch.randn(blocks.numel).to(dtype)
    values, saliency = torch.randint(-4, 5, (3, d)).float(), torch.rand(d)
    mask = values > 1
    expected = masked_weights(theta, mask, layout=blocks, backend="reference")
    assert torch.equal(apply(kernels, theta, mask, blocks, dtype, kind=MaskKind.BOOL), expected)
    for packing, bits in (("uint8", 8), ("int32", 32)):
        assert torch.equal(
            apply(kernels, theta, pack_mask(mask, packing), blocks, dtype, kind=MaskKind.PACKED, bits=bits), expected
        )
    for out_dtype in KINDS:
        factors = values.to(dtype)
        product = masked_weights(theta, factors, layout=blocks, dtype=out_dtype, backend="reference")
        assert torch.equal(apply(kernels, theta, factors, blocks, out_dtype, kind=MaskKind.FACTORS), product)
    borders = [0, d // 3, d // 2, d]
    for score in ENTRY_SCORES:
        options = {"score": score, "saliency": saliency if "saliency" in score else None, "segments": borders}
        cut = topk_threshold(values, [0, d // 4, d], **options)
        kept = masked_weights(theta, values, cut=cut, layout=blocks, backend="reference", **options)
        del options["segments"]
        assert torch.equal(
            apply(kernels, theta, values, blocks, dtype, kind=MaskKind.CUT, cut=cut, borders=borders, **options), kept
        )


@pytest.mark.parametrize("blocks", LAYOUTS)
def test_mask_gradient(kernels, blocks):
    theta, grads = torch.randn(blocks.numel), torch.randn(3, blocks.numel)
    out = torch.full((3, blocks.groups + 2), -7.0)
    mask_gradient_(kernels, theta, grads, blocks, out)
    expected = mask_gradient(theta, grads, layout=blocks, backend="reference")
    torch.testing.assert_close(out[:, : blocks.groups], expected, rtol=1e-6, atol=1e-6)
    assert (out[:, blocks.groups :] == -7).all()


HUGE = 2**32 + 5


@pytest.fixture
def window(kernels):
    """The last two blocks of every launch: the whole would take hours."""
    kernels.emulated_window(long(2))
    yield
    kernels.emulated_window(long(0))


def end_of(tensor, values):
    """Values at the end of the last dimension."""
    tensor[..., -values.shape[-1] :] = values
    return tensor


@pytest.mark.parametrize("unit", [1, 8, 32])
def test_selection_behind_32_bits(kernels, window, unit):
    """Counting, ties and masks; indices beyond 2^32."""
    here = torch.tensor([5.0, 3.0, 3.0, 1.0, 3.0, 4.0, 2.0])
    values = end_of(sparse(1, HUGE), here)
    threshold, tie_end = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    mask = sparse(1, -(-HUGE // unit), dtype={1: torch.uint8, 8: torch.uint8, 32: torch.int32}[unit])
    k, free, counts = torch.tensor([4]), torch.tensor([HUGE]), torch.tensor([HUGE])
    kernels.emulated_select(
        pointer(values), 0, 0, long(1), long(HUGE), long(1), long(1), pointer(counts), None, None, None, pointer(k),
        pointer(free), None, unit, pointer(mask), long(mask.stride(0) * mask.element_size()), pointer(threshold),
        pointer(tie_end),
    )  # fmt: skip
    assert float(threshold) == 3.0
    assert int(tie_end) == HUGE - 4, "the second of three ties is the last one kept"
    kept = [HUGE - 7, HUGE - 6, HUGE - 5, HUGE - 2]
    if unit == 1:
        assert mask[0, -7:].tolist() == [1, 1, 1, 0, 0, 1, 0]
    else:
        words = sorted({place // unit for place in kept})
        bits = [sum(1 << place % unit for place in kept if place // unit == word) for word in words]
        assert [int(mask[0, word]) & (2**unit - 1) for word in words] == bits


@pytest.mark.parametrize("kind", ["bool", "packed", "factors", "cut"])
def test_masked_weights_behind_32_bits(kernels, window, kind):
    """Weights, coordinates and rows of the result beyond 2^32 entries."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    theta, out = end_of(sparse(HUGE), weights), sparse(2, HUGE)
    keep = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
    cut, bits, code = (None, None), 0, MaskKind[kind.upper()]
    if kind == "bool":
        values = end_of(sparse(2, HUGE, dtype=torch.uint8), keep.to(torch.uint8))
    elif kind == "packed":
        values, bits = sparse(2, -(-HUGE // 8), dtype=torch.uint8), 8
        for row in range(2):
            for place, kept in zip(range(HUGE - 4, HUGE), keep[row], strict=True):
                values[row, place // 8] |= int(kept) << place % 8
    else:
        values = end_of(sparse(2, HUGE), keep)
        cut = (torch.full((2, 1), 0.5), torch.full((2, 1), HUGE))
    blocks = Blocks(1, HUGE, 1)
    masked_weights_(kernels, theta, values, blocks, out, kind=code, bits=bits, cut=cut)
    assert torch.equal(out[:, -4:], keep * weights)


@pytest.mark.parametrize("blocks", [Blocks(1, HUGE, 1), Blocks(2, 2**30, 2)], ids=str)
def test_mask_gradient_behind_32_bits(kernels, window, blocks):
    weights, gradient = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[2.0, 3.0, 4.0], [5.0, 6.0, 7.0]])
    count = blocks.numel
    theta, grads, out = end_of(sparse(count), weights), end_of(sparse(2, count), gradient), sparse(2, blocks.groups)
    mask_gradient_(kernels, theta, grads, blocks, out)
    products = weights * gradient
    if blocks.inner == 1:
        assert torch.equal(out[:, -3:], products)
    else:
        assert torch.equal(out[:, -2:], torch.stack([products[:, 0], products[:, 1:].sum(dim=1)], dim=1))
