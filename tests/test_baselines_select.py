"""From scores to masks: global, per tensor, Erdős-Rényi-Kernel, LAMP, N:M; magnitude and random by each."""

import pytest
import torch
from torch import nn

from sfpk_kernels import Coordinates, baselines
from sfpk_kernels.baselines.select import ALLOCATIONS, allocated, erk, lamp, select

from .snapshot import Snapshot


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.913, 0.99])
def test_counts_are_exact(convnet, allocation, sparsity):
    d = Coordinates(convnet).d
    assert baselines.magnitude(convnet, sparsity, allocation=allocation).kept == round((1 - sparsity) * d)


def test_uniform_gives_every_tensor_the_same_fraction(convnet):
    masks = baselines.magnitude(convnet, 0.7, allocation="uniform")
    for name, density in masks.layer_densities().items():
        weight = convnet.get_parameter(name)
        assert abs(density - 0.3) < 1 / weight.numel(), name
        assert weight[masks[name]].abs().min() >= weight[~masks[name]].abs().max(), name


def test_remainders_go_to_the_largest_and_then_to_the_earlier_tensor():
    # 3 tensors of 3, 3 and 4: 5 of 10 kept are shares of 1.5, 1.5 and 2.
    model = nn.Sequential(*(nn.Linear(width, 1, bias=False) for width in (3, 3, 4)))
    assert allocated(Coordinates(model), 0.5, "uniform") == [2, 1, 2]
    # 3 of 10: shares of 0.9, 0.9 and 1.2.
    assert allocated(Coordinates(model), 0.7, "uniform") == [1, 1, 1]


def test_erk_densities_by_the_formula():
    shapes = [(16, 3, 3, 3), (32, 16, 3, 3), (10, 512)]  # Σ shape 25, 54, 522; Π shape 432, 4608, 5120
    kept = erk(shapes, 600)
    factor = 600 / (25 + 54 + 522)
    assert kept == pytest.approx([25 * factor, 54 * factor, 522 * factor])
    # With more, the last one would pass density 1: it is dense, and the others share what is left.
    assert erk(shapes, 6000) == pytest.approx([25 * 880 / 79, 54 * 880 / 79, 5120])
    # With still more, the first one would then.
    assert erk(shapes, 8000) == pytest.approx([432, 8000 - 432 - 5120, 5120])
    assert erk(shapes, 432 + 4608 + 5120) == [432, 4608, 5120]


def test_lamp_by_hand():
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0, 3.0]]))
        model[1].weight.copy_(torch.tensor([[0.1], [0.2]]))
    coordinates = Coordinates(model)
    score = lamp(coordinates, coordinates.flatten(model).abs())
    # Squares 1, 4, 9: 1/14, 4/13, 9/9. Squares .01, .04: .01/.05, .04/.04.
    torch.testing.assert_close(score, torch.tensor([1 / 14, 4 / 13, 1.0, 0.2, 1.0], dtype=torch.float64))
    masks = baselines.magnitude(model, 0.4, allocation="lamp")
    assert masks.flat().tolist() == [False, True, True, False, True]
    assert baselines.magnitude(model, 0.4).flat().tolist() == [True, True, True, False, False]


def test_lamp_of_equal_and_of_zero_scores():
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(2, 1, bias=False))
    score = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])
    assert lamp(Coordinates(model), score).tolist() == pytest.approx([1.0, 1 / 2, 1 / 3, 0.0, 0.0])


def test_patterns_keep_the_best_of_every_group_along_the_inputs():
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(12, 4))
    masks = baselines.magnitude(model, 0.5, pattern=(2, 4))
    for name in masks:
        along = model.get_parameter(name).detach().abs().movedim(1, -1)
        groups, kept = along.reshape(-1, 4), masks[name].movedim(1, -1).reshape(-1, 4)
        assert (kept.sum(1) == 2).all()
        expected = torch.zeros_like(kept).scatter_(1, groups.topk(2, dim=1).indices, True)
        assert torch.equal(kept, expected)
    assert baselines.magnitude(model, 0.75, pattern=(1, 4)).kept == masks.kept // 2


def test_random_masks_repeat_and_are_uniform(mlp):
    before = torch.get_rng_state()
    masks = baselines.random(mlp, 0.7, seed=3)
    assert masks == baselines.random(mlp, 0.7, seed=3)
    assert masks != baselines.random(mlp, 0.7, seed=4)
    assert masks.kept == round(0.3 * 144)
    assert torch.equal(torch.get_rng_state(), before)
    times = sum(baselines.random(mlp, 0.7, seed=seed).flat().int() for seed in range(400))
    # Each is kept 400 · 43/144 = 119.4 times, ± 9.1: five standard deviations are seen in no run of 144.
    assert times.min() > 74
    assert times.max() < 165
    counts = allocated(Coordinates(mlp), 0.7, "erk")
    assert [int(mask.sum()) for mask in map(baselines.random(mlp, 0.7, allocation="erk").__getitem__, masks)] == counts


def test_the_model_is_not_changed(convnet):
    snapshot = Snapshot(convnet)
    for allocation in ALLOCATIONS:
        baselines.magnitude(convnet, 0.8, allocation=allocation)
    baselines.random(convnet, 0.8)
    snapshot.check()


def test_bad_input_is_named(mlp, convnet):
    coordinates = Coordinates(mlp)
    with pytest.raises(ValueError, match="allocation: wanted one of global, uniform, erk, lamp, got 'best'"):
        baselines.magnitude(mlp, 0.5, allocation="best")
    with pytest.raises(ValueError, match="allocation: wanted one of global, uniform, erk, got 'lamp'"):
        baselines.random(mlp, 0.5, allocation="lamp")
    with pytest.raises(ValueError, match="allocation: wanted scores ≥ 0 with 'lamp'"):
        select(coordinates, -torch.ones(144), 0.5, "lamp")
    with pytest.raises(ValueError, match="sparsity: wanted one that keeps at least one of 144 weights"):
        select(coordinates, torch.ones(144), 0.9999, "erk")
    with pytest.raises(ValueError, match=r"sparsity: wanted 0.5, that of pattern=\(2, 4\), got 0.7"):
        baselines.magnitude(mlp, 0.7, pattern=(2, 4))
    with pytest.raises(ValueError, match="allocation: wanted 'global' with a pattern"):
        baselines.magnitude(mlp, 0.5, pattern=(2, 4), allocation="erk")
    with pytest.raises(ValueError, match=r"a multiple of 4 inputs, got 0.weight of shape \(6, 2, 3, 3\)"):
        baselines.magnitude(convnet, 0.5, pattern=(2, 4))
    for pattern in ((4, 2), (0, 4), (2.0, 4), "24", 4):
        with pytest.raises(ValueError, match="pattern: wanted None or integers"):
            baselines.magnitude(mlp, 0.5, pattern=pattern)
