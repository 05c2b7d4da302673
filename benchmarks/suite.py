"""One run of the suite: gate and warm all shapes, then time them one after the other, providers interleaved."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import ceilings, gate, record
from .clock import Effort, clock_of, interleave, quantiles, rotating
from .gate import Verdict
from .record import Line
from .registry import NAIVE, Case, Op, Shape, all_ops

END_TO_END = "benchmarks.end_to_end"
EFFORTS = {
    "cpu": {"quick": Effort(3, 0.05), "default": Effort(9, 1.0), "full": Effort(15, 4.0)},
    "cuda": {"quick": Effort(5, 0.05), "default": Effort(50, 0.5), "full": Effort(100, 2.0)},
}
COPIES = 16  # of the inputs, at most
PAST_CACHES = 3  # times the L2
GATE_SHARE = 0.6  # of the time limit: what was judged by then still gets timed
COPY = "copy ceiling"

OK = Verdict("ok")

Say = Callable[[str], None]


@dataclass
class Job:
    """One op at one shape: verdicts from the gate, later the times."""

    op: Op
    shape: Shape
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    case: Case | None = None  # kept between gate and clock where memory allows
    bytes_moved: int = 0

    def refuse(self, reason: str) -> None:
        """Time none of its providers; those already found wrong stay wrong."""
        for provider in self.op.providers:
            if self.verdicts.get(provider.name, OK) == OK:
                self.verdicts[provider.name] = Verdict("missing", reason)


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    device: torch.device
    size: str = "default"
    ops: tuple[str, ...] | None = None  # names; None for all
    groups: tuple[str, ...] = record.GROUPS
    time_limit: float = float("inf")  # seconds; what has not begun by then is reported as missing

    @property
    def effort(self) -> Effort:
        """How often calls are repeated."""
        return EFFORTS[self.device.type][self.size]

    @property
    def complete(self) -> bool:
        """Whether everything is measured."""
        return self.ops is None and set(self.groups) == set(record.GROUPS)

    def chosen(self) -> list[Op]:
        """The ops to measure."""
        return [op for op in all_ops().values() if op.group in self.groups and (not self.ops or op.name in self.ops)]


def run(
    plan: Plan,
    command: Sequence[str],
    say: Say = lambda text: None,
    keep: Callable[[Line, list[Line]], None] = lambda facts, lines: None,
) -> list[Line]:
    """Measure; the run's line and its rows.

    ``keep`` gets the run's line and the lines that are new, as they come, so that a run that is cut short has not been
    in vain.
    """
    started = time.monotonic()
    deadline = started + plan.time_limit
    say(f"ceilings of {plan.device}")
    limits = ceilings.measure(plan.device, plan.size == "quick", plan.effort)
    facts = record.facts(
        plan.device, command=command, size=plan.size, complete=plan.complete, ceilings=limits
    )  # fmt: skip
    keep(facts, [facts])
    rows: list[Line] = []

    def add(new: list[Line]) -> None:
        keep(facts, new)
        rows.extend(new)

    jobs = [Job(op, shape) for op in plan.chosen() for shape in op.shapes_for(plan.size, plan.device)]
    gate_jobs(jobs, plan.device, started + GATE_SHARE * plan.time_limit, say)
    copy = ceilings.copy_ceiling(plan.device, plan.size == "quick")
    for job in jobs:
        say(f"time {job.op.name} {_words(job.shape)}")
        if time.monotonic() > deadline:
            job.refuse("the time limit was reached")
        try:
            times = measure(job, plan, copy)
        except (torch.OutOfMemoryError, MemoryError):
            job.refuse("out of memory")
            times = {}
        add(rows_of(job, times, facts["id"]))
        job.case = None
    # Without --op, and as one of the ops by name.
    if "end_to_end" in plan.groups and (plan.ops is None or "end_to_end" in plan.ops):
        add(end_to_end(facts["id"], plan, deadline, say))
    return [facts, *rows]


def gate_jobs(jobs: Sequence[Job], device: torch.device, deadline: float, say: Say) -> None:
    """Judge every provider of every job, which also warms all shapes before the first is timed."""
    kept, most = 0, kept_bytes(device)
    for job in jobs:
        if time.monotonic() > deadline:
            break
        say(f"gate {job.op.name} {_words(job.shape)}")
        try:
            case = job.op.build(job.shape, device)
        except (torch.OutOfMemoryError, MemoryError):
            job.refuse("out of memory")
            continue
        except ImportError as error:
            job.refuse(str(error).splitlines()[0])
            continue
        job.shape, job.bytes_moved = case.shape, case.bytes_moved
        job.verdicts = gate.judge_all(case, job.op.providers, device)
        case.forget()
        for name, verdict in job.verdicts.items():
            if verdict.status == "wrong":
                say(f"  {name}: WRONG, not timed: {verdict.reason}")
        if kept + case.input_bytes < most:
            kept += case.input_bytes
            job.case = case


def kept_bytes(device: torch.device) -> int:
    """How many bytes of inputs may wait between gate and clock."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 5
    return 2 << 30


