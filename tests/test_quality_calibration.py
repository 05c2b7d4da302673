"""Shares of particles that keep a weight: the bins, and which weights go."""

import pytest
import torch

from benchmarks.quality import calibration as module
from benchmarks.quality import study
from benchmarks.quality.calibration import calibration, without_a_tenth
from sfpk_kernels import MaskSet

from .test_quality import SMALL


def test_shares_are_counted_by_bin():
    foretold = torch.tensor([0.0, 0.0, 0.1, 0.3, 0.3, 0.9, 1.0, 1.0])
    found = torch.tensor([0.0, 0.2, 0.1, 0.4, 0.2, 0.8, 1.0, 0.5])
    rows = calibration(foretold, found, bins=2)
    expected = [(0.0, 0.1, 2), (0.7 / 3, 0.7 / 3, 3), (0.9, 0.8, 1), (1.0, 0.75, 2)]
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted)


def test_a_tenth_of_the_kept_weights_goes_in_the_order_given():
    mask = MaskSet({"a": torch.ones(4, 5, dtype=torch.bool), "b": torch.tensor([True] * 10 + [False] * 10)})
    order = torch.arange(40.0)
    order[35:] = -1.0  # removed ones do not count
    less = without_a_tenth(mask, order)
    assert less.kept == 27
    assert torch.equal(less.flat(), mask.flat() & (torch.arange(40) >= 3))
    assert mask.kept == 30


def test_the_command_prints_every_part(monkeypatch, capsys):
    monkeypatch.setitem(study.TASKS, "small", SMALL)
    module.main(["--tasks", "small", "--particles", "3", "--steps", "6", "--sparsity", "0.7"])
    printed = capsys.readouterr().out
    assert "small, 70 % removed, 3 particles, 6 steps" in printed
    assert printed.count("a tenth less, by") == 3
    weights = sum(int(line.split(": ")[1].split()[0]) for line in printed.splitlines() if line.endswith("weights"))
    problem = SMALL.build(0)
    assert weights == sum(p.numel() for p in problem.model.parameters() if p.dim() > 1)
