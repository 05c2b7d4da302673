"""The report as one HTML file: pictures inside, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..config import SFPKConfig
from ..execution import Execution
from ..search.structured.words import COSTS
from ..utils.memory import format_bytes
from ..utils.settings import meanings
from . import words
from .contents import before_the_merge
from .markup import STYLE, Fact, Name, Number, explained, facts, table

_TITLES = {
    "loss.png": "Loss along the run",
    "particles.png": "How far apart the particles are",
    "layers.png": "Density by layer",
    "baselines.png": "Accuracy by method",
    "groups.png": "Kept by group",
}
_WIDE = ("particles.png", "layers.png", "groups.png")
_SECTIONS = ("layers.png", "groups.png")  # pictures that stand beside a table


def page(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page of a report."""
    alarms = "".join(f'<p class="alarm">{escape(alarm)}</p>\n' for alarm in report["summary"]["alarms"])
    parts = [
        "" if "method" in report else explained([("Particle", words.PARTICLE)]),
        facts([*_counts(report), *_of(report)]),
        f'<h2>Alarms</h2>\n<p class="words">{escape(words.ALARMS)}</p>\n{alarms}' if alarms else "",
        _evaluation(report.get("evaluation", {}), words.RETRAINED if "shots" in report else words.EVALUATION),
        _shots(report.get("shots", [])),
        *(_figure(name, content, report) for name, content in pictures.items() if name not in _SECTIONS),
        _methods(report["baselines"], report["dense_accuracy"]),
        "" if "shots" in report else _waypoints(report["waypoints"]),
        _latency(report.get("latency", [])),
        _groups(report, pictures),
        _layers(report, pictures),
        _left_alone(report.get("model")),
        _settings({**report["config"], **report.get("execution", {})}),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>SFPK pruning report</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>SFPK pruning report</h1>\n{body}\n"
        f"<p>sfpk_kernels {escape(report['version'])}</p></body></html>\n"
    )


def _counts(report: Mapping[str, Any]) -> list[Fact]:
    summary = report["summary"]
    kept, prunable = summary["kept"], summary["prunable"]
    found = [
        Fact("weights kept", f"{kept:,} of {prunable:,} prunable", words.KEPT),
        Fact("sparsity", f"{100 * summary['sparsity']:.4f} % removed", words.SPARSITY),
    ]
    costs = summary.get("costs_after", {})  # of structured runs
    for name, left in costs.items():
        before = summary["costs_before"][name]
        shown = [format_bytes(one) if name == "bytes" else f"{one:,}" for one in (left, before)]
        found.append(Fact(COSTS[name], f"{shown[0]} of {shown[1]} left ({_share(left, before)})", words.COSTS[name]))
    model = report.get("model")
    if model is not None:  # reports of earlier versions do not say
        total = model["parameters"]
        found += [
            Fact("covered by the masks", f"{_share(prunable, total)} of the whole model: {prunable:,} of {total:,} "
                 "parameters", words.COVERED),
            Fact("removed of the whole model", f"{_share(prunable - kept, total)}: {prunable - kept:,} of {total:,} "
                 "parameters", words.REMOVED),
        ]  # fmt: skip
    return [*found, Fact("mask fingerprint", f"{summary['fingerprint'][:16]}…", words.FINGERPRINT)]


def _of(report: Mapping[str, Any]) -> list[Fact]:
    """What made the mask."""
    if "method" in report:
        return _of_method(report)
    return _of_shots(report) if "shots" in report else _of_run(report)


def _of_method(report: Mapping[str, Any]) -> list[Fact]:
    return [
        Fact("method", report["method"], words.METHOD),
        Fact("time", f"{report['summary']['seconds']:.1f} s", words.METHOD_SECONDS),
    ]


def _of_shots(report: Mapping[str, Any]) -> list[Fact]:
    summary, config = report["summary"], report["config"]
    return [
        Fact("shots", f"{summary['shots']:,}", words.SHOTS),
        Fact("steps, particles", f"{summary['steps']:,}, {config['n_particles']:,}{_merged(report)}", words.STEPS),
        Fact("time", f"{summary['seconds']:.1f} s", words.SEARCHES),
        _saliency(config),
    ]


