"""What a parameter is to its module: a matrix of a matmul, a bias, a norm, an embedding, or none of these."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .wrapped import taken_over

UNKNOWN = -1  # input_dim of a weight of which only its module's code says how it is used

_NORMS: tuple[type, ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_LAYERS: tuple[type, ...] = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_EMBEDDINGS: tuple[type, ...] = (nn.Embedding, nn.EmbeddingBag)
_RECURRENT: tuple[type, ...] = (nn.RNNBase, nn.RNNCellBase)
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# Attributes in which own Linear classes keep their sizes: torch, PyTorch Geometric, and what others call them.
_SIZES = (
    ("in_features", "out_features"),
    ("in_channels", "out_channels"),
    ("in_dim", "out_dim"),
    ("input_dim", "output_dim"),
    ("input_size", "output_size"),
    ("in_size", "out_size"),
    ("nx", "nf"),
)


@dataclass(frozen=True)
class Role:
    """What a parameter is, and how a weight is laid out."""

    kind: str  # "weight", "bias", "norm", "embedding" or "other"
    why: str = ""  # of "other": why it is not prunable by itself
    final: bool = False  # of "other": nor on request
    input_dim: int = 1  # along which the inputs of one output lie, or UNKNOWN
    groups: int = 1  # of inputs along it that no output shares, in grouped transposed convolutions
    stack: int = 1  # matrices along the first dimension, each of its own: those of experts


def role_of(name: str, module: nn.Module, parameter: nn.Parameter) -> Role:
    """What a parameter is to the module that holds it.

    Args:
        name: its full name.
        module: that holds it.
        parameter: itself; its shape is looked at, never its values.
    """
    path, _, local = name.rpartition(".")
    why = taken_over(module, local)
    if why is not None:
        return Role("other", why, final=True)
    if isinstance(module, _NORMS):
        return Role("norm")
    if isinstance(module, _EMBEDDINGS) and local == "weight":
        return Role("embedding")
    if isinstance(module, _LAYERS) or type(module).__name__ == "Conv1D":
        if local == "weight":
            return _layer(module)
        if local == "bias":
            return Role("bias")
        return Role("other", f"neither weight nor bias of its {type(module).__name__}", input_dim=UNKNOWN)
    if isinstance(module, nn.MultiheadAttention) and local in (*_ATTENTION_WEIGHTS, "in_proj_bias"):
        return Role("weight" if local in _ATTENTION_WEIGHTS else "bias")
    if isinstance(module, _RECURRENT):
        return Role("weight" if local.startswith("weight_") else "bias")
    own = _own_matrices(module)
    if own is not None and local in ("weight", "bias"):
        return own if local == "weight" else Role("bias")
    if parameter.dim() == 3 and (_is_expert(path) or _is_expert(type(module).__name__)):
        return Role("weight", input_dim=_expert_inputs(module), stack=parameter.shape[0])
    kind = type(module).__name__
    if parameter.dim() < 2:
        return Role("other", f"no prunable layer type ({kind})", input_dim=UNKNOWN)
    words = f"no matrix that its {kind} is known to multiply by: include=[{name!r}] prunes it"
    return Role("other", words, input_dim=UNKNOWN)


def _layer(module: nn.Module) -> Role:
    """Of a weight of torch's layers, or of the transposed Linear of GPT-2."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return Role("weight", input_dim=0, groups=module.groups)
    return Role("weight", input_dim=0 if type(module).__name__ == "Conv1D" else 1)


def _own_matrices(module: nn.Module) -> Role | None:
    """Of ``weight`` in a class that is no Linear of torch's but has its sizes, or of several such in one tensor."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() not in (2, 3):
        return None
    shape, first = tuple(weight.shape[-2:]), weight.dim() - 2
    for names in _SIZES:
        inputs, outputs = (getattr(module, name, None) for name in names)
        if type(inputs) is not int or type(outputs) is not int:
            continue
        stack = weight.shape[0] if first else 1
        if shape == (outputs, inputs):  # as in nn.Linear; square ones are taken for such
            return Role("weight", input_dim=first + 1, stack=stack)
        if shape == (inputs, outputs):
            return Role("weight", input_dim=first, stack=stack)
    return None


def _is_expert(text: str) -> bool:
    return "expert" in text.lower()


def _expert_inputs(module: nn.Module) -> int:
    """Along which dimension (experts, outputs, inputs) or, where transposed, (experts, inputs, outputs) has inputs."""
    transposed = getattr(module, "is_transposed", None)  # as transformers says it
    return UNKNOWN if not isinstance(transposed, bool) else 1 if transposed else 2
