"""Structured runs that are saved, altered, interrupted: they go on bit for bit, or are refused."""

from pathlib import Path

import pytest
import torch

import sfpk_kernels
from sfpk_kernels import SFPKConfig, SFPKPruner

from .interruptions import every_moment
from .snapshot import Snapshot
from .structured_nets import Scaled
from .structured_runs import images, mlp, structured
from .test_states import equal, refused_or_whole

pytest.importorskip("torch_pruning")


@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.2, "vote": "hard"}, {"vote": "masked", "merge": 0.5}], ids=str)
def test_a_resumed_run_goes_on_bit_for_bit(update, options, tmp_path):
    model, data, x = mlp(), [(torch.randn(8, 6), torch.randint(0, 4, (8,))) for _ in range(6)], torch.randn(2, 6)
    config = structured(granularity="neuron", n_particles=3, n_steps=6, update=update, **options)
    waypoints = [] if options.get("vote") == "masked" else [0.2]

    def make():
        return SFPKPruner(model, config=config, example_inputs=x, waypoints=waypoints)

    whole = make()
    result = whole.run(data)
    first = make()
    for number in range(3):
        first.step([data[(3 * number + i) % 6] for i in range(3)])
        if number == 1:
            first.save(tmp_path / "run")
    second = make()
    again = second.run(data, resume=tmp_path / "run") if not options else None
    second = make()
    second.load_state_dict(first.state_dict())
    assert equal(second.state_dict(), first.state_dict())
    if again is not None:
        assert again.history[-1].step == 6
    batches = [[data[(3 * number + i) % 6] for i in range(3)] for number in range(6)]
    for pruner in (first, second):
        for number in range(3, 6):
            pruner.step(batches[number][: len(pruner.particles)])
    assert torch.equal(first.particles, second.particles)
    assert torch.equal(first.result().score, second.result().score)
    assert torch.equal(first.result().keep, second.result().keep)
    if not options:
        assert torch.equal(first.particles, result.particles)
        assert first.result().mask == result.mask
        assert [w.mask for w in second.result().waypoints] == [w.mask for w in result.waypoints]


def test_another_structure_is_refused():
    model, x = mlp(), torch.randn(2, 6)
    config = structured(granularity="neuron")
    state = SFPKPruner(model, config=config, example_inputs=x).state_dict()
    SFPKPruner(model, config=config, example_inputs=x).load_state_dict(state)
    words = "state: structure: wanted the same channels, heads and neurons at the same costs"
    with pytest.raises(ValueError, match=words):
        SFPKPruner(model, config=config, example_inputs=torch.randn(3, 6)).load_state_dict(state)
    with pytest.raises(ValueError, match="names"):
        SFPKPruner(model, config=config, example_inputs=x, ignored_layers=["3"]).load_state_dict(state)
    with pytest.raises(ValueError, match="names"):
        SFPKPruner(model, config=SFPKConfig(0.5)).load_state_dict(state)


def test_altered_states():
    model, x = mlp(), torch.randn(2, 6)
    data = [(torch.randn(8, 6), torch.randint(0, 4, (8,))) for _ in range(6)]
    config = structured(granularity="neuron", n_particles=2, n_steps=5, momentum=0.1)

    def make():
        return SFPKPruner(model, config=config, example_inputs=x, waypoints=[0.1, 0.4])

    first = make()
    for number in range(3):
        first.step(data[number : number + 2])
    refused_or_whole(
        first.state_dict(), make, SFPKPruner.load_state_dict, SFPKPruner.state_dict, lambda p: p.run(data), 1, 150
    )


@pytest.mark.parametrize("every", [43, pytest.param(1, marks=pytest.mark.slow)])
def test_interrupted_anywhere_it_goes_on_or_says_that_it_cannot(every):
    """In the parts that such a run has alone; a norm over a pruned width has another forward meanwhile."""
    torch.manual_seed(1)
    model, x, data = Scaled(), torch.randn(2, 3, 8, 8), images()
    config = structured(n_steps=3, n_particles=2, update="gauss_seidel")
    whole = SFPKPruner(model, config=config, example_inputs=x, waypoints=[0.3])
    whole.step(data[:2])
    state, snapshot = whole.state_dict(), Snapshot(model)
    for number in (1, 2):
        whole.step(data[2 * number :][:2])
    pruner, counts = SFPKPruner(model, config=config, example_inputs=x, waypoints=[0.3]), {True: 0, False: 0}
    files = [
        "structure/gates", "structure/sums", "structure/select", "search/structured/energy",
        "search/structured/polarizer", "search/structured/coordinates", "modeling/state",
    ]  # fmt: skip

    def work():
        pruner.load_state_dict(state)
        pruner.step(data[2:4])

    first = Path(sfpk_kernels.__file__).parent
    for raised in every_moment(work, [str(first / f"{name}.py") for name in files], step=every):
        assert type(raised) is KeyboardInterrupt
        del raised
        snapshot.check()
        assert all("forward" not in module.__dict__ for module in model.modules())
        broken = pruner._attempt._broken is not None
        counts[broken] += 1
        if broken:
            with pytest.raises(RuntimeError, match="this run cannot go on"):
                pruner.state_dict()
            continue
        for number in range(len(pruner.history), 3):
            pruner.step(data[2 * number :][:2])
        assert torch.equal(pruner.particles, whole.particles)
        assert pruner.result().mask == whole.result().mask
    assert min(counts.values()) * every > 140, counts
