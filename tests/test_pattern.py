"""N:M as a pattern of the search: exactly N of M in the end, no fewer on the way, exact counts throughout."""

import copy
import json

import pytest
import torch
from torch import nn

from sfpk_kernels import (
    Coordinates,
    Execution,
    GradualPruner,
    MaskSet,
    RetrainConfig,
    SFPKConfig,
    SFPKPruner,
    baselines,
    plan,
    prune,
)
from sfpk_kernels.cli import main
from sfpk_kernels.coordinates.pattern import best_of_groups, pattern_mask
from sfpk_kernels.search.checkpoint import settings_of_this_version
from sfpk_kernels.search.polarizer import Polarizer

TWO_OF_FOUR = {"sparsity": 0.5, "pattern": (2, 4)}


@pytest.fixture
def net():
    """Inputs along dimension 1, and along 0 in two groups of four."""
    return nn.Sequential(
        nn.Conv2d(8, 6, 3), nn.Tanh(), nn.ConvTranspose2d(8, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 4)
    )


@pytest.fixture
def mixed():
    """All inputs are multiples of 4."""
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(72, 12), nn.Tanh(),
                         nn.Linear(12, 4))  # fmt: skip


@pytest.fixture
def pictures():
    return [(torch.randn(8, 4, 5, 5), torch.randint(4, (8,))) for _ in range(6)]


def groups_of(model, mask, size=4):
    """(groups, M) bool by prunable tensor, cut out by plain indexing."""
    found = {}
    for name in mask:
        module, kept = model.get_submodule(name.rpartition(".")[0]), mask[name]
        rows = kept.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else kept
        rows = rows.permute(0, *range(2, rows.dim()), 1)
        found[name] = torch.stack([row for line in rows.flatten(0, -2) for row in line.split(size)])
    return found


def brute(score, model, pattern, k):
    """The N best of every group, then the best of the rest: by sorting Python tuples."""
    n, m = pattern
    coordinates, kept = Coordinates(model), set()
    for tensor in coordinates.tensors:
        index = torch.arange(tensor.offset, tensor.offset + tensor.numel).view(tensor.shape)
        lines = index.movedim(tensor.input_dim, -1).reshape(-1, m).tolist()
        for line in lines:
            kept |= set(sorted(line, key=lambda e: (-score[e], e))[:n])
    rest = sorted(set(range(coordinates.d)) - kept, key=lambda e: (-score[e], e))
    kept |= set(rest[: k - len(kept)])
    return torch.tensor([e in kept for e in range(coordinates.d)])


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mask", "mask_weight", "mask_normalized"])
@pytest.mark.parametrize("signed", [False, True])
def test_binary_particles_against_sorting_by_hand(mixed, backend, dtype, kind, signed):
    coordinates = Coordinates(mixed)
    theta = coordinates.flatten(mixed)
    theta[::7] = 0.0  # ties
    polarizer = Polarizer(coordinates, theta, "exact", backend, signed, (2, 4))
    masks = (torch.randn(3, coordinates.d) * 4).round().div(4).to(dtype)
    densities = torch.tensor([0.5, 0.613, 0.9], dtype=torch.float64)
    keep = polarizer.polarize(masks, densities, kind)
    assert keep.cut is None
    votes = polarizer.keeps(masks, densities.tolist(), kind, range(3))
    assert torch.equal(votes, keep.values.sum(dim=0).float())
    for mask, density, got in zip(masks, densities.tolist(), keep.values, strict=True):
        score = mask.float()
        if kind != "mask":
            a = coordinates.normalize_(theta.abs()) if kind == "mask_normalized" else theta.abs()
            score = (score if signed else score.abs()) * a
        k = round(density * coordinates.d)
        assert int(got.sum()) == k
        assert torch.equal(got, brute(score.tolist(), mixed, (2, 4), k))
        assert torch.equal(keep.weights(theta) != 0, keep.values & (theta != 0))


