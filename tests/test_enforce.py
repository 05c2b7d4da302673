"""Masks that hold through training."""

import copy
import logging
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
    mask = magnitude(mlp, 0.6)
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
    mask = magnitude(mlp, 0.6)
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
    mask = magnitude(mlp, 0.6)
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
    mask = magnitude(mlp, 0.6)
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
    mask = magnitude(mlp, 0.6)
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
        mask = magnitude(model, 0.6)
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
    mask = magnitude(mlp, 0.9)
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
    mask = magnitude(mlp, 0.6)
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(mlp, torch.optim.AdamW(mlp.parameters(), 0.01))
    with mask.enforce(optimizer, model):
        train(model, optimizer, vectors, lambda: MaskSet.from_model(mlp) == mask or pytest.fail("not masked"))


def test_nothing_is_changed_where_there_are_no_hooks(mlp):
    class Hookless(torch.optim.Optimizer):
        def __init__(self):
            self.param_groups = [{"params": list(mlp.parameters())}]

    before = copy.deepcopy(mlp.state_dict())
    with pytest.raises(TypeError, match=r"optimizer: wanted a torch.optim.Optimizer with step hooks, got Hookless"):
        magnitude(mlp, 0.6).enforce(Hookless(), mlp)
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


def test_it_cannot_be_copied(mlp, vectors):
    mask = magnitude(mlp, 0.6)
    optimizer = torch.optim.SGD(mlp.parameters(), 0.1)
    with mask.enforce(optimizer, mlp) as handle:
        for act in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="MaskEnforcer: wanted to stay with its optimizer, got copied"):
                act(handle)
        copy.deepcopy(optimizer)
        train(mlp, optimizer, vectors[:1])
        assert MaskSet.from_model(mlp) == mask


def test_an_optimizer_without_masked_parameters_is_refused(mlp, vectors):
    mask = magnitude(mlp, 0.6)
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


def gradients(model, batch):
    model.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()


def warned(caplog):
    return [record.getMessage() for record in caplog.records if "removed weights were not 0" in record.getMessage()]


class Around(torch.optim.Optimizer):
    """Slow weights around another optimizer, which it keeps under a name of its own; never set up as an optimizer."""

    name = "optimizer"

    def __init__(self, inner):
        setattr(self, self.name, inner)
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults
        self.inner = lambda: inner
        self.slow = [p.detach().clone() for group in inner.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner().step(closure)
        weights = [p for group in self.param_groups for p in group["params"]]
        for p, slow in zip(weights, self.slow, strict=True):
            slow.add_(p.data - slow, alpha=0.5)
            p.data.copy_(slow)
        return loss


class WithHooksThatAreNeverCalled(Around):
    name = "_base_optimizer"

    def __init__(self, inner):
        super().__init__(inner)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}


class NoOptimizer:
    """A wrapper that is no optimizer itself."""

    def __init__(self, inner):
        self.base, self.slow = inner, Around(inner).slow

    @property
    def param_groups(self):
        return self.base.param_groups

    def inner(self):
        return self.base

    def step(self, closure=None):
        return Around.step(self, closure)


class SetUp(torch.optim.Optimizer):
    """With hooks of its own."""

    def __init__(self, inner):
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.around = Around(inner)

    def step(self, closure=None):
        return self.around.step(closure)


WRAPPERS = [Around, WithHooksThatAreNeverCalled, NoOptimizer, SetUp, lambda inner: Around(Around(inner))]


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_an_optimizer_around_another_that_writes_weights(mlp, vectors, wrap, closure, caplog):
    optimizer = wrap(torch.optim.SGD(mlp.parameters(), 0.1))  # its slow weights are the dense ones
    mask = magnitude(mlp, 0.6)
    with mask.enforce(optimizer, mlp):
        for batch in vectors:
            if closure:
                optimizer.step(lambda batch=batch: gradients(mlp, batch))
            else:
                gradients(mlp, batch)
                optimizer.step()
            assert MaskSet.from_model(mlp) == mask
    assert len(warned(caplog)) == 1
    assert "0.weight (" in warned(caplog)[0]
    assert "2.weight (" in warned(caplog)[0]
    gradients(mlp, vectors[0])
    optimizer.step()
    assert MaskSet.from_model(mlp).kept > mask.kept, "no longer enforced"


