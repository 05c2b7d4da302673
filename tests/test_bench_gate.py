"""The suite's gate and clock: who is timed, in which order, and what a run records."""

from dataclasses import replace
from itertools import pairwise

import torch

from benchmarks import clock as timing
from benchmarks import gate, record, suite
from benchmarks.clock import Effort, interleave, quantiles, rotating
from benchmarks.registry import NAIVE, Case, Op, Provider, all_ops
from benchmarks.suite import Job, Plan

CPU = torch.device("cpu")


class Counted:
    """A provider's call that counts how often it ran."""

    def __init__(self, result):
        self.result, self.calls = result, 0

    def __call__(self):
        self.calls += 1
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def op_of(**results):
    """An op whose right result is 1, and the calls of its providers."""
    calls = {name: Counted(result) for name, result in results.items()}

    def build(shape, device):
        return Case(shape, None, 100, lambda result: None if result == 1 else f"{result} instead of 1", 0)

    def provider(name):
        return Provider(name, lambda case: calls[name])

    shapes = dict.fromkeys(("quick", "default", "full"), ({"d": 10},))
    return Op("toy", "a toy", shapes, build, tuple(map(provider, calls))), calls


def run_toy(monkeypatch, op, **options):
    monkeypatch.setattr(suite, "all_ops", lambda: {op.name: op})
    said = []
    kept = []
    plan = Plan(CPU, "quick", groups=("ops",), **options)
    lines = suite.run(plan, ["sfpk", "bench"], said.append, lambda facts, new: kept.append(new))
    assert [line for new in kept for line in new] == lines
    assert len(kept) == 2, "a case at a time"
    assert record.check_line(lines[0])["kind"] == "run"
    return {row["provider"]: record.check_line(row) for row in lines[1:]}, said


def test_a_wrong_provider_is_refused_and_not_timed(monkeypatch):
    op, calls = op_of(**{NAIVE: 1, "rival": 2, "ours[cpp]": 1})
    rows, said = run_toy(monkeypatch, op)
    assert rows["rival"]["status"] == "wrong"
    assert rows["rival"]["reason"] == "2 instead of 1"
    assert rows["rival"]["median_s"] is None
    assert calls["rival"].calls == 1, "the gate's call and no other"
    assert any("rival: WRONG, not timed" in text for text in said)
    for name in (NAIVE, "ours[cpp]"):
        assert rows[name]["status"] == "ok"
        assert rows[name]["p20_s"] <= rows[name]["median_s"] <= rows[name]["p80_s"]
        assert calls[name].calls == 1 + 1 + rows[name]["rounds"], "gate, one untimed round, the timed ones"
    expected = rows[NAIVE]["median_s"] / rows["ours[cpp]"]["median_s"]
    assert rows["ours[cpp]"]["ratio_to_naive"] == expected
    assert rows["ours[cpp]"]["bytes"] == 100
    bandwidth = rows["ours[cpp]"]["extra"]["copy_bytes_per_s"]
    assert rows["ours[cpp]"]["ceiling_share"] == 100 / rows["ours[cpp]"]["median_s"] / bandwidth


def test_errors_are_wrong_for_ours_and_missing_for_others(monkeypatch):
    op, _ = op_of(**{"rival": RuntimeError("no compiler\nmore"), "ours[cpp]": RuntimeError("oh"), NAIVE: MemoryError()})
    rows, _ = run_toy(monkeypatch, op)
    assert (rows["rival"]["status"], rows["rival"]["reason"]) == ("missing", "raised RuntimeError: no compiler")
    assert (rows["ours[cpp]"]["status"], rows["ours[cpp]"]["reason"]) == ("wrong", "raised RuntimeError: oh")
    assert (rows[NAIVE]["status"], rows[NAIVE]["reason"]) == ("missing", "out of memory")


def test_who_cannot_run_is_missing_with_its_reason():
    provider = Provider("rival", lambda case: 1 / 0, lambda shape, device: f"no {device.type} here")
    case = Case({"d": 1}, None, 1, lambda result: None, 0)
    assert gate.judge(case, provider, CPU) == gate.Verdict("missing", "no cpu here")


def test_the_time_limit_leaves_rows_that_say_so(monkeypatch):
    op, calls = op_of(**{NAIVE: 1, "ours[cpp]": 2})
    rows, _ = run_toy(monkeypatch, op, time_limit=1e-9)
    assert {row["reason"] for row in rows.values()} == {"the time limit was reached"}
    assert not any(call.calls for call in calls.values())
    job = Job(op, {"d": 10}, {"ours[cpp]": gate.Verdict("wrong", "2 instead of 1")})
    job.refuse("the time limit was reached")
    assert job.verdicts["ours[cpp]"].status == "wrong", "what is wrong stays wrong"


def test_providers_take_turns_in_an_order_that_turns():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}

    def clock(call):
        call()
        return 1e-3

    times = interleave(calls, clock, Effort(4, 1.0))
    assert order == list("abc" + "abc" + "bca" + "cab" + "abc")
    assert times == dict.fromkeys("abc", [1e-3] * 4)


