"""Derivatives of every order and kind, torch.func and vmap: right, or an error that says so; never silently wrong."""

import contextlib
import itertools

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from sfpk_kernels import ops
from sfpk_kernels.ops import Blocks, Cut, mask_gradient, masked_weights, topk_mask, topk_threshold

STEP = {"step": 0.1, "radius": 2.0, "repulsion": 0.2}
LAYOUT = [Blocks(2, 3, 1), Blocks(1, 2, 2)]  # 10 weights, 5 coordinates


def fp64(*shape, tracked=True):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(tracked)


def plain(weights, factors, layout=None):
    """θ ⊙ m in torch."""
    if layout is not None:
        first, parts = 0, []
        for outer, groups, inner, _ in layout:
            part = factors[..., first : first + groups]
            parts.append(part[..., None, :, None].expand(*part.shape[:-1], outer, groups, inner).flatten(-3))
            first += groups
        factors = torch.cat(parts, dim=-1)
    return weights * factors


def test_second_derivative_by_the_mask_by_hand():
    # f = Σ (w m)²: ∂f/∂w = 2 w m², its derivative by m is 4 w m.
    w, m = torch.tensor([3.0, 5.0], requires_grad=True), torch.tensor([2.0, 7.0], requires_grad=True)
    (by_w,) = torch.autograd.grad(masked_weights(w, m).square().sum(), w, create_graph=True)
    (mixed,) = torch.autograd.grad(by_w.sum(), m)
    assert mixed.tolist() == [24.0, 140.0]


