"""``passes=``: a run of at most so many forward and backward passes; and settings that are poor are said once."""

import logging
import re

import pytest

from sfpk_kernels import SFPKConfig, SFPKPruner, plan, prune
from sfpk_kernels.config import PRESETS, WITHOUT
from sfpk_kernels.search import settings
from sfpk_kernels.search.merging import passes, with_passes


@pytest.mark.parametrize("n", [1, 2, 3, 10])
@pytest.mark.parametrize("merge", [None, 0.2, 0.35, 0.7])
def test_as_many_steps_as_the_passes_allow(n, merge):
    config = SFPKConfig(0.9, n_particles=n, merge=merge)
    for count in (n, 10, 11, 60, 61, 299, 1000):
        found = with_passes(config, count)
        assert found == config.replace(n_steps=found.n_steps)
        assert passes(found) <= count < passes(config.replace(n_steps=found.n_steps + 1))


def test_a_run_takes_them(mlp, vectors):
    seen = []

    def loader():
        while True:
            for batch in vectors:
                seen.append(batch)
                yield batch

    result = prune(mlp, loader(), 0.8, passes=13)
    assert result.config == SFPKConfig(0.8, n_steps=13)
    assert len(seen) == len(result.history) == result.plan.passes == 13
    assert SFPKPruner(mlp, 0.8, passes=5).config.n_steps == 5
    assert plan(mlp, vectors, 0.8, passes=7).steps == 7


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"sparsity": 0.8, "passes": 0}, ValueError, "passes: wanted ≥ 1, got 0"),
        ({"sparsity": 0.8, "passes": 2.0}, TypeError, "passes: wanted an integer ≥ 1, got 2.0"),
        (
            {"config": SFPKConfig(0.8, n_steps=4), "passes": 9},
            TypeError,
            "passes: wanted it beside sparsity, or n_steps in config, got 9 beside .* n_particles=1, n_steps=4",
        ),
    ],
)
def test_what_cannot_be_is_said(mlp, vectors, arguments, kind, words):
    for call in (prune, plan):
        with pytest.raises(kind, match=words):
            call(mlp, vectors, **arguments)
    with pytest.raises(ValueError, match="passes: wanted ≥ 4, got 3"):
        with_passes(SFPKConfig(0.8, n_particles=4), 3)


POOR = {
    "10 particles with 30 steps: .* n_particles=1, n_steps=300": {"n_particles": 10, "n_steps": 30},
    "radius=1.2 does nothing with step_length='effective_dimension'; step_scale": {"radius": 1.2},
}
GOOD = [
    {}, {"n_particles": 10, "n_steps": 100}, {"n_particles": 4, "n_steps": 20, "merge": 0.2},
    {"radius": 1.2, "step_length": "radius", "hold": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("words", POOR)
def test_poor_settings_are_said_once(mlp, words, caplog, monkeypatch):
    monkeypatch.setattr(settings, "_said", set())
    caplog.set_level(logging.WARNING, "sfpk_kernels")
    for _ in range(2):
        SFPKPruner(mlp, config=SFPKConfig(0.8, **POOR[words]))
    (record,) = caplog.records
    assert re.search(words, record.message)


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_others_are_not(mlp, options, caplog, monkeypatch):
    monkeypatch.setattr(settings, "_said", set())
    SFPKPruner(mlp, config=SFPKConfig(0.8, **options))
    assert not caplog.records


def test_settings_of_earlier_files_are_what_runs_did_then():
    """They lack the fields that there were none of; settings by hand, of a few fields, take the default."""
    for preset in PRESETS:
        config = SFPKConfig.preset(preset, sparsity=0.8)
        assert SFPKConfig.from_dict(config.to_dict()) == config
    earlier = {name: v for name, v in SFPKConfig.preset("population", sparsity=0.8).to_dict().items()
               if name not in WITHOUT}  # fmt: skip
    assert SFPKConfig.from_dict(earlier) == SFPKConfig.preset("population", sparsity=0.8)
    assert SFPKConfig.from_dict({"sparsity": 0.8, "n_particles": 4}) == SFPKConfig(0.8, n_particles=4)
