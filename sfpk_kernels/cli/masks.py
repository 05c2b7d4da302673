"""``sfpk masks``: look at mask files, compare them, apply them to weights on disk."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ._words import FAILED, refuse


def add_command(commands: Any) -> None:
    """Add ``masks show | compare | apply``."""
    masks = commands.add_parser("masks", help="look at mask files, compare them, apply them to saved weights")
    actions = masks.add_subparsers(dest="action", required=True)
    show = actions.add_parser("show", help="counts and densities by layer")
    show.add_argument("file", type=Path, metavar="FILE")
    compare = actions.add_parser("compare", help="what two files have in common, by layer")
    compare.add_argument("file", type=Path, metavar="FILE")
    compare.add_argument("other", type=Path, metavar="OTHER")
    apply = actions.add_parser("apply", help="set the removed weights of a saved state dict to zero")
    apply.add_argument("file", type=Path, metavar="FILE")
    apply.add_argument(
        "weights",
        type=Path,
        metavar="WEIGHTS",
        help="a state dict: .safetensors, or .pt of torch.save; or a checkpoint of Lightning",
    )
    apply.add_argument("--out", type=Path, required=True, metavar="FILE", help="where to write the masked one")
    for action in (show, compare, apply):
        action.add_argument("--json", action="store_true", help="numbers as JSON on stdout")
        action.add_argument("--quiet", action="store_true", help="no text")
        action.set_defaults(run=_masks)


def _masks(options: argparse.Namespace) -> int:
    actions = {"show": _show, "compare": _compare, "apply": _apply}
    try:
        found, text = actions[options.action](options)
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        return refuse(f"masks {options.action}", error.args[0] if isinstance(error, KeyError) else error)
    except OSError as error:
        return refuse(f"masks {options.action}", error, FAILED)
    if options.json:
        print(json.dumps(found, indent=1))
    elif not options.quiet:
        print(text)
    return 0


def _show(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..masks.maskset import MaskSet

    masks = MaskSet.load(options.file)
    shapes, densities = masks.shapes, masks.layer_densities()
    found = {
        "kept": masks.kept,
        "prunable": masks.prunable,
        "sparsity": masks.sparsity,
        "fingerprint": masks.fingerprint(),
        "metadata": masks.metadata,
        "layers": {name: {"shape": list(shapes[name]), "density": densities[name]} for name in masks},
    }
    rows = [("tensor", "shape", "kept")]
    rows += [(name, " × ".join(map(str, shapes[name])), f"{100 * densities[name]:.2f} %") for name in masks]
    metadata = "".join(f"\n{key}: {value}" for key, value in masks.metadata.items())
    return found, f"{masks!r}{metadata}\n\n{_table(rows)}"


def _compare(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from ..masks.maskset import MaskSet

    a, b = MaskSet.load(options.file), MaskSet.load(options.other)
    overlap = a.iou(b)
    layers = {}
    for name in a:
        one, other = MaskSet({name: a[name]}), MaskSet({name: b[name]})
        layers[name] = {"iou": one.iou(other), "differ": one.hamming(other)}
    found = {"equal": a == b, "iou": overlap, "differ": a.hamming(b), "kept": [a.kept, b.kept], "layers": layers}
    rows = [("tensor", "intersection over union", "differ")]
    rows += [(name, f"{layer['iou']:.4f}", f"{layer['differ']:,}") for name, layer in layers.items()]
    head = "the same masks" if a == b else f"{a.hamming(b):,} of {a.prunable:,} weights differ"
    return found, f"{head}; intersection over union {overlap:.4f}; kept {a.kept:,} and {b.kept:,}\n\n{_table(rows)}"


def _apply(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import torch
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file, save_file

    from ..masks.apply import mask_state_dict_
    from ..masks.maskset import MaskSet
    from ..utils.files import atomic_write, check_writable

    check_writable(options.out, "--out")
    masks = MaskSet.load(options.file)
    source = options.weights
    if not source.is_file():
        raise FileNotFoundError(f"WEIGHTS: wanted a state dict, got {str(source)!r}, which is no file")
    packed = source.suffix == ".safetensors"
    if packed != (options.out.suffix == ".safetensors"):
        raise ValueError(f"--out: wanted the format of {source.name}, got {options.out.name}")
    header = None
    try:
        if packed:
            with safe_open(source, "pt") as file:
                header = file.metadata()  # readers such as transformers want it
        state = load_file(source) if packed else torch.load(source, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"WEIGHTS: {str(source)!r} is no readable state dict: {error}") from error
    except Exception as error:  # torch.load raises UnpicklingError for other objects
        raise ValueError(f"WEIGHTS: wanted a state dict, got another object in {str(source)!r}") from error
    if not isinstance(state, dict):
        raise ValueError(f"WEIGHTS: wanted a state dict, got a {type(state).__name__} in {str(source)!r}")
    weights = state.get("state_dict", state)  # Lightning's checkpoints have more beside it
    weights = weights if isinstance(weights, dict) else state
    try:
        fitted = mask_state_dict_(masks, weights)
    except ValueError as error:
        raise ValueError(f"WEIGHTS: {str(error).removeprefix('state: ')}") from error
    with atomic_write(options.out) as temporary:
        if packed:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, header)
        else:
            torch.save(state, temporary)
    outcome = {"out": str(options.out), "kept": masks.kept, "prunable": masks.prunable, "sparsity": masks.sparsity}
    outcome |= {"prefix_added": fitted.added if fitted else "", "prefix_taken": fitted.taken if fitted else ""}
    named = f" ({fitted})" if fitted else ""
    return outcome, f"{options.out}: {masks.prunable - masks.kept:,} of {masks.prunable:,} weights set to zero{named}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (cell.ljust(width) if i == 0 else cell.rjust(width)
                          for i, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)