def test_below_the_pattern_nothing_more_goes(mixed):
    """Particles that are not retracted may lie below the schedule."""
    coordinates = Coordinates(mixed)
    polarizer = Polarizer(coordinates, coordinates.flatten(mixed), "exact", pattern=(2, 4))
    masks = torch.rand(2, coordinates.d)
    keep = polarizer.polarize(masks, torch.tensor([0.2, 0.5], dtype=torch.float64), "mask").values
    assert keep.sum(dim=1).tolist() == [coordinates.d // 2] * 2


def test_infinite_scores_and_nan(mlp):
    coordinates = Coordinates(mlp)
    polarizer = Polarizer(coordinates, coordinates.flatten(mlp), "exact", pattern=(1, 4))
    score = torch.zeros(144)
    score[:4] = torch.inf  # overflowed: the other groups keep one each all the same
    score[4:8] = -torch.inf
    kept = polarizer.final(score, 1 - 38 / 144)
    assert kept[:4].tolist() == [True] * 3 + [False]
    assert (kept[4:].view(-1, 4).sum(dim=1) == 1).all()
    score[9] = torch.nan
    with pytest.raises(ValueError, match="score: wanted no NaN, got some"):
        polarizer.final(score, 0.75)
    with pytest.raises(ValueError, match="wanted no NaN score"):
        polarizer.polarize(score[None], torch.tensor([0.5], dtype=torch.float64), "mask")


@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (1, 4), (3, 4), (3, 8), (150, 240), (200, 300)])
def test_the_best_of_a_group_are_those_of_a_stable_sort(pattern):
    score = (torch.randn(6, 5, 1200) * 3).round()
    score[score == 0] = torch.where(torch.rand(int((score == 0).sum())) < 0.5, 0.0, -0.0)
    groups = score.view(-1, pattern[1]) + 0.0
    first = groups.sort(dim=1, descending=True, stable=True).indices[:, : pattern[0]]
    expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, first, True).view(score.shape)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(best_of_groups(score.to(dtype), pattern), expected)


def test_groups_lie_along_the_inputs(net):
    mask = baselines.magnitude(net, 0.5, pattern=(2, 4))
    for name, groups in groups_of(net, mask).items():
        assert (groups.sum(dim=1) == 2).all(), name
    assert {t.name: t.inputs for t in Coordinates(net, include_biases=True).tensors} == {
        "0.weight": 8, "0.bias": 0, "2.weight": 4, "2.bias": 0, "4.weight": 16, "4.bias": 0,
    }  # fmt: skip


def test_the_transposed_linear_has_its_inputs_first():
    class Conv1D(nn.Module):  # as of GPT-2
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3))

    model = nn.Sequential(Conv1D())
    coordinates = Coordinates(model)
    mask = pattern_mask(coordinates, coordinates.flatten(model).abs(), (2, 4)).view(8, 3)
    assert mask[:4].sum(dim=0).tolist() == mask[4:].sum(dim=0).tolist() == [2, 2, 2]


@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
@pytest.mark.parametrize("vote", ["soft", "hard", "masked"])
def test_a_run_ends_with_n_of_m(mixed, pictures, update, vote):
    config = SFPKConfig(**TWO_OF_FOUR, n_particles=3, n_steps=6, update=update, vote=vote, momentum=0.1)
    waypoints = [] if vote == "masked" else [0.2, 0.41]
    result = prune(mixed, pictures, config=config, waypoints=waypoints, keep_scores=bool(waypoints))
    d = Coordinates(mixed).d
    masks = [(0.5, result.mask), *((w.sparsity, w.mask) for w in result.waypoints)]
    masks += [(0.5, result.vote(rule)) for rule in ("mean", "soft", "hard", "best", "top_ratio")]
    masks += [(0.3, result.vote("hard", sparsity=0.3))]
    masks += [(0.45, result.mask_at(0.45))] if waypoints else []
    for sparsity, mask in masks:
        assert mask.kept == round((1 - sparsity) * d)
        for name, groups in groups_of(mixed, mask).items():
            counts = groups.sum(dim=1)
            assert (counts == 2).all() if sparsity == 0.5 else (counts >= 2).all(), (name, sparsity)
    for groups in groups_of(mixed, result.stable_core()).values():
        assert (groups.sum(dim=1) <= 2).all()
    share = torch.cat([part.flatten() for part in result.keep_probability().values()])
    assert float(share.sum()) == pytest.approx(d / 2)
    with pytest.raises(ValueError, match=r"sparsity: wanted at most 0.5, that of pattern=\(2, 4\), got 0.6"):
        result.vote(sparsity=0.6)


