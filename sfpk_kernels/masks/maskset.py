"""MaskSet: exact binary masks of a model's tensors, bit-packed, with file format and fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..coordinates.flat import Coordinates
from ..ops import popcount
from ..utils.files import atomic_write
from ..utils.tensors import as_numpy
from .apply import apply_masks_, check_fits
from .enforce import MaskEnforcer
from .files import decode, encode, json_dict
from .torch_prune import to_torch_prune


class MaskSet(Mapping[str, Tensor]):
    """A mapping of binary masks by parameter name: True = kept. One bit per weight, held on the CPU; immutable.

    Args:
        masks: bool tensors by parameter name, each in its parameter's shape.
        metadata: any JSON values by name, kept with the masks and in their files; they play no part in equality and
            fingerprint.

    Raises:
        TypeError: a mask that is no bool tensor, or metadata that are no JSON values.
        ValueError: no mask at all.
    """

    def __init__(self, masks: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None):
        self._metadata = json_dict(metadata)
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
            self._bits[name] = np.packbits(as_numpy(flat), bitorder="little")
            self._kept[name] = int(flat.count_nonzero())

    @classmethod
    def from_flat(
        cls,
        flat: Tensor,  # (d,) bool
        coordinates: Coordinates,
    ) -> MaskSet:
        """The masks of a flat vector over ``coordinates``."""
        return cls({t.name: m for t, m in zip(coordinates.tensors, coordinates.split(flat), strict=True)})

    @classmethod
    def from_model(cls, model: nn.Module, **coordinate_options: Any) -> MaskSet:
        """The masks a pruned model shows: False where a prunable weight is exactly 0.

        ``coordinate_options`` are those of :class:`~sfpk_kernels.Coordinates`: those the model was pruned with, so that
        the same tensors are covered.

        Raises:
            ValueError: nothing prunable.
        """
        coordinates = Coordinates(model, **coordinate_options)
        parameters = zip(coordinates.tensors, coordinates.parameters(model), strict=True)
        return cls({tensor.name: parameter.detach() != 0 for tensor, parameter in parameters})

    def __getitem__(self, name: str) -> Tensor:
        """The bool mask of one parameter, in its shape, on the CPU."""
        shape = self._shapes[name]
        count = _count(shape)
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
        return sum(_count(shape) for shape in self._shapes.values())

    @property
    def kept(self) -> int:
        """How many of them are kept, counted exactly."""
        return sum(self._kept.values())

    @property
    def sparsity(self) -> float:
        """Fraction of the covered weights that is removed."""
        return 1.0 - self.kept / self.prunable

    def share_removed(self, beside: int) -> float:
        """Fraction removed of the covered weights and ``beside`` others: with all others of it, of a whole model."""
        return (self.prunable - self.kept) / (self.prunable + beside)

    def layer_densities(self) -> dict[str, float]:
        """Fraction kept by parameter name."""
        return {name: self._kept[name] / _count(shape) for name, shape in self._shapes.items()}

    def flat(self) -> Tensor:
        """All masks flattened and joined in order, bool (d,)."""
        return torch.cat([self[name].view(-1) for name in self])

    def fingerprint(self) -> str:
        """SHA-256 over names, shapes and bits: equal exactly when the masks are equal, whatever order they are in."""
        digest = hashlib.sha256()
        for name in sorted(self._shapes):
            digest.update(json.dumps([name, list(self._shapes[name])]).encode())
            digest.update(self._bits[name].tobytes())
        return digest.hexdigest()

    @property
    def metadata(self) -> dict[str, Any]:
        """A copy of the JSON values kept with the masks."""
        return json_dict(self._metadata)

    def with_metadata(self, metadata: Mapping[str, Any]) -> MaskSet:
        """The same masks with other metadata."""
        return self._like(self._bits, metadata)

    def __and__(self, other: MaskSet) -> MaskSet:
        """Kept in both. Raises ValueError where the two do not cover the same tensors, like all set operations."""
        return self._combine(other, np.bitwise_and)

    def __or__(self, other: MaskSet) -> MaskSet:
        """Kept in one or both."""
        return self._combine(other, np.bitwise_or)

    def __xor__(self, other: MaskSet) -> MaskSet:
        """Kept in exactly one."""
        return self._combine(other, np.bitwise_xor)

    def __invert__(self) -> MaskSet:
        """Kept where this one removes, and the other way round."""
        flipped = {}
        for name, bits in self._bits.items():
            flipped[name] = ~bits
            flipped[name][-1] &= 0xFF >> (-_count(self._shapes[name]) % 8)  # the bits behind the last weight stay 0
        return self._like(flipped)

    def iou(self, other: MaskSet) -> float:
        """Intersection over union of the kept weights, in [0, 1]; 1 for two empty masks."""
        union = (self | other).kept
        return (self & other).kept / union if union else 1.0

    def hamming(self, other: MaskSet) -> int:
        """In how many weights the two differ."""
        return (self ^ other).kept

    def _combine(self, other: MaskSet, operation: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> MaskSet:
        if not isinstance(other, MaskSet):
            return NotImplemented
        if self._shapes != other._shapes:
            differing = [name for name in {**self._shapes, **other._shapes} if not self._same(other, name)]
            of = ", ".join(
                f"{n}: {self._shapes.get(n, 'none')} and {other._shapes.get(n, 'none')}" for n in differing[:5]
            )
            more = f" (and {len(differing) - 5} more)" if len(differing) > 5 else ""
            raise ValueError(f"masks: wanted two over the same tensors, got different ones: {of}{more}")
        return self._like({name: operation(bits, other._bits[name]) for name, bits in self._bits.items()})

    def _same(self, other: MaskSet, name: str) -> bool:
        return self._shapes.get(name) == other._shapes.get(name)

    def _like(self, bits: dict[str, np.ndarray], metadata: Mapping[str, Any] | None = None) -> MaskSet:
        return self._from_bits(bits, self._shapes, metadata)

    @classmethod
    def _from_bits(
        cls, bits: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]], metadata: Mapping[str, Any] | None
    ) -> MaskSet:
        masks = cls.__new__(cls)
        masks._metadata = json_dict(metadata)
        masks._shapes = dict(shapes)
        masks._bits = bits
        masks._kept = {name: int(popcount(torch.from_numpy(packed))) for name, packed in bits.items()}
        return masks

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
        """That every mask fits a parameter of ``model``, and can be applied to it.

        Names are those of the model inside ``torch.compile``, DataParallel and DistributedDataParallel.

        Raises:
            TypeError: no module.
            ValueError: one does not fit; the message says which names are missing, which shapes differ, which are
                already under torch.nn.utils.prune, which have no values here (meta device), and what is prunable in
                the model but has no mask (which alone is no error: layers may have been ignored).
        """
        check_fits(self, model)

    def apply_(self, model: nn.Module) -> nn.Module:
        """Set the removed weights of ``model`` to exactly 0, in place, and return it.

        Parameters keep their identity and stay leaves; nothing is written if a mask does not fit.

        Raises:
            ValueError: the masks belong to another model.
        """
        return apply_masks_(self, model)

    def enforce(
        self, optimizer: torch.optim.Optimizer, model: nn.Module | None = None, *, strict: bool = True
    ) -> MaskEnforcer:
        """Keep the removed weights at exactly 0 through training: masked now, and again after every optimizer step.

        No hooks on the forward pass, no change to the model; optimizer hooks do it, until ``remove()`` of what is
        returned, or the end of the block where that is used as a context manager. What is masked after a step is what
        the optimizer holds at that step, so parameter groups may be added later. A closure passed to ``step`` sees
        masked weights and leaves no gradient for removed ones, so LBFGS, too, optimizes within the masks.

        Removed weights have gradients: call ``mask_gradients_()`` of what is returned before ``clip_grad_norm_``, or
        they count in the norm. Optimizer state (momentum) is not masked. Copies of the optimizer are not enforced, nor
        are optimizers that keep copies of the weights (fp32 master weights, sharded parameters) covered.

        Args:
            optimizer: that trains the model, or accelerate's wrapper around it.
            model: whose parameters the masks name; may be left out if the optimizer was made from
                ``model.named_parameters()``.
            strict: refuse an optimizer that lacks masked parameters; False enforces those it holds, such as one of
                several optimizers.

        Raises:
            TypeError: no torch optimizer.
            ValueError: an optimizer without some masked parameter, or the masks of another model. Nothing is changed
                then.
        """
        return MaskEnforcer(self, optimizer, model, strict)

    def to_torch_prune(self, model: nn.Module) -> nn.Module:
        """Hand the masks to ``torch.nn.utils.prune``, in place, and return the model.

        Every masked ``weight`` becomes the parameter ``weight_orig`` (the same nn.Parameter object, values untouched)
        and the buffer ``weight_mask``; ``weight`` is their product, made before each forward pass.
        ``prune.remove(module, "weight")`` makes it permanent: the same parameter under its old name, with zeros. Tied
        weights are handed over in every module that uses them. Limits of torch.nn.utils.prune: modules whose weight is
        read without calling them (``out_proj`` of nn.MultiheadAttention) can be neither trained nor deep-copied so;
        other models can be deep-copied after a forward pass under ``torch.no_grad()``, not right after the hand-over
        or a pass with gradients.

        Raises:
            ValueError: the masks belong to another model; nothing is changed then.
        """
        return to_torch_prune(self, model)

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
        """Write a safetensors file: one packed uint8 tensor per mask; shapes, counts, fingerprint, metadata beside.

        Args:
            path: the file, written atomically: a half-written one never takes its place.
            metadata: JSON values by name to keep in the file; ``None`` for those of the masks.

        Raises:
            FileNotFoundError: no such folder.
            TypeError: metadata that are no JSON values.
        """
        content = self.to_bytes(metadata)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no mask file, or one that was cut or altered.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: wanted a mask file, got {os.fspath(path)!r}, which is no file")
        return cls._decode(Path(path).read_bytes(), f"path: {os.fspath(path)!r}")

    def to_bytes(self, metadata: Mapping[str, Any] | None = None) -> bytes:
        """The content of a mask file, to be kept inside another one."""
        facts = {
            "kept": self.kept,
            "prunable": self.prunable,
            "sparsity": self.sparsity,
            "metadata": self._metadata if metadata is None else json_dict(metadata),
        }
        return encode(self._bits, self._shapes, self.fingerprint(), facts)

    @classmethod
    def from_bytes(cls, content: bytes) -> MaskSet:
        """The inverse of :meth:`to_bytes`.

        Raises:
            ValueError: no mask file, or one that was cut or altered.
        """
        return cls._decode(content, "content: this")

    @classmethod
    def _decode(cls, content: bytes, source: str) -> MaskSet:
        bits, shapes, fingerprint, facts = decode(content, source)
        masks = cls._from_bits(bits, shapes, facts.get("metadata"))
        if masks.fingerprint() != fingerprint:
            raise ValueError(f"{source} was altered: its fingerprint does not match its masks")
        return masks


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))
