"""MaskSet: exact binary masks of a model's tensors, bit-packed, with file format and fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor, nn

from .coordinates import Coordinates

_FORMAT = "sfpk-masks-1"


class MaskSet:
    """Binary masks by parameter name: True = kept. One bit per weight, held on the CPU; immutable.

    Args:
        masks: bool tensors by parameter name, each in its parameter's shape.

    Raises:
        TypeError: a mask that is no bool tensor.
        ValueError: no mask at all.
    """

    def __init__(self, masks: Mapping[str, Tensor]):
        if not masks:
            raise ValueError("masks: wanted at least one mask, got none")
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._bits: dict[str, np.ndarray] = {}
        self._kept: dict[str, int] = {}
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"masks: {name}: wanted a bool tensor, got {got}")
            if mask.numel() == 0:
                raise ValueError(f"masks: {name}: wanted at least one weight, got shape {tuple(mask.shape)}")
            flat = mask.detach().reshape(-1).cpu()
            self._shapes[name] = tuple(mask.shape)
            self._bits[name] = np.packbits(flat.numpy(), bitorder="little")
            self._kept[name] = int(flat.count_nonzero())

    @classmethod
    def from_flat(
        cls,
        flat: Tensor,  # (d,) bool
        coordinates: Coordinates,
    ) -> MaskSet:
        """The masks of a flat vector over ``coordinates``."""
        return cls({t.name: m for t, m in zip(coordinates.tensors, coordinates.split(flat), strict=True)})

    def __getitem__(self, name: str) -> Tensor:
        """The bool mask of one parameter, in its shape, on the CPU."""
        shape = self._shapes[name]
        count = int(np.prod(shape, dtype=np.int64))
        bits = np.unpackbits(self._bits[name], count=count, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_)).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, name: object) -> bool:
        return name in self._shapes

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each mask by parameter name, in order."""
        return dict(self._shapes)

    @property
    def prunable(self) -> int:
        """How many weights the masks cover."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self._shapes.values())

    @property
    def kept(self) -> int:
        """How many of them are kept, counted exactly."""
        return sum(self._kept.values())

    @property
    def sparsity(self) -> float:
        """Fraction of the covered weights that is removed."""
        return 1.0 - self.kept / self.prunable

    def layer_densities(self) -> dict[str, float]:
        """Fraction kept by parameter name."""
        return {name: self._kept[name] / int(np.prod(shape, dtype=np.int64)) for name, shape in self._shapes.items()}

    def flat(self) -> Tensor:
        """All masks flattened and joined in order, bool (d,)."""
        return torch.cat([self[name].view(-1) for name in self])

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and bits: equal exactly when the masks are equal."""
        digest = hashlib.sha256()
        for name, shape in self._shapes.items():
            digest.update(json.dumps([name, list(shape)]).encode())
            digest.update(self._bits[name].tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self.fingerprint() == other.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())

    def __repr__(self) -> str:
        return (
            f"MaskSet({self.kept:,} of {self.prunable:,} weights kept, sparsity {self.sparsity:.4f}, "
            f"{len(self)} tensors, {self.fingerprint()[:12]})"
        )

    def check(self, model: nn.Module) -> None:
        """That every mask fits a parameter of ``model``.

        Raises:
            ValueError: it does not; the message says which names are missing or which shapes differ.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        problems = []
        for name, shape in self._shapes.items():
            if name not in parameters:
                problems.append(f"{name} is not in the model")
            elif tuple(parameters[name].shape) != shape:
                problems.append(f"{name} is {tuple(parameters[name].shape)} in the model, {shape} in the masks")
        if problems:
            more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
            raise ValueError(
                f"model: wanted the model these masks were made for, got another: {'; '.join(problems[:5])}{more}"
            )

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> nn.Module:
        """Set the removed weights of ``model`` to exactly 0, in place, and return it.

        Parameters keep their identity and stay leaves; nothing is written if a mask does not fit.

        Raises:
            ValueError: the masks belong to another model.
        """
        self.check(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in self:
            parameter = parameters[name]
            parameter.masked_fill_(~self[name].to(parameter.device), 0)
        return model

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: one packed uint8 tensor per mask, shapes and fingerprint as metadata.

        The file is written beside its place and then moved there, so that no half-written file is ever read.
        """
        target = Path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"path: wanted a file in an existing folder, got {os.fspath(path)!r}")
        metadata = {
            "format": _FORMAT,
            "shapes": json.dumps({name: list(shape) for name, shape in self._shapes.items()}),
            "fingerprint": self.fingerprint(),
        }
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            save_file(self._bits, str(temporary), metadata=metadata)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no mask file, or one that was cut or altered.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: wanted a mask file, got {os.fspath(path)!r}, which is no file")
        try:
            with safe_open(str(path), framework="numpy") as file:
                metadata: dict[str, Any] = file.metadata() or {}
                packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"path: {os.fspath(path)!r} is no readable safetensors file: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"path: {os.fspath(path)!r}: wanted a file of format {_FORMAT}, got {metadata.get('format')!r}"
            )
        try:
            shapes, fingerprint = json.loads(metadata["shapes"]), metadata["fingerprint"]
        except (KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"path: {os.fspath(path)!r} was altered: its metadata is broken") from error
        masks = cls.__new__(cls)
        masks._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        masks._bits = {name: packed.get(name, np.empty(0, np.uint8)) for name in shapes}
        if masks.fingerprint() != fingerprint:
            raise ValueError(f"path: {os.fspath(path)!r} was altered: its fingerprint does not match its masks")
        masks._kept = {name: int(np.unpackbits(bits).sum()) for name, bits in masks._bits.items()}
        return masks