def test_the_masks_of_every_step_keep_n_at_least(mixed, pictures, monkeypatch):
    seen, polarize = [], Polarizer.polarize

    def watched(self, masks, densities, kind, known=None):
        keep = polarize(self, masks, densities, kind, known)
        seen.append((densities.tolist(), keep.values.clone()))
        return keep

    monkeypatch.setattr(Polarizer, "polarize", watched)
    config = SFPKConfig(0.75, pattern=(1, 4), n_particles=2, n_steps=8, hold=0.5)
    prune(mixed, pictures, config=config)
    coordinates = Coordinates(mixed)
    assert len(seen) == 8
    for densities, rows in seen:
        assert rows.sum(dim=1).tolist() == [round(density * coordinates.d) for density in densities]
        for row in rows:
            parts = dict(zip([t.name for t in coordinates.tensors], coordinates.split(row), strict=True))
            assert all((groups.sum(dim=1) >= 1).all() for groups in groups_of(mixed, parts).values())
    assert seen[-1][1].sum(dim=1).tolist() == [coordinates.d // 4] * 2


@pytest.mark.parametrize(
    "options", [{"n_particles": 3, "merge": 0.5}, {"particle_dtype": "float16"}, {"vote": "hard", "n_particles": 2}]
)
def test_resuming_repeats(mixed, pictures, tmp_path, options):
    config, path = SFPKConfig(**TWO_OF_FOUR, n_steps=8, **options), tmp_path / "run"
    whole = prune(mixed, pictures, config=config, waypoints=[0.3], save_every=5, save_path=path)
    again = prune(mixed, pictures, config=config, waypoints=[0.3], resume=path)
    assert again.mask == whole.mask
    assert again.mask_at(0.3) == whole.mask_at(0.3)
    assert whole.mask.kept * 2 == whole.mask.prunable
    with pytest.raises(ValueError, match=r"config: wanted that of the saved run, got a difference in .*pattern \[2, 4"):
        SFPKPruner(mixed, config=SFPKConfig(0.5, n_steps=8, **options)).load(path)


@pytest.mark.parametrize(
    "how",
    [{"backend": "cpp"}, {"backend": "reference"}, {"energy_mode": "sequential", "offload": "cpu"},
     {"energy_mode": "vmap"}, "fp64"],
)  # fmt: skip
def test_however_it_is_computed(mlp, vectors, how):
    config, execution = SFPKConfig(**TWO_OF_FOUR, n_steps=4, n_particles=2, vote="hard"), Execution()
    if how == "fp64":
        mlp, vectors = mlp.double(), [(x.double(), y) for x, y in vectors]
    else:
        execution = Execution(**how)
    mask = prune(mlp, vectors, config=config, execution=execution).mask
    assert all((groups.sum(dim=1) == 2).all() for groups in groups_of(mlp, mask).values())


def test_a_run_that_goes_on_from_another(mlp, vectors):
    first = prune(mlp, vectors, config=SFPKConfig(**TWO_OF_FOUR, n_steps=4))
    further = prune(mlp, vectors, config=SFPKConfig(0.75, pattern=(1, 4), n_steps=4), start=first.particles)
    assert all((groups.sum(dim=1) == 1).all() for groups in groups_of(mlp, further.mask).values())


def test_saved_before_there_were_patterns():
    old = {name: value for name, value in SFPKConfig(0.5).to_dict().items() if name != "pattern"}
    assert settings_of_this_version(old)["pattern"] is None
    assert SFPKConfig.from_dict(old) == SFPKConfig(0.5)


def test_settings_round_trip_and_name_what_is_wrong():
    config = SFPKConfig(0.666667, pattern=[1, 3])
    assert config.pattern == (1, 3)
    assert config.sparsity == 1 - 1 / 3
    assert SFPKConfig.from_json(config.to_json()) == SFPKConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json())["pattern"] == [1, 3]
    for pattern in [(4, 4), (0, 4), (1, 2, 3), (-1, 4)]:
        with pytest.raises(ValueError, match=r"^pattern: wanted None or integers \(N, M\) with 0 < N < M, got"):
            SFPKConfig(0.5, pattern=pattern)
    for pattern in ["2:4", 2, (2.0, 4), (True, 4)]:
        with pytest.raises(TypeError, match=r"^pattern: wanted None or integers \(N, M\) with 0 < N < M, got"):
            SFPKConfig(0.5, pattern=pattern)
    with pytest.raises(ValueError, match=r"^sparsity: wanted 0.5, that of pattern=\(2, 4\), got 0.9"):
        SFPKConfig(0.9, pattern=(2, 4))


