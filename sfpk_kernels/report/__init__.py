"""Reports of runs: report.json, pictures, and a page that holds them all."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..export.measure import Latency
from ..retraining.shots import GradualResult
from ..utils.files import atomic_write, check_place, remove_regular
from ..utils.plain import plain
from .charts import (
    plot_baselines,
    plot_groups,
    plot_layers,
    plot_loss,
    plot_loss_versus_sparsity,
    plot_methods,
    plot_particles,
)
from .contents import (
    FORMAT,
    PARTS,
    Evaluation,
    MethodResult,
    Reported,
    checked_evaluation,
    checked_fraction,
    checked_latency,
    checked_row,
    collect,
    collect_method,
)  # fmt: skip
from .page import page
from .shots import checked_shot_evals, collect_gradual

__all__ = [
    "MethodResult", "plot_loss_versus_sparsity", "plot_methods", "render", "write", "write_gradual", "write_method",
]  # fmt: skip

_PICTURES = {
    "loss.png": plot_loss, "particles.png": plot_particles, "layers.png": plot_layers, "baselines.png": plot_baselines,
    "groups.png": plot_groups,
}  # fmt: skip


def write(
    result: Reported,
    folder: str | os.PathLike[str],
    baselines: Sequence[Mapping[str, Any]] = (),
    dense_accuracy: float | None = None,
    *,
    dense_eval: Evaluation | None = None,
    pruned_eval: Evaluation | None = None,
    latency: Sequence[Latency] = (),
) -> Path:
    """Write ``report.json``, its pictures and ``report.html`` into a folder, made if absent.

    Pictures of an earlier report there are replaced, or removed where this one has none such; what is no regular file
    is left alone. A report that cannot be written loses nothing: the error says what was written, what is left in
    memory, and how to write it again.

    Args:
        result: of a run, a :class:`sfpk_kernels.PruneResult`.
        folder: the folder.
        baselines: rows to compare with: ``method``, ``sparsity``, ``accuracy_mean`` in [0, 1], and ``accuracy_std``
            where known. What else is in them is kept where JSON can hold it.
        dense_accuracy: of the unpruned model, in [0, 1]; beside the baselines.
        dense_eval: what an evaluation of yours says of the model before pruning, a number or numbers by name.
        pruned_eval: the same of the model with this result's mask. What is not given is not shown.
        latency: measured seconds of the dense and of the smaller model, what
            :meth:`sfpk_kernels.StructuredResult.latency` returns.

    Returns:
        The page's path.

    Raises:
        ImportError: no matplotlib (``pip install matplotlib``).
        TypeError: a row of ``baselines`` that JSON cannot hold, an evaluation that is not made of numbers, or a latency
            that is none.
        ValueError: a row of ``baselines`` without what it needs, or a number that is no fraction.
        NotADirectoryError: ``folder`` is a file.
        OSError: something cannot be written; FileExistsError or IsADirectoryError, before anything is, where one of the
            names belongs to what is no regular file.
    """
    rows = [checked_row(row) for row in baselines]
    if dense_accuracy is not None:
        dense_accuracy = checked_fraction("dense_accuracy", dense_accuracy)
    evaluation = _evaluation(dense_eval, pruned_eval)
    timed = checked_latency(latency)
    return _write(folder, lambda: collect(result, rows, dense_accuracy, evaluation, timed), "result.report({})")


def write_method(
    result: MethodResult,
    folder: str | os.PathLike[str],
    *,
    dense_eval: Evaluation | None = None,
    pruned_eval: Evaluation | None = None,
    latency: Sequence[Latency] = (),
) -> Path:
    """As :func:`write` for a mask that a baseline has found: a report without loss and particles."""
    evaluation, timed = _evaluation(dense_eval, pruned_eval), checked_latency(latency)
    return _write(folder, lambda: collect_method(result, evaluation, timed), "write_method(result, {})")


def write_gradual(
    result: GradualResult,
    folder: str | os.PathLike[str],
    baselines: Sequence[Mapping[str, Any]] = (),
    dense_accuracy: float | None = None,
    *,
    dense_eval: Evaluation | None = None,
    shot_evals: Sequence[Evaluation] = (),
    pruned_eval: Evaluation | None = None,
    latency: Sequence[Latency] = (),
) -> Path:
    """As :func:`write` for a gradual run: what every shot left, loss and particles along the searches of all of them.

    Args:
        result: of a :class:`sfpk_kernels.GradualPruner`.
        shot_evals: what an evaluation of yours says of the retrained model after every shot, one a shot.
        others: as for :func:`write`.

    Raises:
        TypeError, ValueError, ImportError, OSError: as there; ``shot_evals`` of another number of shots.
    """
    rows = [checked_row(row) for row in baselines]
    if dense_accuracy is not None:
        dense_accuracy = checked_fraction("dense_accuracy", dense_accuracy)
    evaluation, timed = _evaluation(dense_eval, pruned_eval), checked_latency(latency)
    after = checked_shot_evals(shot_evals, len(result.history))
    return _write(
        folder, lambda: collect_gradual(result, rows, dense_accuracy, evaluation, after, timed), "result.report({})"
    )


def _evaluation(dense: Evaluation | None, pruned: Evaluation | None) -> dict[str, dict[str, float]]:
    measured = {"dense": ("dense_eval", dense), "pruned": ("pruned_eval", pruned)}
    return {which: checked_evaluation(name, value) for which, (name, value) in measured.items() if value is not None}


def _write(folder: str | os.PathLike[str], contents: Callable[[], dict[str, Any]], again: str) -> Path:
    """``again``: the call that writes it, for messages."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        safe = _safe_in_memory(folder.with_name("FOLDER"), again)
        raise NotADirectoryError(f"folder: wanted a folder, got the file {os.fspath(folder)!r}; {safe}")
    with _saying(folder, lambda: _safe_in_memory(folder, again)):
        folder.mkdir(parents=True, exist_ok=True)
        _check_places(folder, "report.json")
        text = json.dumps(plain(contents()), indent=1, allow_nan=False)
        with atomic_write(folder / "report.json") as temporary:
            temporary.write_text(text + "\n", "utf-8")
    with _saying(folder, lambda: _safe_on_disk(folder)):
        return _draw(folder, json.loads(text))


