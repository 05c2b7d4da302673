"""Drop-ins: Algorithm 3's signature, and the pruner object of the authors' experiments."""

import copy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sfpk_kernels import Execution, SFPKConfig, prune
from sfpk_kernels.compat import SFPK, SFPK_prune, free_modules, init_masks_hooks, masked_params, pruners
from sfpk_kernels.naive import naive_sfpk
from tests.test_authors_parity import convnet as recorded_convnet
from tests.test_authors_parity import mlp as recorded_mlp

from .settings import population

DATA = Path(__file__).parent / "data"
SMALL = {"N": 6, "n_mc": 3, "energy_mode": "sequential", "seed": 0}


def masked(model, **freed):
    init_masks_hooks(model)
    free_modules(model, True, True, True, freed.get("conv1", False), freed.get("lastfc", False))
    return model


# --- Algorithm 3 ---


def test_algorithm_3_is_the_paper_preset(mlp, vectors):
    result = SFPK_prune(mlp, 0.75, vectors, 3, 5, 1.5, energy_mode="sequential", progress=False)
    config = SFPKConfig.preset("paper", sparsity=0.75, n_particles=3, n_steps=5, radius=1.5)
    assert result.config == config
    assert (
        result.mask
        == prune(mlp, vectors, config=config, execution=Execution(energy_mode="sequential"), progress=False).mask
    )
    assert result.mask.kept == round(0.25 * 144)
    literal = naive_sfpk(
        mlp, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), (vectors * 2)[:15],
        ["0.weight", "2.weight"], sparsity=0.75, n_particles=3, n_steps=5, radius=1.5,
    )  # fmt: skip
    assert torch.equal(result.mask.flat(), literal.mask)


def test_algorithm_3_takes_other_fields(mlp, vectors):
    result = SFPK_prune(mlp, 0.5, vectors, n=2, K=2, r=2.0, preset="population", seed=4, progress=False)
    assert result.config == population(sparsity=0.5, n_particles=2, n_steps=2, seed=4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"t": 1.0}, ValueError, r"^t: wanted a number in \(0, 1\), got 1.0"),
        ({"t": 0.5, "n": 0}, ValueError, "^n: wanted an integer ≥ 1"),
        ({"t": 0.5, "K": 2.5}, TypeError, "^K: wanted an integer"),
        ({"t": 0.5, "r": 1}, ValueError, "^r: wanted a number > 1"),
        ({"t": 0.5, "n_steps": 3}, TypeError, "n_steps: given twice, it is K here"),
        ({"t": 0.5, "colour": 3}, TypeError, "unknown field colour"),
    ],
)
def test_algorithm_3_names_bad_arguments(mlp, vectors, arguments, error, words):
    with pytest.raises(error, match=words):
        SFPK_prune(mlp, dataloader=vectors, **arguments)


# --- the authors' pruner object ---


@pytest.mark.parametrize(("name", "build"), [("authors_mlp", recorded_mlp), ("authors_convnet", recorded_convnet)])
def test_the_object_gives_the_mask_of_the_recorded_run(name, build):
    recorded = np.load(DATA / f"{name}.npz")
    model = build()
    model.load_state_dict({k.removeprefix("param:"): torch.tensor(recorded[k]) for k in recorded.files if ":" in k})
    dense = copy.deepcopy(model.state_dict())
    masked(model)
    pruner = SFPK(
        model, N=int(recorded["n_steps"]), r=float(recorded["radius"]), n_mc=int(recorded["n_particles"]),
        repl=float(recorded["repulsion"]), momentum=float(recorded["momentum"]), energy_mode="sequential",
    )  # fmt: skip
    batches = [(torch.tensor(x), torch.tensor(y)) for x, y in zip(recorded["x"], recorded["y"], strict=True)]
    model.train()
    pruner.score(nn.CrossEntropyLoss(), batches, "cpu")
    pruner.mask(float(recorded["target_density"]))
    flat = torch.cat([mask.flatten() for _, mask, _ in masked_params(model)]).bool()
    assert torch.equal(flat, torch.tensor(recorded["mask"]))
    scores = torch.cat([score.flatten() for score in pruner.scores.values()])
    np.testing.assert_allclose(scores.numpy(), recorded["score"], rtol=1e-3, atol=1e-6)
    assert model.training
    for key, value in model.named_parameters():
        assert torch.equal(value, dense[key]), "weights are not changed"
    kept, total, share = pruner.stats(model)
    assert (kept, total, share) == (int(flat.sum()), flat.numel(), kept / total)


def test_the_hard_vote_is_theirs(mlp, vectors):
    """Scores at or below a particle's own threshold are 0, then averaged over the particles that vote."""
    theta = torch.cat([mlp[0].weight.flatten(), mlp[2].weight.flatten()]).detach()
    masked(mlp)
    for module in (mlp[0], mlp[2]):
        del module.bias_mask
    pruner = SFPK(mlp, **{**SMALL, "n_mc": 5}, vote_mode="hard", vote_ratio=0.6, momentum=0)
    pruner.score(F.cross_entropy, vectors)
    pruner.mask(0.2)
    voters = pruner.result.energies.argsort()[:3].sort().values
    total = torch.zeros(144)
    for particle in pruner.result.particles[voters]:
        score = (particle * theta).abs()
        total += torch.where(score <= score.kthvalue(int(0.8 * 144)).values, 0.0, score)
    torch.testing.assert_close(pruner.result.score, total / 3)
    flat = torch.cat([mask.flatten() for _, mask, _ in masked_params(mlp)]).bool()
    assert torch.equal(flat, total > total.kthvalue(int(0.8 * 144)).values)


