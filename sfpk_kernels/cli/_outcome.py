"""What every method's run ends with: errors named as on the command line, evaluations, words."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..coordinates.flat import Coordinates
from ..masks.maskset import MaskSet
from ..modeling.batchnorm import recalibrate_batchnorm
from ._task import Task, WrongTask
from ._words import to_json

logger = logging.getLogger(__name__)

_OPTIONS = {
    "ignored_layers": "--ignore", "waypoints": "--waypoints", "sparsity": "--sparsity", "settle": "--settle",
    "hold": "--hold", "merge": "--merge", "n_steps": "--n-steps", "energy_mode": "--energy-mode",
    "microbatch": "--microbatch", "allocation": "--allocation", "passes": "--passes", "seed": "--seed",
    "pattern": "--pattern", "granularity": "--granularity", "budget": "--budget", "min_keep": "--min-keep",
    "round_to": "--round-to", "on_refusal": "--on-refusal", "selection": "--selection", "kernel": "--kernel",
    "offload": "--offload", "compile": "--compile", "include_embeddings": "--include-embeddings",
    "include_biases": "--include-biases", "include_norms": "--include-norms", "include": "--include",
    "sparsity_of": "--sparsity-of",
}  # by argument  # fmt: skip
_NOTHING = "model: wanted at least one prunable tensor"


class WrongOption(ValueError):
    """Named as on the command line."""


@contextlib.contextmanager
def as_options(ignores: bool) -> Iterator[None]:
    """Errors about arguments of a method are about options here; ``ignores``: whether --ignore was given."""
    try:
        yield
    except (TypeError, ValueError) as error:
        argument, _, words = str(error).partition(":")
        if argument == "loader":
            raise WrongTask(str(error)) from error
        if ignores and str(error).startswith(_NOTHING):
            argument, words = "ignored_layers", " wanted patterns that leave something to prune, got ones that do not"
        if argument not in _OPTIONS:
            raise
        raise WrongOption(f"{_OPTIONS[argument]}:{words}") from error


def evaluated(
    task: Task,
    mask: MaskSet,
    dense: float | dict[str, float] | None,
    bn_batches: int,
    report: Callable[..., Any],  # of dense_eval and pruned_eval, where there are any: the page's path
) -> tuple[dict[str, Any], list[str]]:
    """What eval_fn says before and after, and the report's files: it is written, if it can be, whatever that does."""
    evaluation: dict[str, Any] = {} if dense is None else {"dense_eval": dense}
    files = []
    try:
        if dense is not None:
            mask.apply_(task.model)
            recalibrate(task.model, task, bn_batches)
            evaluation["pruned_eval"] = task.evaluate()
    finally:
        try:
            files.append(str(report(**evaluation)))
        except ImportError as error:
            logger.warning("no report: %s", error)
    return evaluation, files


def in_words(mask: MaskSet, coordinates: Coordinates) -> str:
    """What was found: the sparsity of the covered weights, and of the whole model."""
    return f"{mask}, {mask.share_removed(coordinates.beside):.4f} of the whole model"


def said(head: str, outcome: dict[str, Any], json: bool, quiet: bool) -> str:
    """The outcome as it was asked for; ``head``: what was found, in words."""
    if json:
        return to_json(outcome)
    if quiet:
        return ""
    lines = [head]
    if "dense_eval" in outcome:
        before, after = (value if isinstance(value, dict) else {"eval": value}
                         for value in (outcome["dense_eval"], outcome["pruned_eval"]))  # fmt: skip
        lines += [f"{name}: {before[name]:.6g} dense, {after[name]:.6g} pruned" for name in before]
    return "\n".join([*lines, *outcome["files"]])


def recalibrate(model: nn.Module, task: Task, batches: int) -> None:
    """Batch-norm statistics of a pruned model: the dense one's would spoil what eval_fn measures."""
    if batches:
        try:
            recalibrate_batchnorm(model, task.loader, max_batches=batches)
        except TypeError as error:  # batches that only loss_fn understands
            logger.warning("batch-norm was not re-estimated: %s", error)
