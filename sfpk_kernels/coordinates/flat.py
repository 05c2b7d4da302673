"""Which weights of a model are prunable, and where each stands in the flat vector of coordinates."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..utils.arguments import check_model
from .entries import Entry, Ignored, entries_of, ignored_names
from .outputs import output_weights
from .roles import Role, role_of
from .shared_memory import overlaps, place
from .wrapped import check_not_sharded, check_plain, check_structure, quantized, reserved

__all__ = [
    "Coordinates",
    "Ignored",
    "PrunableTensor",
    "SkippedTensor",
    "ignored_names",
    "named_parameters",
    "unwrapped",
]

_PIECE = 1 << 18  # elements
_NAMED = 3  # tensors, in one message

T = TypeVar("T")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper, DataParallel and DistributedDataParallel: its names are the names."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # by name: torch._dynamo would be loaded for the type
            model = model.get_submodule("_orig_mod")
        else:
            return model


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by every name it goes by in the model inside such wrappers.

    Raises:
        ValueError: some are parts of sharded ones.
    """
    parameters = dict(unwrapped(model).named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        check_not_sharded(name, parameter)
    return parameters


@dataclass(frozen=True)
class PrunableTensor:
    """One prunable parameter and its place in the flat vector."""

    name: str
    aliases: tuple[str, ...]  # other names of the same parameter (tied weights)
    layer: str  # class of the module that holds it
    shape: tuple[int, ...]
    offset: int
    numel: int
    input_dim: int = 1  # along which the inputs of one output lie; 0 in transposed layers, -1 where nothing tells
    groups: int = 1  # of inputs along it that no output shares, in grouped transposed convolutions
    stack: int = 1  # matrices along the first dimension, each a tensor of its own: those of experts
    is_output: bool = False  # of the model's last layer

    @property
    def inputs(self) -> int:
        """How many inputs (channels) every output has side by side; 0 for biases and norms, or where nothing tells."""
        return self.shape[self.input_dim] // self.groups if len(self.shape) > 1 and self.input_dim >= 0 else 0

    @property
    def segments(self) -> list[tuple[int, ...]]:
        """The shapes of what counts as a tensor by itself: one, or of a stack each matrix."""
        return [self.shape] if self.stack == 1 else [self.shape[1:]] * self.stack


@dataclass(frozen=True)
class SkippedTensor:
    """One parameter that is left alone, and why."""

    name: str
    shape: tuple[int, ...]
    numel: int
    reason: str
    ignored: bool = False  # by ignored_layers


class Coordinates:
    """The prunable coordinates of one model: single weights, flattened in the order of its parameters.

    Prunable are the matrices that inputs are multiplied by: the weights of Linear, Bilinear, Conv1d/2d/3d,
    ConvTranspose1d/2d/3d, RNN, LSTM and GRU and their cells, the projections of MultiheadAttention, the transposed
    Linear ("Conv1D") of GPT-2 style models, the ``weight`` (two- or three-dimensional) of a module of any other class
    with such sizes in its attributes (``in_features`` and ``out_features``, ``in_channels`` and ``out_channels``, …),
    and three-dimensional parameters of experts, which have "expert" in the name or class of their module. Of experts
    each matrix counts as a tensor by itself. Everything else goes with ``include`` alone. A parameter used under
    several names is one tensor here, and is pruned only if every use of it may be pruned, or one is included.

    Args:
        model: the trained model, all on one device. Only its structure is kept, no reference to it. Inside
            ``torch.compile``, DataParallel and DistributedDataParallel the names are those of the model within.
        ignored_layers: what to leave alone: module instances or module types (with everything inside them),
            names of modules or parameters, ``"re:PATTERN"``, matched from the start of parameter names, or functions
            ``f(name, parameter) -> bool``.
        include: what to prune, too, whatever it is: entries as above. Names of parameters, patterns and functions mean
            the parameters they match, modules, their types and names all parameters inside of two dimensions and
            more. What ``ignored_layers`` names, too, stays.
        include_embeddings: prune Embedding and EmbeddingBag weights, too.
        include_biases: prune the biases of the layers above, too.
        include_norms: prune the weights and biases of normalization layers, too.

    Raises:
        TypeError: model or an ignored layer of the wrong type.
        ValueError: a model on several devices, with uninitialized parameters or without any prunable tensor; one that
            was scripted or sharded, or has a prunable weight that is no dense tensor (sparse, quantized); an ignored
            or included name, pattern or module that matches nothing; an included one of which nothing can be pruned.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        ignored_layers: Iterable[Ignored] = (),
        include: Iterable[Ignored] = (),
        include_embeddings: bool = False,
        include_biases: bool = False,
        include_norms: bool = False,
    ):
        check_model(model)
        model = unwrapped(model)
        check_structure(model)
        self.device = _single_device(model)
        kinds = {"weight": True, "embedding": include_embeddings, "bias": include_biases, "norm": include_norms}
        ignored = ignored_names(model, ignored_layers)
        entries = entries_of(model, include, "include")
        wanted = {name for entry in entries for name in entry.wanted}
        outputs = output_weights(model)
        self.tensors: list[PrunableTensor] = []
        self.skipped: list[SkippedTensor] = []
        dtypes = [torch.float32]
        offset = 0
        elsewhere = reserved(model)
        for uses in _parameter_uses(model):
            name, module, parameter = uses[0]
            names = [use[0] for use in uses]
            shape, numel = tuple(parameter.shape), parameter.numel()
            reason = _reason_to_skip(uses, kinds, ignored, wanted, elsewhere)
            if reason is not None:
                self.skipped.append(SkippedTensor(name, shape, numel, reason, any(one in ignored for one in names)))
                continue
            role = role_of(name, module, parameter)
            self.tensors.append(
                PrunableTensor(
                    name=name,
                    aliases=tuple(names[1:]),
                    layer=type(module).__name__,
                    shape=shape,
                    offset=offset,
                    numel=numel,
                    input_dim=role.input_dim if parameter.dim() > 1 else 1,
                    groups=role.groups,
                    stack=role.stack,
                    is_output=not outputs.isdisjoint(names),
                )
            )
            dtypes.append(parameter.dtype)
            offset += numel
        self._check_included(entries)
        prunable = {name for tensor in self.tensors for name in (tensor.name, *tensor.aliases)}
        for a, b in overlaps([*model.named_parameters(), *model.named_buffers()]):
            if prunable & {a, b}:
                raise ValueError(
                    f"model: wanted every weight in memory of its own, got {a} and {b}, which overlap: tie whole "
                    "parameters (b.weight = a.weight), or give one a copy (b.weight.data = b.weight.data.clone())"
                )
        for name, shape, why in quantized(model):
            self.skipped.append(SkippedTensor(name, shape, math.prod(shape), why))
        if not self.tensors:
            raise ValueError(f"model: wanted at least one prunable tensor, got none\n{self.describe()}")
        self.d = offset
        # Half-precision models are simulated in fp32, fp64 models in fp64.
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32

    def _check_included(self, entries: Sequence[Entry]) -> None:
        """Refuse an entry of which nothing can be pruned."""
        left = {skip.name: skip for skip in self.skipped}
        prunable = {name for tensor in self.tensors for name in (tensor.name, *tensor.aliases)}
        for entry in entries:
            names = entry.wanted or entry.names
            others = [left[name] for name in names if name in left and not left[name].ignored]
            if others and prunable.isdisjoint(names):
                found = "; ".join(f"{skip.name}: {skip.reason}" for skip in others[:_NAMED])
                raise ValueError(f"include: wanted weights that can be pruned, got {entry.label!r}, {found}")

    @property
    def beside(self) -> int:
        """How many weights of the model are no coordinates."""
        return sum(skip.numel for skip in self.skipped)

    @property
    def segments(self) -> list[int]:
        """How many coordinates everything has that counts as a tensor by itself: of experts each matrix."""
        return [math.prod(shape) for tensor in self.tensors for shape in tensor.segments]

    @property
    def copied(self) -> int:
        """Numbers that hold the masked weights of one particle."""
        return self.d

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The prunable parameters of ``model``, in flat order."""
        model = unwrapped(model)
        return [model.get_parameter(tensor.name) for tensor in self.tensors]

    def by_parameter(self, model: nn.Module, values: Sequence[T]) -> dict[int, T]:
        """A value per prunable tensor by the ``id`` of its parameter, tied ones under each of theirs."""
        model = unwrapped(model)
        return {
            id(model.get_parameter(name)): value
            for tensor, value in zip(self.tensors, values, strict=True)
            for name in (tensor.name, *tensor.aliases)
        }

    def flatten(self, model: nn.Module) -> Tensor:
        """A copy of the prunable weights as one vector (d,), fp32 (fp64 if the model has fp64 weights).

        Raises:
            ValueError: a weight that is not finite; the message names its tensor.
        """
        flat = torch.cat([p.detach().reshape(-1).to(self.dtype) for p in self.parameters(model)])
        if not bool(torch.isfinite(flat).all()):
            bad = [t.name for t, part in zip(self.tensors, self.split(flat), strict=True) if not part.isfinite().all()]
            raise ValueError(f"model: wanted finite weights, got NaN or infinite ones in {', '.join(bad)}")
        return flat

    def split(
        self,
        flat: Tensor,  # (d,)
    ) -> list[Tensor]:
        """Views of a flat vector in the shapes of the prunable tensors (one autograd node for all)."""
        parts = flat.split([tensor.numel for tensor in self.tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, self.tensors, strict=True)]

    def normalize_(
        self,
        saliency: Tensor,  # (d,) ≥ 0, divided in place
    ) -> Tensor:  # (d,)
        """Every tensor's part divided by its own mean (of experts each matrix's), so that scales compare."""
        for part in saliency.split(self.segments):
            # In pieces: each is converted to fp64 as a whole. Added up at once: results kept would leave holes in the
            # heap that the next piece does not fit in.
            total = torch.zeros((), dtype=torch.float64, device=part.device)
            for piece in part.split(_PIECE):
                total += piece.sum(dtype=torch.float64)
            mean = total.div(part.numel()).to(part.dtype)
            part.div_(torch.where(mean > 0, mean, 1.0))
        return saliency

    def describe(self) -> str:
        """A table of every parameter: what is pruned, what is skipped and why."""
        rows = [("parameter", "shape", "weights", "pruned?")]
        for tensor in self.tensors:
            notes = [tensor.layer]
            if tensor.stack > 1:
                notes.append(f"{tensor.stack} matrices")
            if tensor.aliases:
                notes.append(f"tied: {', '.join(tensor.aliases)}")
            if tensor.is_output:
                notes.append(f"an output layer: ignored_layers=[{tensor.name!r}] leaves it alone")
            rows.append((tensor.name, _shape(tensor.shape), f"{tensor.numel:,}", f"yes ({', '.join(notes)})"))
        for skip in self.skipped:
            rows.append((skip.name, _shape(skip.shape), f"{skip.numel:,}", f"no: {skip.reason}"))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {count:>{widths[2]}}  {pruned}"
            for name, shape, count, pruned in rows
        ]
        prunable = sum(tensor.numel for tensor in self.tensors)
        total = prunable + sum(skip.numel for skip in self.skipped)
        lines.append(f"prunable: {prunable:,} of {total:,} weights in {len(self.tensors)} tensors")
        return "\n".join(lines)


