"""No op depends on what surrounds its call: default dtype and device, modes, autocast; and a lint of all sources."""

import ast
import contextlib
from pathlib import Path

import pytest
import torch

from sfpk_kernels import ops

pytestmark = pytest.mark.usefixtures("one_tile")

PACKAGE = Path(__file__).parent.parent / "sfpk_kernels"

# A tensor made by one of these takes dtype and device from the process where the call does not say them.
CREATORS = {
    "arange", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand", "randint",
    "randn", "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def unsaid(source: str) -> list[int]:
    """Lines that create a tensor without dtype and device; parameters of modules follow the process, as torch's do."""
    lines, tree = [], ast.parse(source)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    parameters = [node for node in calls if ast.unparse(node.func) == "nn.Parameter"]
    excepted = {id(node) for parameter in parameters for node in ast.walk(parameter)}
    for node in calls:
        if id(node) in excepted or not (isinstance(node.func, ast.Attribute) and node.func.attr in CREATORS):
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "torch":
            said = {keyword.arg for keyword in node.keywords}
            if None not in said and not {"dtype", "device"} <= said:  # None: **options
                lines.append(node.lineno)
    return lines


def test_the_lint_sees_what_it_should():
    assert unsaid("torch.zeros(3)\ntorch.full((2,), 1, dtype=a)\ntorch.arange(3, device=b)") == [1, 2, 3]
    assert unsaid("torch.zeros(3, dtype=a, device=b)\nx.new_zeros(3)\ntorch.zeros_like(x)\nnp.zeros(3)") == []
    assert unsaid("torch.tensor(\n  [torch.eye(2, dtype=a, device=b)]\n)") == [1]


def test_every_tensor_is_created_with_dtype_and_device():
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in sorted(PACKAGE.rglob("*.py"))
        if (lines := unsaid(path.read_text(encoding="utf-8")))
    }
    assert not found, f"dtype= and device= are missing in {found}"


def calls(backend):
    """Every op with every kind of argument: name → a function of fresh arguments, and what makes these."""
    random = torch.Generator().manual_seed(5)
    n, d = 3, 20
    values, theta, grads = (torch.randn(*shape, generator=random) for shape in ((n, d), (d,), (n, d)))
    saliency, sizes = torch.rand(d, generator=random) + 0.1, torch.ones(d)
    masks, packed = torch.rand(n, d, generator=random) + 0.5, ops.pack_mask(values > 0, "int32")
    cut = ops.topk_threshold(values, 5, score="abs_saliency", saliency=saliency, segments=[0, 8, d])
    first = torch.arange(d) == 1
    layout = [ops.Blocks(2, 5, 2)]
    sfpk = {"step": 0.1, "radius": 2.0, "repulsion": 0.3, "backend": backend}
    rest = {"backend": backend if backend in ("reference", "cpp") else None}  # of ops without a Triton backend

    def transition(m, g, w, a, c):
        stats = ops.transition_(m, g, weights=w, saliency=a, sizes=c, kernel="weighted_rbf", target_density=0.5, **sfpk)
        return [m, *stats, *ops.transition_(m, g, weights=w, saliency=a, sizes=c, kernel="weighted_rbf", consensus=0.3,
                                            state=stats, **sfpk)]  # fmt: skip

    def two_byte(m, g, r):
        ops.transition_(m, g, residual=r, row=None, step_index=3, **sfpk)
        return [m] if r is None else [m, r]

    def written(w, m, out):
        return ops.masked_weights(w, m, out=out, backend=backend)

    return {
        "topk_mask": (lambda v: ops.topk_mask(v, 7, backend=backend), (values,)),
        "topk_mask fp64": (lambda v: ops.topk_mask(v, [1, 2, 3], backend="reference"), (values.double(),)),
        "topk_mask constraints": (
            lambda v, a, p: ops.topk_mask(
                v, 7, score="abs_saliency", saliency=a, segments=[0, 8, d], min_keep=[1, 2], pattern=(2, 4),
                protected=p, removed=p.roll(1), packed="int32", **rest),
            (values.bfloat16(), saliency, first),
        ),
        "topk_mask budget": (lambda v, c: ops.topk_mask(v, 7, sizes=c, packed="uint8", **rest), (values.half(), sizes)),
        "topk_mask mean": (
            lambda v, a, g: ops.topk_mask(v, 7, score="mean_abs_saliency", saliency=a, guess=g, backend=backend),
            (values, saliency, torch.ones(1)),
        ),
        "topk_mask list": (lambda v, w: ops.topk_mask([v, w], 7, segments="tensors", **rest), (values, theta)),
        "topk_threshold": (lambda v, k: list(ops.topk_threshold(v, k, backend=backend)), (values, torch.full((n,), 4))),
        "masked_weights bool": (lambda w, m: ops.masked_weights(w, m, backend=backend), (theta, values > 0)),
        "masked_weights factors": (lambda w, m: ops.masked_weights(w, m, backend=backend), (theta.half(), values)),
        "masked_weights packed": (
            lambda v, w, m: ops.masked_weights([v, w], m, dtype=torch.bfloat16, backend=backend),
            (theta[:9], theta[9:].view(11, 1), packed),
        ),
        "masked_weights cut": (
            lambda w, m, t, e, a: ops.masked_weights(
                w, m, cut=ops.Cut(t, e), score="abs_saliency", saliency=a, segments=[0, 8, d], backend=backend),
            (theta, values, *cut, saliency),
        ),
        "masked_weights out": (written, (theta, values > 0, torch.zeros(n, d))),
        "masked_weights layout": (
            lambda w, m: ops.masked_weights(w, m, layout=layout, backend=backend), (theta, values[:, :5])),
        "mask_gradient": (lambda w, g: ops.mask_gradient(w, g, backend=backend), (theta, grads)),
        "mask_gradient layout": (
            lambda w, g: ops.mask_gradient(w, g, layout=layout, backend=backend), (theta, grads.bfloat16())),
        "average_gradients_": (
            lambda g, v, w: [*ops.average_gradients_(g, v, 0.3, weights=w, backend=backend), g],
            (grads, values, theta),
        ),
        "average_gradients_ fp16": (
            lambda g, w: ops.average_gradients_(g, None, weights=w, backend=backend).effective_dimensions,
            (grads.half(), theta),
        ),
        "bits": (
            lambda m, p: [ops.pack_mask(m, **rest), ops.unpack_mask(p, d, **rest), ops.popcount(p, **rest),
                          ops.mask_iou(p, **rest), ops.mask_hamming(p, p, **rest)],
            (values > 0, packed),
        ),
        "transition_": (transition, (masks, grads, theta, saliency, sizes)),
        "transition_ row": (lambda m, g: [m, *ops.transition_(m, g, row=1, **sfpk)], (masks, grads[:1])),
        "transition_ fp16": (lambda m, g: two_byte(m, g, None), (masks.half(), grads)),
        "transition_ bf16": (two_byte, (masks.bfloat16(), grads, torch.zeros(n, d, dtype=torch.bfloat16))),
    }  # fmt: skip


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "default meta": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
}
BACKENDS = ["reference", "cpp", "triton"]


