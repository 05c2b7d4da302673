"""Whole steps against Algorithm 3: the gate passes, the row is complete, a wrong one is seen."""

import pytest

from benchmarks import end_to_end, peak


@pytest.mark.parametrize("update", ["jacobi", "gauss_seidel"])
def test_a_row(update):
    row = end_to_end.measure("mlp", particles=3, quick=True, memory=False, options={"update": update})
    assert row["agrees"]
    assert row["error"] < 1e-4
    assert row["coordinates"] == 99584
    assert row["update"] == update
    assert row["ratio"] == pytest.approx(row["naive_seconds_per_step"] / row["seconds_per_step"])
    assert 0 < row["outside_share"] < 1


def test_a_pruner_that_is_off_does_not_agree():
    row = end_to_end.measure("mlp", particles=3, quick=True, memory=False, options={"repulsion": 20.0, "radius": 3.0})
    assert not row["agrees"]


@pytest.mark.skipif(not peak.can_measure(), reason="the peak of a process cannot be set back here")
@pytest.mark.parametrize("provider", ["naive", "ours"])
def test_peaks(provider):
    found = peak.measure("wide-mlp", provider, n_particles=2, energy_mode="sequential")
    d = 64 * 2048 + 2048**2 + 2048 * 10
    assert found["measured"] > 4 * 4 * d  # particles and gradients at least


def test_a_peak_that_cannot_be_measured_says_why():
    with pytest.raises(RuntimeError, match="no-such-model"):
        peak.measure("no-such-model", "ours")