def _saliency(config: Mapping[str, Any]) -> Fact:
    kind = config["final_score"] or config["polarizer"]
    return Fact("saliency", kind, f"{words.SALIENCY} {words.SCORES.get(kind, '')}".strip())


def _of_run(report: Mapping[str, Any]) -> list[Fact]:
    summary, config, choice = report["summary"], report["config"], report["plan"]["choice"]
    found = [
        Fact("steps, particles", f"{summary['steps']:,}, {config['n_particles']:,}{_merged(report)}", words.STEPS),
        Fact("time", f"{summary['seconds']:.1f} s", words.SECONDS),
    ]
    losses = [point["energy"] for point in report["curve"] if point["energy"] is not None]
    if losses:
        found.append(Fact("loss", f"{losses[0]:.4g} at the first step, {losses[-1]:.4g} at the last", words.LOSS))
    knee = "none found" if report["knee"] is None else f"{100 * report['knee']:.1f} % removed"
    found.append(Fact("knee of the loss", knee, words.KNEE))
    apart = before_the_merge(report["history"])
    last = apart[-1] if apart else {"overlaps": []}
    if config["n_particles"] > 1 and last["overlaps"] and last["effective_particles"] is not None:
        when = (
            "at the last step" if len(apart) == len(report["history"]) else f"at step {len(apart):,}, the last of all"
        )
        count = f"{last['effective_particles']:.2f} of {config['n_particles']:,} {when}"
        found.append(Fact("effective particles", count, words.EFFECTIVE))
    return [
        *found,
        _saliency(config),
        Fact("energies", f"{choice['mode']}: {choice['reason']}", words.ENERGIES),
        Fact("predicted peak memory", f"{report['plan']['peak_bytes'] / 1e6:,.1f} MB", words.MEMORY),
    ]


def _merged(report: Mapping[str, Any]) -> str:
    """When the particles became one, where they did in the steps of the report."""
    apart = len(before_the_merge(report["history"]))
    return f"; one after step {apart:,}" if apart < len(report["history"]) else ""


def _evaluation(evaluation: Mapping[str, Mapping[str, float | None]], note: str) -> str:
    """What was measured of the model before and after; a figure that one of the two lacks stays empty."""
    columns = [which for which in ("dense", "pruned") if which in evaluation]
    if not columns:
        return ""
    rows: list[tuple[Any, ...]] = []
    for name in dict.fromkeys(name for which in columns for name in evaluation[which]):
        cells = [Number(_measured(evaluation[which], name)) for which in columns]
        if len(columns) == 2:
            before, after = (evaluation[which].get(name) for which in columns)
            cells.append(Number("" if before is None or after is None else f"{after - before:+.6g}"))
        rows.append((Name(name), *cells))
    header = ("", *columns, *(["change"] if len(columns) == 2 else []))
    return _section("Evaluation", note, table("Evaluation before and after", header, rows))


def _measured(values: Mapping[str, float | None], name: str) -> str:
    value = values.get(name)
    return f"{value:.6g}" if value is not None else "not finite" if name in values else ""


def _methods(rows: Sequence[Mapping[str, Any]], dense: float | None) -> str:
    """The numbers behind the picture; a deviation only where there is one."""
    if not rows and dense is None:
        return ""
    found = [] if dense is None else [(Name("dense"), Number("0 %"), Number(f"{100 * dense:.2f} %"))]
    for row in rows:
        spread = f" ± {100 * row['accuracy_std']:.2f}" if "accuracy_std" in row else ""
        found.append((Name(row["method"]), Number(f"{100 * row['sparsity']:g} %"),
                      Number(f"{100 * row['accuracy_mean']:.2f}{spread} %")))  # fmt: skip
    header = ("method", "removed", "accuracy")
    note = "As given to the report; ± is the standard deviation, where it was given."
    return _section("Accuracies", note, table("Accuracy by method", header, found))


