"""Output layers: few weights, each of which decides a whole output, so that some leave them alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

# Names of a model's last layer, where it stands at the top of the model.
_NAMES = (
    "lm_head", "classifier", "score", "head", "heads", "fc", "qa_outputs", "embed_out", "proj_out",
    "classification_head", "output_layer", "output_projection",
)  # fmt: skip


def output_weights(model: nn.Module) -> set[str]:
    """Full names of the weights of output layers, as far as names and frameworks tell them."""
    found = {id(weight) for weight in _weights(model)}
    return {name for name, one in model.named_parameters(remove_duplicate=False) if id(one) in found}


def _weights(model: nn.Module) -> Iterator[nn.Parameter]:
    layer = None
    with contextlib.suppress(AttributeError, NotImplementedError):  # of transformers; some models have none
        layer = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(layer, nn.Module):
        yield from _last(layer)
    for name, child in model.named_children():
        if name in _NAMES:
            yield from _last(child)
    if isinstance(model, nn.Sequential) and len(model) > 1:
        children = [child for child in model if next(child.parameters(), None) is not None]
        if children and isinstance(children[-1], nn.Linear):
            yield from _last(children[-1])


def _last(module: nn.Module) -> list[nn.Parameter]:
    """The last matrix in a module: of a head in several layers only that."""
    return [parameter for parameter in module.parameters() if parameter.dim() > 1][-1:]
