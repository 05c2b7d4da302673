"""The registry through pytest-benchmark: its tables and JSON, from the interleaved rounds of `python -m benchmarks`.

    python -m pytest benchmarks [--bench-size quick] [--benchmark-json FILE] [-k "selection"]

pytest-benchmark's own loop would time one provider after the other; see benchmarks/clock.py for why that is
not good enough. So all providers of a case are timed together when the first of its tests runs, and every test hands
its provider's rounds to pytest-benchmark.
"""

import math

import pytest
import torch

from benchmarks import ceilings, suite
from benchmarks.suite import COPY, Job, Plan


def pytest_generate_tests(metafunc):
    config = metafunc.config
    device = config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = Plan(torch.device(device), config.getoption("--bench-size"))
    jobs = [Job(op, shape) for op in plan.chosen() for shape in op.shapes_for(plan.size, plan.device)]
    cases = [(job, name) for job in jobs for name in (COPY, *(provider.name for provider in job.op.providers))]
    ids = [f"{job.op.name}-{'-'.join(str(value) for value in job.shape.values())}-{name}" for job, name in cases]
    metafunc.parametrize(("job", "name"), cases, ids=ids)


@pytest.fixture(scope="session")
def rounds(request):
    """Seconds by provider of a job, timed once; before the first, every selected job is judged and warmed."""
    config = request.config
    selected = [item.callspec.params["job"] for item in request.session.items if item.originalname == "test_provider"]
    jobs = list({id(job): job for job in selected}.values())
    device = config.getoption("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = Plan(torch.device(device), config.getoption("--bench-size"))
    suite.gate_jobs(jobs, plan.device, math.inf, print)
    copy = ceilings.copy_ceiling(plan.device, plan.size == "quick")
    measured = {}

    def of(job):
        if id(job) not in measured:
            times = suite.measure(job, plan, copy)
            job.case = None
            measured[id(job)] = {**times, COPY: [copy.amount / bandwidth for bandwidth in times.get(COPY, [])]}
        return measured[id(job)]

    return of


def test_provider(benchmark, rounds, job, name):
    times = rounds(job)
    verdict = job.verdicts.get(name)
    if verdict is not None and verdict.status == "missing":
        pytest.skip(verdict.reason)
    assert verdict is None or verdict.status == "ok", verdict.reason
    if not times[name]:
        pytest.skip("no provider could be timed")
    benchmark.group = f"{job.op.name}: " + ", ".join(f"{key} = {value}" for key, value in job.shape.items())
    benchmark.extra_info.update(bytes=job.bytes_moved, provider=name)
    benchmark._mode = "interleaved rounds"  # else pytest-benchmark warns that the fixture was not used
    statistics = benchmark._make_stats(iterations=1)  # no public way leads seconds measured elsewhere in here
    for seconds in times[name]:
        statistics.update(seconds)