def measure(job: Job, plan: Plan, copy: ceilings.Ceiling) -> dict[str, list[float]]:
    """Seconds per round of the providers that passed the gate, and of the copy that took turns with them."""
    passed = [p for p in job.op.providers if job.verdicts.get(p.name) == OK]
    if not passed:
        return {}
    cases = [job.case or job.op.build(job.shape, plan.device)]
    if plan.device.type == "cuda":
        cache = torch.cuda.get_device_properties(plan.device).L2_cache_size
        copies = min(COPIES, -(-PAST_CACHES * cache // max(1, cases[0].input_bytes)))
        cases += [job.op.build(job.shape, plan.device) for _ in range(copies - 1)]
    calls = {p.name: rotating([p.make(case) for case in cases]) for p in passed}
    times = interleave({COPY: copy.call, **calls}, clock_of(plan.device), plan.effort)
    # Bandwidth instead of seconds: the copy's size is its own.
    times[COPY] = [copy.amount / seconds for seconds in times[COPY]]
    return times


def rows_of(job: Job, times: dict[str, list[float]], run_id: str) -> list[Line]:
    """A row per provider."""
    naive = quantiles(times[NAIVE])[0] if NAIVE in times else None
    rows = []
    for provider in job.op.providers:
        verdict = job.verdicts.get(provider.name, Verdict("missing", "the time limit was reached"))
        values: dict[str, Any] = {"status": verdict.status, "reason": verdict.reason}
        values["bytes"] = job.bytes_moved or None
        if provider.name in times:
            bandwidth = quantiles(times[COPY])[0]
            median, low, high = quantiles(times[provider.name])
            values.update(rounds=len(times[provider.name]), median_s=median, p20_s=low, p80_s=high)
            values["ratio_to_naive"] = naive / median if naive else None
            # Of a run over steps most is forward and backward, which no copy bounds, as calls of models.
            if job.bytes_moved and "steps" not in job.shape:
                values["ceiling_share"] = job.bytes_moved / median / bandwidth
                values["extra"] = {"copy_bytes_per_s": bandwidth}
        if job.op.axis:
            values["extra"] = {**values.get("extra", {}), "axis": job.op.axis}
        rows.append(record.row(run_id, job.op.group, job.op.name, job.shape, provider.name, **values))
    return rows


def end_to_end(run_id: str, plan: Plan, deadline: float, say: Say) -> list[Line]:
    """Rows of whole pruning steps, where the module that measures them is part of the installation."""
    if importlib.util.find_spec(END_TO_END) is None:
        return []
    module: Any = importlib.import_module(END_TO_END)
    rows = []
    for name in module.NAMES[plan.device.type][plan.size]:
        say(f"end to end {name}")
        shape: dict[str, Any] = {"model": name}
        try:
            if time.monotonic() > deadline:
                raise TimeoutError("the time limit was reached")
            quick = plan.size == "quick"
            found = dict(module.measure(name, quick=quick, device=plan.device.type, memory=not quick))
        except Exception as error:
            reason = f"raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"
            rows.append(record.row(run_id, "end_to_end", "end_to_end", shape, "ours", status="missing", reason=reason))
            continue
        rows += end_to_end_rows(run_id, found)
    return rows


def end_to_end_rows(run_id: str, found: dict[str, Any]) -> list[Line]:
    """The two rows, naive and ours, of one model's figures."""
    shape: dict[str, Any] = {
        name: found.pop(name) for name in ("model", "coordinates", "batch", "particles") if name in found
    }
    if not found.get("agrees", True):
        reason = f"differs from the naive step by {found['error']:.1e}"
        return [record.row(run_id, "end_to_end", "end_to_end", shape, "ours", status="wrong", reason=reason)]
    ours, naive = found.pop("seconds_per_step"), found.pop("naive_seconds_per_step", None)
    ratio = found.pop("ratio", naive / ours if naive else None)
    naive_extra = {"peak_bytes": found.pop("naive_peak_bytes", None)}
    rows = []
    if naive is not None:
        rows.append(record.row(run_id, "end_to_end", "end_to_end", shape, NAIVE, median_s=naive, ratio_to_naive=1.0,
                               extra=naive_extra))  # fmt: skip
    rows.append(record.row(run_id, "end_to_end", "end_to_end", shape, "ours", median_s=ours, ratio_to_naive=ratio,
                           extra=found))  # fmt: skip
    return rows


def _words(shape: Shape) -> str:
    return ", ".join(f"{name} = {value:,}" if isinstance(value, int) else f"{name} = {value}"
                     for name, value in shape.items())  # fmt: skip
