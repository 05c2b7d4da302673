"""Pieces of HTML: tables that scroll by themselves, facts with their explanation, and how they look."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from .names import shortened

_NAME = 44  # characters of a name in a table

# Dark on light whatever the device prefers; wide things scroll in their own box, so that the page never does.
STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  background: #fff; overflow-wrap: anywhere; -webkit-text-size-adjust: 100% }
h1 { font-size: 1.7rem; line-height: 1.2 } h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem }
.scroll { overflow: auto; max-height: 85vh; width: fit-content; max-width: 100%; margin: 1rem 0;
  border: 1px solid #ddd }
.scroll:focus-visible { outline: 2px solid #1b5e9e }
table { border-collapse: collapse }
td, th { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top }
th { position: sticky; top: 0; background: #f3f3f3; white-space: nowrap }
td { overflow-wrap: normal }
td.number, th.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
td.name { overflow-wrap: anywhere; min-width: 8rem; font-family: ui-monospace, monospace; font-size: 90% }
td[title] { text-decoration: underline dotted #888; cursor: help }
.facts { margin: 1rem 0 } .facts > div { display: flex; flex-wrap: wrap; gap: 0 1rem;
  padding: .45rem 0; border-bottom: 1px solid #ddd }
dt { font-weight: 600; flex: 1 1 12rem } dd { margin: 0; flex: 999 1 18rem }
.words { color: #555; font-size: 90%; margin: .35rem 0 } dd .words { margin: 0 }
dfn { font-style: normal; font-weight: 600 }
figure { margin: 1rem 0 } figure .scroll { max-height: none; width: auto } figcaption { font-weight: 600 }
img { display: block; width: 100%; height: auto; min-width: 34rem } img.wide { min-width: 46rem }
.alarm { border-left: 4px solid #c4541a; padding-left: .8rem } details { margin: 1rem 0 } summary { cursor: pointer }
@media print { .scroll { overflow: visible; max-height: none; border: 0 } img, img.wide { min-width: 0 } }
"""


class Name(NamedTuple):
    """Of a layer or method: a long one is shortened in the middle, and whole where the pointer rests on it."""

    text: str


class Number(NamedTuple):
    """A number in the digits it is shown with."""

    text: str


class Fact(NamedTuple):
    """One thing about a run."""

    name: str
    value: str
    words: str = ""  # what the name means


def facts(rows: Sequence[Fact]) -> str:
    """Names and values, each with its explanation below."""
    lines = []
    for row in rows:
        words = f'<p class="words">{escape(row.words)}</p>' if row.words else ""
        lines.append(f"<div><dt>{escape(row.name)}</dt><dd>{escape(row.value)}{words}</dd></div>")
    return '<dl class="facts">' + "\n".join(lines) + "</dl>"


def explained(words: Sequence[tuple[str, str]]) -> str:
    """Terms and what they mean, a paragraph each."""
    return "\n".join(f'<p class="words"><dfn>{escape(term)}</dfn>: {escape(meaning)}.</p>' for term, meaning in words)


def table(label: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in a box that scrolls; ints get thousands separators, Names are shortened.

    Args:
        label: what it shows, for who cannot see it.
        header: of the columns; those of numbers stand on the right, as in the first row.
        rows: of the cells.
    """
    right = [isinstance(cell, int | Number) for cell in rows[0]] if rows else [False] * len(header)
    heads = "".join(
        f'<th class="number">{escape(name)}</th>' if numeric else f"<th>{escape(name)}</th>"
        for name, numeric in zip(header, right, strict=True)
    )
    lines = [f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows]
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table>\n<thead><tr>{heads}</tr>'
        "</thead>\n<tbody>" + "\n".join(lines) + "</tbody></table></div>"
    )


def _cell(cell: Any) -> str:
    if isinstance(cell, Name):
        short = shortened(cell.text, _NAME)
        title = "" if short == cell.text else f' title="{escape(cell.text)}"'
        breakable = re.sub(r"([._/…-])", r"\1<wbr>", escape(short))  # between words, where it has to be
        return f'<td class="name"{title}>{breakable}</td>'
    if isinstance(cell, Number):
        return f'<td class="number">{escape(cell.text)}</td>'
    if isinstance(cell, int) and not isinstance(cell, bool):
        return f'<td class="number">{cell:,}</td>'
    return f"<td>{escape(str(cell))}</td>"
