"""Settings in a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def read_settings(path: Path) -> dict[str, Any]:
    """What a TOML or JSON file says, by name.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither, or holds no table; with Python 3.10, TOML, which its library cannot read.
    """
    content = path.read_bytes()
    try:
        text = content.decode()
        if path.suffix == ".json":
            found = json.loads(text)
        elif path.suffix == ".toml":
            if sys.version_info < (3, 11):
                raise ValueError("wanted JSON with Python before 3.11, got TOML")
            import tomllib

            found = tomllib.loads(text)
        else:
            raise ValueError(f"wanted a name that ends in .toml or .json, got {path.name!r}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: wanted settings by name, got a {type(found).__name__}")
    return found