def _shots(shots: Sequence[Mapping[str, Any]]) -> str:
    """Of gradual runs: a row a shot; what was measured after them, where it was."""
    if not shots:
        return ""
    costs = list(shots[0].get("costs", {}))
    names = list(dict.fromkeys(name for shot in shots for name in shot.get("evaluation", {})))
    rows = []
    for shot in shots:
        left = [format_bytes(shot["costs"][name]) if name == "bytes" else f"{shot['costs'][name]:,}" for name in costs]
        rows.append((
            shot["number"], Number(f"{100 * shot['sparsity']:.4g} %"), shot["kept"], shot["returned"],
            *map(Number, left), Number(_loss(shot["search_loss"])), Number(_loss(shot["retraining_loss"])),
            *(Number(_measured(shot.get("evaluation", {}), name)) for name in names),
        ))  # fmt: skip
    header = (
        "shot", "sparsity", "weights kept", "returned", *(COSTS[name] for name in costs), "loss of the search",
        "loss of retraining", *names,
    )  # fmt: skip
    return _section("Shots", words.OF_SHOTS, table("What every shot left", header, rows))


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _waypoints(waypoints: Sequence[Mapping[str, Any]]) -> str:
    if not waypoints:
        return ""
    taken = [
        (Number(f"{100 * w['sparsity']:g} %"), w["step"], w["kept"], Name(w["fingerprint"][:16])) for w in waypoints
    ]
    header = ("sparsity", "after step", "kept", "fingerprint")
    return _section("Masks taken on the way", words.WAYPOINTS, table("Masks taken on the way", header, taken))


def _layers(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    rows = [
        (number, Name(name), size, Number(f"{100 * report['layer_densities'][name]:.2f} %"))
        for number, (name, size) in enumerate(report["layer_sizes"].items(), start=1)
    ]
    picture = _figure("layers.png", pictures["layers.png"], report)
    listed = table("Prunable tensors", ("no.", "tensor", "weights", "kept"), rows)
    return _section("Layers", words.LAYERS, f"{picture}\n{listed}")


def _groups(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """Of structured runs: what each group keeps."""
    groups = report["summary"].get("groups")
    if not groups:
        return ""
    rows = [
        (number, Name(name), one["kind"], one["kept"], one["size"], Number(_share(one["kept"], one["size"])))
        for number, (name, one) in enumerate(groups.items(), start=1)
    ]
    listed = table("Kept by group", ("no.", "group", "kind", "kept", "of", "share"), rows)
    return _section("Groups", words.GROUPS, f"{_figure('groups.png', pictures['groups.png'], report)}\n{listed}")


def _latency(rows: Sequence[Mapping[str, Any]]) -> str:
    """Seconds before and after, by batch size."""
    if not rows:
        return ""
    found = [
        (row["batch"], Number(f"{1e3 * row['dense']:.3g} ms"), Number(f"{1e3 * row['shrunk']:.3g} ms"),
         Number(f"{row['speedup']:.2f} ×"), row["runs"], row["threads"], row["device"])
        for row in rows
    ]  # fmt: skip
    header = ("batch", "dense", "shrunk", "times as fast", "runs", "threads", "device")
    return _section("Latency", words.LATENCY, table("Latency before and after", header, found))


def _left_alone(model: Mapping[str, Any] | None) -> str:
    if model is None or not model["left_alone"]:
        return ""
    rows = [(reason, part["tensors"], part["parameters"]) for reason, part in model["left_alone"].items()]
    header = ("reason", "tensors", "parameters")
    return _section("Left alone", words.LEFT_ALONE, table("Parameters left alone", header, rows))


def _settings(settings: Mapping[str, Any]) -> str:
    known = {**meanings(SFPKConfig), **meanings(Execution)}
    listed = facts([
        Fact(name, str(value), known[name].plain if name in known else "") for name, value in settings.items()
    ])  # fmt: skip
    return f"<details><summary>Settings, and what they mean</summary>{listed}</details>"


def _figure(name: str, content: bytes, report: Mapping[str, Any]) -> str:
    title, source = escape(_TITLES[name]), base64.b64encode(content).decode()
    wide = ' class="wide"' if name in _WIDE else ""
    return (
        f'<figure><figcaption>{title}</figcaption><div class="scroll" role="region" tabindex="0" aria-label="{title}">'
        f'<img{wide} alt="{title}" src="data:image/png;base64,{source}"></div>'
        f"{explained(words.of_picture(name, report))}</figure>"
    )


def _section(title: str, note: str, content: str) -> str:
    return f'<h2>{escape(title)}</h2>\n<p class="words">{escape(note)}</p>\n{content}'


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %"
