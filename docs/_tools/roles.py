"""griffe extension: the cross-references of docstrings (``:func:`…```) as links, or as code where there is no page."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":[a-z]+:`(~?)([^`]+)`")


class Roles(Extension):
    """Rewrites every docstring that is loaded."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Called for every object of the package."""
        if isinstance(obj, Object) and obj.docstring:
            obj.docstring.value = _ROLE.sub(_link, obj.docstring.value)


def _link(found: re.Match[str]) -> str:
    short, path = found[1], found[2]
    name = path.rpartition(".")[2] if short else path
    # Optional: autorefs leaves the words as they are where no page has that name.
    return f'<autoref optional identifier="{path}">`{name}`</autoref>' if path.startswith("sfpk_kernels.") else f"`{name}`"