def test_kept_weights_are_those_of_the_wrapped_optimizer_alone(mlp, vectors):
    """Masking a wrapper changes nothing but the removed weights."""
    mask = magnitude(mlp, 0.6)
    twin = mask.apply_(copy.deepcopy(mlp))
    with mask.enforce(Around(torch.optim.SGD(mlp.parameters(), 0.1)), mlp) as handle:
        optimizer = Around(handle._optimizer)
        gradients(mlp, vectors[0])
        optimizer.step()
    other = torch.optim.SGD(twin.parameters(), 0.1)
    slow = [p.detach().clone() for p in twin.parameters()]
    gradients(twin, vectors[0])
    other.step()
    for (name, p), q, s in zip(mlp.named_parameters(), twin.parameters(), slow, strict=True):
        expected = s + 0.5 * (q.detach() - s)
        kept = mask[name] if name in mask else slice(None)
        torch.testing.assert_close(p.detach()[kept], expected[kept])


class Sharpness(torch.optim.Optimizer):
    """Steps at the gradient of a point uphill, like SAM: in two calls, or with a closure."""

    def __init__(self, parameters, seen):
        super().__init__(parameters, {})
        self.base_optimizer, self.seen = torch.optim.SGD(self.param_groups, 0.1), seen

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.clone()
                p.add_(p.grad)

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure):
        closure = torch.enable_grad()(closure)
        self.first_step()
        self.seen()
        closure()
        self.second_step()


@pytest.mark.parametrize("style", ["calls", "closure"])
def test_weights_that_are_moved_for_another_gradient(mlp, vectors, style, caplog):
    mask = magnitude(mlp, 0.6)
    seen = []

    def look():
        seen.append(MaskSet.from_model(mlp) == mask)

    optimizer = Sharpness(mlp.parameters(), look)
    with mask.enforce(optimizer, mlp):
        for batch in vectors:
            gradients(mlp, batch)
            if style == "closure":
                optimizer.step(lambda batch=batch: gradients(mlp, batch))
            else:
                optimizer.first_step()
                look()
                gradients(mlp, batch)
                optimizer.second_step()
            assert MaskSet.from_model(mlp) == mask
    assert seen == [True] * 10, "the second gradient is one of masked weights"
    assert len(warned(caplog)) == 1
    assert "after first_step() of Sharpness" in warned(caplog)[0]
    assert not {"step", "first_step", "second_step"} & set(vars(optimizer)), "its methods are its own again"