def test_refusals(mixed, convnet, pictures):
    config = SFPKConfig(**TWO_OF_FOUR)
    words = r"multiple of 4 inputs, got 0.weight of .*, 4.weight of .* ignored_layers=\['0.weight', '4.weight'\]"
    for call in (SFPKPruner, lambda model, config: plan(model, pictures, config=config)):
        with pytest.raises(ValueError, match=f"^pattern: wanted tensors with a {words}"):
            call(convnet, config=config)
    assert SFPKPruner(convnet, config=config, ignored_layers=["0.weight", "4.weight"]).coordinates.d == 288
    with pytest.raises(ValueError, match="^pattern: .*, got 1.weight"):
        SFPKPruner(mixed, config=config, include_norms=True)
    with pytest.raises(ValueError, match="^pattern: wanted None with selection='threshold'"):
        SFPKPruner(mixed, config=config.replace(selection="threshold"))
    with pytest.raises(ValueError, match=f"^pattern: wanted tensors with a {words}"):
        GradualPruner(convnet, pictures, config=config, shots=2, retrain=1)


@pytest.mark.parametrize(
    "options", [{}, {"n_particles": 3, "vote": "hard", "merge": 0.6}, {"retract": False, "momentum": 0.2}], ids=str
)
def test_gradually(mixed, pictures, options, tmp_path):
    """Exact counts after every shot, no group ever below its N, in the end exactly N; resumed bit for bit."""
    dense, config = copy.deepcopy(mixed), SFPKConfig(0.75, pattern=(1, 4), n_steps=18, **options)

    def make(model):
        return GradualPruner(model, pictures, config=config, shots=3, retrain=RetrainConfig(2, lr=0.05))

    pruner = make(mixed)
    densities = []
    while not pruner.done:
        pruner.shot()
        densities.append(pruner.result().mask.kept / pruner.coordinates.d)
        if pruner.finished == 2:
            torch.save(pruner.state_dict(), tmp_path / "state")
    assert densities == pytest.approx([0.25 ** (i / 3) for i in (1, 2, 3)], abs=1 / pruner.coordinates.d)
    result = pruner.result()
    for mask in result.masks:
        groups = torch.cat(list(groups_of(mixed, mask).values()))
        assert int(groups.sum(1).min()) >= 1
    assert bool((groups.sum(1) == 1).all()), "of the last mask"
    assert len({mask.fingerprint() for mask in result.masks}) == 3
    assert MaskSet.from_model(mixed) == result.mask
    again = make(dense)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert again.run().masks == result.masks
    assert all(torch.equal(value, mixed.state_dict()[name]) for name, value in dense.state_dict().items())


def test_a_weight_may_return_to_its_group(mixed, pictures):
    """Between the shots the weight that its group has lost is made the best of it."""
    config = SFPKConfig.preset("population", sparsity=0.5, pattern=(2, 4), n_particles=1, n_steps=4, consensus=0.0)
    pruner = GradualPruner(mixed, pictures, config=config, shots=2, retrain=lambda *_: None)
    dense = pruner.coordinates.flatten(mixed)
    pruner.shot()
    first = pruner.result().mask.flat()
    back = int((dense.abs() * ~first).argmax())
    pruner._particles[:, back] = 5.0
    pruner._particles.mul_(pruner.shots[0].density / pruner._particles.square().mean().sqrt())
    record = pruner.shot()
    assert pruner.result().mask.flat()[back]
    assert record.returned == int((pruner.result().mask.flat() & ~first).sum()) >= 1


