"""The stages of the transition: composed they are the fused op, and sums of shards are the sums of the whole."""

import itertools
import math
from unittest import mock

import pytest
import torch

from sfpk_kernels._dispatch import where_present
from sfpk_kernels.ops import TransitionStats, transition_
from sfpk_kernels.ops._named import by_name
from sfpk_kernels.ops.transition import Columns, Shard, Step, TransitionSpec, _stage_ops, stages

from .pairs import pairwise
from .test_transition_backends import problem

STEP = {"step": 0.05, "radius": 2.0, "repulsion": 0.2}
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
ENDS = [
    {},
    {"target_density": 0.5},
    {"consensus": 0.3},
    {"target_density": 0.5, "consensus": 0.3},
    {"target_density": 0.6, "consensus": 0.3, "eps": 1e-3, "repulsion": 30.0},
    {"target_density": 0.6, "consensus": 1.0, "repulsion": 0.0},
]
OPTIONS = [
    {"kernel": kernel, "density": density, **end}
    for kernel, density, end in itertools.product(["rbf", "weighted_rbf"], ["l2", "l2_squared"], ENDS)
]


def start(n, d, dtype, sized=False, theta=True, seed=0):
    """Particles, gradients, vectors and a residual where the dtype wants one."""
    masks, grads, vectors = problem(n, d, sized=sized, theta=theta, seed=seed)
    if dtype == torch.float64:
        grads = grads.double()
    residual = None
    if dtype == torch.bfloat16:
        residual = (masks - masks.bfloat16().float()).bfloat16()
    return masks.to(dtype), grads, Columns(**vectors), residual


