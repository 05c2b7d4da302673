"""``sfpk prune package.module:task``: a whole run from the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..batchnorm import recalibrate_batchnorm
from ..config import CHOICES, PRESETS, SFPKConfig
from ._task import WANTED, Task, WrongTask, call_task, find_task, place
from ._words import FAILED, refuse

_KINDS = ("embeddings", "biases", "norms")
_OPTIONS = {"ignored_layers": "--ignore", "checkpoints": "--checkpoints", "sparsity": "--sparsity"}  # by argument


def add_command(commands: Any) -> None:
    """Add ``prune``, with an option for every field of :class:`SFPKConfig`."""
    prune = commands.add_parser(
        "prune",
        help="prune the model that a function of yours returns",
        description=f"TASK is package.module:function, {WANTED}; eval_fn(model) -> number (or "
        "numbers by name) is called before and after. "
        "Writes mask.safetensors and a report; the model itself is not saved.",
    )
    prune.add_argument("task", metavar="TASK")
    prune.add_argument(
        "--preset", choices=sorted(PRESETS), default="default", help="what the other settings start from"
    )
    prune.add_argument("--out", type=Path, default=Path("sfpk-out"), metavar="DIR", help="default: sfpk-out")
    prune.add_argument("--plan", action="store_true", help="only print memory and time of the run")
    prune.add_argument("--checkpoints", type=float, nargs="+", default=(), metavar="S",
                       help="sparsities at which to write a mask on the way")  # fmt: skip
    prune.add_argument("--save-every", type=int, metavar="STEPS", help="write DIR/run.sfpk after so many steps")
    prune.add_argument("--resume", nargs="?", const=True, metavar="FILE",
                       help="go on from FILE (default: DIR/run.sfpk, if it exists)")  # fmt: skip
    prune.add_argument("--ignore", action="append", default=[], metavar="NAME",
                       help="leave this module or parameter alone, or re:PATTERN; may be repeated")  # fmt: skip
    for kind in _KINDS:
        prune.add_argument(f"--include-{kind}", action="store_true", help=f"prune {kind}, too")
    prune.add_argument("--bn-batches", type=int, default=50, metavar="INT",
                       help="batches that re-estimate batch-norm before eval_fn sees the pruned model, 0 for none "
                       "(default: 50)")  # fmt: skip
    prune.add_argument("--traceback", action="store_true", help="show where an error came from in full")
    prune.add_argument("--json", action="store_true", help="the outcome as JSON on stdout")
    prune.add_argument("--quiet", action="store_true", help="no progress, no text")
    settings = prune.add_argument_group("settings", "fields of SFPKConfig; without the option the preset's value")
    words = _descriptions()
    for field in dataclasses.fields(SFPKConfig):
        _add_field(settings, field, words[field.name])
    prune.set_defaults(run=_prune)


def _descriptions() -> dict[str, str]:
    """What SFPKConfig's docstring says of its fields."""
    text = (SFPKConfig.__doc__ or "").split("Args:", 1)[-1].split("Raises:", 1)[0]
    parts = re.split(r"\n {8}(?=[a-z_]+: )", text)[1:]
    pairs = (part.split(":", 1) for part in parts)
    return {name.strip(): re.sub(r"\s+", " ", words).replace("``", "").strip() for name, words in pairs}


def _add_field(settings: Any, field: dataclasses.Field[Any], words: str) -> None:
    option, words = f"--{field.name.replace('_', '-')}", words.replace("%", "%%")
    common = {"dest": f"config_{field.name}", "default": argparse.SUPPRESS, "help": words}
    if field.type == "bool":
        settings.add_argument(option, action=argparse.BooleanOptionalAction, **common)
        return
    optional = str(field.type).endswith("| None")
    kind = {"int": int, "float": float, "str": str}[str(field.type).removesuffix(" | None")]
    choices = CHOICES.get(field.name)
    if choices is not None:
        settings.add_argument(option, choices=[c or "none" for c in choices], **common)
    else:
        settings.add_argument(option, type=_or_none(kind) if optional else kind,
                              required=field.name == "sparsity", metavar=kind.__name__.upper(), **common)  # fmt: skip


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text == "none" else kind(text)

    parse.__name__ = kind.__name__  # in argparse's message
    return parse


def _prune(options: argparse.Namespace) -> int:
    given = {name.removeprefix("config_"): value for name, value in vars(options).items() if name.startswith("config_")}
    given = {name: None if value == "none" else value for name, value in given.items()}
    try:
        config = SFPKConfig.preset(options.preset, **given)
    except (TypeError, ValueError) as error:
        field, _, words = str(error).partition(":")
        return refuse("prune", f"--{field.replace('_', '-')}:{words}")
    if options.out.exists() and not options.out.is_dir():
        return refuse("prune", f"--out: wanted a folder, got the file {options.out}")
    if isinstance(options.resume, str) and not Path(options.resume).is_file():
        return refuse("prune", f"--resume: wanted a file, got {options.resume!r}, which is none")
    for name in ("save_every", "bn_batches"):
        value, least = getattr(options, name), 1 if name == "save_every" else 0
        if value is not None and value < least:
            return refuse("prune", f"--{name.replace('_', '-')}: wanted ≥ {least}, got {value}")
    try:
        return _run(call_task(find_task(options.task)), config, options)
    except WrongTask as error:
        return refuse("prune", f"TASK: {error}")
    except _WrongOption as error:
        return refuse("prune", error)
    except Exception as error:
        if options.traceback:
            traceback.print_exception(error)
        notes = "".join(f"\n  {note}" for note in getattr(error, "__notes__", ()))
        return refuse("prune", f"{type(error).__name__}: {error}{notes}{place(error)}", FAILED)


