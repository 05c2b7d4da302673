"""``sfpk prune package.module:task``: a whole run from the command line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..compat.fields import separated
from ..config import PRESETS, SFPKConfig
from ..execution import Execution
from ..search.merging import with_passes
from ..search.waypoints import check_waypoints
from ..utils.settings import kind_of, meaning_of
from ._methods import SFPK, add_options, check_options, run_method, with_sparsity
from ._outcome import WrongOption, as_options, evaluated, said
from ._settings import read_settings
from ._structured import check_structured, described, inputs_of, latency_of, write_recipe, write_shrunk
from ._task import WANTED, Task, WrongTask, call_task, find_task, place
from ._words import FAILED, Aside, make_folder, refuse, say, to_json

logger = logging.getLogger(__name__)

_KINDS = ("embeddings", "biases", "norms")


def add_command(commands: Any) -> None:
    """Add ``prune``, with an option for every field of :class:`SFPKConfig` and :class:`Execution`."""
    prune = commands.add_parser(
        "prune",
        help="prune the model that a function of yours returns",
        description=f"TASK is package.module:function, {WANTED}; eval_fn(model) -> number (or "
        "numbers by name) is called before and after. "
        "Writes mask.safetensors and a report; the model itself is not saved.",
    )
    prune.add_argument("task", metavar="TASK")
    add_options(prune)
    prune.add_argument(
        "--preset", choices=sorted(PRESETS), help="what the other settings start from (default: default)"
    )
    prune.add_argument("--config", type=Path, metavar="FILE",
                       help="settings in a TOML or JSON file: preset, and the names of the groups method and "
                       "execution; options go before them")  # fmt: skip
    prune.add_argument("--plan", action="store_true", help="only print memory and time of the run")
    prune.add_argument("--waypoints", type=float, nargs="+", default=(), metavar="S",
                       help="sparsities at which to write a mask on the way; -- ends the list")  # fmt: skip
    prune.add_argument("--ignore", action="append", default=[], metavar="NAME",
                       help="leave this module or parameter alone, or re:PATTERN; may be repeated")  # fmt: skip
    prune.add_argument("--include", action="append", default=[], metavar="NAME",
                       help="prune this module or parameter, too, whatever it is, or re:PATTERN; may be "
                       "repeated")  # fmt: skip
    for kind in _KINDS:
        prune.add_argument(f"--include-{kind}", action="store_true", help=f"prune {kind}, too")
    prune.add_argument("--bn-batches", type=int, default=50, metavar="INT",
                       help="batches that re-estimate batch-norm before eval_fn sees the pruned model, 0 for none "
                       "(default: 50)")  # fmt: skip
    prune.add_argument("--traceback", action="store_true", help="show where an error came from in full")
    prune.add_argument("--json", action="store_true", help="the outcome as JSON on stdout")
    prune.add_argument("--quiet", action="store_true", help="no progress, no text (what TASK prints goes to stderr)")
    files = prune.add_argument_group("files")
    files.add_argument("--out", type=Path, default=Path("sfpk-out"), metavar="DIR", help="default: sfpk-out")
    files.add_argument("--shrunk", action="store_true",
                       help="with --granularity: write shrunk.safetensors, too, the smaller model, its batch-norm "
                       "re-estimated (--bn-batches); sfpk_kernels.load_exported turns a dense one into it")  # fmt: skip
    files.add_argument("--latency", action="store_true",
                       help="with --granularity: measure a call of the dense and of the smaller model, at batch sizes "
                       "1 and 16, for the report")  # fmt: skip
    files.add_argument("--save-every", type=int, metavar="STEPS", help="write DIR/run.sfpk after so many steps")
    files.add_argument("--resume", nargs="?", const=True, metavar="FILE",
                       help="go on from FILE (default: DIR/run.sfpk, if it exists)")  # fmt: skip
    method = prune.add_argument_group("method", "what decides the mask; without the option the preset's value")
    execution = prune.add_argument_group("execution", "how it is computed; decides nothing of the mask but rounding")
    for group, settings in ((method, SFPKConfig), (execution, Execution)):
        for field in dataclasses.fields(settings):
            _add_field(group, field)
    prune.set_defaults(run=_prune)


def _add_field(group: Any, field: dataclasses.Field[Any]) -> None:
    option, meaning = f"--{field.name.replace('_', '-')}", meaning_of(field)
    (kind, optional), words = kind_of(field), meaning.plain.replace("%", "%%")
    common = {"dest": f"config_{field.name}", "default": argparse.SUPPRESS, "help": words}
    if kind is bool:
        group.add_argument(option, action=argparse.BooleanOptionalAction, **common)
    elif kind is tuple:
        group.add_argument(option, type=_pattern, metavar="N:M", **common)
    elif meaning.choices is not None:
        group.add_argument(option, choices=[c or "none" for c in meaning.choices], **common)
    else:
        group.add_argument(option, type=_or_none(kind) if optional else kind, metavar=kind.__name__.upper(), **common)


def _pattern(text: str) -> tuple[int, int] | None:
    """2:4 as a pair; what it may be is said where it is checked."""
    if text == "none":
        return None
    first, second = map(int, text.split(":"))
    return first, second


_pattern.__name__ = "N:M"  # in argparse's message


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text == "none" else kind(text)

    parse.__name__ = kind.__name__  # in argparse's message
    return parse


def _prune(options: argparse.Namespace) -> int:
    given = {name.removeprefix("config_"): value for name, value in vars(options).items() if name.startswith("config_")}
    given = {name: None if value == "none" else value for name, value in given.items()}
    try:
        if options.method != SFPK:
            given = with_sparsity(given)
        check_options(options, given)
        run = _searching(options, given) if options.method == SFPK else _comparing(options, given)
        for name in ("save_every", "bn_batches"):
            value, least = getattr(options, name), 1 if name == "save_every" else 0
            if value is not None and value < least:
                raise WrongOption(f"--{name.replace('_', '-')}: wanted ≥ {least}, got {value}")
        with contextlib.redirect_stdout(Aside()):  # what the task prints is not the outcome
            code, text = run(call_task(find_task(options.task)))
    except WrongTask as error:
        return refuse("prune", f"TASK: {error}")
    except WrongOption as error:
        return refuse("prune", error)
    except Exception as error:
        if options.traceback:
            traceback.print_exception(error)
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        return refuse("prune", f"{type(error).__name__}: {error}{notes}{place(error)}", FAILED)
    if text:
        print(text)
    return code


Run = Callable[[Task], tuple[int, str]]  # exit code, and what to print


def _comparing(options: argparse.Namespace, given: dict[str, Any]) -> Run:
    """Another method than SFPK."""
    return lambda task: run_method(task, options, given, _which(options))


def _searching(options: argparse.Namespace, given: dict[str, Any]) -> Run:
    """SFPK, by the settings of options and file."""
    try:
        read = {} if options.config is None else read_settings(options.config)
    except (OSError, ValueError) as error:
        raise WrongOption(f"--config: {error}") from error
    told = read.pop("preset", "default")
    preset = options.preset or told
    values = with_sparsity({**read, **given})
    if "sparsity" not in values:
        raise WrongOption("--sparsity: wanted a fraction in (0, 1), as an option or in the file of --config, got none")
    try:
        values, execution = separated(values)
        config = SFPKConfig.preset(preset, **values)
        if options.passes is not None:
            config = with_passes(config, options.passes)
    except (TypeError, ValueError) as error:
        field, _, words = str(error).partition(":")
        if field in (*given, "passes") or (field == "preset" and options.preset):
            raise WrongOption(f"--{field.replace('_', '-')}:{words}") from error
        raise WrongOption(f"--config: {options.config}: {error}") from error
    check_structured(options, config)
    if isinstance(options.resume, str) and not Path(options.resume).is_file():
        raise WrongOption(f"--resume: wanted a file, got {options.resume!r}, which is none")
    return lambda task: _run(task, config, execution, options)


def _which(options: argparse.Namespace) -> dict[str, Any]:
    """Options of Coordinates."""
    include = {f"include_{kind}": getattr(options, f"include_{kind}") for kind in _KINDS}
    return {**include, "ignored_layers": options.ignore, "include": options.include}


def _run(task: Task, config: SFPKConfig, execution: Execution, options: argparse.Namespace) -> tuple[int, str]:
    """Exit code, and what to print."""
    from ..search.planning import plan
    from ..search.pruner import SFPKPruner

    which = {**_which(options), **inputs_of(task, config)}
    how: dict[str, Any] = {"loss_fn": task.loss_fn, "config": config, "execution": execution}
    if options.plan:
        with as_options(bool(options.ignore)):
            check_waypoints(options.waypoints, config)
            found = plan(task.model, task.loader, **how, **which)
        text = to_json(found.to_dict()) if options.json else "" if options.quiet else str(found)
        return 0 if found.fits else FAILED, text
    with as_options(bool(options.ignore)):
        pruner = SFPKPruner(task.model, waypoints=options.waypoints, **how, **which)
    saved = options.out / "run.sfpk"
    start = options.resume if isinstance(options.resume, str) else saved if options.resume and saved.exists() else None
    if start is not None:
        try:
            pruner.load(start)
        except ValueError as error:
            raise WrongOption(f"--resume: {str(error).removeprefix('path: ')}") from error
    try:
        make_folder(options.out)
    except OSError as error:
        raise WrongOption(error) from error
    shows = not options.quiet and sys.stderr.isatty()
    if not options.quiet and not shows:
        pruner.add_callback(_log_line(config))
    dense = task.evaluate()  # before the run: an eval_fn that does not work is known early
    target = saved if options.save_every else None
    result = pruner.run(task.loader, progress=shows, save_every=options.save_every, save_path=target)
    files = [
        *_write_masks(result, options.out),
        *write_recipe(result, options.out),
        *(write_shrunk(result, task, options.out, options.bn_batches) if options.shrunk else ()),
    ]  # first: whatever an evaluation does, they are there
    latency = latency_of(result, task, which["example_inputs"]) if options.latency else []
    evaluation, written = evaluated(
        task, result.mask, dense, options.bn_batches,
        lambda **found: result.report(options.out, latency=latency, **found),
    )  # fmt: skip
    outcome: dict[str, Any] = {**result.summary(), "files": [*files, *written], **evaluation}
    if latency:
        outcome["latency"] = [dataclasses.asdict(row) for row in latency]
    return 0, said(described(result, latency), outcome, options.json, options.quiet)


def _write_masks(result: Any, folder: Path) -> list[str]:
    """The final mask and those taken on the way."""
    how = {"config": result.config.to_dict(), "execution": result.execution.to_dict()}
    masks = {"mask.safetensors": (result.mask, {"sparsity": result.config.sparsity, **how})}
    for waypoint in result.waypoints:
        metadata = {"sparsity": waypoint.sparsity, "step": waypoint.step, **how}
        masks[f"mask-{waypoint.sparsity:g}.safetensors"] = (waypoint.mask, metadata)
    for name, (mask, metadata) in masks.items():
        mask.save(folder / name, metadata)
    others = sorted(path.name for path in folder.glob("mask-*.safetensors") if path.name not in masks)
    if others:
        logger.warning("%s also holds masks of another run: %s", folder, ", ".join(others))
    return [str(folder / name) for name in masks]


def _log_line(config: SFPKConfig) -> Callable[[Any], None]:
    """About twenty lines a run."""
    every = max(1, config.n_steps // 20)

    def callback(record: Any) -> None:
        if record.step % every == 0 or record.step == config.n_steps:
            say(
                f"step {record.step} of {config.n_steps}: loss {record.energy:.4g}, "
                f"sparsity {1.0 - record.density:.4f}, {record.seconds:.3g} s"
            )

    return callback