def cut(d, count):
    """Borders of so many shards, ragged; from the third on one is empty."""
    borders = [0, *(d * k // count + 3 for k in range(1, count)), d]
    return borders if count < 3 else [*borders[:2], *borders[1:-2], d]


def staged(masks, grads, columns, residual, spec, count=1, state=None, backend=None):
    """The step in stages over ``count`` shards, whose sums are added here; the particles change in place."""
    d = masks.shape[1]
    total = None if columns.sizes is None else columns.sizes.sum(dtype=torch.float64).reshape(1)
    shards = []
    for a, b in itertools.pairwise(cut(d, count)):
        part = Columns(*(t if t is None else t[a:b] for t in columns))
        here = masks[:, a:b], grads[:, a:b], part, None if residual is None else residual[:, a:b]
        shards.append((*here, Shard(d, total, a)))

    def added(stage):
        parts = [stage(*shard) for shard in shards]
        return sum(parts[1:], parts[0])

    def over(stage, *more):
        return lambda m, g, c, r, s: stage(Step(m, g, spec, c, r, state), s, *more, backend=backend)

    whole = shards[0][-1]
    if state is None:
        sums = added(lambda m, g, c, r, s: stages.measure(m, spec, c, residual=r, backend=backend))
        state = stages.stats(sums, spec, whole, backend=backend)
    lean = added(over(stages.sample))
    sums = added(over(stages.sums, lean))
    plan = stages.plan(state, lean, sums, spec, whole, backend=backend)
    moved = added(over(stages.apply_, plan))
    return stages.stats(moved, spec, whole, cosines=plan.cosines, backend=backend)


def fused(masks, grads, columns, residual, spec, state=None, backend=None):
    options = spec._asdict()
    row = options.pop("only")
    return transition_(
        masks, grads, **columns._asdict(), **options, state=state, residual=residual, row=None if row < 0 else row,
        backend=backend,
    )  # fmt: skip


def compare(n, d, dtype, sized, options, count, backend=None, bad=None):
    """Staged against fused: (particles and stats) of each."""
    spec = TransitionSpec(**{**STEP, "seed": 3, "step_index": 5, **options})
    results = []
    for run in (fused, lambda *a, **k: staged(*a, count=count, **k)):
        masks, grads, columns, residual = start(n, d, dtype, sized)
        if spec.only >= 0:
            grads = grads[:1]
        if bad is not None:
            grads[bad, 4] = math.nan
        first = run(masks, grads, columns, residual, spec, backend=backend)
        second = run(masks, grads.flip(1), columns, residual, spec._replace(step_index=6), state=first, backend=backend)
        results.append((masks, residual, first, second))
    return results


def assert_equal(a, b):
    (masks, residual, *stats), (others, other_residual, *other_stats) = a, b
    assert torch.equal(masks, others)
    assert residual is None or torch.equal(residual, other_residual)
    for one, other in zip(stats, other_stats, strict=True):
        for name, x, y in zip(TransitionStats._fields, one, other, strict=True):
            assert torch.equal(x, y) or torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), name


def assert_close(a, b, move, stat):
    (masks, residual, *stats), (others, other_residual, *other_stats) = a, b
    masks, others = (
        m.double() if r is None else m.double() + r.double() for m, r in ((masks, residual), (others, other_residual))
    )
    assert (masks - others).abs().max() <= move
    for one, other in zip(stats, other_stats, strict=True):
        for name, x, y in zip(TransitionStats._fields, one, other, strict=True):
            assert torch.equal(x.isnan(), y.isnan()), name
            x, y = x.nan_to_num(7.0), y.nan_to_num(7.0)
            assert (x - y).abs().max() <= stat * y.abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_one_shard_is_the_fused_op_bit_for_bit(dtype, sized, options):
    for n, d in ((5, 2100), (1, 70), (7, 33)):
        assert_equal(*compare(n, d, dtype, sized, options, 1, backend="cpp"))


@pytest.mark.parametrize("nonfinite", ["skip", "hold"])
@pytest.mark.parametrize(("bad", "row"), [(None, 2), (0, 2), (1, -1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_and_gradients_that_are_not_finite(dtype, nonfinite, bad, row):
    options = {"nonfinite": nonfinite, "only": row, "target_density": 0.5, "consensus": 0.3}
    for backend in ("cpp", "reference"):
        ours = compare(5, 700, dtype, True, options, 1, backend=backend, bad=bad)
        if backend == "cpp":
            assert_equal(*ours)
        largest = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 2e-5}[dtype]
        assert_close(*ours, largest, 1e-4)
        assert_close(*compare(5, 700, dtype, True, options, 3, backend=backend, bad=bad), largest, 1e-4)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_shards_in_fp64(count, sized, options):
    for n, row in ((5, -1), (1, -1), (5, 2)):
        assert_close(*compare(n, 300, torch.float64, sized, {**options, "only": row}, count), 2e-12, 1e-10)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("options", OPTIONS[::3])
def test_shards_in_fewer_bytes(count, sized, options, backend):
    assert_close(*compare(5, 2100, torch.float32, sized, options, count, backend=backend), 3e-6, 2e-4)
    assert_close(*compare(5, 2100, torch.bfloat16, sized, options, count, backend=backend), 3e-5, 2e-4)
    a, b = compare(5, 2100, torch.float16, sized, options, count, backend=backend)
    # Random bits are those of the whole: what differs lies where rounding turns from one side to the other.
    assert (a[0] != b[0]).double().mean() < 5e-3
    assert_close(a, b, 2e-3, 1e-3)


@pytest.mark.parametrize("n", [3, 1])
def test_backends_may_be_mixed(n):
    """The sums of one backend mean the same to the plan of another."""
    spec = TransitionSpec(**STEP, target_density=0.5, consensus=0.3)
    masks, grads, columns, _ = start(n, 500, torch.float32, sized=True)
    shard = Shard(500, columns.sizes.sum(dtype=torch.float64).reshape(1))
    found = {}
    for backend in ("cpp", "reference"):
        state = stages.stats(stages.measure(masks, spec, columns, backend="cpp"), spec, shard, backend=backend)
        step = Step(masks, grads, spec, columns, state=state)
        lean = stages.sample(step, shard, backend="cpp")
        sums = stages.sums(step, shard, lean, backend="cpp")
        found[backend] = (*state, *stages.plan(state, lean, sums, spec, shard, backend=backend))
        own = stages.sums(step, shard, lean, backend="reference")
        counted = torch.ones_like(sums, dtype=torch.bool)
        for k in (0, 2, 3, 5) if n > 1 else ():
            counted[8 + k * n : 8 + (k + 1) * n].triu_()
        assert torch.allclose(own[counted], sums[counted], rtol=1e-4, atol=1e-3)
    for a, b in zip(found["cpp"], found["reference"], strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


# Sizes of every tiling, with products in the pass and without, one slot and several; interpreted, each takes its time.
TRITON = [(3, 130, True, torch.float32), (3, 130, False, torch.float16), (9, 70, False, torch.bfloat16),
          (20, 70, True, torch.float16), (40, 40, False, torch.float32), (130, 40, True, torch.float32),
          (2, 5001, False, torch.float16)]  # fmt: skip


@pytest.mark.parametrize(
    ("size", "options", "count"), pairwise(TRITON, [OPTIONS[3], {**OPTIONS[15], "only": 1}, {}], [1, 3])
)
def test_triton(size, options, count):
    pytest.importorskip("triton")
    n, d, sized, dtype = size
    spec = TransitionSpec(**{**STEP, "seed": 3, **options})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for run, backend in ((staged, where_present("triton")), (fused, "reference")):
        masks, grads, columns, residual = start(n, d, dtype, sized)
        grads = grads[:1] if spec.only >= 0 else grads
        masks, grads, *vectors, residual = (
            t if t is None else t.to(device) for t in (masks, grads, *columns, residual)
        )
        more = {"count": count} if run is staged else {}
        results.append((masks, residual, run(masks, grads, Columns(*vectors), residual, spec, backend=backend, **more)))
    if dtype == torch.float16:  # of other random bits, about half would differ
        assert (results[0][0] != results[1][0]).double().mean() < 0.03
    assert_close(*results, {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 3e-5}[dtype], 1e-3)


def test_the_plan_raises_before_anything_moves():
    spec, shard = TransitionSpec(**STEP), Shard(50)
    masks, grads, columns, _ = start(3, 50, torch.float32)
    grads[1, 3] = math.inf
    state = stages.stats(stages.measure(masks, spec, columns), spec, shard)
    step = Step(masks, grads, spec, columns, state=state)
    lean = stages.sample(step, shard)
    sums = stages.sums(step, shard, lean)
    with pytest.raises(ValueError, match=r"non-finite ones in particles \[1\]"):
        stages.plan(state, lean, sums, spec, shard)


def test_rows_of_zeros_stay():
    masks, grads, columns, _ = start(3, 60, torch.float32)
    masks[1] = 0.0
    spec = TransitionSpec(**STEP, target_density=0.5, consensus=0.3)
    for backend in ("cpp", "reference"):
        moved = masks.clone()
        staged(moved, grads, columns, None, spec, count=2, backend=backend)
        assert torch.equal(moved[1], masks[1])
        assert not torch.equal(moved[0], masks[0])


def test_bad_arguments():
    masks, grads, columns, _ = start(3, 50, torch.float32, sized=True)
    spec, shard = TransitionSpec(**STEP), Shard(50, torch.tensor([100.0]).double())
    state = stages.stats(stages.measure(masks, spec, columns), spec, shard)
    step = Step(masks, grads, spec, columns, state=state)
    lean = stages.sample(step, shard)
    for call, message in (
        (lambda: stages.sample(step, Shard(50)), "shard.total: wanted the sum of all sizes, got None"),
        (lambda: stages.sample(step._replace(columns=Columns()), shard), "shard.total: wanted None without sizes"),
        (lambda: stages.sample(step, shard._replace(first_column=1)),
         "shard.first_column: wanted 0 … 0, as 50 of 50 columns are here, got 1"),
        (lambda: stages.sample(step._replace(spec=spec._replace(only=3)), shard), "spec.only: wanted 0 … 2, got 3"),
        (lambda: stages.sample(step._replace(spec=spec._replace(radius=1)), shard), "radius: wanted a number > 1"),
        (lambda: stages.sums(step, shard, lean[:1]), r"sample: wanted shape \(2, 3\)"),
        (lambda: stages.plan(state, lean, lean, spec, shard), r"sums: wanted shape \(8, 3\), got \(2, 3\)"),
        (lambda: stages.stats(lean, spec, shard), r"sums: wanted shape \(7, 3\), got \(2, 3\)"),
        (lambda: stages.stats(lean, spec, Shard(0)), "wanted"),
        (lambda: stages.measure(masks[0], spec), r"masks: wanted shape \(n ≥ 1, d ≥ 0\), got \(50,\)"),
        (lambda: stages.measure(masks, spec._replace(kernel="weighted_rbf")), "saliency: wanted"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="state: wanted TransitionStats, got NoneType"):
        stages.sample(step._replace(state=None), shard)
    with pytest.raises(TypeError, match="sums: wanted float64, got float32"):
        stages.stats(lean.float(), spec, shard)


def two_steps(masks, grads, theta):
    spec, shard, columns = TransitionSpec(**STEP, nonfinite="hold"), Shard(masks.shape[1]), Columns(theta)
    state = stages.stats(stages.measure(masks, spec, columns), spec, shard)
    for _ in range(2):
        step = Step(masks, grads, spec, columns, state=state)
        lean = stages.sample(step, shard)
        plan = stages.plan(state, lean, stages.sums(step, shard, lean), spec, shard)
        state = stages.stats(stages.apply_(step, shard, plan), spec, shard, cosines=plan.cosines)
    return state


def test_compiles_into_one_graph():
    masks, grads, columns, _ = start(3, 40, torch.float32)
    eager, compiled = masks.clone(), masks.clone()
    expected = two_steps(eager, grads, columns.weights)
    found = torch.compile(two_steps, fullgraph=True, backend="aot_eager")(compiled, grads, columns.weights)
    assert torch.equal(eager, compiled)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_nothing_waits(dtype):
    """On fake tensors: everything stays on their device, and the host reads nothing."""
    pytest.importorskip("triton")
    from .recorder import recorded

    spec = TransitionSpec(**STEP, target_density=0.5, consensus=0.3, kernel="weighted_rbf", nonfinite="skip")
    with recorded() as recording, mock.patch.object(stages.arguments, "check_values"):
        masks, grads = torch.empty(3, 40, dtype=dtype, device="cuda:1"), torch.empty(3, 40, device="cuda:1")
        columns = Columns(*torch.empty(3, 40, device="cuda:1"))
        total = columns.sizes.sum(dtype=torch.float64).reshape(1)
        residual = torch.zeros_like(masks) if dtype == torch.bfloat16 else None
        shard = Shard(40, total)
        recording.waits.clear()
        given = implementation("measure")(masks, *columns, residual, *spec, "")
        state = [*implementation("stats")(given, *spec, *shard, ""), given[0]]
        common = masks, grads, *columns, residual, state, *spec, *shard
        lean = implementation("sample")(*common, "")
        sums = implementation("sums")(*common, lean, "")
        coefficients, _ = implementation("plan")(state, lean, sums, *spec, *shard, "")
        moved = implementation("apply_")(*common, coefficients, "")
        assert str(moved.device) == "cuda:1"
        assert moved.shape == (7, 3)
    assert recording.waits == []
    launched = [launch.constants["STAGE"] for launch in recording.launches]
    passes = ["measure", "prepare", "prepare", "reduce", "prepare", "update"]
    assert launched == ([] if dtype == torch.float64 else passes)
    assert {launch.device for launch in recording.launches} <= {torch.device("cuda:1")}


def implementation(stage):
    """What is registered for CUDA, to be called on fake tensors."""
    return by_name(f"sfpk::transition_{stage}", _stage_ops.IMPLEMENTATIONS[stage][0])
