"""Long names, shortened in the middle: what tells layers apart stands at both ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def shortened(name: str, limit: int) -> str:
    """At most ``limit`` characters (≥ 3), a little more of the end than of the beginning."""
    if len(name) <= limit:
        return name
    head = (limit - 1) * 2 // 5
    return f"{name[:head]}…{name[len(name) - (limit - 1 - head) :]}"


def shortened_apart(names: Sequence[str], limit: int) -> list[str]:
    """The names shortened; those that would look alike get more characters, until they differ."""
    shown = [shortened(name, limit) for name in names]
    alike = {short for short, count in Counter(shown).items() if count > 1}
    again = [name for name, short in zip(names, shown, strict=True) if short in alike]
    if len(set(again)) < 2:  # none, or one name several times
        return shown
    longer = dict(zip(again, shortened_apart(again, limit + 8), strict=True))
    return [longer.get(name, short) for name, short in zip(names, shown, strict=True)]
