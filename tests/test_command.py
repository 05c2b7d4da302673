"""The command as it is started: what it sets for OpenMP before torch is loaded, and when it does not."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import sfpk_command

NAMES = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY", "KMP_LIBRARY")
# What torch's OpenMP runtime sees when it is loaded, and what the command says.
STARTED = """
import os, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "torch":
            print({n: os.environ.get(n) for n in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")}, flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
import sfpk_command
assert "torch" not in sys.modules
sfpk_command.main(["--version"])
raise AssertionError("torch was not loaded")
"""


def test_waiting_threads_sleep_soon():
    environment = {}
    sfpk_command.spin_shortly(environment)
    assert environment == {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_said_stays(name):
    environment = {name: "something"}
    sfpk_command.spin_shortly(environment)
    assert environment == {name: "something"}


@pytest.mark.parametrize("said", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}], ids=str)
def test_it_is_set_before_torch_is_loaded(said):
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | said
    done = subprocess.run(
        [sys.executable, "-c", STARTED], capture_output=True, text=True, env=environment, check=True, timeout=120
    )
    expected = (
        {"GOMP_SPINCOUNT": said.get("GOMP_SPINCOUNT"), "KMP_BLOCKTIME": None} if said else sfpk_command.SHORT_SPIN
    )
    assert done.stdout.splitlines()[0] == str(expected)


def test_the_installed_command_starts_there():
    points = {point.value for point in entry_points(group="console_scripts", name="sfpk")}
    if not points:
        pytest.skip("the package is not installed")
    assert points == {"sfpk_command:main"}


def test_make_sets_the_same(tmp_path):
    """The Makefile says it for whatever it starts."""
    ours = Path(sfpk_command.__file__).with_name("Makefile")
    (tmp_path / "Makefile").write_text(f"include {ours}\nshown:\n\t@env | grep -E 'SPIN|KMP'\n")
    ours = ("MAKE", "KMP_", "GOMP_", "OMP_")  # scikit-learn, too, sets some
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    for said, expected in [
        ({}, ["GOMP_SPINCOUNT=1000", "KMP_BLOCKTIME=1"]),
        ({"GOMP_SPINCOUNT": "7"}, ["GOMP_SPINCOUNT=7"]),
    ]:
        done = subprocess.run(
            ["make", "-s", "-f", str(tmp_path / "Makefile"), "shown"],
            capture_output=True, text=True, env={**clean, **said}, check=True, timeout=60,
        )  # fmt: skip
        assert sorted(done.stdout.split()) == expected
