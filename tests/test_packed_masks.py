"""Bit-packed masks: both backends against NumPy's packbits; counts and distances against bools."""

import numpy as np
import pytest
import torch

from sfpk_kernels.ops import mask_hamming, mask_iou, pack_mask, popcount, topk_mask, unpack_mask

BACKENDS = ["reference", "cpp"]
SIZES = [1, 7, 8, 9, 31, 32, 33, 1000, 131_071, 300_001]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["uint8", "int32"])
@pytest.mark.parametrize("d", SIZES)
def test_packs_like_numpy_and_back(backend, kind, d):
    mask = torch.rand(3, d) > 0.5
    packed = pack_mask(mask, kind, backend=backend)
    octets = np.packbits(mask.numpy(), axis=1, bitorder="little")
    stored = packed.view(torch.uint8).numpy()
    assert np.array_equal(stored[:, : octets.shape[1]], octets)
    assert not stored[:, octets.shape[1] :].any()
    assert torch.equal(unpack_mask(packed, d, backend=backend), mask)
    assert torch.equal(popcount(packed, backend=backend), mask.sum(dim=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (5,), (0, 5), (2, 0), (2, 3, 10)])
def test_any_shape(backend, shape):
    mask = torch.rand(shape) > 0.5
    packed = pack_mask(mask, backend=backend)
    assert packed.shape[:-1] == mask.shape[:-1]
    assert torch.equal(unpack_mask(packed, shape[-1] if shape else 1, backend=backend).reshape(shape), mask)
    assert torch.equal(popcount(packed, backend=backend), mask.reshape(shape or (1,)).sum(dim=-1))


def test_strided_masks():
    mask = torch.rand(40, 30) > 0.5
    for view in (mask.t(), mask[::2, 1::3], mask[3].expand(4, 30)):
        assert torch.equal(unpack_mask(pack_mask(view, backend="cpp"), view.shape[1], backend="cpp"), view)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["uint8", "int32"])
@pytest.mark.parametrize("d", SIZES)
def test_iou_and_hamming(backend, kind, d):
    a, b = torch.rand(4, d) > 0.3, torch.rand(2, d) > 0.7
    a[0] = b[1] = False
    hamming = torch.tensor([[int((x ^ y).sum()) for y in b] for x in a])
    union = torch.tensor([[int((x | y).sum()) for y in b] for x in a])
    both = torch.tensor([[int((x & y).sum()) for y in b] for x in a])
    packed_a, packed_b = pack_mask(a, kind), pack_mask(b, kind)
    assert torch.equal(mask_hamming(packed_a, packed_b, backend=backend), hamming)
    iou = mask_iou(packed_a, packed_b, backend=backend)
    assert torch.equal(iou, torch.where(union > 0, both.double() / union, 1.0))
    assert iou[0, 1] == 1
    assert torch.equal(mask_iou(packed_a, backend=backend).diagonal(), torch.ones(4, dtype=torch.float64))


def test_counts_what_a_selection_kept():
    packed = topk_mask(torch.randn(3, 1001), [0, 400, 1001], packed="int32")
    assert popcount(packed).tolist() == [0, 400, 1001]


def test_bad_input_is_named():
    packed = torch.zeros(2, 2, dtype=torch.uint8)
    with pytest.raises(TypeError, match="mask: wanted bool"):
        pack_mask(torch.zeros(3))
    with pytest.raises(ValueError, match="kind: wanted one of 'uint8', 'int32'"):
        pack_mask(torch.zeros(3, dtype=torch.bool), "int64")
    with pytest.raises(TypeError, match="packed: wanted uint8 or int32"):
        popcount(torch.zeros(3))
    with pytest.raises(ValueError, match="packed: wanted 1 entries along the last dimension for d = 5"):
        unpack_mask(packed, 5)
    with pytest.raises(ValueError, match=r"a: wanted shape \(n, units\)"):
        mask_iou(packed[0])
    with pytest.raises(TypeError, match="b: wanted torch.uint8 as in a"):
        mask_hamming(packed, packed.int())
    with pytest.raises(ValueError, match="b: wanted shape"):
        mask_hamming(packed, packed[:, :1])
