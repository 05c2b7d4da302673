"""The selection on GPUs (Triton interpreted where there is none): the reference's masks and cuts, bit for bit."""

import pytest
import torch

from sfpk_kernels.ops import topk_mask, topk_threshold
from sfpk_kernels.ops.codes import SCORES
from sfpk_kernels.ops.selection import _device

BACKENDS = ["triton", pytest.param("cuda", marks=pytest.mark.gpu)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def place(value):
    if isinstance(value, list):
        return [place(v) for v in value]
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def both(backend, function, values, k, **options):
    values, options = place(values), {name: place(value) for name, value in options.items()}
    return [function(values, k, backend=backend, **options) for backend in ("reference", backend)]


def scores(kind, d, generator):
    if kind == "few":
        return torch.randint(-2, 3, (3, d), generator=generator).float()
    values = torch.randn(3, d, generator=generator)
    if kind == "special":
        values[:, ::3] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-42])[torch.arange(0, d, 3) % 5]
    return values.half() if kind == "half" else values


@pytest.mark.usefixtures("one_tile")
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("kind", "d"), [("normal", 1), ("normal", 1025), ("special", 1025), ("half", 1025), ("few", 2500)]
)
def test_agrees_with_the_reference(backend, kind, score, d):
    agree_with_the_reference(backend, kind, score, d)


@pytest.mark.parametrize(("kind", "score"), [("few", "value"), ("normal", "mean_abs_saliency")])
def test_agrees_beyond_a_chunk(backend, kind, score):
    agree_with_the_reference(backend, kind, score, 17_000)


def agree_with_the_reference(backend, kind, score, d):
    generator = torch.Generator().manual_seed(d)
    values = scores(kind, d, generator)
    saliency = torch.rand(d, generator=generator) + 0.1 if "saliency" in score else None
    counts = d // 3 if score.startswith("mean") else [0, d // 3, d]
    options = {"score": score, "saliency": saliency}
    reference, ours = both(backend, topk_threshold, values, counts, **options)
    assert torch.equal(reference.threshold, ours.threshold)
    assert torch.equal(reference.tie_end, ours.tie_end)
    packing = {1: None, 1025: "uint8"}.get(d, "int32")
    assert torch.equal(*both(backend, topk_mask, values, counts, packed=packing, **options))


@pytest.mark.usefixtures("one_tile")
def test_protected_and_removed(backend):
    generator = torch.Generator().manual_seed(1)
    values, place = scores("few", 3000, generator), torch.rand(3, 3000, generator=generator)
    for aside in (
        {"protected": place < 0.1},
        {"removed": place[0] > 0.5},
        {"protected": place < 0.1, "removed": place > 0.7},
    ):
        assert torch.equal(*both(backend, topk_mask, values, [400, 500, 1400], **aside))


def agree_on_a_list(backend, longest, counts):
    generator = torch.Generator().manual_seed(2)
    shapes = [(9, 70), (5,), (0,), (longest,), (7, 3, 3), ()]
    values = [torch.randint(-2, 3, s, generator=generator).float() for s in shapes]
    for k in (*counts, sum(v.numel() for v in values)):
        for packed in (None, "uint8"):
            reference, ours = both(backend, topk_mask, values, k, packed=packed)
            assert all(torch.equal(a, b) for a, b in zip(reference, ours, strict=True))
        reference, ours = both(backend, topk_threshold, values, k)
        assert torch.equal(reference.threshold, ours.threshold)
        assert torch.equal(reference.tie_end, ours.tie_end)


@pytest.mark.usefixtures("one_tile")
def test_lists(backend):
    agree_on_a_list(backend, 2100, (0, 3, 700, 1900))


def test_a_list_beyond_a_chunk(backend):
    agree_on_a_list(backend, 17_001, (15_000,))


def test_nan_is_an_error_where_the_host_looks(backend, monkeypatch):
    values = torch.randn(2, 100)
    values[1, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN in row 1"):
        topk_mask(place(values), 10, backend=backend)
    # With k on the device nothing is waited for; the row with the NaN keeps nothing.
    monkeypatch.setattr(_device, "knows_all", lambda problem: True)
    k = torch.tensor([200, 10])
    cut = topk_threshold(place(values), place(k), backend=backend)
    assert cut.threshold[0, 0] == -float("inf")  # clamped to d
    assert cut.threshold[1].isnan().all()
    assert topk_mask(place(values), place(k), backend=backend).sum(dim=1).tolist() == [100, 0]


def test_what_it_does_not_solve_is_named(backend):
    values = place(torch.randn(8))
    with pytest.raises(ValueError, match=f"'{backend}' cannot run here: it does not solve pattern"):
        topk_mask(values, 2, pattern=(2, 4), backend=backend)
    with pytest.raises(ValueError, match="it solves one segment"):
        topk_mask(values, 2, segments=[0, 4, 8], backend=backend)
    with pytest.raises(ValueError, match="these are float64"):
        topk_mask(values.double(), 2, backend=backend)
