"""griffe extension: docstrings as the package has them when it runs, with the shapes that stand beside the signature.

The house writes shapes and fields' meanings as comments; here they become part of what is shown.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

from griffe import Attribute, Class, Docstring, ExprCall, Extension, Function, Object

_ROLE = re.compile(r":[a-z]+:`(~?)([^`]+)`")
_COMMENT = re.compile(r"^\s+(\w+)\s*:.*?,?\s+# (.+)$")  # "    masks: Tensor,  # (n, d)"
_RESULT = re.compile(r"^\) -> .*:\s+# (.+)$")


class Docstrings(Extension):
    """Completes every docstring that is loaded."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Called for every object of the package."""
        if not isinstance(obj, Object):
            return
        if isinstance(obj, Class) and any(str(decorator.value) == "described" for decorator in obj.decorators):
            # Settings: the fields' meanings are added when the module is imported.
            real = getattr(importlib.import_module(obj.module.path), obj.name)
            obj.docstring = Docstring(inspect.getdoc(real) or "", parent=obj)
        elif isinstance(obj, Attribute) and isinstance(obj.value, ExprCall) and str(obj.value.function) == "setting":
            default = obj.value.arguments[0]
            obj.value = None if str(default).endswith("MISSING") else default
        elif isinstance(obj, Attribute) and obj.docstring is None and isinstance(obj.parent, Class):
            comment = re.search(r"\s# (.+)$", "\n".join(_lines(obj)))
            if comment and not comment[1].startswith(("type:", "noqa", "fmt:")):
                obj.docstring = Docstring(comment[1], parent=obj)
        elif isinstance(obj, Function) and obj.docstring:
            obj.docstring.value = _with_shapes(obj.docstring.value, _lines(obj))
        if obj.docstring:
            text = re.sub(r"::$", ":", obj.docstring.value, flags=re.MULTILINE)  # what is indented is code anyway
            obj.docstring.value = _ROLE.sub(_link, text)


def _lines(obj: Object) -> list[str]:
    """Its source, up to the docstring."""
    if obj.lineno is None or isinstance(obj.filepath, list):
        return []
    lines = obj.filepath.read_text(encoding="utf-8").splitlines()[obj.lineno - 1 : obj.endlineno]
    end = next((i for i, line in enumerate(lines) if line.lstrip().startswith(('"""', 'r"""'))), len(lines))
    return lines[:end]


def _with_shapes(text: str, signature: list[str]) -> str:
    """The docstring with what the signature's comments say of arguments and result."""
    shapes = {found[1]: found[2] for line in signature if (found := _COMMENT.match(line))}
    known: set[str] = set()

    def described(found: re.Match[str]) -> str:
        names = found[1].split(", ")
        known.update(names)
        said = dict.fromkeys(shapes[name] for name in names if name in shapes and shapes[name] not in found[2])
        return f"    {found[1]}: *{'; '.join(said)}.* {found[2]}" if said else found[0]

    head, args, rest = text.partition("\nArgs:\n")
    arguments, blank, after = rest.partition("\n\n")
    arguments = re.sub(r"^ {4}(\w+(?:, \w+)*): (.*)$", described, arguments, flags=re.MULTILINE)
    missing = [f"    {name}: {shape}." for name, shape in shapes.items() if name not in known]
    if args or missing:
        parts = [*([arguments] if args else []), *missing]
        if args:
            text = f"{head}\nArgs:\n" + "\n".join(parts) + blank + after
        else:
            body, raises, errors = text.partition("\nRaises:\n")
            text = f"{body.rstrip()}\n\nArgs:\n" + "\n".join(parts) + (f"\n\nRaises:\n{errors}" if raises else "")
    result = next((found[1] for line in signature if (found := _RESULT.match(line))), None)
    if result and "\nReturns:\n" not in text:
        text += f"\n\nReturns:\n    {result}"
    return text


def _link(found: re.Match[str]) -> str:
    short, path = found[1], found[2]
    name = path.rpartition(".")[2] if short else path
    if not path.startswith("sfpk_kernels."):
        return f"`{name}`"
    return f'<autoref optional identifier="{path}">`{name}`</autoref>'  # plain words where no page has that name
