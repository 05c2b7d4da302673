"""Masks that hold through training."""

import copy
import pickle

import pytest
import torch
from torch import nn

from sfpk_kernels import MaskSet
from sfpk_kernels.baselines import magnitude


def train(model, optimizer, batches, after=lambda: None):
    for x, y in batches:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        after()


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, 0.1, max_iter=2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_removed_weights_are_zero_after_every_step(mlp, vectors, make):
    mask = magnitude(mlp, None, None, 0.6)
    optimizer = make(mlp.parameters())
    identities = [id(p) for p in mlp.parameters()]
    handle = mask.enforce(optimizer, mlp)
    assert MaskSet.from_model(mlp) == mask, "at once"
    seen = []
    train(mlp, optimizer, vectors, lambda: seen.append(MaskSet.from_model(mlp) == mask))
    assert seen == [True] * 10
    assert [id(p) for p in mlp.parameters()] == identities
    assert handle.active
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in mlp.modules())
    handle.remove()
    handle.remove()
    assert not handle.active
    train(mlp, optimizer, vectors[:3])
    assert MaskSet.from_model(mlp).kept > mask.kept, "no longer enforced: the test above means something"


def test_kept_weights_learn_as_without_masks_on_them(mlp, vectors):
    """One SGD step: the kept weights move exactly as the masked model's gradient says."""
    mask = magnitude(mlp, None, None, 0.6)
    plain = mask.apply_(copy.deepcopy(mlp))
    optimizer = torch.optim.SGD(mlp.parameters(), 0.1)
    with mask.enforce(optimizer, mlp) as handle:
        train(mlp, optimizer, vectors[:1])
    assert not handle.active
    train(plain, torch.optim.SGD(plain.parameters(), 0.1), vectors[:1])
    for name in mask:
        kept = mask[name]
        assert torch.equal(mlp.get_parameter(name)[kept], plain.get_parameter(name)[kept])


def test_several_groups_and_names_from_the_optimizer(mlp, vectors):
    mask = magnitude(mlp, None, None, 0.6)
    names = dict(mlp.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in names.items() if n.startswith("0")]},
        {"params": [(n, p) for n, p in names.items() if n.startswith("2")], "lr": 0.5},
    ]
    optimizer = torch.optim.SGD(groups, 0.1)
    with mask.enforce(optimizer) as handle:
        assert len(handle) == 2
        train(mlp, optimizer, vectors)
    assert MaskSet.from_model(mlp) == mask


def test_weights_loaded_in_between(mlp, vectors):
    mask = magnitude(mlp, None, None, 0.6)
    dense = copy.deepcopy(mlp.state_dict())
    optimizer = torch.optim.SGD(mlp.parameters(), 0.1)
    with mask.enforce(optimizer, mlp) as handle:
        mlp.load_state_dict(dense)
        assert MaskSet.from_model(mlp) != mask
        handle.apply_()
        assert MaskSet.from_model(mlp) == mask
    state = copy.deepcopy(optimizer).state_dict()
    optimizer.load_state_dict(state)


def test_groups_that_are_added_later(mlp, vectors):
    mask = magnitude(mlp, None, None, 0.6)
    optimizer = torch.optim.SGD(mlp[2].parameters(), 0.1)
    with mask.enforce(optimizer, mlp, strict=False) as handle:
        train(mlp, optimizer, vectors[:2])
        assert len(handle) == 1
        assert (mlp[0].weight != 0).all()
        optimizer.add_param_group({"params": mlp[0].parameters()})
        train(mlp, optimizer, vectors[:2], lambda: MaskSet.from_model(mlp) == mask or pytest.fail("not masked"))
        assert len(handle) == 2
    optimizer = torch.optim.SGD(list(mlp[2].named_parameters(prefix="2")), 0.1)
    with mask.enforce(optimizer, strict=False) as handle:
        wrong = nn.Parameter(torch.ones(3, 8))
        optimizer.add_param_group({"params": [("0.weight", wrong)]})
        wrong.grad = torch.ones(3, 8)
        with pytest.raises(ValueError, match=r"wanted 0.weight in the shape of its mask, \(12, 8\), got \(3, 8\)"):
            optimizer.step()
        assert torch.equal(wrong.detach(), torch.ones(3, 8)), "refused before the step"


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs_optimizes_within_the_masks(vectors, keyword, search):
    """It evaluates its closure many times in a step: as with torch.nn.utils.prune, which masks in the forward pass."""
    x, y = torch.cat([x for x, _ in vectors]), torch.cat([y for _, y in vectors])

    def losses(act):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).double()
        mask = magnitude(model, None, None, 0.6)
        optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=10, line_search_fn=search)
        act(mask, model, optimizer)

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x.double()), y)
            loss.backward()
            return loss

        arguments = ((), {"closure": closure}) if keyword else ((closure,), {})
        return [optimizer.step(*arguments[0], **arguments[1]).item() for _ in range(6)]

    enforced = losses(lambda mask, model, optimizer: mask.enforce(optimizer, model))
    expected = losses(lambda mask, model, _: mask.to_torch_prune(model))
    assert enforced == pytest.approx(expected, rel=1e-6)
    assert enforced[-1] < 0.8 * enforced[0]


