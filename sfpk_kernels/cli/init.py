"""``sfpk init``: a task file to begin with."""

from __future__ import annotations

import argparse
import keyword
from pathlib import Path
from typing import Any

from ._words import refuse

TEMPLATE = '''"""What `sfpk prune {name}:task --sparsity 0.9` prunes. It runs as it is: put in your model and data."""

import torch
from torch import nn
from torch.nn import functional as F


def data(seed, batches):
    """Batches (x, y). Yours: a DataLoader."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(batches):
        y = torch.randint(10, (64,), generator=random)
        yield centres[y] + 1.5 * torch.randn(64, 64, generator=random), y


def trained():
    """A trained model. Yours: build it and load its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for x, y in data(1, 200):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def loss_fn(model, batch):
    """One number per batch; None instead of it: cross-entropy of model(x) and y."""
    x, y = batch
    return F.cross_entropy(model(x), y)


@torch.no_grad()
def accuracy(model):
    """Called before and after. May be left out: return model, loss_fn, loader."""
    right = [(model(x).argmax(1) == y).float().mean() for x, y in data(2, 20)]
    return float(torch.stack(right).mean())


def task():
    return trained(), loss_fn, list(data(3, 40)), accuracy
'''


def add_command(commands: Any) -> None:
    """Add ``init``."""
    init = commands.add_parser(
        "init",
        help="write a task file that runs, to be changed into your own",
        description="FILE.py holds a function task() for `sfpk prune FILE:task --sparsity 0.9`.",
    )
    init.add_argument("file", type=Path, nargs="?", default=Path("my_task.py"), metavar="FILE.py")
    init.set_defaults(run=_init)


def _init(options: argparse.Namespace) -> int:
    path: Path = options.file
    if path.suffix != ".py" or not path.stem.isidentifier() or keyword.iskeyword(path.stem):
        return refuse("init", f"FILE.py: wanted the name of a Python module, got {path.name!r}")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(TEMPLATE.replace("{name}", path.stem))
    except FileExistsError:
        return refuse("init", f"FILE.py: wanted a new file, got {str(path)!r}, which exists")
    except FileNotFoundError:
        return refuse("init", f"FILE.py: wanted a file in an existing folder, got {str(path)!r}")
    print(f"{path}: sfpk prune {path.stem}:task --sparsity 0.9")
    return 0
