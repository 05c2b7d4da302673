"""Energies: the loss and its weight gradient for every particle, each on its own mini-batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils import _pytree as pytree

from .coordinates import Coordinates
from .polarizer import Polarized

logger = logging.getLogger(__name__)

LossFn = Callable[[nn.Module, Any], Tensor]

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class _Loss(nn.Module):
    """Model and loss as one module, so that functional_call can put masked weights in for both."""

    def __init__(self, model: nn.Module, loss_fn: LossFn):
        super().__init__()
        self.model = model
        # In a tuple, not registered: a loss that is a module itself, or holds the model, must not add
        # parameter names.
        self._loss_fn = (loss_fn,)

    def forward(self, batch: Any, leaves: Sequence[Tensor] = ()) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """The loss; with ``leaves`` also its gradients by them.

        The backward pass belongs inside functional_call: checkpointed layers run again during it, and must still
        see the masked weights.
        """
        (loss_fn,) = self._loss_fn
        loss = loss_fn(self.model, batch)
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss_fn: wanted a scalar tensor, got {type(loss).__name__}")
        if loss.numel() != 1:
            raise ValueError(f"loss_fn: wanted a scalar tensor, got shape {tuple(loss.shape)}")
        if not leaves:
            return loss.reshape(())
        if not loss.requires_grad:
            raise RuntimeError("loss_fn: wanted a loss that depends on the prunable weights, got a constant")
        gradients = torch.autograd.grad(loss.reshape(()), leaves, allow_unused=True, materialize_grads=True)
        return loss.detach().reshape(()), gradients


class ParticleEnergy:
    """Loss L_i and gradient ∂L_i/∂W_i at the masked weights W_i = P_i ⊙ θ, for all particles.

    The mask gradient (straight through the polarizer) is θ ⊙ ∂L_i/∂W_i; ``transition_(weights=θ)`` multiplies
    it in. The model must be under :func:`~sfpk_kernels.model_state.guarded`; its own parameters are never
    written, masked weights take their place inside ``torch.func.functional_call``.

    Args:
        model: the dense model.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        coordinates: of ``model``.
        theta: the dense weights (d,).
        mode: ``"vmap"``: a chunk of particles in one batched pass; ``"sequential"``: one by one; ``"auto"``:
            vmap for plain stacks of Linear layers, where it is faster, sequential for the rest (grouped
            convolutions and batched attention are slower under vmap than a loop), and sequential with a
            logged reason where vmap fails.
        chunk_size: particles per vmap pass, ``None`` for all.
        backend: of the masked-weights op.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        coordinates: Coordinates,
        theta: Tensor,
        *,
        mode: str = "auto",
        chunk_size: int | None = None,
        backend: str | None = None,
    ):
        self._loss = _Loss(model, loss_fn)
        self._coordinates = coordinates
        self._theta = theta
        self._dtypes = [parameter.dtype for parameter in coordinates.parameters(model)]
        self._names = [f"model.{tensor.name}" for tensor in coordinates.tensors]
        # Everything else detached: no gradient is computed for it. Tied parameters stand here under their first
        # name alone; functional_call carries them over to the others.
        prunable = set(self._names)
        self._fixed = {
            name: parameter.detach() for name, parameter in self._loss.named_parameters() if name not in prunable
        }
        self._may_fall_back = mode == "auto"
        self.mode = ("vmap" if _prefers_vmap(model) else "sequential") if mode == "auto" else mode
        self._chunk_size = chunk_size
        self._backend = backend
        self._said_ragged = False
        # Kept from step to step, because fresh pages would cost more than filling them: all gradients, and the
        # weights (1, d) of the particle at work.
        self._grads: Tensor | None = None
        self._weights: Tensor | None = None
        self._depends = False  # whether a vmap pass has shown that the loss depends on the weights

    def __call__(
        self,
        keep: Polarized | Tensor,  # of n particles; (n, d) bool, or float factors
        batches: Sequence[Any],  # n of them
    ) -> tuple[Tensor, Tensor]:  # losses (n,) fp64, ∂L/∂W (n, d)
        """Losses and weight gradients, the latter in a buffer that the next call writes again.

        Raises:
            TypeError, ValueError: a loss that is no scalar.
            RuntimeError: ``mode="vmap"`` and vmap cannot run this model; a loss that does not depend on the
                prunable weights. Other errors of the model or ``loss_fn`` pass through with a note that names the
                particle (with ``mode="vmap"`` as the cause of the RuntimeError).
        """
        keep = Polarized(keep) if isinstance(keep, Tensor) else keep
        n = len(keep)
        losses = torch.empty(n, dtype=torch.float64, device=self._theta.device)
        if self._grads is None or self._grads.shape[0] != n:
            self._grads = self._theta.new_empty(n, self._coordinates.d)
        grads = self._grads
        chunk = self._chunk_size or n
        for begin in range(0, n, chunk):
            rows = slice(begin, min(begin + chunk, n))
            with torch.enable_grad():
                done = self.mode == "vmap" and self._batched(keep.rows(rows), batches[rows], losses[rows], grads[rows])
            if not done:
                for i in range(rows.start, rows.stop):
                    with torch.enable_grad():
                        losses[i] = self._single(i, keep.rows(slice(i, i + 1)), batches[i], grads[i])
        return losses, grads

    def _functional(self, tensors: Sequence[Tensor], *arguments: Any) -> Any:
        parameters = {**self._fixed, **dict(zip(self._names, tensors, strict=True))}
        return functional_call(self._loss, parameters, arguments)

    def _single(self, index: int, keep: Polarized, batch: Any, grad: Tensor) -> Tensor:
        """One particle: writes ∂L/∂W into ``grad`` (d,), returns the loss."""
        if self._weights is None:
            self._weights = torch.empty_like(self._theta)[None]
        (flat,) = keep.weights(self._theta, out=self._weights, backend=self._backend)
        leaves = [
            part.to(dtype).detach().requires_grad_()
            for part, dtype in zip(self._coordinates.split(flat), self._dtypes, strict=True)
        ]
        try:
            loss, gradients = self._functional(leaves, batch, leaves)
        except Exception as error:
            if hasattr(error, "add_note"):  # Python ≥ 3.11
                error.add_note(f"sfpk_kernels: while computing the energy of particle {index}")
                if "more than 1 value per channel" in str(error):
                    error.add_note("sfpk_kernels: batch-norm cannot use a batch of one sample: drop_last=True")
            raise
        for part, gradient in zip(self._coordinates.split(grad), gradients, strict=True):
            part.copy_(gradient)
        return loss

    def _batched(self, keep: Polarized, batches: Sequence[Any], losses: Tensor, grads: Tensor) -> bool:
        """A chunk under vmap; False where it has to run one by one."""
        stacked = _stack(batches)
        if stacked is None:
            reason = "the batches differ in structure or shape"
            if not self._may_fall_back:
                raise RuntimeError(f"energy_mode='vmap' cannot run this chunk of particles: {reason}")
            if not self._said_ragged:
                logger.info("particles run one by one where %s", reason)
                self._said_ragged = True
            return False

        def loss_of(flat: Tensor, batch: Any) -> Tensor:
            parts = self._coordinates.split(flat)
            return self._functional([p.to(dtype) for p, dtype in zip(parts, self._dtypes, strict=True)], batch)

        weights = keep.weights(self._theta, backend=self._backend)
        attributes = [(module, dict(module.__dict__), dict(module._buffers)) for module in self._loss.model.modules()]
        try:
            results = vmap(grad_and_value(loss_of), randomness="different")(weights, stacked)
        except _OUT_OF_MEMORY:
            raise
        except Exception as error:
            _put_back(attributes)
            if not self._may_fall_back:
                raise RuntimeError(f"energy_mode='vmap' cannot run this model: {_first_line(error)}") from error
            logger.warning("particles run one by one from now on, vmap failed: %s", _first_line(error))
            self.mode = "sequential"
            return False
        if _holds_batched_tensors(self._loss.model):
            _put_back(attributes)
            reason = "the model keeps tensors of its forward pass as attributes or buffers"
            if not self._may_fall_back:
                raise RuntimeError(f"energy_mode='vmap' cannot run this model: {reason}")
            logger.warning("particles run one by one from now on: %s", reason)
            self.mode = "sequential"
            return False
        if not self._depends:
            # A loss that ignores the weights gives zeros here; one by one it is told from a flat one.
            self._depends = bool(results[0].any())
            if not self._depends:
                return False
        grads.copy_(results[0])
        losses.copy_(results[1])
        return True


def _put_back(attributes: Sequence[tuple[nn.Module, dict[str, Any], dict[str, Tensor | None]]]) -> None:
    """Give every module the attributes and buffers it had."""
    for module, values, buffers in attributes:
        module.__dict__.clear()
        module.__dict__.update(values)
        module._buffers.clear()
        module._buffers.update(buffers)


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


def _stack(batches: Sequence[Any]) -> Any | None:
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


def _prefers_vmap(model: nn.Module) -> bool:
    """Whether the model is built of Linear layers, norms and activations alone."""
    slower = (
        nn.modules.conv._ConvNd,
        nn.MultiheadAttention,
        nn.Embedding,
        nn.RNNBase,
        nn.RNNCellBase,
    )
    return not any(isinstance(module, slower) for module in model.modules())
