"""Scores of all particles go to the host together, where what they keep is selected."""

import pytest
import torch

from sfpk_kernels import SFPKPruner
from sfpk_kernels.search.structured import polarizer as module

from .structured_nets import Residual
from .structured_runs import images, structured

pytest.importorskip("torch_pruning")


@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
@pytest.mark.parametrize(("vote", "reads"), [("soft", 1), ("hard", 2)])
def test_one_read_a_step_for_all_particles(update, vote, reads, monkeypatch):
    torch.manual_seed(1)
    seen = []

    def on_host(scores):
        seen.append(tuple(scores.shape))
        return scores.detach().cpu()

    monkeypatch.setattr(module, "on_host", on_host)
    config = structured(n_particles=3, n_steps=6, update=update, vote=vote, momentum=0.5)
    pruner = SFPKPruner(Residual(), config=config, example_inputs=torch.randn(2, 3, 8, 8))
    for _ in range(2):
        seen.clear()
        pruner.step(images()[:3])
        assert seen == [(3, pruner.coordinates.d)] * reads


def test_what_is_kept_is_that_of_each_alone():
    torch.manual_seed(1)
    config = structured(n_particles=3, n_steps=6)
    pruner = SFPKPruner(Residual(), config=config, example_inputs=torch.randn(2, 3, 8, 8))
    polarizer, masks = pruner._run.polarizer, torch.rand(3, pruner.coordinates.d)
    shares = [0.4, 0.9, 1.0]
    together = polarizer.polarize(masks, torch.tensor(shares), "mask_weight", shares).values
    alone = torch.stack([
        polarizer.best(polarizer.score(mask, "mask_weight"), 1 - share)
        for mask, share in zip(masks, shares, strict=True)
    ])  # fmt: skip
    assert torch.equal(together, alone)
    assert together[2].all()
    assert torch.equal(polarizer.keeps(masks, shares, "mask_weight", [0, 1]), together[:2].float().sum(0))