def test_slow_providers_take_part_in_fewer_rounds_spread_evenly():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("slow", "fast")}

    def clock(call):
        call()
        return 10.0 if order[-1] == "slow" else 1e-3

    times = interleave(calls, clock, Effort(9, 1.0))
    assert {name: len(seconds) for name, seconds in times.items()} == {"slow": timing.FEWEST, "fast": 9}
    rounds = [i for i, name in enumerate(order[2:]) if name == "slow"]
    gaps = [b - a for a, b in pairwise(rounds)]
    assert min(gaps) >= 3
    assert interleave({}, clock, Effort(9, 1.0)) == {}


def test_rotating_takes_the_copies_in_turn():
    call = rotating([lambda i=i: i for i in range(3)])
    assert sorted(call() for _ in range(6)) == [0, 0, 1, 1, 2, 2]
    one = Counted(5)
    assert rotating([one]) is one


def test_quantiles():
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 1.8, 4.2)


def test_the_registry_has_what_each_op_needs():
    ops = all_ops()
    for op in ops.values():
        for size in ("quick", "default", "full"):
            assert op.shapes_for(size, CPU)
            assert op.shapes_for(size, torch.device("cuda"))
        assert set(map(str, op.shapes_for("default", CPU))) <= set(map(str, op.shapes_for("full", CPU)))
        names = [provider.name for provider in op.providers]
        assert len(set(names)) == len(names)
        assert any(name.startswith("ours") for name in names)
    for name in ("transition", "selection", "apply", "step"):
        providers = [provider.name for provider in ops[name].providers]
        assert NAIVE in providers
        for backend in ("cpp", "triton"):
            assert f"ours[{backend}]" in providers
    rivals = {p.name for op in ops.values() for p in op.providers}
    assert {"eager", "torch.compile", "keops + eager", "torch.topk", "np.partition", "torch.nn.utils.prune"} <= rivals


def test_every_cpu_provider_agrees_with_the_reference():
    """But torch.compile, which takes seconds; a tiny case of every op."""
    for op in all_ops().values():
        shape = op.shapes["quick"][0]
        case = op.build({**shape, "d": 3000} if "steps" not in shape else shape, CPU)
        for provider in op.providers:
            if provider.name != "torch.compile":
                verdict = gate.judge(case, provider, CPU)
                assert verdict.status != "wrong", (op.name, provider.name, verdict.reason)
                if provider.name in (NAIVE, "ours[cpp]", "ours[reference]", "np.partition", "torch.topk"):
                    assert verdict.status == "ok", (op.name, provider.name, verdict.reason)


def test_the_gate_sees_small_errors():
    """A result off in one entry, or a threshold off by one rank, is wrong."""
    ops = all_ops()
    for name in ("apply", "apply_cut", "polarize_apply", "mask_gradient"):
        case = ops[name].build({"n": 2, "d": 3000}, CPU)
        call = next(p for p in ops[name].providers if p.name == "ours[reference]").make(case)
        result = call().clone()
        assert case.check(result) is None
        result[1, 7] += 1e-3
        assert "1 of 6,000 entries differ" in case.check(result)
    case = ops["selection"].build(ops["selection"].shapes["quick"][0], CPU)
    values, k = case.inputs.values, case.inputs.k
    assert case.check(values.topk(k).values) is None
    assert "the threshold" in case.check(values.topk(k + 1).values[:, 1:])
    assert "the threshold" in case.check(values.topk(k + 1).values[:, -1])
    case = ops["transition"].build({"n": 3, "d": 3000}, CPU)
    moved = ops["transition"].providers[0].make(case)()
    assert case.check(moved) is None
    assert "the move is off" in case.check(case.inputs.masks)
    assert "shape" in case.check(moved[:2])


def test_the_gate_sees_a_model_that_is_shrunk_wrongly():
    """Outputs of the dense model, of another one, and of one that is larger than was asked for."""
    op = all_ops()["shrunk"]
    case = op.build(op.shapes["quick"][0], CPU)
    dense, half, quarter = (provider.make(case)() for provider in op.providers)
    assert case.shape["macs"] > 1e7
    assert [case.check(output) for output in (dense, half, quarter)] == [None] * 3
    for output, logits in ((half, dense.logits), (quarter, half.logits), (dense, half.logits)):
        assert "differs from the masked model by" in case.check(replace(output, logits=logits))
    sizes = [sum(p.numel() for p in case.inputs.models[removed].parameters()) for removed in (0.0, 0.5, 0.75)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_case_that_lacks_a_package_is_missing_and_the_run_goes_on(monkeypatch):
    def build(shape, device):
        raise ImportError("structured pruning: wanted torch-pruning\nmore")

    op, _ = op_of(**{NAIVE: 1, "ours": 1})
    rows, _ = run_toy(monkeypatch, replace(op, build=build))
    assert {row["status"] for row in rows.values()} == {"missing"}
    assert rows["ours"]["reason"] == "structured pruning: wanted torch-pruning"
