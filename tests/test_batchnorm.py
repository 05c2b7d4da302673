"""Batch-norm re-estimation."""

import pytest
import torch
from torch import nn

from sfpk_kernels import recalibrate_batchnorm


def test_statistics_are_the_average_over_the_loader(convnet, images):
    convnet.train()
    convnet[4].eval()
    modes = [m.training for m in convnet.modules()]
    momentum = convnet[1].momentum
    assert recalibrate_batchnorm(convnet, images) is convnet
    first = [convnet[0](x) for x, _ in images]
    mean = torch.stack([y.mean((0, 2, 3)) for y in first]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in first]).mean(0)
    torch.testing.assert_close(convnet[1].running_mean, mean)
    torch.testing.assert_close(convnet[1].running_var, var)
    assert convnet[1].num_batches_tracked == 10
    assert [m.training for m in convnet.modules()] == modes
    assert convnet[1].momentum == momentum


def test_max_batches_and_dict_batches(images):
    class Dict(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(2)

        def forward(self, pixels, labels=None):
            return self.bn(pixels)

    model = Dict()
    recalibrate_batchnorm(model, [{"pixels": x, "labels": y} for x, y in images], max_batches=3)
    assert model.bn.num_batches_tracked == 3
    torch.testing.assert_close(model.bn.running_mean, torch.stack([x.mean((0, 2, 3)) for x, _ in images[:3]]).mean(0))


def test_an_error_leaves_the_statistics(convnet, images):
    before = {name: value.clone() for name, value in convnet.state_dict().items()}
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(convnet, [*images[:2], (torch.randn(4, 3, 6, 6), None)])
    with pytest.raises(ValueError, match="loader: wanted batches"):
        recalibrate_batchnorm(convnet, [])
    with pytest.raises(ValueError, match="max_batches"):
        recalibrate_batchnorm(convnet, images, max_batches=0)
    with pytest.raises(TypeError, match="batch: wanted a tensor, a tuple"):
        recalibrate_batchnorm(convnet, ["text"])
    for name, value in convnet.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not convnet.training


def test_a_model_without_batchnorm_is_left_alone(mlp):
    assert recalibrate_batchnorm(mlp, []) is mlp
