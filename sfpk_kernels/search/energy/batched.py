"""A chunk of particles in one pass: ``vmap`` over stacked weights and batches."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap
from torch.utils import _pytree as pytree

from ..polarizer import Polarized
from ._problem import CannotRunError, Problem
from ._scale import LossScale
from ._swap import stand_ins, stood_in

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class Batched:
    """Particles through the model together."""

    name = "vmap"

    def __init__(self, problem: Problem, scale: LossScale):
        self.problem = problem
        self.scale = scale
        if problem.theta.device != problem.device:
            raise CannotRunError("the particles are not on the model's device")
        for module in problem.model.modules():
            if isinstance(module, nn.RNNBase):
                raise CannotRunError(f"{type(module).__name__} keeps a list of its weights that no batched one enters")
        # Everything else stands in for itself without a gradient: none is computed for it.
        indices = range(len(problem.coordinates.tensors))
        self._places = stand_ins(problem.model, problem.coordinates.by_parameter(problem.model, indices))
        self._dtypes = problem.dtypes
        self._pass = vmap(grad_and_value(self._scaled, has_aux=True), in_dims=(0, 0, None), randomness="different")
        if problem.compiled:
            self._pass = torch.compile(self._pass)
        self._depends = False  # whether a pass has shown that the loss depends on the weights

    def run(
        self,
        keep: Polarized,  # a chunk
        batches: Sequence[Any],
        losses: Tensor,  # (chunk,) written
        grads: Tensor,  # (chunk, d) written
    ) -> None:
        """Losses and weight gradients of a chunk.

        Raises:
            CannotRunError: batches of different structure or shape, or a model that vmap cannot run.
        """
        stacked = stack(batches)
        if stacked is None:
            raise RaggedError("the batches differ in structure or shape")
        with torch.enable_grad():
            weights = keep.weights(self.problem.theta, backend=self.problem.backend)
            while True:
                self.differentiate(weights, stacked, losses, grads)
                if self.scale.accepts(losses, grads):
                    break
        if not self._depends:
            # A loss that ignores the weights gives zeros here; one by one it is told from a flat one.
            self._depends = bool(grads.any())
            if not self._depends:
                raise FlatError("all gradients are zero")

    def differentiate(
        self,
        weights: Tensor,  # (chunk, d)
        stacked: Any,
        losses: Tensor,
        grads: Tensor,
    ) -> None:
        """Forward and backward; the gradients times the loss scale."""
        shapes = [tensor.shape for tensor in self.problem.coordinates.tensors]
        sizes = [tensor.numel for tensor in self.problem.coordinates.tensors]
        parts = [
            part.view(-1, *shape).to(dtype)
            for part, shape, dtype in zip(weights.split(sizes, dim=1), shapes, self._dtypes, strict=True)
        ]
        first = True
        for micro, share in _micro_batches(stacked, self.problem.microbatch):
            gradients, (_, loss) = self._guarded(parts, micro, share * self.scale.value)
            for target, gradient in zip(grads.split(sizes, dim=1), gradients, strict=True):
                flat = gradient.reshape(len(gradient), -1)
                target.copy_(flat) if first else target.add_(flat)
            losses.copy_(loss * share) if first else losses.add_(loss * share)
            first = False

    def _scaled(self, parts: Sequence[Tensor], batch: Any, factor: float) -> tuple[Tensor, Tensor]:
        places = [(m, name, parts[s] if isinstance(s, int) else s.detach()) for m, name, s in self._places]
        problem = self.problem
        with stood_in(places), problem.autocast():
            loss = problem.checked(problem.loss_fn, batch)
        return (loss if factor == 1.0 else loss * factor), loss.detach()

    def _guarded(self, parts: Sequence[Tensor], batch: Any, factor: float) -> Any:
        """The batched pass, and the model afterwards as before."""
        model = self.problem.model
        attributes = [
            (module, dict(module.__dict__), dict(module._buffers), dict(module._parameters))
            for module in model.modules()
        ]
        try:
            with warnings.catch_warnings():
                # Slow operators are found by timing.
                warnings.filterwarnings("ignore", message="There is a performance drop")
                results = self._pass(parts, batch, factor)
        except _OUT_OF_MEMORY:
            _put_back(attributes)
            raise
        except Exception as error:
            _put_back(attributes)
            raise CannotRunError(f"vmap failed: {_first_line(error)}") from error
        except BaseException:
            _put_back(attributes)
            raise
        if _holds_batched_tensors(model):
            _put_back(attributes)
            raise CannotRunError("the model keeps tensors of its forward pass as attributes or buffers")
        return results


class RaggedError(CannotRunError):
    """These particles cannot go together; the next ones may."""


class FlatError(RaggedError):
    """They went together, and no gradient came of it: right for a flat loss, wrong for one without the weights."""


def _micro_batches(stacked: Any, size: int | None) -> Any:
    """As split_batch, for leaves with the particles in front."""
    if size is None:
        yield stacked, 1.0
        return
    leaves, spec = pytree.tree_flatten(stacked)
    samples = next((leaf.shape[1] for leaf in leaves if leaf.dim() > 1), None)
    if not samples:
        raise ValueError("microbatch: wanted a batch whose tensors have samples in their first dimension, got none")
    for begin in range(0, samples, size):
        end = min(begin + size, samples)
        cut = [leaf[:, begin:end] if leaf.dim() > 1 and leaf.shape[1] == samples else leaf for leaf in leaves]
        yield pytree.tree_unflatten(cut, spec), (end - begin) / samples


def _put_back(attributes: Sequence[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]]) -> None:
    """Give every module the attributes, buffers and parameters it had."""
    for module, values, buffers, parameters in attributes:
        module.__dict__.clear()
        module.__dict__.update(values)
        for table, before in ((module._buffers, buffers), (module._parameters, parameters)):
            table.clear()
            table.update(before)


def _holds_batched_tensors(model: nn.Module) -> bool:
    """Whether a vmap pass left tensors of its own on the model; they are dead outside of it."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(
        isinstance(value, Tensor) and wrapped(value)
        for module in model.modules()
        for value in (*module._buffers.values(), *module.__dict__.values())
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def stack(batches: Sequence[Any]) -> Any | None:
    """All batches stacked leaf by leaf along a new first dimension, or None where they do not fit."""
    flats, specs = zip(*(pytree.tree_flatten(batch) for batch in batches), strict=True)
    if any(spec != specs[0] for spec in specs):
        return None
    leaves = []
    for column in zip(*flats, strict=True):
        first = column[0]
        if not all(isinstance(leaf, Tensor) for leaf in column):
            return None
        if any(leaf.shape != first.shape or leaf.dtype != first.dtype for leaf in column):
            return None
        leaves.append(torch.stack(column))
    return pytree.tree_unflatten(leaves, specs[0])