def _shape(shape: Sequence[int]) -> str:
    return "×".join(str(size) for size in shape) or "scalar"


def _single_device(model: nn.Module) -> torch.device:
    first: dict[torch.device, str] = {}  # the first tensor on each
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"model: wanted initialized parameters, got {name}, lazy: run one forward pass first")
        first.setdefault(tensor.device, name)
    devices = sorted(map(str, first))
    meta = first.get(torch.device("meta"))
    remedy = "load its weights first, without offloading (or model.to_empty(device=…) and load_state_dict)"
    if len(first) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in first.items())
        then = remedy if meta else "model.to(device) moves it"
        raise ValueError(f"model: wanted all on one device, got {', '.join(devices)} ({where}): {then}")
    if meta:
        raise ValueError(f"model: wanted real weights, got {meta} and all others on the meta device: {remedy}")
    return next(iter(first), torch.device("cpu"))


Use = tuple[str, nn.Module, nn.Parameter]  # (full name, the module that holds it, the parameter)


def _parameter_uses(model: nn.Module) -> list[list[Use]]:
    """Every parameter once, with all the names it goes by; one memory behind several of them counts as one."""
    uses: dict[Hashable, list[Use]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{local}" if prefix else local
            uses.setdefault(place(parameter), []).append((name, module, parameter))
    return list(uses.values())


def _reason_to_skip(
    uses: list[Use],
    kinds: dict[str, bool],  # of roles: whether they are pruned
    ignored: dict[str, str],
    wanted: set[str],
    elsewhere: dict[str, str],
) -> str | None:
    is_wanted = any(name in wanted for name, _, _ in uses)
    for name, module, parameter in uses:
        tied = "" if name == uses[0][0] else f" (tied to {name})"
        if name in ignored:
            return f"ignored_layers: {ignored[name]}{tied}"
        for prefix, why in elsewhere.items():
            if name.startswith(prefix):
                return f"{why}{tied}"
        role = role_of(name, module, parameter)
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:  # fp8: a code, beside scales elsewhere
            quantizes = parameter.dtype.itemsize == 1 and parameter.dtype != torch.bool and role.kind == "weight"
            remedy = ": quantized, prune the model before that" if quantizes else ""
            return f"dtype {str(parameter.dtype).removeprefix('torch.')}{remedy}"
        if parameter.numel() == 0:
            return "empty"
        if role.final or not (is_wanted or kinds.get(role.kind, False)):
            return _why_not(role, tied)
    for name, _, parameter in uses:
        check_plain(name, parameter)
    return None


def _why_not(role: Role, tied: str) -> str:
    if role.kind == "other":
        return f"{role.why}{tied}"
    plural = {"bias": "biases"}.get(role.kind, f"{role.kind}s")
    return f"{role.kind}{tied}: include_{plural}=True prunes it"
