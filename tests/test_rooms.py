"""What has an underscore belongs to one room, a folder of the package or of an op: no other room reads it."""

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sfpk_kernels"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}  # public in spite of their underscore


def room_of(module):
    """The folder that a module stands in: the package itself, a folder of it, or that of an op."""
    parts = (module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]).split(".")
    return ".".join(parts[: 3 if parts[1:2] == ["ops"] else 2])


def is_foreign(name, module):
    """Whether a dotted name is private to others than ``module``.

    A module with an underscore is there for its folder and the folders in it, a name with one for its own room.
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.startswith("_") and not part.startswith("__") and part not in OF_NAMED_TUPLES:
            modules = [".".join(parts[:j]) for j in range(1, i + 1)]
            owner, room = room_of([module for module in modules if module in MODULES][-1]), room_of(module)
            inside = f"{room}.".startswith(f"{owner}.") if ".".join(parts[: i + 1]) in MODULES else room == owner
            if not inside:
                return True
    return False


def imported(tree, module):
    """(name in the module, dotted name in the package) of every import, wherever it stands."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield alias.asname or alias.name, f"{source}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    alias.asname or alias.name.partition(".")[0],
                    alias.name if alias.asname else alias.name.partition(".")[0],
                )


def read_by(module, source):
    """Dotted names of the package that a module imports, or reads of what it imports."""
    tree = ast.parse(source)
    names = dict(imported(tree, module))
    found = set(names.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            found.add(f"{names[node.value.id]}.{node.attr}")
    return {name for name in found if name.split(".")[0] == "sfpk_kernels"}


@pytest.mark.parametrize("room", sorted({room_of(module) for module in MODULES}))
def test_no_room_reads_what_is_private_to_another(room):
    offences = [
        f"{module} reads {name}"
        for module, path in MODULES.items()
        if room_of(module) == room
        for name in sorted(read_by(module, path.read_text()))
        if is_foreign(name, module)
    ]
    assert offences == []


@pytest.mark.parametrize(
    ("module", "source", "foreign"),
    [
        ("sfpk_kernels.ops.masking", "from ..bits import _shape", True),
        ("sfpk_kernels.ops.masking", "from ..bits._shape import BITS", True),
        ("sfpk_kernels.ops.masking.cpp", "from .. import selection as s\ns._ops", True),
        ("sfpk_kernels.cli.info", "def f():\n    from ..ops.bits import _BACKENDS", True),
        ("sfpk_kernels.search.pruner", "from ..ops import _checks", True),
        ("sfpk_kernels.search.pruner", "from ..config import _positive", True),
        ("sfpk_kernels.ops.masking", "from .. import _checks as check\ncheck._lowest", True),
        ("sfpk_kernels.ops.masking", "from .. import _checks\nfrom ._ops import _run", False),
        ("sfpk_kernels.search.energy", "from ..records import Step\nfrom ..._dispatch import choose", False),
        ("sfpk_kernels.search.pruner", "from .energy._scale import scaled", False),
        ("sfpk_kernels.utils.memory", "from torch.utils import _pytree", False),
    ],
)
def test_what_is_foreign(module, source, foreign):
    assert any(is_foreign(name, module) for name in read_by(module, source)) == foreign


def test_dotted_names_spelled_as_words_are_public():
    """importlib.import_module(…)._x and getattr(module, "_x") would pass by the other test."""
    for path in [*MODULES.values(), *sorted((ROOT / "benchmarks").rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and isinstance(node.value, ast.Call):
                called = ast.unparse(node.value.func)
                assert not called.endswith("import_module"), f"{path.relative_to(ROOT)}: {ast.unparse(node)}"