def test_a_model_in_dataparallel(convnet, images):
    """As their scripts wrap it on several GPUs."""
    kept = []
    for wrap in (lambda model: model, nn.DataParallel):
        model = wrap(masked(copy.deepcopy(convnet)))
        pruner = SFPK(model, **SMALL)
        pruner.score(F.cross_entropy, images)
        pruner.mask(0.3)
        kept.append(torch.cat([mask.flatten() for _, mask, _ in masked_params(model)]))
    assert torch.equal(*kept)


def test_masks_act_in_forward_and_in_gradients(convnet, images):
    masked(convnet)
    pruner = SFPK(convnet, **SMALL)
    pruner.score(F.cross_entropy, images)
    pruner.mask(0.3)
    convnet.eval()
    pruned = copy.deepcopy(convnet)
    with torch.no_grad():
        for module in pruned.modules():
            if hasattr(module, "fwd_hook"):
                module.fwd_hook.remove()
                module._forward_hooks.clear()
            for kind in ("weight", "bias"):
                if hasattr(module, f"{kind}_mask"):
                    getattr(module, kind).mul_(getattr(module, f"{kind}_mask"))
    x, y = images[0]
    assert torch.equal(convnet(x), pruned(x))
    F.cross_entropy(convnet(x), y).backward()
    for _, mask, parameter in masked_params(convnet):
        assert bool((parameter.grad[mask == 0] == 0).all())
        assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_a_script_in_the_style_of_theirs(convnet, images, monkeypatch):
    """Prune, retrain, prune further; the pruner is found by name in a module, as their loader does it."""
    theirs = types.ModuleType("Methods")
    theirs.pruners = pruners
    monkeypatch.setitem(sys.modules, "Methods", theirs)
    scope = {}
    exec("from Methods import pruners\nSFPK = vars(pruners)['SFPK']", scope)
    model = masked(convnet, conv1=True)
    pruner = scope["SFPK"](
        model, N=6, r=1.4, ode_scope="global", E="CE", G="l2", score_option="mp", mask_option="one", schedule="exp",
        mask_proc_kwargs={"mask_proc_option": "ohh", "mask_proc_eps": 0.9, "mask_proc_ratio": 0.9,
                          "mask_proc_score_option": "Id", "mask_proc_mxp": True},
        rt_schedule="fix", momentum=0.1, n_mc=3, repl_mode="exp", repl=0.2, repl_weighted=True, vote_ratio=1,
        vote_mode="soft", save_dir=None, save_ckpt=False,
    )  # fmt: skip
    criterion, total, before = nn.CrossEntropyLoss(), pruner.total_param, None
    assert total == 8 * 6 * 9 + 4 * 72 + 4, "the second convolution, the last layer and its bias"
    for kept in (0.5, 0.2):
        model.train()
        pruner.score(criterion, images, "cpu")
        pruner.mask(kept)
        remaining, of, share = pruner.stats(model)
        assert of == total
        assert remaining == total - int((1 - kept) * total)
        assert share == remaining / total
        masks = {name: mask.clone() for name, mask, _ in masked_params(model)}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for x, y in images:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        assert pruner.stats(model)[0] == remaining
        assert all(torch.equal(mask, masks[name]) for name, mask, _ in masked_params(model))
        if before is not None:
            assert pruner.result.history[0].scheduled_density < before.density, "the particles went on"
        before = pruner.result.history[-1]
    assert "2.weight_mask" not in model.state_dict()
    assert model.state_dict()["4.weight_mask"].count_nonzero() < 8 * 6 * 9


def test_a_mask_with_zeros_is_where_particles_start(mlp, vectors):
    masked(mlp)
    with torch.no_grad():
        mlp[0].weight_mask[:3] = 0
    pruner = SFPK(mlp, **SMALL)
    pruner.score(F.cross_entropy, vectors)
    pruner.mask(0.3)
    start = ((160 - 24) / 160) ** 0.5  # soft density of 144 weights and 16 biases, 24 of them removed
    scheduled = [record.scheduled_density for record in pruner.result.history]
    assert scheduled == pytest.approx([start * (0.3 / start) ** (k / 6) for k in range(1, len(scheduled) + 1)])
    with pytest.raises(ValueError, match="^sparsity: 0.9 cannot be reached: start: wanted particles of a mean"):
        pruner.mask(0.9)


