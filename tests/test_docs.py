"""README and docs: their code runs, their links lead somewhere, and every public name has a page."""

import importlib
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sfpk_kernels import SFPKConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
NEEDS = {
    "lightning.md": "lightning",
    "huggingface.md": "transformers",
    "structure.md": "torch_pruning",
    "baselines.md": "torch_pruning",
    "structured.md": "torch_pruning",
    "gradual.md": "torch_pruning",
    "trackers.md": "tensorboard",
}
_INTEGRATIONS = [f"integrations.{name}" for name in ("lightning", "transformers", "tensorboard", "wandb", "mlflow")]
API = {
    name: f"sfpk_kernels{name and '.'}{name}"
    for name in ("", "ops", "baselines", "compat", "structure", *_INTEGRATIONS)
}


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)


def name_of(page):
    return str(page.relative_to(ROOT))


def given(page):
    """What pages take for granted: a trained model, and batches. Where a page is about batch-norm, it has one."""
    norm = nn.BatchNorm1d(64) if page.name in ("README.md", "modes.md") else nn.Identity()
    model = nn.Sequential(nn.Linear(20, 64), norm, nn.ReLU(), nn.Linear(64, 2))
    x = torch.randn(256, 20)
    loader = torch.utils.data.DataLoader(list(zip(x, (x[:, 0] > 0).long(), strict=True)), batch_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch, labels in list(loader) * 20:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), labels).backward()
        optimizer.step()
    return {"model": model, "loader": loader, "__name__": "page"}


@pytest.fixture
def _fewer_steps(monkeypatch):
    """A tenth of the steps where a page names none: what is shown stays as it is, and takes less time."""
    defaults = SFPKConfig.__init__.__defaults__
    assert defaults.count(1000) == 1
    monkeypatch.setattr(SFPKConfig.__init__, "__defaults__", tuple(100 if x == 1000 else x for x in defaults))


@pytest.mark.usefixtures("_fewer_steps")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_code_runs_in_the_order_of_its_page(page, tmp_path, monkeypatch, capsys):
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # the command sfpk
    namespace = given(page)
    for number, block in enumerate(blocks(page), start=1):
        exec(compile(block, f"{name_of(page)}, block {number}", "exec"), namespace)
    if page.name == "README.md":
        assert "MaskSet(141 of 1,408 weights kept, sparsity 0.8999" in capsys.readouterr().out


def test_the_readme_is_short():
    text = re.sub(
        r"<!-- (\w+)-short:begin -->.*?<!-- \1-short:end -->", "", text_of(ROOT / "README.md"), flags=re.DOTALL
    )
    words = [word for word in re.sub(r"\]\([^)]*\)", "]", text).split() if re.search(r"\w", word)]
    assert 250 <= len(words) <= 450
    (block,) = blocks(ROOT / "README.md")
    assert len(block.strip().splitlines()) <= 6


def anchors(page):
    """As GitHub and the site make them of headings."""
    found = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    code = r"^```.*?^```|`[^`\n]*`"
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(code, "", text_of(page), flags=re.DOTALL | re.MULTILINE)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        if page.parent != ROOT and "docs" in page.parts:
            assert DOCS in found.resolve().parents, f"{target}: outside of the site"
        assert not anchor or anchor in anchors(found), target


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"([\w/-]+\.md)", text_of(ROOT / "mkdocs.yml").split("\nnav:", 1)[1]))
    generated = {"index.md", "contributing.md", "changes.md"}
    assert listed - generated - {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"} == {
        str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")
    }


@pytest.mark.parametrize("module", API.values())
def test_every_public_name_has_a_page(module):
    if module.endswith(("lightning", "transformers")):
        pytest.importorskip(module.rpartition(".")[2])
    shown = {found for page in (DOCS / "api").glob("*.md") for found in re.findall(r"^::: (\S+)$", text_of(page), re.M)}
    names = importlib.import_module(module).__all__
    missing = {name for name in names if f"{module}.{name}" not in shown}
    assert missing <= {"__version__", "baselines", "ops", "MASK_FILE"}, missing


def test_what_a_class_inherits_is_on_its_page():
    """Methods that stand in a base class of ours would be missing otherwise."""
    entries = [
        (found, options)
        for page in (DOCS / "api").glob("*.md")
        for found, options in re.findall(r"^::: (\S+)\n?( {4}options: .*)?$", text_of(page), re.M)
    ]
    inheriting = []
    for name, options in entries:
        module, _, last = name.rpartition(".")
        if module.endswith(("lightning", "transformers")):
            continue  # their bases are the frameworks'
        thing = getattr(importlib.import_module(module), last, None)  # None: a module
        bases = thing.__mro__[1:] if isinstance(thing, type) else ()
        ours = [base for base in bases if base.__module__.startswith("sfpk_kernels")]
        if any(not member.startswith("_") for base in ours for member in vars(base)):
            inheriting.append(last)
            assert "inherited_members: true" in options, name
    assert {"SFPKPruner", "SFPKConfig", "Execution"} <= set(inheriting)