def _safe_in_memory(folder: Path, again: str) -> str:
    return (
        "nothing is lost: the result is in memory, result.mask.save(path) writes its mask, "
        f"{again.format(repr(os.fspath(folder)))} the report, to another folder, too"
    )


def _safe_on_disk(folder: Path) -> str:
    return (
        f"nothing is lost: {os.fspath(folder / 'report.json')!r} holds the numbers, and `sfpk report "
        f"{os.fspath(folder)}` draws page and pictures from it again; the result is in memory, "
        "result.mask.save(path) writes its mask"
    )


@contextmanager
def _saying(folder: Path, safe: Callable[[], str]) -> Iterator[None]:
    """Errors of writing, and of drawing without matplotlib, say what is safe."""
    try:
        yield
    except OSError as error:
        where = os.fspath(folder)
        if error.errno is None:
            raise type(error)(f"the report in {where!r} was not written: {error}; {safe()}") from error
        at = "" if error.filename is None else f": {error.filename!r}"
        raise OSError(
            error.errno, f"{error.strerror}{at}: the report in {where!r} was not written; {safe()}"
        ) from error
    except ImportError as error:
        raise ImportError(f"{error} ({safe()})", name=error.name) from error


def _check_places(folder: Path, *more: str) -> None:
    """That all that will be written may take its place."""
    for name in (*more, *_PICTURES, "report.html"):
        check_place(folder / name, name)


def render(folder: str | os.PathLike[str]) -> Path:
    """Draw the pictures and the page of a folder again from its ``report.json``; returns the page's path.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no report, or a damaged one.
    """
    source = Path(folder) / "report.json"
    if not source.is_file():
        raise FileNotFoundError(f"folder: wanted a folder with a report.json, got {os.fspath(folder)!r}")
    try:
        report = json.loads(source.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{source}: wanted a report of format {FORMAT}, got what is no JSON: {error}") from error
    found = report.get("format", "one that names none") if isinstance(report, dict) else type(report).__name__
    if found != FORMAT:
        raise ValueError(f"{source}: wanted a report of format {FORMAT}, got {found}")
    missing = sorted(PARTS - report.keys())
    if missing:
        raise ValueError(f"{source}: wanted a report of format {FORMAT}, got one without {', '.join(missing)}")
    try:
        return _draw(source.parent, report)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source}: wanted a report of format {FORMAT}, got a damaged one: {type(error).__name__}: {error}"
        ) from error


def _draw(folder: Path, report: Mapping[str, Any]) -> Path:
    """The pictures and the page; pictures of another report go."""
    _check_places(folder)
    pictures = {}
    for name, draw in _PICTURES.items():
        if "method" in report and name in ("loss.png", "particles.png"):
            continue
        if name == "particles.png" and report["config"]["n_particles"] == 1:
            continue
        if name == "baselines.png" and not report["baselines"]:
            continue
        if name == "groups.png" and not report["summary"].get("groups"):
            continue
        picture = io.BytesIO()
        draw(picture, report)
        pictures[name] = picture.getvalue()
    text = page(report, pictures)
    for name in _PICTURES:
        if name not in pictures:
            remove_regular(folder / name)
    target = folder / "report.html"
    for path, content in {**{folder / name: png for name, png in pictures.items()}, target: text.encode()}.items():
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)
    return target
