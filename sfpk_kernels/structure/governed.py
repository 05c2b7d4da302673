"""What one position of one module governs: which tensors, along which dim, in which role."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    """A tensor's dim, a norm's width, or what a module's attribute counts, along the positions of a module."""

    what: str  # "tensor", "norm" or "attribute"
    name: str  # of the tensor, or of the module
    dim: int
    role: str  # of a tensor; the name of the attribute
    size: int
    share: int = 1  # so many positions of the module are one here
    period: int | None = None  # after so many they begin again
    trouble: str | None = None

    @property
    def key(self) -> tuple[str, str, int, str]:
        """All positions of the same dim."""
        return self.what, self.name, self.dim, self.role

    def place(self, position: int) -> int:
        """Where a position of the module is here."""
        return position // self.share if self.period is None else position % self.period

    def trouble_at(self, position: int) -> str | None:
        """Why it cannot be removed there, or None."""
        inside = 0 <= self.place(position) < self.size
        return self.trouble or (None if inside else f"position {position} of {self.name}, which has {self.size}")


def why_not(module: Any) -> str | None:
    """Why what a module computes is not followed, or None."""
    for kind, why in _MODULES.items():
        if isinstance(module, kind):
            return why
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return "it normalizes over positions and channels at once"
    return "it moves channels to other places" if isinstance(module, UNFOLLOWED) else None


def governed(model: nn.Module, module: Any, name: str, side: str, dim: int) -> list[Governed]:
    """Everything that goes when a position of a module's inputs or outputs goes.

    Args:
        model: where ``name`` is looked up.
        module: a module, a parameter that belongs to none that is known, or something else, which governs nothing.
        name: of the module or parameter.
        side: "in" or "out".
        dim: of such a parameter.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(module, name, side)
    if isinstance(module, nn.Linear):
        if side == "in":
            return [_tensor(module, name, "weight", 1, "gate")]
        return _present(module, name, (("weight", 0, "producer"), ("bias", 0, "follower")))
    if isinstance(module, nn.Embedding):
        return [_tensor(module, name, "weight", 1, "producer")] if side == "out" else []
    if isinstance(module, nn.modules.batchnorm._NormBase):
        locals_ = [(local, 0, "follower") for local in ("weight", "bias", "running_mean", "running_var")]
        found = _present(module, name, locals_)
        return found or [_attribute(name, "num_features", module.num_features)]
    if isinstance(module, nn.LayerNorm):
        width = module.normalized_shape[-1]
        found = _present(module, name, (("weight", 0, "follower"), ("bias", 0, "follower")))
        found = found or [_attribute(name, "normalized_shape", width)]
        return [*found, Governed("norm", name, 0, "", width)]
    if isinstance(module, nn.PReLU):
        one = module.num_parameters == 1
        return [] if one else [_tensor(module, name, "weight", 0, "follower")]
    if isinstance(module, nn.Parameter):
        owner, _, local = name.rpartition(".")
        holder = model.get_submodule(owner)
        found = [_tensor(holder, owner, local, dim % module.dim(), "follower")]
        if isinstance(holder, nn.RMSNorm) or type(holder).__name__.endswith("RMSNorm"):
            found.append(Governed("norm", owner, 0, "", module.shape[-1]))
        return found
    return []


def _convolution(module: nn.modules.conv._ConvNd, name: str, side: str) -> list[Governed]:
    from ._coupling import grouped_whole

    first, second = (0, 1) if side == "in" else (1, 0)  # dims of a transposed one
    dim = first if module.transposed else second
    bias = [] if side == "in" or module.bias is None else [_tensor(module, name, "bias", 0, "follower")]
    role = "gate" if side == "in" else "producer"
    if module.groups == 1:
        return [_tensor(module, name, "weight", dim, role), *bias]
    per_group = (module.in_channels if side == "in" else module.out_channels) // module.groups
    if grouped_whole(module):  # passes its input on: what reads its output is gated
        found = [replace(_attribute(name, "groups", module.groups), share=per_group), *bias]
        return [*found, _tensor(module, name, "weight", 0, "producer")] if dim == 0 else found
    # Dim 0 runs over all groups, dim 1 over the positions in one of them.
    return [replace(_tensor(module, name, "weight", dim, role), period=None if dim == 0 else per_group), *bias]


def _present(module: nn.Module, name: str, locals_: Any) -> list[Governed]:
    return [
        _tensor(module, name, local, dim, role)
        for local, dim, role in locals_
        if getattr(module, local, None) is not None
    ]


def _tensor(module: nn.Module, name: str, local: str, dim: int, role: str) -> Governed:
    full = f"{name}.{local}" if name else local
    if local not in module._parameters and local not in module._buffers:
        trouble = f"{full}, which is computed from others: undo that first"
        return Governed("tensor", full, dim, role, 1, trouble=trouble)
    return Governed("tensor", full, dim, role, getattr(module, local).shape[dim])


def _attribute(name: str, attribute: str, size: int) -> Governed:
    return Governed("attribute", name, 0, attribute, size)
