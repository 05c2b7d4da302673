"""Results on disk: one JSON object per line, a "run" (who measured where, with what) followed by its "row"s.

Files are only ever appended to. Every line is checked before it is written and when it is read.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import subprocess
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .registry import SIZES

SCHEMA = 1
STATUSES = ("ok", "wrong", "missing")
GROUPS = ("ops", "scaling", "end_to_end", "structured", "structured_step")

Line = dict[str, Any]
_Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _optional(check: _Check) -> _Check:
    return lambda value: value is None or check(value)


def _one_of(choices: Sequence[str]) -> _Check:
    return lambda value: value in choices


def _shape(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, (int, float, str)) for v in value.values())


def _date(value: Any) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _ceilings(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(limit, dict) and _positive(limit.get("rate")) and _text(limit.get("unit"))
        for limit in value.values()
    )


def _dict(value: Any) -> bool:
    return isinstance(value, dict)


# Field → (what is wanted, test). Every field must be there and no other may be; free ones go into "extra".
RUN_FIELDS: dict[str, tuple[str, _Check]] = {
    "kind": ("'run'", _one_of(("run",))),
    "schema": (f"{SCHEMA}", lambda value: value == SCHEMA),
    "id": ("a text", _text),
    "date": ("an ISO date with time zone", _date),
    "command": ("a text", _text),
    "size": (f"one of {', '.join(SIZES)}", _one_of(SIZES)),
    "complete": ("true or false", lambda value: isinstance(value, bool)),  # all ops and groups were asked for
    "device": ("'cpu' or 'cuda'", _one_of(("cpu", "cuda"))),
    "device_name": ("a text", _text),
    "driver": ("a text or null", _optional(_text)),
    "cpu": ("a text", _text),
    "threads": ("an integer", _count),
    "os": ("a text", _text),
    "python": ("a text", _text),
    "torch": ("a text", _text),
    "triton": ("a text or null", _optional(_text)),
    "cuda": ("a text or null", _optional(_text)),
    "sfpk_kernels": ("a text", _text),
    "commit": ("a text or null", _optional(_text)),
    "ceilings": ("rates > 0 with units by name", _ceilings),
}
ROW_FIELDS: dict[str, tuple[str, _Check]] = {
    "kind": ("'row'", _one_of(("row",))),
    "run": ("the id of a run", _text),
    "group": (f"one of {', '.join(GROUPS)}", _one_of(GROUPS)),
    "op": ("a text", _text),
    "shape": ("numbers and texts by name", _shape),
    "provider": ("a text", _text),
    "status": (f"one of {', '.join(STATUSES)}", _one_of(STATUSES)),
    "reason": ("a text or null", _optional(_text)),
    "rounds": ("an integer", _count),
    "median_s": ("a number > 0 or null", _optional(_positive)),
    "p20_s": ("a number > 0 or null", _optional(_positive)),
    "p80_s": ("a number > 0 or null", _optional(_positive)),
    "bytes": ("an integer or null", _optional(_count)),
    "ceiling_share": ("a number > 0 or null", _optional(_positive)),
    "ratio_to_naive": ("a number > 0 or null", _optional(_positive)),
    "extra": ("an object", _dict),
}


def check_line(line: Any) -> Line:
    """The line itself if it fits the schema.

    Raises:
        ValueError: naming the field, what was wanted and what came.
    """
    if not isinstance(line, dict) or line.get("kind") not in ("run", "row"):
        raise ValueError(f"kind: wanted an object with kind 'run' or 'row', got {line!r:.80}")
    fields = RUN_FIELDS if line["kind"] == "run" else ROW_FIELDS
    for name, (wanted, test) in fields.items():
        if name not in line:
            raise ValueError(f"{name}: wanted {wanted}, got nothing")
        if not test(line[name]):
            raise ValueError(f"{name}: wanted {wanted}, got {line[name]!r:.80}")
    unknown = sorted(set(line) - set(fields))
    if unknown:
        raise ValueError(f"{unknown[0]}: wanted no such field (extra takes free ones), got {line[unknown[0]]!r:.80}")
    if line["kind"] == "row":
        if (line["status"] == "ok") == (line["median_s"] is None):
            raise ValueError(f"median_s: wanted a time with status ok and none else, got {line['median_s']!r}")
        if (line["status"] == "ok") == (line["reason"] is not None):
            raise ValueError(f"reason: wanted one unless status is ok, got {line['reason']!r:.80}")
        low, median, high = line["p20_s"], line["median_s"], line["p80_s"]
        if low is not None and high is not None and median is not None and not low <= median <= high:
            raise ValueError(f"median_s: wanted p20 ≤ median ≤ p80, got {low:g}, {median:g}, {high:g}")
    return line


def row(run: str, group: str, op: str, shape: Mapping[str, Any], provider: str, **values: Any) -> Line:
    """A checked row; what is not given is null."""
    line: Line = {
        "kind": "row", "run": run, "group": group, "op": op, "shape": dict(shape), "provider": provider,
        "status": "ok", "reason": None, "rounds": 0, "median_s": None, "p20_s": None, "p80_s": None, "bytes": None,
        "ceiling_share": None, "ratio_to_naive": None, "extra": {}, **values,
    }  # fmt: skip
    return check_line(line)


@dataclass
class Run:
    """A run and its rows, as read."""

    facts: Line
    rows: list[Line] = field(default_factory=list)


def read(paths: Iterable[Path]) -> list[Run]:
    """The runs in some files, oldest first.

    Raises:
        ValueError: a line that does not fit, with file and number; a row without its run.
    """
    runs: dict[str, Run] = {}
    for path in paths:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                line = check_line(json.loads(text))
                if line["kind"] == "run":
                    if line["id"] in runs:
                        raise ValueError(f"id: wanted one of its own, got {line['id']!r} again")
                    runs[line["id"]] = Run(line)
                elif line["run"] not in runs:
                    raise ValueError(f"run: wanted the id of a run above, got {line['run']!r}")
                else:
                    runs[line["run"]].rows.append(line)
            except ValueError as error:  # also what json raises
                raise ValueError(f"{path.name}:{number}: {error}") from None
    return sorted(runs.values(), key=lambda run: datetime.fromisoformat(run.facts["date"]))


def append(path: Path, lines: Iterable[Line]) -> None:
    """Check lines, then add them to a file (and its folder, if need be)."""
    text = "".join(json.dumps(check_line(line), ensure_ascii=False) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def file_of(facts: Line) -> str:
    """The name of the file a run belongs to: one per device."""
    name = "".join(c if c.isalnum() else "-" for c in facts["device_name"].lower())
    return "-".join(filter(None, [facts["device"], *name.split("-")])) + ".jsonl"


def facts(
    device: Any,  # torch.device
    *,
    command: Sequence[str],
    size: str,
    complete: bool,
    ceilings: Mapping[str, Any],
) -> Line:
    """The checked "run" line: everything about machine and software that a reader needs to judge the rows."""
    import torch

    from sfpk_kernels._version import __version__

    on_gpu = device.type == "cuda"
    return check_line(
        {
            "kind": "run",
            "schema": SCHEMA,
            "id": uuid.uuid4().hex[:12],
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(command),
            "size": size,
            "complete": complete,
            "device": device.type,
            "device_name": torch.cuda.get_device_name(device) if on_gpu else cpu_model(),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
            "os": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
            "cuda": torch.version.cuda if on_gpu else None,
            "sfpk_kernels": __version__,
            "commit": commit(),
            "ceilings": dict(ceilings),
        }
    )


def cpu_model() -> str:
    """As the system names it, with the number of cores this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name or platform.processor() or platform.machine()}, {cores} cores"


def commit() -> str | None:
    """The checkout's commit, "+changes" where files differ from it; ``None`` outside of a checkout."""
    folder = str(Path(__file__).resolve().parents[1])
    name = _output("git", "-C", folder, "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no", "--", ".",
                      ":!benchmarks/results", ":!README.md", ":!docs")  # fmt: skip
    return f"{name}+changes" if name and changed else name


def _output(*command: str) -> str | None:
    """The first line a command prints, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.strip().splitlines() or [None])[0]  # type: ignore[list-item]
