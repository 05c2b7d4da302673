"""Batch-norm re-estimation."""

import collections

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


def flat():
    """Two batch-norm layers over vectors: one sample has no variance in the second, nor in the first."""
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5),
        nn.Linear(5, 4),
    )  # fmt: skip


def statistics(model):
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("where", [0, 1, -1], ids=["first", "second", "last"])
@pytest.mark.parametrize("samples", [1, 0])
def test_a_batch_without_variance_is_left_out(images, where, samples, caplog):
    model = flat()
    recalibrate_batchnorm(model, images)
    expected = statistics(model)
    batches = list(images)
    batches.insert(len(batches) if where < 0 else where, (torch.randn(samples, 2, 6, 6), torch.randint(4, (samples,))))
    again = flat()
    again.load_state_dict(model.state_dict())
    assert recalibrate_batchnorm(again, batches) is again
    assert all(torch.equal(value, expected[name]) for name, value in statistics(again).items()), "not in any layer"
    assert again[1].num_batches_tracked == len(images)
    words = "recalibrate_batchnorm: 1 of 11 batches left out"
    assert [words in record.getMessage() for record in caplog.records] == [True]


def test_a_loader_whose_last_batch_is_one_sample():
    data = torch.utils.data.TensorDataset(torch.randn(33, 2, 6, 6), torch.randint(4, (33,)))
    model = flat()
    recalibrate_batchnorm(model, torch.utils.data.DataLoader(data, 8))
    assert model[5].num_batches_tracked == 4


def test_one_sample_of_many_pixels_has_a_variance(convnet, images):
    recalibrate_batchnorm(convnet, [*images, (torch.randn(1, 2, 6, 6), None)])
    assert convnet[1].num_batches_tracked == 11


def test_nothing_but_single_samples(images):
    model = flat()
    before = statistics(model)
    with pytest.raises(
        ValueError, match="wanted batches of more than one sample.* got 3 without: pass a larger batch_size"
    ):
        recalibrate_batchnorm(model, [(x[:1], y[:1]) for x, y in images[:3]])
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())


def test_other_errors_pass_through(images):
    model = flat()
    before = statistics(model)

    def broken(model, batch):
        model(batch[0])
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        recalibrate_batchnorm(model, images, forward_fn=broken)
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(2)

    def forward(self, pixels):
        return self.bn(pixels)


Pair = collections.namedtuple("Pair", "x y")

SHAPES = {
    "tensors": lambda x, y: x,
    "tuples": lambda x, y: (x, y),
    "lists": lambda x, y: [x, y],
    "named tuples": lambda x, y: Pair(x, y),
    "more than two": lambda x, y: (x, y, y),
    "one in a tuple": lambda x, y: (x,),
    "labels that are no tensors": lambda x, y: (x, y.tolist()),
    "dicts": lambda x, y: {"pixels": x},
    "ordered dicts": lambda x, y: collections.OrderedDict(pixels=x),
    "other mappings": lambda x, y: collections.UserDict(pixels=x),
    "dicts and labels": lambda x, y: ({"pixels": x}, y),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_batches_of_every_shape(images, shape):
    expected = recalibrate_batchnorm(Named(), images)
    model = recalibrate_batchnorm(Named(), (shape(x, y) for x, y in images))
    assert torch.equal(model.bn.running_mean, expected.bn.running_mean)
    assert torch.equal(model.bn.running_var, expected.bn.running_var)


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (torch.randn(4, 2, 6, 6), r"got a Tensor: put a single batch in a list, \[batch\]"),
        ({"pixels": torch.randn(4, 2, 6, 6)}, r"got a dict: put a single batch in a list"),
        (torch.utils.data.TensorDataset(torch.randn(4, 2, 6, 6)), "got the dataset TensorDataset: pass DataLoader"),
        (3, "got int"),
    ],
)
def test_what_is_no_loader(loader, words):
    model = Named()
    before = statistics(model)
    with pytest.raises(TypeError, match=f"^loader: wanted an iterable of batches, {words}"):
        recalibrate_batchnorm(model, loader)
    assert all(torch.equal(value, before[name]) for name, value in statistics(model).items())
    with pytest.raises(TypeError, match=r"pass forward_fn\(model, batch\)"):
        recalibrate_batchnorm(model, [((torch.randn(2, 2, 6, 6), 1), 2)])


def test_modes_are_switched_without_train_and_eval(images):
    class Merging(nn.Linear):
        """An adapter that changes its weight where its mode changes."""

        def train(self, mode=True):
            self.weight.data.add_(1 if mode else -1)
            return super().train(mode)

    model = nn.Sequential(nn.Flatten(), Merging(72, 4), nn.BatchNorm1d(4))
    weight = model[1].weight.detach().clone()
    recalibrate_batchnorm(model, images)
    assert torch.equal(model[1].weight.detach(), weight)
    assert all(module.training for module in model.modules())