def test_the_plan_counts_the_masks(mixed, pictures):
    config = SFPKConfig(**TWO_OF_FOUR, n_particles=2)
    found = plan(mixed, pictures, config=config, execution=Execution(energy_mode="sequential"))
    assert found.parts["binary masks"] == 2 * Coordinates(mixed).d
    without = plan(mixed, pictures, config=SFPKConfig(0.5), execution=Execution(energy_mode="sequential"))
    assert without.parts["binary masks"] == 0


def test_searched_two_of_four_lose_less_than_the_largest():
    torch.manual_seed(1)
    inputs = torch.randn(256, 16)
    targets = (inputs[:, :8] * inputs[:, 8:]).sum(dim=1).sign().long().clamp_min(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    batches = [(inputs[i : i + 64], targets[i : i + 64]) for i in range(0, 256, 64)]

    def loss(mask=None):
        tried = copy.deepcopy(model)
        if mask is not None:
            mask.apply_(tried)
        with torch.no_grad():
            return float(nn.functional.cross_entropy(tried(inputs), targets))

    largest = baselines.magnitude(model, 0.5, pattern=(2, 4))
    for seed in range(2):
        searched = prune(model, batches, config=SFPKConfig(**TWO_OF_FOUR, n_steps=150, seed=seed)).mask
        assert all((groups.sum(dim=1) == 2).all() for groups in groups_of(model, searched).values())
        assert loss(searched) - loss() < 0.5 * (loss(largest) - loss())


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("words", [["--n-steps", "3"], ["--method", "magnitude"], ["--method", "wanda"]])
def test_on_the_command_line(tmp_path, capsys, words):
    out = ["--out", str(tmp_path), "--json"]
    assert main(["prune", "tests.cli_task:small", "--pattern", "2:4", *words, *out]) == 0
    assert json.loads(capsys.readouterr().out)["sparsity"] == 0.5
    masks = MaskSet.load(tmp_path / "mask.safetensors")
    assert all((part.view(-1, 4).sum(dim=1) == 2).all() for part in (masks["0.weight"], masks["2.weight"]))
    settings = masks.metadata.get("config", masks.metadata)
    assert (settings["sparsity"], settings["pattern"]) == (0.5, [2, 4])


def test_in_a_file_of_settings(tmp_path, capsys):
    (tmp_path / "a.json").write_text(SFPKConfig(0.75, pattern=(1, 4), n_steps=2).to_json())
    arguments = ["prune", "tests.cli_task:without_eval", "--config", str(tmp_path / "a.json"), "--out", str(tmp_path)]
    assert main([*arguments, "--plan", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["binary masks"] == 144
    (tmp_path / "a.json").write_text('{"pattern": "2:4", "sparsity": 0.5}')
    assert main(arguments) == 2
    assert "pattern: wanted None or integers (N, M) with 0 < N < M, got '2:4'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--pattern", "2"], "argument --pattern: invalid N:M value: '2'"),
        (["--pattern", "4:4"], "--sparsity: wanted a fraction in (0, 1)"),
        (["--pattern", "4:4", "--sparsity", "0.5"], "--pattern: wanted None or integers (N, M)"),
        (["--pattern", "2:4", "--sparsity", "0.9"], "--sparsity: wanted 0.5, that of pattern=(2, 4), got 0.9"),
        (["--pattern", "3:5"], "--pattern: wanted tensors with a multiple of 5 inputs, got 0.weight of shape (12, 8)"),
        (["--pattern", "2:4", "--method", "snip"], "--pattern: wanted without --method snip"),
    ],
)
def test_wrong_patterns_on_the_command_line(tmp_path, capsys, words, said):
    try:
        code = main(["prune", "tests.cli_task:without_eval", *words, "--out", str(tmp_path / "out")])
    except SystemExit as end:  # of argparse
        code = end.code
    assert code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