def copies(arguments):
    return [a.clone() for a in arguments]


def listed(results):
    return list(results) if isinstance(results, list | tuple) else [results]


def same(a, b):
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(calls("cpp")))
def test_surroundings_change_nothing(name, backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("these arguments lie on the CPU, where Triton runs in its interpreter only")
    function, arguments = calls(backend)[name]
    expected = listed(function(*copies(arguments)))
    for surrounding, enter in SURROUNDINGS.items():
        fresh = copies(arguments)
        with enter():
            results = listed(function(*fresh))
        assert all(map(same, results, expected)), surrounding


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", sorted(calls("cpp")))
def test_tensors_made_under_inference_mode_are_tensors(name, backend):
    """Each argument in turn, then all; read, written and kept for a gradient."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("these arguments lie on the CPU, where Triton runs in its interpreter only")
    function, arguments = calls(backend)[name]
    expected = listed(function(*copies(arguments)))
    for which in [*([i] for i in range(len(arguments))), range(len(arguments))]:
        fresh = copies(arguments)
        with torch.inference_mode():
            for i in which:
                fresh[i] = arguments[i].clone()
        results = listed(function(*fresh))
        assert all(map(same, results, expected)), list(which)
        own = [r for r in results if not any(r is a for a in fresh)]
        assert not any(r.is_inference() for r in own), "a result that autograd could not use"
        assert len(results) == len(expected)


def test_constants_of_a_run_are_looked_at_again_once_they_change():
    """Their lowest value is remembered: not for tensors that have no version to notice a change by."""
    masks, grads = torch.rand(2, 5) + 0.5, torch.randn(2, 5)
    options = {"step": 0.1, "radius": 2.0, "repulsion": 0.0}
    with torch.inference_mode():
        frozen = torch.ones(5)
    for sizes in (torch.ones(5), frozen):
        ops.transition_(masks.clone(), grads, sizes=sizes, **options)
        with torch.inference_mode():
            sizes[2] = -1.0
        with pytest.raises(ValueError, match="sizes: wanted all > 0"):
            ops.transition_(masks.clone(), grads, sizes=sizes, **options)


def test_autograd_notices_what_the_ops_write():
    """Gradients from values that an op has overwritten since are refused by torch, as after any in-place change."""
    for change in (
        lambda m: ops.transition_(m, torch.randn(2, 5), step=0.1, radius=2.0, repulsion=0.0),
        lambda m: ops.masked_weights(torch.randn(5), torch.rand(2, 5), out=m),
        lambda m: ops.average_gradients_(m, torch.rand(2, 5), 0.5, weights=torch.randn(5)),
    ):
        masks, theta = torch.rand(2, 5) + 0.5, torch.rand(5, requires_grad=True)
        result = ops.masked_weights(theta, masks).sum()
        change(masks)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()
