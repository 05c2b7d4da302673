"""mkdocs hook: pages that are files of the repository's root, so that nothing is written twice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changes.md": "CHANGELOG.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=as_page((ROOT / source).read_text(encoding="utf-8"))))
    return files


def as_page(text: str) -> str:
    """With links as they are from docs/: into it, or to another of the pages; other files are named, not linked."""
    pages = {source: name for name, source in PAGES.items()}

    def link(found: re.Match[str]) -> str:
        label, target = found[1], found[2]
        path, hash_, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return found[0]
        if path.startswith("docs/"):
            return f"[{label}]({path.removeprefix('docs/')}{hash_}{anchor})"
        return f"[{label}]({pages[path]}{hash_}{anchor})" if path in pages else label

    return re.sub(r"\[([^\]]*)\]\(([^)\s]+)\)", link, text)
