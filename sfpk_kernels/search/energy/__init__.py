"""Energies: the loss and its weight gradient for every particle, each on its own mini-batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..._dispatch import where_present
from ...coordinates.flat import Coordinates
from ...execution import Execution
from ...modeling.batches import default_loss
from ...modeling.state import seeded
from ..polarizer import Polarized
from ._problem import AUTOCAST, CannotRunError, LossFn, Problem
from ._scale import LossScale
from .batched import Batched, FlatError, RaggedError
from .choice import UNDECIDED, Choice, choose
from .graphed import Graphed
from .sequential import OneByOne

__all__ = ["AUTOCAST", "Choice", "LossFn", "ParticleEnergy", "energy_of"]

logger = logging.getLogger(__name__)


class ParticleEnergy:
    """Loss L_i and gradient ∂L_i/∂W_i at the masked weights W_i = P_i ⊙ θ, for all particles.

    The mask gradient (straight through the polarizer) is θ ⊙ ∂L_i/∂W_i; ``transition_(weights=θ)`` multiplies
    it in. The model must be under :func:`~sfpk_kernels.modeling.state.guarded`; its own parameters are never written:
    stand-ins take their place while particles run, and they are back afterwards, also after errors.

    Args:
        model: the dense model.
        loss_fn: ``loss_fn(model, batch) -> scalar``.
        coordinates: of ``model``.
        theta: the dense weights (d,), on the device of the particles.
        mode: ``"vmap"``: a chunk of particles in one batched pass; ``"sequential"``: one by one; ``"cudagraph"``: one
            by one, the pass captured once and replayed; ``"auto"``: by the rule of :func:`.choice.by_rule`;
            ``"timed"``: the fastest in a short trial. The last two go one by one, with a logged reason, where vmap
            fails.
        chunk_size: particles per vmap pass, ``None`` for all.
        backend: of the masked-weights op.
        precision: ``"bf16"`` or ``"fp16"``: forward and backward under autocast; losses, gradients and weights stay
            as they are. fp16 losses are scaled, the factor found on the way.
        microbatch: samples per forward/backward; gradients of a batch are then added up.
        compiled: run the loss through ``torch.compile``.
    """

    one_by_one_runner: type[OneByOne] = OneByOne

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
        precision: str | None = None,
        microbatch: int | None = None,
        compiled: bool = False,
    ):
        self.problem = Problem(model, loss_fn, coordinates, theta, backend, precision, microbatch, compiled)
        self.scale = LossScale(precision == "fp16")
        self.choice: Choice | None = None if mode in UNDECIDED else Choice(mode, "as asked for")
        self._mode = mode
        self._chunk_size = chunk_size
        self._said_ragged = False
        self._inside: OneByOne | None = None  # whose stand-ins the model has
        self._fell_back = False  # whether it is not that of :attr:`_inside`
        # Kept from step to step, because fresh pages would cost more than filling them.
        self._grads: Tensor | None = None
        self._runners: dict[str, Any] = {}

    @property
    def mode(self) -> str:
        """The way in use; ``"auto"`` or ``"timed"`` while it is not chosen."""
        return self._mode if self.choice is None else self.choice.mode

    def choose(
        self,
        batch: Any,
        n: int,
        together: bool = True,
        trial_bytes: int | None = None,
    ) -> Choice:
        """Measure the ways that come into question on one batch; decides ``"auto"`` and ``"timed"``.

        Args:
            batch: of one particle.
            n: particles.
            together: whether all of a chunk may go through the model at once.
            trial_bytes: bytes that the trial of a batched pass may take with ``"timed"``.
        """
        with seeded(0, self.problem.device):
            self.choice = choose(self.problem, self._mode, batch, min(self._chunk_size or n, n), together, trial_bytes)
        return self.choice

    def __call__(
        self,
        keep: Polarized | Tensor,  # of n particles; (n, d) bool, or float factors
        batches: Sequence[Any],  # n of them
    ) -> tuple[Tensor, Tensor]:  # losses (n,) fp64, ∂L/∂W (n, d)
        """Losses and weight gradients, the latter in a buffer that the next call writes again.

        Raises:
            TypeError, ValueError: a loss that is no scalar.
            RuntimeError: a forced mode that cannot run this model; a loss that does not depend on the prunable
                weights. Other errors of the model or ``loss_fn`` pass through with a note that names the particle
                (with ``mode="vmap"`` as the cause of the RuntimeError).
        """
        keep = Polarized(keep) if isinstance(keep, Tensor) else keep
        n = len(keep)
        if self.choice is None:
            self.choose(batches[0], n)
        theta = self.problem.theta
        losses = torch.empty(n, dtype=torch.float64, device=theta.device)
        grads = self.buffer(n)
        begin = 0
        if self.mode == "vmap":
            chunk = self._chunk_size or n
            while begin < n and self.mode == "vmap":
                rows = slice(begin, min(begin + chunk, n))
                if not self._batched(keep.rows(rows), batches[rows], losses[rows], grads[rows]):
                    with self.one_by_one():
                        for i in range(rows.start, rows.stop):
                            losses[i] = self.single(i, keep.rows(slice(i, i + 1)), batches[i], grads[i])
                begin = rows.stop
        if begin < n:
            with self.one_by_one():
                for i in range(begin, n):
                    losses[i] = self.single(i, keep.rows(slice(i, i + 1)), batches[i], grads[i])
        return losses, grads

    def buffer(self, rows: int) -> Tensor:  # (rows, d)
        """Where gradients are written; the same memory from call to call."""
        if self._grads is None or self._grads.shape[0] != rows:
            theta = self.problem.theta
            pinned = theta.device != self.problem.device and self.problem.device.type == "cuda"
            self._grads = torch.empty(rows, theta.numel(), dtype=theta.dtype, device=theta.device, pin_memory=pinned)
        return self._grads

    def drop_gradients(self) -> None:
        """Give back where gradients were written; the next call makes it anew."""
        self._grads = None

    def release(self) -> None:
        """Give back the buffers; the next call makes new ones."""
        self.drop_gradients()
        self._runners.clear()

    def state(self) -> tuple[Choice | None, tuple[float, int]]:
        """What computing energies changes for later passes: the way it is done, and the scale of fp16 losses."""
        return self.choice, self.scale.state_dict()

    def put_back(self, state: tuple[Choice | None, tuple[float, int]]) -> None:
        """Go on from what :meth:`state` gave."""
        self.choice, scale = state
        self.scale.take_over(scale)

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """The model ready for :meth:`single`."""
        try:
            runner = self._runner(Graphed if self.mode == "cudagraph" else self.one_by_one_runner)
        except CannotRunError as error:
            raise RuntimeError(f"energy_mode={self.mode!r} cannot run this model: {error}") from error
        with runner.ready():
            self._inside, self._fell_back = runner, False
            try:
                yield
            finally:
                self._inside = None

    def single(
        self,
        index: int,  # of the particle, for messages
        keep: Polarized,  # it alone
        batch: Any,
        grad: Tensor,  # (d,) written
    ) -> Tensor:  # 0-d
        """One particle's loss and weight gradient; only inside :meth:`one_by_one`."""
        assert self._inside is not None
        try:
            with self._inside.ready() if self._fell_back else nullcontext():
                return self._inside.run(keep, batch, grad)
        except CannotRunError as error:
            if self._mode not in UNDECIDED:
                raise RuntimeError(f"energy_mode={self.mode!r} cannot run this model: {error}") from error
            why = str(error)
        except BaseException as error:
            if hasattr(error, "add_note"):  # Python ≥ 3.11
                error.add_note(f"sfpk_kernels: while computing the energy of particle {index}")
                if "more than 1 value per channel" in str(error):
                    error.add_note("sfpk_kernels: batch-norm cannot use a batch of one sample: drop_last=True")
            raise
        # Here, where the error is gone: it holds on to the graphs and their memory.
        self._fall_back(why)
        return self.single(index, keep, batch, grad)

    def _fall_back(self, why: str) -> None:
        """From now on without CUDA graphs; in this step with stand-ins for those that the model has now."""
        logger.warning("particles run one by one without CUDA graphs from now on: %s", why)
        self.choice = Choice("sequential", why)
        self._runners.clear()
        self._inside, self._fell_back = OneByOne(self.problem, self.scale), True

    def _runner(self, kind: type) -> Any:
        if kind.__name__ not in self._runners:
            self._runners[kind.__name__] = kind(self.problem, self.scale)
        return self._runners[kind.__name__]

    def _batched(self, keep: Polarized, batches: Sequence[Any], losses: Tensor, grads: Tensor) -> bool:
        """A chunk under vmap; False where it has to run one by one."""
        forced = self._mode == "vmap"
        try:
            self._runner(Batched).run(keep, batches, losses, grads)
        except RaggedError as error:
            if forced and isinstance(error, FlatError):
                return True  # a run looks at it in its first step
            if forced:
                raise RuntimeError(f"energy_mode='vmap' cannot run this chunk of particles: {error}") from error
            if not self._said_ragged:
                logger.info("particles run one by one where %s", error)
                self._said_ragged = True
            return False
        except CannotRunError as error:
            if forced:
                raise RuntimeError(f"energy_mode='vmap' cannot run this model: {error}") from error
            logger.warning("particles run one by one from now on: %s", error)
            self.choice = Choice("sequential", str(error))
            return False
        return True


def energy_of(
    model: nn.Module, loss_fn: LossFn | None, coordinates: Coordinates, theta: Tensor, execution: Execution
) -> ParticleEnergy:
    """The energies of a run."""
    return ParticleEnergy(
        model,
        loss_fn or default_loss,
        coordinates,
        theta,
        mode=execution.energy_mode,
        chunk_size=execution.chunk_size,
        backend=where_present(execution.backend),
        precision=execution.dtype,
        microbatch=execution.microbatch,
        compiled=execution.compile,
    )
