"""SynFlow (Tanaka et al., NeurIPS 2020): prune by the flow through the network of absolute weights, without data."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..coordinates.coverage import coordinates_for
from ..coordinates.flat import Coordinates, unwrapped
from ..masks.maskset import MaskSet
from ..modeling.batches import forward, move_to
from ..modeling.state import BATCH_NORMS, autograd_allowed, check_no_inference_tensors, guarded
from ..ops import topk_mask
from ..search.polarizer import budget
from ..search.schedule import density_schedule
from ..utils.arguments import called, check_least
from .select import check_sparsity, select


@called("synflow(model, sparsity, example=batch)")
@autograd_allowed()
def synflow(
    model: nn.Module,
    sparsity: float,
    *,
    example: Any,
    rounds: int = 100,
    **coordinate_options: Any,
) -> MaskSet:
    """The round((1 - sparsity)·d) weights that carry most synaptic flow, pruned in rounds.

    The score is θ ⊙ ∂R/∂θ, R the sum of the outputs for an input of ones with every parameter replaced by its absolute
    value (sections 4 and 6). Round k of K keeps the best to a density of ρ^(k/K) and scores those
    anew (algorithm 1), so that no tensor is emptied before it has to be; what was removed stays removed. Costs one
    forward and backward pass of one sample a round, in fp64 as the authors' (products of many layers overflow fp32),
    on a copy of the model. The model is not changed.

    The paper prunes networks at initialization. Of a trained one the batch-norm means are set to 0 as they are there:
    subtracted, they would turn parts of the flow negative. Flow is conserved from layer to layer in networks of linear
    and convolutional layers, ReLU and pooling; with other activations, attention or layer norms the score is defined,
    the conservation is not.

    Args:
        model: the model.
        sparsity: fraction removed, in (0, 1).
        example: a batch as the model takes it (a tensor, (x, …) or a dict): of its first sample, floats are replaced
            by ones, whole numbers (tokens) are used.
        rounds: K.
        coordinate_options: those of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        TypeError: a batch of another kind.
        ValueError: a sparsity outside (0, 1), nothing prunable, rounds below 1, or outputs without any flow.
        FloatingPointError: a flow that is not finite.
    """
    check_sparsity(sparsity)
    check_least("rounds", rounds, 1)
    coordinates = coordinates_for(model, **coordinate_options)
    check_no_inference_tensors(model)
    least = budget(float(sparsity), coordinates.d)
    weights = coordinates.flatten(model).double().abs()
    twin = _absolute(model)
    ones = _ones(move_to(example, coordinates.device))
    mask, score = torch.ones_like(weights, dtype=torch.bool), weights
    with guarded(twin, bn="running", training=False), torch.enable_grad():
        for density in density_schedule("exponential", 1.0 - float(sparsity), rounds)[1:]:
            score = synaptic_flow(twin, coordinates, weights * mask, ones)
            score.masked_fill_(~mask, -1.0)
            mask = topk_mask(score, max(least, round(density * coordinates.d)), backend="reference")  # fp64
    return select(coordinates, score, sparsity)


def synaptic_flow(
    twin: nn.Module,
    coordinates: Coordinates,
    weights: Tensor,  # (d,) fp64, ≥ 0
    ones: Any,
) -> Tensor:  # (d,) fp64
    """θ ⊙ ∂R/∂θ at some weights, which are written into the twin.

    Raises:
        ValueError: it is zero throughout.
        FloatingPointError: it is not finite.
    """
    parameters = coordinates.parameters(twin)
    with torch.no_grad():
        for parameter, part in zip(parameters, coordinates.split(weights), strict=True):
            parameter.copy_(part)
    output = forward(twin, ones)
    leaves = pytree.tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    total = sum(leaf.sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
    if not isinstance(total, Tensor) or not total.requires_grad:
        raise ValueError("example: wanted outputs that depend on the prunable weights, got others")
    grads = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    score = torch.cat([grad.reshape(-1) for grad in grads]).mul_(weights)
    if not bool(score.isfinite().all()):
        raise FloatingPointError("model: wanted a finite synaptic flow, got one beyond fp64 or NaN")
    if not bool(score.any()):
        raise ValueError("example: wanted outputs that depend on the prunable weights, got a synaptic flow of zero")
    return score


def _absolute(model: nn.Module) -> nn.Module:
    """A copy in fp64 with absolute parameters."""
    twin = copy.deepcopy(unwrapped(model)).double()
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True).abs_()
        for module in twin.modules():
            if isinstance(module, BATCH_NORMS) and module.running_mean is not None:
                module.running_mean.zero_()
    return twin


def _ones(batch: Any) -> Any:
    """Its first sample, floats replaced by ones."""

    def one(tensor: Tensor) -> Tensor:
        first = tensor[:1] if tensor.dim() else tensor
        return torch.ones_like(first, dtype=torch.float64) if first.is_floating_point() else first

    return pytree.tree_map_only(Tensor, one, batch)
