"""The sparsity that groups of channels, heads or neurons may have: in selection, search, settings, command."""

import copy
import json
import pickle

import pytest
import torch

from sfpk_kernels import MaskSet, SFPKConfig, SFPKPruner, baselines, prune
from sfpk_kernels.cli import main
from sfpk_kernels.structure import Costs, find_structure, select, shrink

from .structured_nets import make
from .structured_runs import images, mlp, structured

pytest.importorskip("torch_pruning")


def counts(structure, keep):
    return {group.name: int(keep[group.span].sum()) for group in structure.groups}


@pytest.mark.parametrize("name", ["plain", "residual", "concat", "two groups"])
def test_with_counted_channels_it_is_the_best_that_floors_and_ceilings_allow(name):
    """By brute force: the floors, then the best others whose group has not come to its ceiling."""
    model, x = make(name)
    structure = find_structure(model, x, check=False)
    costs = Costs(model, structure, (x,))
    generator = torch.Generator().manual_seed(3)
    for _ in range(8):
        score = torch.rand(structure.size, generator=generator)
        score[structure.groups[0].span] *= 0.1  # its floor holds it, the ceiling of the last holds that back
        score[structure.groups[-1].span] += 1
        first, last = structure.groups[0], structure.groups[-1]
        ranges = {first.name: (0.0, 0.5), last.name: (0.25, 1.0)}
        if first is last:
            ranges = {first.name: (0.25, 0.5)}
        found = select(structure, costs, score, 0.4, "channels", layer_sparsity=ranges)
        low = {g.name: 1 for g in structure.groups} | {first.name: round(0.5 * first.size)}
        high = {g.name: g.size for g in structure.groups} | {last.name: round(0.75 * last.size)}
        expected, order = set(), sorted(range(structure.size), key=lambda c: (-float(score[c]), c))
        for group in structure.groups:
            inside = [c for c in order if group.first <= c < group.first + group.size]
            expected |= set(inside[: low[group.name]])
        for layer in structure.layers:
            if not expected & set(layer.tolist()):
                expected.add(next(c for c in order if c in layer.tolist()))
        for c in order:
            group = structure.group_of(c)
            there = sum(group.first <= other < group.first + group.size for other in expected)
            if c not in expected and there < high[group.name] and len(expected) < round(0.6 * structure.size):
                expected.add(c)
        assert set(found.nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("name", ["plain", "residual", "concat", "chunk added", "squeeze-excite", "many groups"])
@pytest.mark.parametrize("round_to", [1, 2])
def test_within_their_ranges_at_every_budget(name, round_to):
    """Costs stay within the budget, nothing dies, and no single channel more would be allowed."""
    model, x = make(name)
    structure = find_structure(model, x, check=False)
    costs = Costs(model, structure, (x,))
    ranges = {"re:.*": (0.2, 0.8), structure.groups[0].name: (0.0, 0.5)}
    for seed, budget in enumerate(("params", "macs", "channels")):
        score = torch.rand(structure.size, generator=torch.Generator().manual_seed(seed))
        keep = select(structure, costs, score, 0.4, budget, round_to=round_to, layer_sparsity=ranges)
        assert costs.cost(keep, budget) <= round(0.6 * costs.dense[budget])
        assert shrink(model, structure, keep)(x).isfinite().all()
        for group in structure.groups:
            kept, highest = int(keep[group.span].sum()), 0.5 if group is structure.groups[0] else 0.8
            assert round((1 - highest) * group.size) <= kept <= round(0.8 * group.size)
            assert kept % round_to == 0
            if round_to == 1 and kept < round(0.8 * group.size):
                for coordinate in (~keep[group.span]).nonzero().flatten().tolist():
                    more = keep.clone()
                    more[group.first + coordinate] = True
                    assert costs.cost(more, budget) > round(0.6 * costs.dense[budget])


def test_a_layer_inside_of_a_group_lives_below_the_ceiling():
    """Where the best of the group leave a layer dead, one of that layer takes the place of the worst of them."""
    model, x = make("chunk added")
    structure = find_structure(model, x, check=False)
    costs = Costs(model, structure, (x,))
    for group in structure.groups:
        lowest = 1 - 2 / group.size
        for seed in range(10):
            score = torch.rand(structure.size, generator=torch.Generator().manual_seed(seed))
            keep = select(structure, costs, score, 0.0, "channels", layer_sparsity={group.name: (lowest, 1.0)})
            structure.check_keep(keep)
            assert int(keep[group.span].sum()) == 2


def test_names():
    """A module, one around it, an expression; a group has the names of all that compute it."""
    model, x = make("residual")  # stem and b are added
    structure = find_structure(model, x, check=False)
    costs, score = Costs(model, structure, (x,)), torch.ones(structure.size)
    dense = counts(structure, score > 0)
    for name in ("stem", "b", "re:.*tem", "re:b$"):
        keep = select(structure, costs, score, 0.0, "channels", layer_sparsity={name: (0.5, 1)})
        assert counts(structure, keep) == {**dense, "stem": 4}
    keep = select(structure, costs, score, 0.0, "channels", layer_sparsity={"re:": (0.5, 0.5)})
    assert counts(structure, keep) == {"stem": 4, "a": 3}
    both = {"stem": (0.25, 1), "b": (0.0, 0.25)}  # all that match
    assert counts(structure, select(structure, costs, score, 0.3, "macs", layer_sparsity=both))["stem"] == 6


@pytest.mark.parametrize(
    ("ranges", "error", "words"),
    [
        ({"fc": (0, 1)}, ValueError, "wanted names among stem, a, got 'fc'"),
        ({"re:(": (0, 1)}, ValueError, r"wanted a valid pattern, got 're:\(': "),
        ({"stem": (0.5, 1), "b": (0, 0.2)}, ValueError,
         r"wanted ranges that stem can have, of whose 8 channels at least 6 stay \(min_keep=1, round_to=1\), "
         r"got 'stem': \(0.5, 1.0\), 'b': \(0.0, 0.2\), by which at most 4 do"),
        ({"a": (1, 1)}, ValueError, "wanted ranges that a can have, of whose 6 .* at least 1 stay .* at most 0 do"),
        ({"a": (0.6, 0.5)}, ValueError, r"wanted a dict of ranges \(low, high\) .*, 0 ≤ low ≤ high ≤ 1, got 'a': "),
        ({"a": (0, 1.5)}, ValueError, "wanted a dict of ranges"),
        ({"a": (float("nan"), 1)}, ValueError, "wanted a dict of ranges"),
        ({"": (0, 1)}, ValueError, "wanted a dict of ranges"),
        ({"a": 0.5}, TypeError, "wanted a dict of ranges .*, got 'a': 0.5"),
        ({"a": (True, 1)}, TypeError, "wanted a dict of ranges"),
        ({"a": ("0", "1")}, TypeError, "wanted a dict of ranges"),
        ({3: (0, 1)}, TypeError, "wanted a dict of ranges .*, got the name 3"),
        ([("a", (0, 1))], TypeError, "wanted a dict of ranges .*, or None, got"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(ranges, error, words):
    model, x = make("residual")
    structure = find_structure(model, x, check=False)
    costs = Costs(model, structure, (x,))
    with pytest.raises(error, match=f"^layer_sparsity: {words}"):
        select(structure, costs, torch.ones(structure.size), 0.3, layer_sparsity=ranges)
    with pytest.raises(error, match=f"^layer_sparsity: {words}"):
        SFPKPruner(model, config=structured(0.3, layer_sparsity=ranges), example_inputs=x)
    with pytest.raises(error, match=f"^layer_sparsity: {words}"):
        baselines.structured_magnitude(model, 0.3, example_inputs=x, layer_sparsity=ranges)


def test_budgets_that_ranges_do_not_allow():
    model, x = make("residual")
    floor = structured(0.7, budget="channels", layer_sparsity={"stem": (0, 0.1), "re:a": (0, 0.4)})
    words = r"sparsity: wanted at most 0\.\d+ of the channels, .*, with layer_sparsity={'stem': .*}, got 0.7"
    with pytest.raises(ValueError, match=words):
        SFPKPruner(model, config=floor, example_inputs=x)
    ceiling = structured(0.2, budget="channels", layer_sparsity={"re:": (0.5, 1.0)})
    words = r"sparsity: wanted at least 0\.\d+ of the channels, which layer_sparsity={'re:': .*} demands, got 0.2"
    for call in (
        lambda: SFPKPruner(model, config=ceiling, example_inputs=x),
        lambda: baselines.structured_random(
            model, 0.2, budget="channels", example_inputs=x, layer_sparsity={"re:": (0.5, 1.0)}
        ),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError, match="^layer_sparsity: wanted None with granularity='weight', got {'0': "):
        SFPKPruner(model, config=SFPKConfig(0.5, layer_sparsity={"0": (0, 1)}))
    # Rounded to whole channels the same fraction everywhere is a little less than all of the budget.
    uniform = structured(0.5, budget="channels", n_steps=2, layer_sparsity={"re:": (0.5, 0.5)})
    result = prune(mlp(), rows(), config=uniform, example_inputs=torch.randn(2, 6))
    assert result.kept_of_groups() == {"0": (6, 12), "3": (5, 10)}


def rows():
    generator = torch.Generator().manual_seed(6)
    return [(torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)) for _ in range(6)]


@pytest.mark.parametrize("options", [{}, {"n_particles": 3, "vote": "hard", "merge": 0.5}], ids=str)
def test_a_run_holds_them_in_every_mask(options):
    """Binary particles, masks on the way, votes and the final mask; what is saved goes on bit for bit."""
    model, x = make("residual")
    config = structured(0.5, layer_sparsity={"stem": (0.25, 0.5), "re:a": (0.0, 0.7)}, **options)

    def fits(keep):
        stem, a = int(keep[:8].sum()), int(keep[8:].sum())
        assert 4 <= stem <= 6
        assert a >= 2
        return True

    def make_run():
        return SFPKPruner(model, config=config, example_inputs=x, waypoints=[0.1, 0.3], keep_scores=True)

    pruner, seen = make_run(), []
    polarize = pruner._run.polarizer.polarize
    pruner._run.polarizer.polarize = lambda *a, **k: (seen.append(polarize(*a, **k)), seen[-1])[1]
    result = pruner.run(images())
    assert len(seen) == 12
    assert all(fits(row) for keep in seen for row in keep.values)
    assert all(fits(result.keep_at(sparsity)) for sparsity in (0.1, 0.2, 0.3, 0.5))
    assert all(fits(result.coordinates.keep_of(result.vote(rule))) for rule in ("mean", "soft", "hard", "best"))
    assert fits(result.keep)
    assert result.costs_after["macs"] <= 0.5 * result.costs_before["macs"] + 0.5
    first, second = make_run(), make_run()
    for number in range(4):
        first.step([images()[(len(first.particles) * number + i) % 6] for i in range(len(first.particles))])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for one in (first, second):
        while not one.done:
            one.step(images()[: len(one.particles)])
    assert torch.equal(first.particles, second.particles)
    assert fits(second.result().keep)
    other = SFPKPruner(model, config=config.replace(layer_sparsity=None), example_inputs=x, waypoints=[0.1, 0.3])
    with pytest.raises(ValueError, match="layer_sparsity"):
        other.load_state_dict(first.state_dict())


def test_settings_go_through_files():
    given = {"re:layer4": [0.25, 1], "stem": (0, 0.5)}
    config = structured(layer_sparsity=given)
    assert config.to_dict()["layer_sparsity"] == {"re:layer4": (0.25, 1.0), "stem": (0.0, 0.5)}
    assert SFPKConfig.from_json(config.to_json()) == SFPKConfig.from_dict(config.to_dict()) == config
    assert config.replace(seed=1).layer_sparsity == config.layer_sparsity
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert hash(config) == hash(structured(layer_sparsity=dict(reversed(given.items()))))
    assert eval(repr(config)) == config
    given["stem"] = (0.5, 1)
    assert config.layer_sparsity["stem"] == (0.0, 0.5)
    with pytest.raises(TypeError):
        config.layer_sparsity["stem"] = (0.5, 1)
    assert config != structured()
    assert structured(layer_sparsity={}) == structured()


@pytest.mark.usefixtures("undrawn")
def test_from_a_shell(tmp_path, capsys):
    words = ["prune", "tests.cli_task:without_eval", "--granularity", "neuron", "--budget", "channels",
             "--n-steps", "3", "--sparsity", "0.5", "--quiet"]  # fmt: skip
    options = ["--layer-sparsity", "0=0.25:0.5", "--layer-sparsity", "re:0=0.5:1"]
    assert main([*words, *options, "--out", str(tmp_path / "a")]) == 0, capsys.readouterr().err
    expected = {"0": [0.25, 0.5], "re:0": [0.5, 1.0]}
    metadata = MaskSet.load(tmp_path / "a" / "mask.safetensors").metadata
    assert metadata["config"]["layer_sparsity"] == expected
    (tmp_path / "settings.json").write_text(json.dumps({"layer_sparsity": expected}))
    assert main([*words, "--config", str(tmp_path / "settings.json"), "--out", str(tmp_path / "b")]) == 0
    assert MaskSet.load(tmp_path / "b" / "mask.safetensors").metadata["config"] == metadata["config"]
    assert main([*words, "--layer-sparsity", "none=0:1", "--out", str(tmp_path / "c")]) == 2
    assert "--layer-sparsity: wanted names among 0" in capsys.readouterr().err
    assert main([*words, "--layer-sparsity", "0=0.9:0.1", "--out", str(tmp_path / "c")]) == 2
    assert "--layer-sparsity: wanted a dict of ranges" in capsys.readouterr().err
    for wrong in ("0=0.5", "0=a:b", "0=0:1:2"):
        with pytest.raises(SystemExit):
            main([*words, "--layer-sparsity", wrong, "--out", str(tmp_path / "c")])
        assert "invalid NAME=LOW:HIGH value" in capsys.readouterr().err