class ScheduleFree(torch.optim.Optimizer):
    """Weights between two sequences, exchanged for their average where the model is evaluated."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def _move(self, share):
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], share)

    def train(self):
        self._move(0.1)

    def eval(self):
        self._move(1 - 1 / 0.9)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                z.sub_(p.grad, alpha=0.1)
                p.lerp_(z, 0.1).sub_(p.grad, alpha=0.09)


@pytest.mark.parametrize("package", [False, True])
def test_weights_exchanged_for_averages_where_the_model_is_evaluated(mlp, vectors, package, caplog):
    kind = pytest.importorskip("schedulefree").AdamWScheduleFree if package else ScheduleFree
    mask = magnitude(mlp, 0.6)
    optimizer = kind(mlp.parameters())
    with mask.enforce(optimizer, mlp):
        for batch in vectors:
            optimizer.train()
            assert MaskSet.from_model(mlp) == mask
            gradients(mlp, batch)
            optimizer.step()
            assert MaskSet.from_model(mlp) == mask
            optimizer.eval()
            assert MaskSet.from_model(mlp) == mask
    assert len(warned(caplog)) == 1
    assert f"after eval() of {kind.__name__}" in warned(caplog)[0]


def exchanged(model, optimizer, dense):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(dense[name])


WRITING = {
    "load_state_dict": lambda model, optimizer, dense: model.load_state_dict(dense),
    "copied": exchanged,
    "data": lambda model, optimizer, dense: [p.data.add_(1) for p in model.parameters()],
    "swapped": lambda model, optimizer, dense: [
        setattr(p, "data", dense[name].clone()) for name, p in model.named_parameters()
    ],
    "initialized": lambda model, optimizer, dense: nn.init.ones_(model[0].weight),
    "an average": lambda model, optimizer, dense: model.load_state_dict(
        torch.optim.swa_utils.AveragedModel(copy.deepcopy(model).apply(init_ones)).module.state_dict()
    ),
    "vector": lambda model, optimizer, dense: nn.utils.vector_to_parameters(
        torch.ones(sum(p.numel() for p in model.parameters())), model.parameters()
    ),
    "another optimizer": lambda model, optimizer, dense: (
        [setattr(p, "grad", torch.ones_like(p)) for p in model.parameters()],
        torch.optim.SGD(model.parameters(), 0.1).step(),
    ),
}


def init_ones(module):
    if isinstance(module, nn.Linear):
        nn.init.ones_(module.weight)


@pytest.mark.parametrize("write", WRITING.values(), ids=WRITING.keys())
def test_whatever_writes_removed_weights_outside_of_a_step_is_said_once(mlp, vectors, write, caplog):
    dense = copy.deepcopy(mlp.state_dict())
    mask = magnitude(mlp, 0.6)
    optimizer = torch.optim.SGD(mlp.parameters(), 0.1)
    with mask.enforce(optimizer, mlp):
        for number, batch in enumerate(vectors):
            gradients(mlp, batch)
            if number in (2, 5):
                write(mlp, optimizer, dense)
            assert len(warned(caplog)) == (number > 2)
            optimizer.step()
            assert len(warned(caplog)) == (number >= 2)
            assert MaskSet.from_model(mlp) == mask
    assert caplog.records[0].levelno == logging.WARNING
    assert "before a step of SGD, in 0.weight (" in warned(caplog)[0]
    assert "they were set to 0 again" in warned(caplog)[0]


def test_the_step_itself_starts_from_masked_weights(mlp, vectors):
    """Optimizers that look at whole tensors do not see what was found alive."""

    class Norm(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self):
            self.seen = MaskSet.from_model(mlp)

    mask = magnitude(mlp, 0.6)
    dense = copy.deepcopy(mlp.state_dict())
    optimizer = Norm(mlp.parameters())
    with mask.enforce(optimizer, mlp):
        for _ in range(2):
            mlp.load_state_dict(dense)
            optimizer.step()
            assert optimizer.seen == mask


def test_found_alive_at_the_end(mlp, vectors, caplog):
    inner = torch.optim.SGD(mlp.parameters(), 0.1)
    outer = Around(inner)
    mask = magnitude(mlp, 0.6)
    with mask.enforce(inner, mlp):  # the outer one was not given
        gradients(mlp, vectors[0])
        outer.step()
    assert len(warned(caplog)) == 1
    assert "when enforcement ended" in warned(caplog)[0]
    assert "they stay as they are" in warned(caplog)[0]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_nothing_is_said_where_nothing_was_written(mlp, vectors, make, caplog):
    mask = magnitude(mlp, 0.6)
    optimizer = make(mlp.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    handle = mask.enforce(optimizer, mlp)
    train(mlp, optimizer, vectors, scheduler.step)
    dense = copy.deepcopy(mlp.state_dict())
    mlp.load_state_dict(dense)
    handle.apply_()
    train(mlp, optimizer, vectors)
    handle.remove()
    assert not warned(caplog)


def test_a_wrapper_keeps_its_methods_schedulers_and_copies(mlp, vectors):
    """Nothing of ours is left behind, whatever came after us; copies step themselves and are not enforced."""
    mask = magnitude(mlp, 0.6)
    optimizer = Around(torch.optim.SGD(mlp.parameters(), 0.1))
    handle = mask.enforce(optimizer, mlp)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts itself before step, too
    gradients(mlp, vectors[0])
    optimizer.step()
    assert optimizer._opt_called
    assert MaskSet.from_model(mlp) == mask
    handle.remove()
    gradients(mlp, vectors[0])
    optimizer.step()
    assert MaskSet.from_model(mlp).kept > mask.kept

    class Wrapper(NoOptimizer):
        steps = 0

        def step(self, closure=None):
            self.steps += 1

    one = Wrapper(torch.optim.SGD(mlp.parameters(), 0.1))
    with mask.enforce(one, mlp):
        other = copy.copy(one)
        vars(other)["step"] = copy.deepcopy(vars(one)["step"], {id(one): other})
        other.step()
        assert (one.steps, other.steps) == (0, 1)
    assert "step" not in vars(one)
    one.step()
    assert one.steps == 1


def test_several_optimizers_in_one(mlp, vectors):
    class Both(torch.optim.Optimizer):
        def __init__(self, *optimizers):
            self.optimizers = list(optimizers)

        @property
        def param_groups(self):
            return [group for one in self.optimizers for group in one.param_groups]

        def step(self):
            for one in self.optimizers:
                one.step()

    mask = magnitude(mlp, 0.6)
    optimizer = Both(*(torch.optim.SGD(mlp[i].parameters(), 0.1) for i in (0, 2)))
    with mask.enforce(optimizer, mlp) as handle:
        assert len(handle) == 2
        for batch in vectors:
            gradients(mlp, batch)
            optimizer.step()
            assert MaskSet.from_model(mlp) == mask
