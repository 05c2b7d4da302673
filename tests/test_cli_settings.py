"""``sfpk init``, and settings from a file."""

import json
import os
import subprocess
import sys

import pytest

from sfpk_kernels import MaskSet
from sfpk_kernels.cli import main

TASK = "tests.cli_task:without_eval"
TOML = pytest.param("settings.toml", marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib"))


def written(folder, name, **settings):
    path = folder / name
    if name.endswith(".json"):
        path.write_text(json.dumps(settings))
    else:
        path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    return str(path)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["settings.json", TOML])
def test_settings_come_from_a_file_and_options_go_before_them(tmp_path, name, capsys):
    settings = {"preset": "paper", "sparsity": 0.5, "n_particles": 2, "n_steps": 4, "energy_mode": "sequential"}
    path = written(tmp_path, name, **settings)
    assert main(["prune", TASK, "--config", path, "--n-steps", "3", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    config = MaskSet.load(tmp_path / "out" / "mask.safetensors").metadata["config"]
    assert (config["sparsity"], config["n_particles"], config["n_steps"]) == (0.5, 2, 3)
    assert config["consensus"] == 0.0, "the paper's"
    more = ["--preset", "default", "--out", str(tmp_path / "b"), "--quiet"]
    assert main(["prune", TASK, "--config", path, *more]) == 0
    assert MaskSet.load(tmp_path / "b" / "mask.safetensors").metadata["config"]["consensus"] != 0.0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{", "--config: {path}: Expecting property name"),
        ("a.json", "[1]", "--config: {path}: wanted settings by name, got a list"),
        ("a.json", '{"sparsity": 0.5, "steps": 3}', "--config: {path}: SFPKConfig: unknown field steps"),
        ("a.json", '{"sparsity": 2}', "--config: {path}: sparsity: wanted a number in (0, 1), got 2"),
        ("a.json", '{"sparsity": 0.5, "preset": "x"}', "--config: {path}: preset: wanted one of"),
        ("a.json", "{}", "--sparsity: wanted a fraction in (0, 1), as an option or in the file of --config, got none"),
        ("a.yaml", "sparsity: 0.5", "--config: {path}: wanted a name that ends in .toml or .json, got 'a.yaml'"),
        pytest.param("a.toml", "sparsity = ", "--config: {path}: Invalid value", marks=TOML.marks),
    ],
)
def test_a_file_that_does_not_serve_is_refused(tmp_path, capsys, name, content, words):
    path = tmp_path / name
    path.write_text(content)
    assert main(["prune", TASK, "--config", str(path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"sfpk prune: {words.format(path=path)}")
    assert not (tmp_path / "out").exists()


def test_without_any_sparsity(tmp_path, capsys):
    assert main(["prune", TASK, "--out", str(tmp_path / "out")]) == 2
    assert "--sparsity: wanted a fraction in (0, 1)" in capsys.readouterr().err
    assert main(["prune", TASK, "--config", str(tmp_path / "none.json")]) == 2
    assert "--config: " in capsys.readouterr().err


def test_the_file_of_init_runs_as_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine.py"]) == 0
    assert capsys.readouterr().out == "mine.py: sfpk prune mine:task --sparsity 0.9\n"
    words = ["prune", "mine:task", "--sparsity", "0.9", "--n-particles", "3", "--n-steps", "10", "--json", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "sfpk_kernels.cli", *words],
        capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["dense_eval"] > 0.9
    assert found["pruned_eval"] > 0.3
    assert found["sparsity"] == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("task.txt", "wanted the name of a Python module"),
        ("my-task.py", "wanted the name of a Python module"),
        ("class.py", "wanted the name of a Python module"),
        ("none/task.py", "wanted a file in an existing folder"),
        ("there.py", "wanted a new file"),
    ],
)
def test_init_replaces_nothing(tmp_path, monkeypatch, capsys, name, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.py").write_text("mine")
    assert main(["init", name]) == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / "there.py").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there.py"]