class _WrongOption(ValueError):
    """Named as on the command line."""


@contextmanager
def _as_options() -> Iterator[None]:
    """Errors about arguments of the pruner are about options here."""
    try:
        yield
    except (TypeError, ValueError) as error:
        argument, _, words = str(error).partition(":")
        if argument not in _OPTIONS:
            raise
        raise _WrongOption(f"{_OPTIONS[argument]}:{words}") from error


def _run(task: Task, config: SFPKConfig, options: argparse.Namespace) -> int:
    from ..planning import plan
    from ..pruner import SFPKPruner

    which = {f"include_{kind}": getattr(options, f"include_{kind}") for kind in _KINDS}
    which["ignored_layers"] = options.ignore
    if options.plan:
        batch = next(iter(task.loader), None)
        if batch is None:
            raise WrongTask("loader: wanted batches, got an empty iterable")
        with _as_options():
            found = plan(task.model, config, batch, task.loss_fn, **which)
        print(json.dumps(found.to_dict(), indent=1) if options.json else found)
        return 0 if found.fits else FAILED
    with _as_options():
        pruner = SFPKPruner(task.model, task.loss_fn, config, checkpoints=options.checkpoints, **which)
    saved = options.out / "run.sfpk"
    start = options.resume if isinstance(options.resume, str) else saved if options.resume and saved.exists() else None
    if start is not None:
        try:
            pruner.load(start)
        except ValueError as error:
            raise _WrongOption(f"--resume: {str(error).removeprefix('path: ')}") from error
    options.out.mkdir(parents=True, exist_ok=True)
    shows = not options.quiet and sys.stderr.isatty()
    if not options.quiet and not shows:
        pruner.add_callback(_log_line(config))
    dense = task.evaluate()  # before the run: an eval_fn that does not work is known early
    target = saved if options.save_every else None
    result = pruner.run(task.loader, progress=shows, save_every=options.save_every, save_path=target)
    outcome: dict[str, Any] = {**result.summary(), "files": _write(result, options.out)}
    if dense is not None:
        result.apply_(task.model)
        _recalibrate(task, options.bn_batches)
        outcome |= {"dense_eval": dense, "pruned_eval": task.evaluate()}
    if options.json:
        print(json.dumps(outcome, indent=1))
    elif not options.quiet:
        print(result.mask)
        if dense is not None:
            before, after = (value if isinstance(value, dict) else {"eval": value}
                             for value in (dense, outcome["pruned_eval"]))  # fmt: skip
            for name in before:
                print(f"{name}: {before[name]:.6g} dense, {after[name]:.6g} pruned")
        print("\n".join(outcome["files"]))
    return 0


def _recalibrate(task: Task, batches: int) -> None:
    """Batch-norm statistics of the pruned model: the dense one's would spoil what eval_fn measures."""
    if batches:
        try:
            recalibrate_batchnorm(task.model, task.loader, max_batches=batches)
        except TypeError as error:  # batches that only loss_fn understands
            logging.getLogger(__name__).warning("batch-norm was not re-estimated: %s", error)


def _write(result: Any, folder: Path) -> list[str]:
    """Masks, and the report where it can be drawn."""
    metadata = {"sparsity": result.config.sparsity, "config": result.config.to_dict()}
    files = [folder / "mask.safetensors"]
    result.mask.save(files[0], metadata)
    for waypoint in result.waypoints:
        files.append(folder / f"mask-{waypoint.sparsity:g}.safetensors")
        waypoint.mask.save(files[-1], {"sparsity": waypoint.sparsity, "step": waypoint.step})
    try:
        files.append(result.report(folder))
    except ImportError as error:
        logging.getLogger(__name__).warning("no report: %s: pip install 'sfpk_kernels[demo]'", error)
    return [str(file) for file in files]


def _log_line(config: SFPKConfig) -> Callable[[Any], None]:
    """About twenty lines a run."""
    every = max(1, config.n_steps // 20)

    def callback(record: Any) -> None:
        if record.step % every == 0 or record.step == config.n_steps:
            print(
                f"step {record.step} of {config.n_steps}: loss {record.energy:.4g}, "
                f"sparsity {1.0 - record.density:.4f}, {record.seconds:.3g} s",
                file=sys.stderr,
                flush=True,
            )

    return callback
