"""Tasks on text: character transformers, on the English of Python's help topics and on Python's own source."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import models
from .task import Batch, Problem, Task, fit, seeded_model, trained

_WINDOW = 64  # characters
_BATCH = 16
_STEPS = 4000
_HELD_OUT = 0.1  # of the text, its end
_MEASURED = 256  # windows
_SYMBOLS = [chr(code) for code in range(32, 127)] + ["\n"]
_MODULES = """
    argparse ast calendar csv datetime decimal difflib doctest fractions inspect json locale mailbox optparse pickle pdb
    platform
    shutil smtplib socket ssl statistics subprocess tarfile threading tokenize typing unittest.mock uuid zipfile
"""


class CharTransformer(nn.Module):
    """Two blocks of 48: 59,904 prunable weights (embeddings are none)."""

    def __init__(self) -> None:
        super().__init__()
        dim = 48
        self.embedding = nn.Embedding(len(_SYMBOLS), dim)
        self.position = nn.Embedding(_WINDOW, dim)
        self.blocks = nn.Sequential(*(models._Block(dim, 4, True) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, len(_SYMBOLS))

    def forward(self, symbols: Tensor) -> Tensor:  # (batch, window) → (batch, window, symbols)
        """Logits of the next symbol."""
        places = torch.arange(symbols.shape[1], dtype=torch.int64, device=symbols.device)
        return self.head(self.norm(self.blocks(self.embedding(symbols) + self.position(places))))


@functools.cache
def _topics() -> str:
    return "\n\n".join(text for _, text in sorted(importlib.import_module("pydoc_data.topics").topics.items()))


@functools.cache
def _source() -> str:
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in _MODULES.split())


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def _task(name: str, title: str, text: Callable[[], str], kept_out: bool) -> Task:
    @functools.cache
    def encoded() -> tuple[Tensor, Tensor, str]:
        places = {symbol: i for i, symbol in enumerate(_SYMBOLS)}
        codes = torch.tensor([places[c] for c in text() if c in places], dtype=torch.int64)
        border = int((1 - _HELD_OUT) * len(codes))
        return codes[:border], codes[border:], hashlib.sha256(text().encode()).hexdigest()[:12]

    def windows(codes: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = codes[starts[:, None] + torch.arange(_WINDOW + 1)]
        return rows[:, :-1], rows[:, 1:]

    def batches(seed: int, size: int) -> Iterator[Batch]:
        codes = encoded()[0]
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield windows(codes, torch.randint(len(codes) - _WINDOW - 1, (size,), generator=generator))

    def train(model: nn.Module, seed: int) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        fit(model, _loss, batches(seed, 2 * _BATCH), _STEPS, optimizer, 4e-3)

    def build(seed: int) -> Problem:
        codes, digest = encoded()[1:]
        model = trained(
            f"{name}-{seed}",
            lambda: seeded_model(seed, CharTransformer),
            lambda model: train(model, seed),
            f"{name} {seed} {digest} {_STEPS} {_BATCH} {_WINDOW}",
        )
        held_out = windows(codes, torch.linspace(0, len(codes) - _WINDOW - 1, _MEASURED).long())

        @torch.no_grad()
        def measure(pruned: nn.Module) -> float:
            return float(_loss(pruned.eval(), held_out))

        return Problem(model, _loss, lambda other: batches(1_000 + other, _BATCH), measure)

    return Task(
        name, title, "held-out loss (nats)", False, 0.005, build, (0.5, 0.7, 0.8, 0.9), kept_out,
        transformer=True, linear=True,
    )  # fmt: skip


TASKS = (
    _task("lm", "character transformer on English, 60 k weights", _topics, False),
    _task("lm-source", "character transformer on Python source, 60 k weights", _source, True),
)
