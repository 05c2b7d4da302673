"""Tensors of a model made smaller in place, and the sizes that its modules keep beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

_WIDTHS: dict[type, tuple[str, ...]] = {  # of norms: the attribute is the length of their tensors
    nn.modules.batchnorm._NormBase: ("num_features",),
    nn.PReLU: ("num_parameters",),
}


def slice_tensors(model: nn.Module, slices: Mapping[str, Mapping[int, Tensor]]) -> None:
    """Put the kept positions in the place of each named parameter or buffer; tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for name, dims in slices.items():
        prefix, _, local = name.rpartition(".")
        module = model.get_submodule(prefix)
        old = module._parameters.get(local)
        if old is not None and id(old) in made:
            module._parameters[local] = made[id(old)]
            continue
        tensor = getattr(module, local)
        smaller = tensor.detach()
        for dim, positions in dims.items():
            smaller = smaller.index_select(dim, positions.to(smaller.device))
        smaller = smaller.clone()
        if old is None:
            module._buffers[local] = smaller
        else:
            parameter = nn.Parameter(smaller, requires_grad=old.requires_grad)
            made[id(old)] = module._parameters[local] = parameter
            made[id(parameter)] = parameter


def set_sizes(model: nn.Module, names: Iterable[str], attributes: Mapping[str, Mapping[str, int]]) -> None:
    """Set what modules keep of the shapes of the named tensors, and the attributes given."""
    for prefix, values in attributes.items():
        module = model.get_submodule(prefix)
        for attribute, value in values.items():
            setattr(module, attribute, (value,) if attribute == "normalized_shape" else value)
    for prefix in dict.fromkeys(name.rpartition(".")[0] for name in names):
        _set(model.get_submodule(prefix))


def _set(module: nn.Module) -> None:
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = module.weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.in_channels, module.out_channels = second * module.groups, first
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = map(int, module.weight.shape)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # transformers: weight (in, out)
        for width, size in zip(("nx", "nf"), module._parameters["weight"].shape, strict=True):  # type: ignore[union-attr]
            setattr(module, width, size)
    for kind, widths in _WIDTHS.items():
        if isinstance(module, kind):
            tensors = [*module._parameters.values(), *module._buffers.values()]
            lengths = [t.shape[0] for t in tensors if t is not None and t.dim() == 1]
            for width in widths if lengths else ():
                setattr(module, width, lengths[0])
