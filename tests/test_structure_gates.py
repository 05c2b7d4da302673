"""Gates sit on the consumers' inputs alone: no removed coordinate is cut off from the loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfpk_kernels.structure import find_structure, gate_gradient, gated_call, gated_weights, kept_statistics, shrink

from .snapshot import Snapshot
from .structured_nets import NETS, make

pytest.importorskip("torch_pruning")


def gradients(model, structure, keep, x, target):
    """(per coordinate, the loss) by the gradients of the gated weights."""
    tensors = dict(model.named_parameters())
    gated = {name: w.detach().requires_grad_() for name, w in gated_weights(structure, tensors, keep).items()}
    with kept_statistics(model, structure, keep):
        loss = (torch.func.functional_call(model, gated, (x,)) - target).square().mean()
    found = torch.autograd.grad(loss, list(gated.values()))
    return gate_gradient(structure, tensors, dict(zip(gated, found, strict=True))), float(loss.detach())


@pytest.mark.parametrize("name", NETS)
def test_the_gradient_of_each_coordinate(name):
    """By autograd through the keep values themselves, in fp64; norms keep the statistics of the kept."""
    model, x = make(name)
    model, x = model.double(), x.double()
    structure = find_structure(model, x, check=False)
    target = torch.randn_like(model(x))
    keep = (torch.rand(structure.size) > 0.4).double().requires_grad_()
    (gated_call(model, structure, keep, (x,)) - target).square().mean().backward()
    found, _ = gradients(model, structure, keep.detach(), x, target)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, keep.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NETS)
def test_every_removed_coordinate_can_return(name, monkeypatch):
    """None has a gradient that is always 0, with the statistics of the batch or the running ones."""
    monkeypatch.setattr(F, "relu", lambda x, inplace=False: F.gelu(x))  # no channel is dead of itself
    model, x = make(name)
    structure = find_structure(model, x, check=False)
    for training in (False, True):
        model.train(training)
        moved = torch.zeros(structure.size, dtype=torch.bool)
        for turn in range(6):
            keep = torch.arange(structure.size) % 6 != turn
            x = torch.randn(4, *x.shape[1:])
            gradient, _ = gradients(copy.deepcopy(model), structure, keep, x, torch.zeros(()))
            moved |= (gradient != 0) & ~keep
        assert moved.all(), structure.describe(int((~moved).nonzero()[0]))


def test_a_mask_on_producers_would_cut_them_off():
    """What the gates are for: the same removal by zeroed producers and norms leaves no gradient at all."""
    model, x = make("plain")
    structure = find_structure(model, x)
    keep = torch.arange(structure.size) % 2 == 0
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for entry in structure.entries:
            if entry.role != "gate" and "running" not in entry.tensor:
                masked.get_parameter(entry.tensor).index_fill_(entry.dim, (~keep[entry.index]).nonzero().flatten(), 0)
    torch.testing.assert_close(masked(x), gated_call(model, structure, keep, (x,)))
    masked(x).square().sum().backward()
    producers = {e.tensor: e for e in structure.entries if e.role == "producer"}
    for name, entry in producers.items():
        removed = ~keep[entry.index]
        gradient = masked.get_parameter(name).grad.abs().flatten(1).sum(1)
        assert (gradient[removed] == 0).all()
        assert (gradient[~removed] > 0).any()


def test_norms_use_what_is_kept():
    """A LayerNorm and an RMSNorm over half of their width, by the formula in fp64."""
    model, x = make("mlp")
    model, x = model.double(), x.double()
    structure = find_structure(model, x)
    assert {norm.module for norm in structure.norms} == {"4", "7"}
    keep = torch.rand(structure.size) > 0.5
    y = torch.randn(5, 12, dtype=torch.float64)
    present = keep[16:28]
    with kept_statistics(model, structure, keep):
        found = model[4](y)[:, present]
        rms = model[7](y[:, :10])[:, keep[28:]]
    kept = y[:, present]
    expected = (kept - kept.mean(1, keepdim=True)) / (kept.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(found, expected * model[4].weight[present] + model[4].bias[present])
    other = nn.RMSNorm(int(keep[28:].sum())).double()
    other.weight.data = model[7].weight.data[keep[28:]]
    torch.testing.assert_close(rms, other(y[:, :10][:, keep[28:]]))
    plain = F.layer_norm(y, (12,), model[4].weight, model[4].bias)
    assert torch.equal(model[4](y), plain)  # afterwards it is the norm that it was


def test_the_model_is_as_it_was():
    model, x = make("convnext")
    structure = find_structure(model, x)
    snapshot = Snapshot(model)
    keep = torch.arange(structure.size) % 2 == 0
    before = [set(vars(module)) for module in model.modules()]
    gated_call(model, structure, keep, (x,))

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.head.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        gated_call(model, structure, keep, (x,))
    handle.remove()
    snapshot.check()
    assert [set(vars(module)) for module in model.modules()] == before


def test_a_step_on_the_shrunk_model_is_one_on_the_masked():
    """Gradients of what is left are the same in both."""
    model, x = make("residual")
    model, x = model.double(), x.double()
    structure = find_structure(model, x)
    keep = torch.arange(structure.size) % 3 > 0
    smaller = shrink(model, structure, keep)
    gated_call(model, structure, keep, (x,)).square().sum().backward()
    smaller(x).square().sum().backward()
    torch.testing.assert_close(model.a.weight.grad[keep[8:]][:, keep[:8]], smaller.a.weight.grad)
    torch.testing.assert_close(model.stem.weight.grad[keep[:8]], smaller.stem.weight.grad)
