"""Which weights of a model are prunable, and where each stands in the flat vector of coordinates."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..utils.arguments import check_model
from .shared_memory import overlaps, place
from .wrapped import check_not_sharded, check_plain, check_structure, quantized, reserved, taken_over

_NORMS: tuple[type, ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_LAYERS: tuple[type, ...] = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_EMBEDDINGS: tuple[type, ...] = (nn.Embedding, nn.EmbeddingBag)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_PIECE = 1 << 18  # elements

T = TypeVar("T")
Ignored = str | type[nn.Module] | nn.Module


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
    input_dim: int = 1  # along which the inputs of one output lie; 0 in transposed layers
    groups: int = 1  # of inputs along it that no output shares, in grouped transposed convolutions

    @property
    def inputs(self) -> int:
        """How many inputs (channels) every output has side by side; 0 for biases and norms, which have none."""
        return self.shape[self.input_dim] // self.groups if len(self.shape) > 1 else 0


@dataclass(frozen=True)
class SkippedTensor:
    """One parameter that is left alone, and why."""

    name: str
    shape: tuple[int, ...]
    numel: int
    reason: str


class Coordinates:
    """The prunable coordinates of one model: single weights, flattened in the order of its parameters.

    Prunable are the weights of Linear, Bilinear, Conv1d/2d/3d, ConvTranspose1d/2d/3d, the projections of
    MultiheadAttention and the transposed Linear ("Conv1D") of GPT-2 style models. A parameter used under
    several names is one tensor here, and is pruned only if every use of it may be pruned.

    Args:
        model: the trained model, all on one device. Only its structure is kept, no reference to it. Inside
            ``torch.compile``, DataParallel and DistributedDataParallel the names are those of the model within.
        ignored_layers: what to leave alone: module instances or module types (with everything inside them),
            names of modules or parameters, or ``"re:PATTERN"``, matched from the start of parameter names.
        include_embeddings: prune Embedding and EmbeddingBag weights, too.
        include_biases: prune the biases of the layers above, too.
        include_norms: prune the weights and biases of normalization layers, too.

    Raises:
        TypeError: model or an ignored layer of the wrong type.
        ValueError: a model on several devices, with uninitialized parameters or without any prunable tensor; one that
            was scripted or sharded, or has a prunable weight that is no dense tensor (sparse, quantized); an ignored
            name, pattern or module that matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        ignored_layers: Iterable[Ignored] = (),
        include_embeddings: bool = False,
        include_biases: bool = False,
        include_norms: bool = False,
    ):
        check_model(model)
        model = unwrapped(model)
        check_structure(model)
        self.device = _single_device(model)
        include = {"embedding": include_embeddings, "bias": include_biases, "norm": include_norms}
        ignored = ignored_names(model, ignored_layers)
        self.tensors: list[PrunableTensor] = []
        self.skipped: list[SkippedTensor] = []
        dtypes = [torch.float32]
        offset = 0
        elsewhere = reserved(model)
        for uses in _parameter_uses(model):
            name, module, parameter = uses[0]
            shape, numel = tuple(parameter.shape), parameter.numel()
            reason = _reason_to_skip(uses, include, ignored, elsewhere)
            if reason is not None:
                self.skipped.append(SkippedTensor(name, shape, numel, reason))
                continue
            aliases = tuple(alias for alias, _, _ in uses[1:])
            layer, inputs = type(module).__name__, _inputs_of(module, parameter)
            self.tensors.append(PrunableTensor(name, aliases, layer, shape, offset, numel, *inputs))
            dtypes.append(parameter.dtype)
            offset += numel
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
        """Every tensor's part divided by its own mean, so that layers of different scale compare."""
        for part in saliency.split([tensor.numel for tensor in self.tensors]):
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
            tied = f", tied: {', '.join(tensor.aliases)}" if tensor.aliases else ""
            rows.append((tensor.name, _shape(tensor.shape), f"{tensor.numel:,}", f"yes ({tensor.layer}{tied})"))
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


def _inputs_of(module: nn.Module, parameter: nn.Parameter) -> tuple[int, int]:
    """Along which dimension inputs lie, and in how many groups."""
    if parameter.dim() < 2:
        return 1, 1
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 0, module.groups
    return (0 if type(module).__name__ == "Conv1D" else 1), 1


