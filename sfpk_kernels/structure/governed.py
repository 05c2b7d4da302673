"""What one position of one module governs: which tensors, along which dim, in which role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

# Modules that mix or move positions in ways the graph does not follow.
UNFOLLOWED = (nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Fold, nn.Unfold, nn.RNNBase)
_MODULES: dict[type, str] = {
    nn.GroupNorm: "the statistics of its groups are of all their channels",
    nn.RNNBase: "recurrent weights are not handled",
    nn.MultiheadAttention: "its heads and width are not handled",
}


@dataclass(frozen=True)
class Governed:
    """A position of a tensor's dim, of a norm's width, or one that a module's attribute counts."""

    what: str  # "tensor", "norm" or "attribute"
    name: str  # of the tensor, or of the module
    dim: int
    role: str  # of a tensor; the name of the attribute
    position: int
    size: int
    trouble: str | None = None

    @property
    def key(self) -> tuple[str, str, int, str]:
        """All positions of the same dim."""
        return self.what, self.name, self.dim, self.role


def why_not(module: Any) -> str | None:
    """Why what a module computes is not followed, or None."""
    for kind, why in _MODULES.items():
        if isinstance(module, kind):
            return why
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return "it normalizes over positions and channels at once"
    return "it moves channels to other places" if isinstance(module, UNFOLLOWED) else None


def governed(model: nn.Module, module: Any, name: str, side: str, position: int, dim: int) -> list[Governed]:
    """Everything that goes when this position goes.

    Args:
        model: where ``name`` is looked up.
        module: a module, a parameter that belongs to none that is known, or something else, which governs nothing.
        name: of the module or parameter.
        side: "in" or "out".
        position: along the module's inputs or outputs.
        dim: of such a parameter.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(module, name, side, position)
    if isinstance(module, nn.Linear):
        if side == "in":
            return [_tensor(module, name, "weight", 1, "gate", position)]
        return _present(module, name, (("weight", 0, "producer"), ("bias", 0, "follower")), position)
    if isinstance(module, nn.Embedding):
        return [_tensor(module, name, "weight", 1, "producer", position)] if side == "out" else []
    if isinstance(module, nn.modules.batchnorm._NormBase):
        locals_ = [(local, 0, "follower") for local in ("weight", "bias", "running_mean", "running_var")]
        found = _present(module, name, locals_, position)
        return found or [_attribute(name, "num_features", position, module.num_features)]
    if isinstance(module, nn.LayerNorm):
        width = module.normalized_shape[-1]
        found = _present(module, name, (("weight", 0, "follower"), ("bias", 0, "follower")), position)
        found = found or [_attribute(name, "normalized_shape", position, width)]
        return [*found, Governed("norm", name, 0, "", position, width, _outside(name, position, width))]
    if isinstance(module, nn.PReLU):
        one = module.num_parameters == 1
        return [] if one else [_tensor(module, name, "weight", 0, "follower", position)]
    if isinstance(module, nn.Parameter):
        owner, _, local = name.rpartition(".")
        holder = model.get_submodule(owner)
        found = [_tensor(holder, owner, local, dim % module.dim(), "follower", position)]
        if isinstance(holder, nn.RMSNorm) or type(holder).__name__.endswith("RMSNorm"):
            found.append(Governed("norm", owner, 0, "", position, module.shape[-1]))
        return found
    return []


def _convolution(module: nn.modules.conv._ConvNd, name: str, side: str, position: int) -> list[Governed]:
    from ._coupling import grouped_whole

    first, second = (0, 1) if side == "in" else (1, 0)  # dims of a transposed one
    dim = first if module.transposed else second
    bias = [] if side == "in" or module.bias is None else [_tensor(module, name, "bias", 0, "follower", position)]
    if module.groups == 1:
        role = "gate" if side == "in" else "producer"
        return [_tensor(module, name, "weight", dim, role, position), *bias]
    channels = module.in_channels if side == "in" else module.out_channels
    if grouped_whole(module):  # passes its input on: what reads its output is gated
        group = position // (channels // module.groups)
        found = [_attribute(name, "groups", group, module.groups), *bias]
        return [*found, _tensor(module, name, "weight", 0, "producer", position)] if dim == 0 else found
    # Dim 0 runs over all groups, dim 1 over the positions in one of them.
    role = "gate" if side == "in" else "producer"
    along = position if dim == 0 else position % (channels // module.groups)
    return [_tensor(module, name, "weight", dim, role, along), *bias]


def _present(module: nn.Module, name: str, locals_: Any, position: int) -> list[Governed]:
    return [
        _tensor(module, name, local, dim, role, position)
        for local, dim, role in locals_
        if getattr(module, local, None) is not None
    ]


def _tensor(module: nn.Module, name: str, local: str, dim: int, role: str, position: int) -> Governed:
    full = f"{name}.{local}" if name else local
    trouble = None
    if local not in module._parameters and local not in module._buffers:
        return Governed("tensor", full, dim, role, 0, 1, f"{full}, which is computed from others: undo that first")
    size = getattr(module, local).shape[dim]
    trouble = _outside(full, position, size)
    return Governed("tensor", full, dim, role, position, size, trouble)


def _outside(name: str, position: int, size: int) -> str | None:
    return None if 0 <= position < size else f"position {position} of {name}, which has {size}"


def _attribute(name: str, attribute: str, position: int, size: int) -> Governed:
    return Governed("attribute", name, 0, attribute, position, size)
