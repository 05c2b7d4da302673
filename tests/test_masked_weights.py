"""θ ⊙ mask: values, dtypes, buffers, gradient, bad input."""

import pytest
import torch

from sfpk_kernels.ops import masked_weights


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
