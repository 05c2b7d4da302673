"""The report as one HTML file: pictures inside, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100%; height: auto }
.alarm { border-left: 4px solid #c4541a; padding-left: .8rem } code { font-size: 90% } details { margin: 1rem 0 }
"""

_CAPTIONS = {
    "loss.png": "Mini-batch loss of the particles over the soft sparsity at which it was taken. Each particle sees its "
    "own batch, so part of the band is chance.",
    "particles.png": "Left: root mean square distance of the particles from their mean. Right: how much the binary "
    "masks have in common; n² / Σ IoU² counts them, 1 where all are alike.",
    "layers.png": "Share of each prunable tensor's weights that is kept.",
    "baselines.png": "Accuracy by method, as given to the report.",
}
_CAPTIONS_OF_ONE = {
    "loss.png": "Mini-batch loss of the particle over the soft sparsity at which it was taken. Each step sees another "
    "batch, so part of the ups and downs is chance.",
}


def page(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page of a report."""
    summary = report["summary"]
    rows: list[tuple[str, Any]] = [
        ("weights kept", f"{summary['kept']:,} of {summary['prunable']:,}"),
        ("sparsity", f"{summary['sparsity']:.6f}"),
        ("mask", f"{summary['fingerprint'][:16]}…"),
        ("steps, particles", f"{summary['steps']}, {report['config']['n_particles']}"),
        ("time", f"{summary['seconds']:.1f} s"),
        ("knee of the loss", "none found" if report["knee"] is None else f"{100 * report['knee']:.1f} % removed"),
        ("energies", f"{report['plan']['choice']['mode']}: {report['plan']['choice']['reason']}"),
        ("predicted peak memory", f"{report['plan']['peak_bytes'] / 1e6:,.1f} MB"),
    ]
    one = report["config"]["n_particles"] == 1
    captions = {**_CAPTIONS, **_CAPTIONS_OF_ONE} if one else _CAPTIONS
    parts = [_table(("", ""), rows)]
    parts += [f'<p class="alarm">{escape(words)}</p>' for words in summary["alarms"]]
    for name, content in pictures.items():
        source = base64.b64encode(content).decode()
        caption = escape(captions[name])
        parts.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{source}"><figcaption>{caption}'
                     "</figcaption></figure>")  # fmt: skip
    if report["waypoints"]:
        taken = [
            (f"{100 * w['sparsity']:g} %", w["step"], w["kept"], w["fingerprint"][:16]) for w in report["waypoints"]
        ]
        parts.append("<h2>Masks taken on the way</h2>" + _table(("sparsity", "after step", "kept", "mask"), taken))
    layers = [
        (number, name, size, f"{100 * report['layer_densities'][name]:.2f} %")
        for number, (name, size) in enumerate(report["layer_sizes"].items(), start=1)
    ]
    parts.append("<h2>Layers</h2>" + _table(("", "tensor", "weights", "kept"), layers))
    settings = _table(("setting", "value"), list(report["config"].items()))
    parts.append(f"<details><summary>Settings</summary>{settings}</details>")
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>SFPK pruning report</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>SFPK pruning report</h1>\n{body}\n"
        f"<p>sfpk_kernels {escape(report['version'])}</p></body></html>\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>"] if any(header) else []
    for row in rows:
        cells = "".join(
            f'<td class="number">{cell:,}</td>' if isinstance(cell, int) and not isinstance(cell, bool)
            else f"<td>{escape(str(cell))}</td>"
            for cell in row
        )  # fmt: skip
        lines.append(f"<tr>{cells}</tr>")
    return "<table>" + "".join(lines) + "</table>"