def _role(name: str, module: nn.Module) -> str:
    """``"weight"``, ``"bias"``, ``"norm"``, ``"embedding"``, or else the reason why it is not prunable."""
    local = name.rpartition(".")[2]
    why = taken_over(module, local)
    if why is not None:
        return why
    if isinstance(module, _NORMS):
        return "norm"
    if isinstance(module, _EMBEDDINGS) and local == "weight":
        return "embedding"
    is_layer = isinstance(module, _LAYERS) or type(module).__name__ == "Conv1D"
    if (is_layer and local == "weight") or (isinstance(module, nn.MultiheadAttention) and local in _ATTENTION_WEIGHTS):
        return "weight"
    if (is_layer and local == "bias") or (isinstance(module, nn.MultiheadAttention) and local == "in_proj_bias"):
        return "bias"
    if is_layer:
        return f"neither weight nor bias of its {type(module).__name__}"
    return f"no prunable layer type ({type(module).__name__})"


def _reason_to_skip(
    uses: list[Use], include: dict[str, bool], ignored: dict[str, str], elsewhere: dict[str, str]
) -> str | None:
    for name, module, parameter in uses:
        tied = "" if name == uses[0][0] else f" (tied to {name})"
        if name in ignored:
            return f"ignored_layers: {ignored[name]}{tied}"
        for prefix, why in elsewhere.items():
            if name.startswith(prefix):
                return f"{why}{tied}"
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:  # fp8: a code, beside scales elsewhere
            quantizes = (
                parameter.dtype.itemsize == 1 and parameter.dtype != torch.bool and _role(name, module) == "weight"
            )
            remedy = ": quantized, prune the model before that" if quantizes else ""
            return f"dtype {str(parameter.dtype).removeprefix('torch.')}{remedy}"
        if parameter.numel() == 0:
            return "empty"
        role = _role(name, module)
        if role in include and not include[role]:
            plural = {"bias": "biases"}.get(role, f"{role}s")
            return f"{role}{tied}: include_{plural}=True prunes it"
        if role != "weight" and role not in include:
            return f"{role}{tied}"
    for name, _, parameter in uses:
        check_plain(name, parameter)
    return None


def ignored_names(model: nn.Module, ignored_layers: Iterable[Ignored]) -> dict[str, str]:
    """Full parameter name → the entry of ignored_layers that covers it.

    Raises:
        TypeError, ValueError: entries as in :class:`Coordinates`.
    """
    if isinstance(ignored_layers, str | nn.Module | type):
        raise TypeError(f"ignored_layers: wanted a list, got {ignored_layers!r:.80}: put it in a list")
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules = list(model.named_modules(remove_duplicate=False))
    found: dict[str, str] = {}
    for entry in ignored_layers:
        label = entry if isinstance(entry, str) else entry.__name__ if isinstance(entry, type) else ""
        if isinstance(entry, str) and entry.startswith("re:"):
            try:
                pattern = re.compile(entry.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"ignored_layers: wanted a valid pattern, got {entry!r}: {error}") from error
            covered = [name for name in names if pattern.match(name)]
        elif isinstance(entry, str):
            covered = [name for name in names if name == entry or name.startswith(f"{entry}.")]
        elif isinstance(entry, nn.Module) or (isinstance(entry, type) and issubclass(entry, nn.Module)):
            inside = [
                prefix
                for prefix, module in modules
                if (isinstance(module, entry) if isinstance(entry, type) else module is entry)
            ]
            label = label or (inside[0] if inside and inside[0] else type(entry).__name__)
            covered = [name for name in names if any(p == "" or name.startswith(f"{p}.") for p in inside)]
            if isinstance(entry, type) or inside:  # a type may match nothing, a module without weights too
                found.update(dict.fromkeys(covered, label))
                continue
        else:
            raise TypeError(f"ignored_layers: wanted modules, module types or names, got {entry!r}")
        if not covered:
            raise ValueError(f"ignored_layers: {entry!r:.80} matches no parameter of the model")
        found.update(dict.fromkeys(covered, label))
    return found
