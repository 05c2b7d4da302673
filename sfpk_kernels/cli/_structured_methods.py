"""``sfpk prune --method structured_…``: baselines that choose whole channels, heads and neurons."""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

from .. import baselines
from ..baselines import StructuredBaseline
from ..config import SFPKConfig
from ..execution import Execution
from ..modeling.batches import move_to
from ..search.parts import coordinates_of
from ..search.structured.coordinates import StructuredCoordinates
from ..search.structured.words import costs_and_groups
from ._outcome import WrongOption, as_options, evaluated, said
from ._structured import inputs_of, latency_of, smaller_of, with_times, write_recipe, write_shrunk
from ._task import Task
from ._words import make_folder

_FOUND_BY = ("granularity", "on_refusal")  # what may go; the rest is for the method
_COMMON = (*_FOUND_BY, "budget", "min_keep", "round_to", "layer_sparsity", "shrunk", "latency")
STRUCTURED: dict[str, tuple[str, ...]] = {
    "structured_magnitude": ("allocation", "norm", *_COMMON), "structured_snip": ("allocation", *_COMMON),
    "structured_random": ("allocation", "seed", *_COMMON),
}  # functions of sfpk_kernels.baselines, and the options beside the sparsity that each takes  # fmt: skip


def run_structured(
    task: Task, options: argparse.Namespace, settings: dict[str, Any], which: dict[str, Any]
) -> tuple[int, str]:
    """Exit code, and what to print.

    Args:
        task: the model and the rest.
        options: of the command line, checked.
        settings: the method's, by name, where given.
        which: options of Coordinates.

    Raises:
        WrongOption, WrongTask: what the command line or the task says wrong.
    """
    from ..report import MethodResult, write_method

    settings = {"granularity": "group", "budget": "macs", **settings}
    if settings["granularity"] == "weight":
        raise WrongOption(
            f"--granularity: wanted channel, head, neuron or group with --method {options.method}, got weight"
        )
    fields = {field.name for field in dataclasses.fields(SFPKConfig)} - {"seed"}
    with as_options(bool(options.ignore)):
        config = SFPKConfig(**{name: value for name, value in settings.items() if name in fields})
        inputs = inputs_of(task, config)["example_inputs"]
        coordinates = coordinates_of(task.model, config, Execution(), example_inputs=inputs, **which)
    assert isinstance(coordinates, StructuredCoordinates)
    inputs = move_to(inputs, coordinates.device)
    try:
        make_folder(options.out)
    except OSError as error:
        raise WrongOption(error) from error
    dense = task.evaluate()  # before the method: an eval_fn that does not work is known early
    began = time.perf_counter()
    with as_options(bool(options.ignore)):
        found = _found(task, options.method, coordinates, inputs, settings)
    seconds = time.perf_counter() - began
    mask, recipe = coordinates.masks_of(found.keep), found.recipe
    path = options.out / "mask.safetensors"
    mask.save(path, {"method": options.method, **settings})
    files = [
        str(path),
        write_recipe(recipe, found.dense, found.left, options.out),
        *([write_shrunk(recipe, task, options.out, options.bn_batches)] if options.shrunk else ()),
    ]  # first: whatever an evaluation does, they are there
    latency = latency_of(recipe, task, inputs) if options.latency else []
    more = costs_and_groups(found.dense, found.left, found.structure, found.keep)
    result = MethodResult(options.method, settings, mask, coordinates, seconds, more)
    evaluation, written = evaluated(
        task, mask, dense, options.bn_batches,
        lambda **values: write_method(result, options.out, latency=latency, **values),
        smaller_of(found.structure, recipe, task.model),
    )  # fmt: skip
    outcome = {**result.summary(), "files": [*files, *written], **evaluation}
    if latency:
        outcome["latency"] = [dataclasses.asdict(row) for row in latency]
    return 0, said(with_times(str(found), latency), outcome, options.json, options.quiet)


def _found(
    task: Task, name: str, coordinates: StructuredCoordinates, inputs: Any, settings: dict[str, Any]
) -> StructuredBaseline:
    """The method's choice among the coordinates."""
    own = {key: value for key, value in settings.items() if key not in (*_FOUND_BY, "sparsity")}
    how = {"example_inputs": inputs, "structure": coordinates.structure, **own}
    if name == "structured_snip":
        return baselines.structured_snip(task.model, task.loader, settings["sparsity"], loss_fn=task.loss_fn, **how)
    method = baselines.structured_magnitude if name == "structured_magnitude" else baselines.structured_random
    return method(task.model, settings["sparsity"], **how)
