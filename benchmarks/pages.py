"""Pages with generated tables: each stands between two markers, and what is around it is left alone."""

from __future__ import annotations


def markers(name: str) -> tuple[str, str]:
    """Between which a page holds the table of that name."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def has_place(text: str, name: str) -> bool:
    """Whether the page has them, in this order."""
    begin, end = markers(name)
    return 0 <= text.find(begin) < text.find(end)


def put(text: str, name: str, table: str) -> str:
    """The page with that table renewed; it has a place for it."""
    begin, end = markers(name)
    return f"{text[: text.index(begin) + len(begin)]}\n{table}\n{text[text.index(end) :]}"
