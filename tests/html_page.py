"""The page of a report, read as a browser would: facts, tables, figures, and what lies in what."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import NamedTuple

VOID = {"meta", "img", "wbr", "br", "link"}


class Cell(NamedTuple):
    text: str
    title: str | None  # what it says to a pointer that rests on it


class Page(HTMLParser):
    """Parsed when made; a tag that is not closed where it should be is an error."""

    def __init__(self, html: str):
        super().__init__()
        self.facts: dict[str, tuple[str, str]] = {}  # by name: value, words
        self.settings: dict[str, tuple[str, str]] = {}  # those in the details at the end
        self.terms: dict[str, dict[str, str]] = {}  # by figure: what is explained below it
        self.tables: dict[str, list[list[Cell]]] = {}  # by label, the header first
        self.headings: list[str] = []
        self.text = ""  # all of it, without style
        self.tags: list[tuple[str, dict[str, str | None], list[str]]] = []  # tag, attributes, classes it lies in
        self._open: list[tuple[str, dict[str, str | None]]] = []
        self._name = self._value = self._words = self._term = self._figure = self._label = ""
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        around = [name for _, outer in self._open for name in (outer.get("class") or "").split()]
        self.tags.append((tag, found, around))
        if tag in VOID:
            return
        self._open.append((tag, found))
        if tag == "dt":
            self._name = self._value = self._words = ""
        elif tag == "div" and "aria-label" in found:
            self._label = found["aria-label"]
        elif tag == "table":
            self.tables[self._label] = []
        elif tag == "tr":
            self.tables[self._label].append([])
        elif tag in ("td", "th"):
            self.tables[self._label][-1].append(Cell("", found.get("title")))
        elif tag in ("h1", "h2"):
            self.headings.append("")
        elif tag == "figure":
            self._figure = ""
        elif tag == "p":
            self._term = ""

    def handle_endtag(self, tag):
        opened, _ = self._open.pop()
        assert opened == tag, f"</{tag}> for <{opened}>"
        if tag == "dd":
            folded = "details" in [tag for tag, _ in self._open]
            (self.settings if folded else self.facts)[self._name] = (self._value, self._words)
        elif tag == "figcaption":
            self.terms[self._figure] = {}
        elif tag == "figure":
            self._figure = ""

    def handle_data(self, data):
        inside = [tag for tag, _ in self._open]
        if "style" in inside or not inside:
            return
        self.text += data
        if inside[-1] in ("td", "th"):
            row = self.tables[self._label][-1]
            row[-1] = row[-1]._replace(text=row[-1].text + data)
        elif inside[-1] in ("h1", "h2"):
            self.headings[-1] += data
        elif inside[-1] == "dt":
            self._name += data
        elif inside[-1] == "dd":
            self._value += data
        elif inside[-2:] == ["dd", "p"]:
            self._words += data
        elif inside[-1] == "figcaption":
            self._figure += data
        elif inside[-1] == "dfn" and "figure" in inside:
            self._term = data
            self.terms[self._figure][data] = ""
        elif inside[-1] == "p" and self._term and "figure" in inside:
            self.terms[self._figure][self._term] += data.removeprefix(": ")
