"""``sfpk prune --method NAME``: the baselines on the command line."""

from __future__ import annotations

import argparse
import time
from typing import Any

from .. import baselines
from ..coordinates.coverage import coordinates_for
from ..coordinates.pattern import is_pattern, sparsity_of
from ..masks.maskset import MaskSet
from ._outcome import WrongOption, as_options, evaluated, in_words, said
from ._task import Task, WrongTask
from ._words import make_folder

SFPK = "sfpk"
_ALLOCATED, _LEARNED = ("allocation",), ("seed", "passes")
METHODS: dict[str, tuple[str, ...]] = {
    "magnitude": (*_ALLOCATED, "pattern"), "random": (*_ALLOCATED, "seed"), "synflow": (), "snip": _ALLOCATED,
    "force": ("seed",), "grasp": _ALLOCATED, "ste": _LEARNED, "single_particle": _LEARNED, "wanda": ("pattern",),
    "sparsegpt": (*_ALLOCATED, "pattern"), "woodfisher": _ALLOCATED,
}  # functions of sfpk_kernels.baselines, and the options beside the sparsity that each takes  # fmt: skip
_WITHOUT_LOADER = ("magnitude", "random", "synflow")
_OWN = ("allocation", "passes")
_OF_A_RUN = ("preset", "config", "plan", "waypoints", "save_every", "resume", "shrunk", "latency")


def add_options(prune: argparse.ArgumentParser) -> None:
    """Add ``--method`` and the options that baselines alone take."""
    prune.add_argument(
        "--method", choices=[SFPK, *METHODS], default=SFPK,
        help="what chooses the mask (default: sfpk); the others take --sparsity, --seed where they draw anything, "
        f"--pattern ({', '.join(name for name, takes in METHODS.items() if 'pattern' in takes)}), and the options "
        "below",
    )  # fmt: skip
    takers = {own: ", ".join(name for name, takes in METHODS.items() if own in takes) for own in _OWN}
    prune.add_argument("--allocation", choices=("global", "uniform", "erk", "lamp"),
                       help=f"how kept weights are spread over the tensors; for {takers['allocation']}")  # fmt: skip
    prune.add_argument("--passes", type=int, metavar="INT",
                       help=f"forward and backward passes, in place of --n-steps (default: 1000); for {SFPK}, "
                       f"{takers['passes']}")  # fmt: skip


def with_sparsity(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by name; a pattern says how much is removed, where nothing else does."""
    pattern = settings.get("pattern")
    if "sparsity" in settings or not is_pattern(pattern):
        return settings
    return {**settings, "sparsity": sparsity_of(pattern)}


def check_options(options: argparse.Namespace, given: dict[str, Any]) -> None:
    """That the method takes what was given: ``given`` are the fields of SFPKConfig and Execution by name.

    Raises:
        WrongOption: it does not, or lacks the sparsity.
    """
    own = [name for name in _OWN if getattr(options, name) is not None]
    if options.method == SFPK:
        if options.passes is not None and "n_steps" in given:
            raise WrongOption(f"--passes: wanted it or --n-steps, got {options.passes} beside {given['n_steps']}")
        for name in own:
            if name == "passes":
                continue
            takers = ", ".join(method for method, takes in METHODS.items() if name in takes)
            raise WrongOption(f"--{name}: wanted with --method {takers}, got --method {SFPK}")
        return
    takes = ("sparsity", *METHODS[options.method])
    of_a_run = [name for name in _OF_A_RUN if getattr(options, name)]
    for name in (*own, *of_a_run, *given):
        if name not in takes:
            option = f"--{name.replace('_', '-')}"
            raise WrongOption(f"{option}: wanted without --method {options.method}, which does not take it, got both")
    if "sparsity" not in given:
        raise WrongOption("--sparsity: wanted a fraction in (0, 1), got none")


def run_method(
    task: Task, options: argparse.Namespace, given: dict[str, Any], which: dict[str, Any]
) -> tuple[int, str]:
    """Exit code, and what to print.

    Args:
        task: the model and the rest.
        options: of the command line, checked.
        given: sparsity, seed and pattern, where given.
        which: options of Coordinates.
    """
    from ..report import MethodResult, write_method

    settings = {name: getattr(options, name) for name in _OWN if getattr(options, name) is not None} | given
    with as_options(bool(options.ignore)):
        coordinates = coordinates_for(task.model, **which)
    try:
        make_folder(options.out)
    except OSError as error:
        raise WrongOption(error) from error
    dense = task.evaluate()  # before the method: an eval_fn that does not work is known early
    began = time.perf_counter()
    with as_options(bool(options.ignore)):
        mask = _mask(task, options.method, {**settings, **which})
    result = MethodResult(options.method, settings, mask, coordinates, time.perf_counter() - began)
    path = options.out / "mask.safetensors"
    mask.save(path, {"method": options.method, **settings})
    evaluation, files = evaluated(
        task, mask, dense, options.bn_batches, lambda **found: write_method(result, options.out, **found)
    )
    outcome = {**result.summary(), "files": [str(path), *files], **evaluation}
    return 0, said(in_words(mask, coordinates), outcome, options.json, options.quiet)


def _mask(task: Task, name: str, settings: dict[str, Any]) -> MaskSet:
    method = getattr(baselines, name)
    if name == "synflow":
        try:
            settings["example"] = next(iter(task.loader))
        except StopIteration:
            raise WrongTask("loader: wanted batches, got an empty iterable") from None
    if name in _WITHOUT_LOADER:
        return method(task.model, settings.pop("sparsity"), **settings)
    return method(task.model, task.loader, settings.pop("sparsity"), loss_fn=task.loss_fn, **settings)
