"""The file format of MaskSet: safetensors with one packed uint8 tensor per mask, everything else as metadata."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

FORMAT = "sfpk-masks-2"  # 1 had fingerprints that depended on the order of the masks


def json_dict(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """A deep copy of a metadata dict.

    Raises:
        TypeError: no dict of JSON values by string.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        raise TypeError(f"metadata: wanted a dict of JSON values by name, got {metadata!r:.80}")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(f"metadata: wanted JSON values, got another: {error}") from error
    return copied


def encode(
    bits: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], fingerprint: str, facts: dict[str, Any]
) -> bytes:
    """The bytes of a mask file. ``facts`` are JSON values beside the masks, with the user's metadata among them."""
    text = json.dumps(facts)
    header = {
        "format": FORMAT,
        "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
        "fingerprint": fingerprint,
        "facts": text,
        "facts_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    content: bytes = save(bits, metadata=header)
    return content


def decode(
    content: bytes, source: str
) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]], str, dict[str, Any]]:
    """Bits, shapes, fingerprint and facts of a mask file; ``source`` names it in errors.

    Raises:
        ValueError: no mask file, or broken metadata.
    """
    try:
        packed = load(content)
        size = int.from_bytes(content[:8], "little")
        header: dict[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{source} is no readable safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{source}: wanted a file of format {FORMAT}, got {header.get('format')!r}")
    try:
        shapes = {name: tuple(shape) for name, shape in json.loads(header["shapes"]).items()}
        if not shapes or not all(type(size) is int and size > 0 for shape in shapes.values() for size in shape):
            raise ValueError("its shapes are none")
        fingerprint, facts = header["fingerprint"], json.loads(header["facts"])
        if not isinstance(facts, dict):
            raise ValueError("its metadata are no dict")
        json_dict(facts.get("metadata"))
        if hashlib.sha256(header["facts"].encode()).hexdigest() != header["facts_sha256"]:
            raise ValueError("its metadata does not match its checksum")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{source} was altered: its metadata is broken") from error
    for name, shape in shapes.items():
        bits = packed.get(name, np.empty(0, np.uint8))
        count = math.prod(shape)
        if bits.dtype != np.uint8 or bits.shape != (-(-count // 8),) or (count % 8 and int(bits[-1]) >> count % 8):
            raise ValueError(
                f"{source} was altered: {name}: wanted one bit for each weight of shape {shape}, got others"
            )
    return {name: packed[name] for name in shapes}, shapes, fingerprint, facts