SMALL = [Blocks(2, 2, 1), Blocks(1, 1, 2)]  # 6 weights, 3 coordinates: the checks go by every pair of entries
CASES = {
    "flat": (lambda w, m: masked_weights(w, m), (4,), (4,)),
    "rows": (lambda w, m: masked_weights(w, m), (4,), (3, 4)),
    "no rows": (lambda w, m: masked_weights(w, m), (4,), (0, 4)),
    "layout": (lambda w, m: masked_weights(w, m, layout=SMALL), (6,), (2, 3)),
    "list": (lambda w, m: torch.cat([t.flatten(1) for t in masked_weights([w, w[0]], m)], 1), (2, 2), (2, 6)),
    "gradient": (lambda w, g: mask_gradient(w, g), (4,), (3, 4)),
    "gradient of one": (lambda w, g: mask_gradient(w, g), (4,), (4,)),
    "gradient layout": (lambda w, g: mask_gradient(w, g, layout=SMALL), (6,), (2, 6)),
    "gradient list": (lambda w, g: mask_gradient([w, w[0]], [g, g[:, 0]]), (2, 2), (3, 2, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_first_second_and_forward_derivatives(name):
    function, *shapes = CASES[name]
    inputs = tuple(fp64(*shape) for shape in shapes)
    assert gradcheck(function, inputs, check_forward_ad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)
    third = lambda w, m: torch.autograd.grad(function(w, m).pow(3).sum(), (w, m), create_graph=True)  # noqa: E731
    assert gradgradcheck(third, inputs)


@pytest.mark.parametrize("mask", ["bool", "uint8", "int32"])
def test_masks_without_a_derivative(mask):
    keep = torch.rand(3, 7) > 0.5
    given = keep if mask == "bool" else ops.pack_mask(keep, mask)
    theta = fp64(7)
    assert gradcheck(lambda w: masked_weights(w, given), theta, check_forward_ad=True)
    assert gradgradcheck(lambda w: masked_weights(w, given).pow(3), theta)
    assert torch.equal(
        jacrev(lambda w: masked_weights(w, given))(theta), jacfwd(lambda w: masked_weights(w, given))(theta)
    )


@pytest.mark.parametrize("layout", [None, [Blocks(1, 6, 1)], [Blocks(2, 3, 2)]])
def test_through_a_cut_derivatives_are_straight_of_any_order(layout):
    """As if the polarizer P(m) had the derivative 1: those of θ ⊙ (P + m - m₀), with m₀ a constant equal to m."""
    d = 6 if layout is None else layout[0].groups
    theta, values = torch.randn(12 if layout and layout[0].outer > 1 else 6), torch.rand(2, d)
    cut = topk_threshold(values, d // 2)
    mask = topk_mask(values, d // 2).float()

    def straight(w, v):
        return plain(w, mask + v - values, layout)

    def ours(w, v):
        return masked_weights(w, v, cut=cut, layout=layout)

    def losses(f):
        return lambda w, v: f(w, v).pow(3).sum() + f(w, v).sin().sum()

    for first, second in itertools.product((0, 1), repeat=2):
        expected = jacrev(grad(losses(straight), first), second)(theta, values)
        torch.testing.assert_close(jacrev(grad(losses(ours), first), second)(theta, values), expected)
        torch.testing.assert_close(jacfwd(grad(losses(ours), first), second)(theta, values), expected)


def test_torch_func_agrees_with_torch():
    theta, factors = fp64(10, tracked=False), fp64(2, 5, tracked=False)

    def loss(f):
        return lambda w, m: f(w, m).pow(3).sum()

    ours, torchs = loss(lambda w, m: masked_weights(w, m, layout=LAYOUT)), loss(lambda w, m: plain(w, m, LAYOUT))
    for transform in (
        lambda f: grad(f, (0, 1)),
        lambda f: jacrev(f, (0, 1)),
        lambda f: jacfwd(f, (0, 1)),
        lambda f: hessian(f, (0, 1)),
        lambda f: jacrev(jacrev(f, 1), 0),
        lambda f: jacfwd(jacfwd(f, 1), 0),
        lambda f: grad(lambda w, m: grad(f)(w, m).pow(2).sum(), (0, 1)),
        lambda f: vmap(grad(f, (0, 1)), in_dims=(None, 0)),
        lambda f: lambda w, m: vmap(f, in_dims=(None, 1))(w, m.t().contiguous()),
        lambda f: grad(lambda w, m: vmap(f, in_dims=(None, 0))(w, m).sum(), (0, 1)),
        lambda f: lambda w, m: vjp(f, w, m)[1](torch.ones((), dtype=torch.float64)),
        lambda f: lambda w, m: jvp(f, (w, m), (w.cos(), m.sin())),
        lambda f: lambda w, m: jvp(lambda w: f(w, m), (w,), (w.cos(),)),
    ):
        results, expected = (transform(f)(theta, factors) for f in (ours, torchs))
        torch.testing.assert_close(results, expected)


def test_forward_mode_outside_of_torch_func():
    theta, tangent, factors = fp64(5, tracked=False), fp64(5, tracked=False), fp64(2, 5, tracked=False)
    with forward_ad.dual_level():
        result = masked_weights(forward_ad.make_dual(theta, tangent), factors)
        assert torch.equal(forward_ad.unpack_dual(result).tangent, tangent * factors)
    with forward_ad.dual_level():
        result = mask_gradient(theta, forward_ad.make_dual(factors, factors.cos()))
        torch.testing.assert_close(forward_ad.unpack_dual(result).tangent, theta * factors.cos())


def test_the_old_vmap_behind_batched_grads_is_refused():
    theta = torch.randn(5, requires_grad=True)
    result = masked_weights(theta, torch.rand(2, 5))
    with pytest.raises(RuntimeError, match="Batching rule not implemented for sfpk::"):
        torch.autograd.grad(result, theta, torch.randn(3, 2, 5), is_grads_batched=True)


def test_gradients_of_dtypes_that_differ():
    theta, factors = torch.randn(6, dtype=torch.bfloat16).requires_grad_(), torch.rand(2, 6, requires_grad=True)
    masked_weights(theta, factors, dtype=torch.float16).sum().backward()
    assert theta.grad.dtype == torch.bfloat16
    assert factors.grad.dtype == torch.float32
    torch.testing.assert_close(theta.grad, factors.detach().sum(0).bfloat16())
    torch.testing.assert_close(factors.grad, theta.detach().float().expand(2, 6))


# vmap of every op, over each argument and over all: as if called one by one.


def every_op():
    values, theta, saliency = torch.randn(4, 3, 16), torch.randn(4, 16), torch.rand(4, 16) + 0.1
    keep, packed = values > 0, ops.pack_mask(values > 0)
    cuts = [topk_threshold(v, 4) for v in values]
    threshold, tie_end = (torch.stack(parts) for parts in zip(*cuts, strict=True))
    return {
        "topk_mask": (lambda v, a: topk_mask(v, 4, score="abs_saliency", saliency=a), (values, saliency)),
        "topk_mask rows": (lambda v, k: topk_mask(v, k, packed="uint8"), (values, torch.arange(12).view(4, 3))),
        "topk_mask vector": (lambda v: topk_mask(v, 4), (theta,)),
        "topk_mask list": (lambda v, w: topk_mask([v, w], 9, segments="tensors", max_keep=8), (values, theta)),
        "topk_threshold": (lambda v, g: topk_threshold(v, 4, guess=g), (values, torch.rand(4, 3))),
        "topk_threshold list": (lambda v, w: topk_threshold([v, w], 9), (values, theta)),
        "masked_weights": (masked_weights, (theta, keep)),
        "masked_weights factors": (masked_weights, (theta, values)),
        "masked_weights one": (masked_weights, (theta, saliency)),
        "masked_weights packed": (lambda a, m: masked_weights([a[:6], a[6:]], m), (theta, packed)),
        "masked_weights cut": (
            lambda w, v, t, e: masked_weights(w, v, cut=Cut(t, e)), (theta, values, threshold, tie_end)),
        "mask_gradient": (mask_gradient, (theta, values)),
        "mask_gradient layout": (lambda w, g: mask_gradient(w, g, layout=Blocks(2, 4, 2)), (theta, theta.cos())),
        "pack_mask": (lambda m: ops.pack_mask(m, "int32"), (keep,)),
        "unpack_mask": (lambda p: ops.unpack_mask(p, 16), (packed,)),
        "popcount": (ops.popcount, (packed,)),
        "mask_iou": (ops.mask_iou, (packed, packed.flip(0, 1))),
        "mask_hamming": (ops.mask_hamming, (packed,)),
        "transition_": (
            lambda m, g, w: (stepped := m.clone(), *ops.transition_(stepped, g, weights=w, **STEP)),
            (values.abs() + 0.5, values.cos(), theta)),
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(every_op()))
@pytest.mark.filterwarnings("error:.*performance drop")
def test_vmap_is_a_loop(name):
    function, arguments = every_op()[name]
    for batched in itertools.product((False, True), repeat=len(arguments)):
        if not any(batched) or (name == "transition_" and not batched[0]):
            continue
        for place in (0, -1):
            given = [a.movedim(0, place) if b else a[0] for a, b in zip(arguments, batched, strict=True)]
            results = vmap(function, in_dims=tuple(place if b else None for b in batched))(*given)
            loop = [function(*(a[i] if b else a[0] for a, b in zip(arguments, batched, strict=True))) for i in range(4)]
            listed = [[r] if isinstance(r, torch.Tensor) else list(r) for r in (results, *loop)]
            for whole, *parts in zip(*listed, strict=True):
                assert torch.equal(whole, torch.stack(parts)), batched


def test_nested_vmap_and_per_sample_gradients_of_a_module():
    theta, factors = torch.randn(3, 5), torch.randn(2, 5)
    nested = vmap(lambda w: vmap(lambda m: masked_weights(w, m))(factors))(theta)
    assert torch.equal(nested, theta[:, None] * factors)

    class Masked(torch.nn.Linear):
        def forward(self, x):
            weight, bias = masked_weights([self.weight, self.bias], mask)
            return torch.nn.functional.linear(x, weight, bias)

    model = Masked(3, 2)
    mask, x, y = torch.rand(8) > 0.4, torch.randn(4, 3), torch.randn(4, 2)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x, y):
        return (functional_call(model, parameters, (x,)) - y).square().sum()

    by_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(4):
        model.zero_grad()
        (model(x[i]) - y[i]).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(by_sample[name][i], parameter.grad)


# What has no derivative says so.


def test_a_mask_is_a_constant():
    values = torch.randn(3, 8)
    assert torch.equal(grad(lambda v: (v * topk_mask(v, 3)).sum())(values), topk_mask(values, 3).float())
    (_, tangent) = jvp(lambda v: v * topk_mask(v, 3), (values,), (torch.ones_like(values),))
    assert torch.equal(tangent, topk_mask(values, 3).float())


def test_a_threshold_has_no_derivative_and_says_so_when_one_is_wanted():
    values = torch.randn(3, 8, requires_grad=True)
    theta = torch.randn(8)
    for given in (values, [values, theta]):
        cut = topk_threshold(given, 3)
        assert torch.equal(cut.threshold, topk_threshold([v.detach() for v in given] if isinstance(given, list) else
                                                         given.detach(), 3).threshold)  # fmt: skip
        with pytest.raises(NotImplementedError, match=r"threshold: wanted no derivative.*values.detach\(\)"):
            cut.threshold.sum().backward()
    for transform in (grad, jacrev, jacfwd):
        with pytest.raises(NotImplementedError, match="threshold: wanted no derivative"):
            transform(lambda v: topk_threshold(v, 3).threshold.sum())(values.detach())
    # As the cut of masked weights it is a constant, and disturbs nobody.
    masked_weights(theta, values, cut=topk_threshold(values, 3)).sum().backward()
    assert torch.equal(values.grad, theta.expand(3, 8))
    by = grad(lambda v: masked_weights(theta, v, cut=topk_threshold(v, 3)).sum())(values.detach())
    assert torch.equal(by, theta.expand(3, 8))


@pytest.mark.parametrize("name", ["masks", "grads", "weights", "saliency", "sizes"])
def test_a_step_has_no_derivative_and_says_so(name):
    arguments = {"masks": torch.rand(2, 5) + 0.5, "grads": torch.randn(2, 5)}
    arguments |= {"weights": torch.randn(5), "saliency": torch.rand(5), "sizes": torch.ones(5)}
    before = arguments["masks"].clone()

    def step(value):
        return ops.transition_(**{**arguments, name: value}, **STEP).densities.sum()

    message = rf"transition_: {name}: wanted a tensor without gradient, as a step has no derivative.*detach\(\)"
    with pytest.raises(ValueError, match=message):
        step(arguments[name].clone().requires_grad_())
    for transform in (grad, jacrev, jacfwd):
        with pytest.raises(ValueError, match=message):
            transform(step)(arguments[name])
    with forward_ad.dual_level(), pytest.raises(ValueError, match=message):
        step(forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name])))
    assert torch.equal(arguments["masks"], before)
    with torch.no_grad():
        step(arguments[name].clone().requires_grad_())


def test_a_buffer_has_no_derivative_and_says_so():
    theta, mask = torch.randn(5, requires_grad=True), torch.rand(2, 5)
    with pytest.raises(
        ValueError, match="masked_weights: weights: wanted a tensor without gradient, as a result written"
    ):
        masked_weights(theta, mask, out=torch.empty(2, 5))
    with pytest.raises(ValueError, match=r"weights\[1\]: wanted a tensor without gradient"):
        masked_weights([mask[0], theta], torch.rand(2, 10), out=[torch.empty(2, 5), torch.empty(2, 5)])
    with pytest.raises(ValueError, match="mask: wanted a tensor without gradient"):
        grad(lambda m: masked_weights(theta.detach(), m, out=torch.empty(2, 5)).sum())(mask)
    with torch.no_grad():
        assert torch.equal(masked_weights(theta, mask, out=torch.empty(2, 5)), theta * mask)


def test_vmap_over_a_step_needs_particles_of_its_own():
    masks, grads = torch.rand(2, 5) + 0.5, torch.randn(3, 2, 5)
    before = masks.clone()
    with pytest.raises(ValueError, match="transition_: masks: wanted it batched under vmap like the others"):
        vmap(lambda g: ops.transition_(masks, g, **STEP).norms)(grads)
    assert torch.equal(masks, before)
    batch = before.expand(3, 2, 5).clone()
    norms = vmap(lambda m, g: ops.transition_(m, g, **STEP).norms)(batch, grads)
    for i in range(3):
        alone = before.clone()
        assert torch.equal(ops.transition_(alone, grads[i], **STEP).norms, norms[i])
        assert torch.equal(batch[i], alone)


def test_compiled_together_with_a_transform_it_is_right_or_refused():
    theta, factors = torch.randn(5), torch.randn(2, 5)
    function = grad(lambda w: masked_weights(w, factors).square().sum())
    with contextlib.suppress(Exception):  # torch's own words; what must not be is another result
        torch.testing.assert_close(torch.compile(function, backend="eager")(theta), function(theta))
        return
    with pytest.raises(Exception, match="setup_context|Unsupported|transform"):
        torch.compile(function, backend="eager")(theta)