def test_gradients_of_removed_weights_do_not_count(mlp, vectors):
    mask = magnitude(mlp, None, None, 0.9)
    optimizer = torch.optim.SGD(mlp.parameters(), 0.1)
    with mask.enforce(optimizer, mlp) as handle:
        handle.mask_gradients_()  # none yet
        nn.functional.cross_entropy(mlp(vectors[0][0]), vectors[0][1]).backward()
        before = {name: parameter.grad.clone() for name, parameter in mlp.named_parameters()}
        handle.mask_gradients_()
    for name, parameter in mlp.named_parameters():
        expected = before[name] * mask[name] if name in mask else before[name]
        assert torch.equal(parameter.grad, expected)


def test_sparse_gradients(vectors):
    model = nn.Embedding(6, 4, sparse=True)
    mask = MaskSet({"weight": torch.rand(6, 4) > 0.5})
    optimizer = torch.optim.SparseAdam(model.parameters(), 0.1)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.tensor([1, 1, 4])).square().sum()
        loss.backward()
        return loss

    with mask.enforce(optimizer, model):
        optimizer.step(closure)
    assert model.weight.grad.is_sparse
    dense = model.weight.grad.to_dense()
    assert torch.equal(dense != 0, mask["weight"] & torch.tensor([0, 1, 0, 0, 1, 0]).bool()[:, None])
    assert bool((model.weight[~mask["weight"]] == 0).all())


def test_wrapped_optimizers(mlp, vectors):
    accelerate = pytest.importorskip("accelerate")
    mask = magnitude(mlp, None, None, 0.6)
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(mlp, torch.optim.AdamW(mlp.parameters(), 0.01))
    with mask.enforce(optimizer, model):
        train(model, optimizer, vectors, lambda: MaskSet.from_model(mlp) == mask or pytest.fail("not masked"))


def test_nothing_is_changed_where_there_are_no_hooks(mlp):
    class Hookless(torch.optim.Optimizer):
        def __init__(self):
            self.param_groups = [{"params": list(mlp.parameters())}]

    before = copy.deepcopy(mlp.state_dict())
    with pytest.raises(TypeError, match=r"optimizer: wanted a torch.optim.Optimizer with step hooks, got Hookless"):
        magnitude(mlp, None, None, 0.6).enforce(Hookless(), mlp)
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


def test_it_cannot_be_copied(mlp, vectors):
    mask = magnitude(mlp, None, None, 0.6)
    optimizer = torch.optim.SGD(mlp.parameters(), 0.1)
    with mask.enforce(optimizer, mlp) as handle:
        for act in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="MaskEnforcer: wanted to stay with its optimizer, got copied"):
                act(handle)
        copy.deepcopy(optimizer)
        train(mlp, optimizer, vectors[:1])
        assert MaskSet.from_model(mlp) == mask


def test_an_optimizer_without_masked_parameters_is_refused(mlp, vectors):
    mask = magnitude(mlp, None, None, 0.6)
    before = copy.deepcopy(mlp.state_dict())
    some = torch.optim.SGD([*mlp[0].parameters()], 0.1)
    with pytest.raises(ValueError, match="wanted one that holds every masked parameter, got one without 2.weight"):
        mask.enforce(some, mlp)
    with pytest.raises(ValueError, match="got one without 0.weight, 2.weight"):
        mask.enforce(torch.optim.SGD(copy.deepcopy(mlp).parameters(), 0.1), mlp)
    with pytest.raises(ValueError, match=r"its parameters have no names: pass the model too"):
        mask.enforce(some)
    other = nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"wanted 0.weight in the shape of its mask, \(12, 8\), got \(3, 8\)"):
        mask.enforce(torch.optim.SGD(other.named_parameters(), 0.1))
    with pytest.raises(ValueError, match="wanted the model these masks were made for"):
        mask.enforce(some, nn.Sequential(mlp[0]))
    with pytest.raises(TypeError, match=r"wanted a torch.optim.Optimizer with step hooks, got list"):
        mask.enforce([], mlp)
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
    with mask.enforce(some, mlp, strict=False) as handle:
        assert len(handle) == 1
        train(mlp, some, vectors[:2])
    assert torch.equal(mlp[0].weight == 0, ~mask["0.weight"])