def test_all_particles_go_on_from_where_the_merged_one_ended(mlp, vectors):
    pruner = SFPK(masked(mlp), **SMALL, merge=0.5)
    pruner.score(F.cross_entropy, vectors)
    for kept in (0.5, 0.3):
        pruner.mask(kept)
        assert [len(record.energies) for record in pruner.result.history][:4] == [SMALL["n_mc"]] * 3 + [1]
        assert pruner.result.mask.kept == pruner.stats(mlp)[0]
    assert pruner.result.history[0].start_density < 0.8


def test_same_seed_same_masks_and_a_run_leaves_hooks_as_they_were(mlp, vectors):
    seen = []
    masked(mlp)
    mlp[0].register_forward_hook(lambda module, inputs, output: seen.append(1))
    hooks = [list(module._forward_hooks) for module in mlp]
    runs = []
    for _ in range(2):
        model = copy.deepcopy(mlp)
        torch.manual_seed(5)
        pruner = SFPK(model, N=4, n_mc=2, energy_mode="sequential")
        pruner.score(F.cross_entropy, torch.utils.data.DataLoader([(x[0], y[0]) for x, y in vectors], 4, shuffle=True))
        pruner.mask(0.4)
        runs.append([mask for _, mask, _ in masked_params(model)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    pruner = SFPK(mlp, **SMALL)

    def failing(output, y):
        raise RuntimeError("no loss today")

    pruner.score(failing, vectors)
    with pytest.raises(RuntimeError, match="no loss today"):
        pruner.mask(0.4)
    assert [list(module._forward_hooks) for module in mlp] == hooks
    assert pruner.stats(mlp) == (160, 160, 1.0)
    assert seen, "other hooks run during the search"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ode_scope": "local"}, "ode_scope: wanted 'global', got 'local'"),
        ({"G": "l1"}, "G: wanted 'l2'"),
        ({"E": "P1"}, "E: wanted 'CE'"),
        ({"score_option": "mpz"}, "score_option: wanted 'mp' or 'm'"),
        ({"schedule": "hess"}, "schedule: wanted 'exp' or 'lin'"),
        ({"rt_schedule": "auto"}, "rt_schedule: wanted 'fix'"),
        ({"repl_mode": "cos"}, "repl_mode: wanted 'exp'"),
        ({"mask_proc_kwargs": {"mask_proc_option": "qt"}}, "mask_proc_option: wanted 'ohh'"),
        ({"start": 0.5}, "start: wanted None or 1"),
    ],
)
def test_what_is_not_offered_is_refused(mlp, options, words):
    with pytest.raises(NotImplementedError, match=words):
        SFPK(masked(mlp), **options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r": 0.5}, ValueError, "^r: wanted a number > 1, got 0.5"),
        ({"N": 0}, ValueError, "^N: wanted an integer ≥ 1"),
        ({"n_mc": "ten"}, TypeError, "^n_mc: wanted an integer"),
        ({"repl": -1}, ValueError, "^repl: wanted a number ≥ 0"),
        ({"vote_mode": "loud"}, ValueError, "^vote_mode: wanted one of 'soft', 'hard'"),
        ({"n_steps": 0}, ValueError, "^n_steps: wanted an integer ≥ 1"),
        ({"colour": 1}, TypeError, "unknown field colour"),
    ],
)
def test_the_object_names_its_own_arguments(mlp, options, error, words):
    with pytest.raises(error, match=words):
        SFPK(masked(mlp), **options)


def test_wrong_use_is_named(mlp, vectors):
    with pytest.raises(ValueError, match="weight_mask buffers, got none"):
        SFPK(mlp)
    with pytest.raises(NotImplementedError, match="structural: wanted False"):
        init_masks_hooks(mlp, structural=True)
    masked(mlp)
    pruner = SFPK(mlp, **SMALL)
    with pytest.raises(RuntimeError, match="wanted score"):
        pruner.mask(0.5)
    with pytest.raises(TypeError, match="criterion: wanted a function"):
        pruner.score("loss", vectors)
    pruner.score(F.cross_entropy, vectors)
    for value, error in ((0.0, ValueError), (1.5, ValueError), ("half", TypeError), ([0.5, 0.5], NotImplementedError)):
        with pytest.raises(error, match="^sparsity: wanted"):
            pruner.mask(value)
    with pytest.raises(ValueError, match="^sparsity: wanted a fraction kept of at least one of 160 weights, got 1e-06"):
        pruner.mask(1e-6)
    pruner.score(F.cross_entropy, [{"x": x, "y": y} for x, y in vectors])
    with pytest.raises(TypeError, match=r"^dataloader: wanted batches \(x, y\), got dict"):
        pruner.mask(0.5)
    assert pruner.stats(mlp) == (160, 160, 1.0)
    mlp.extra = nn.LayerNorm(4)
    mlp.extra.register_buffer("weight_mask", torch.ones(4))
    with pytest.raises(ValueError, match="got also extra.weight"):
        SFPK(mlp)


def test_free_modules_takes_masks_and_hooks_away(convnet):
    init_masks_hooks(convnet)
    free_modules(convnet, True, True, True, True, True, verbose=False)
    assert [name for name, _, _ in masked_params(convnet)] == ["4.weight"]
    assert [i for i, module in enumerate(convnet) if module._forward_hooks] == [4]
