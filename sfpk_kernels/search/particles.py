"""ParticleSystem: the (n, d) state, its soft densities, and the move of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dispatch import where_present
from ..config import SFPKConfig
from ..execution import Execution
from ..ops import GradientStats, TransitionStats, average_gradients_, transition_
from . import averaging
from . import state_checks as check
from .merging import mean_square, merge_into, particles_after, passes
from .schedule import density_schedule

_PART = 1 << 18  # elements
_ROUNDING = 0.01  # relative: how far saved statistics may lie from those of the saved particles


class SystemState(NamedTuple):
    """What :meth:`ParticleSystem.state_dict` gave, checked."""

    masks: Tensor
    residual: Tensor | None
    average: Tensor | None
    stats: TransitionStats | None
    step: int
    schedule: list[float]


class ParticleSystem:
    """n mask particles that start at "all weights kept" and follow the density schedule; one, once they are merged.

    Args:
        d: number of coordinates.
        config: schedule, transition and particle count.
        execution: where particles are kept, and which backend moves them.
        theta: dense weights (d,); gives dtype and device.
        saliency: a_e (d,) for the weighted kernel, else None.
        start: (n, d) particles to go on from, copied; None for all at 1. The schedule begins at their mean density.

    Raises:
        TypeError: ``start`` is no tensor.
        ValueError: ``start`` of another shape, not finite, or of a mean density not above the target and at most 1.

    Attributes:
        masks: (n, d) in ``config.particle_dtype``, the particles; another tensor, (1, d), once they are merged. May
            be written between steps; the statistics are then measured anew.
        step: steps done, 0 … K.
        known_densities: ρ(m_i) as the host knows them, or None.
        moves: of single particles, counted when they begin: after an error or an interruption it may not have ended.
        schedule: K + 1 soft densities, ρ_0 = 1 (or that of ``start``) … ρ_K = 1 - sparsity.
    """

    def __init__(
        self,
        d: int,
        config: SFPKConfig,
        execution: Execution,
        theta: Tensor,
        saliency: Tensor | None,
        start: Tensor | None = None,
    ):
        dtype = theta.dtype if config.particle_dtype == "float32" else getattr(torch, config.particle_dtype)
        pinned = execution.offload == "cpu" and theta.device.type == "cpu" and torch.cuda.is_available()
        self._options: dict[str, Any] = {"dtype": dtype, "device": theta.device, "pin_memory": pinned}
        self.masks = torch.ones(config.n_particles, d, **self._options)
        # What rounding took from bf16 particles.
        self._residual = torch.zeros_like(self.masks) if dtype == torch.bfloat16 else None
        # Of gradients, in their dtype.
        self._average = theta.new_zeros(config.n_particles, d) if averaging.most(config) > 0 else None
        self.step = self.moves = 0
        self._config = config
        self._backend = where_present(execution.backend)
        self._theta = theta
        self._saliency = saliency
        self._stats: TransitionStats | None = None
        self._version = self.masks._version
        self._known: tuple[int, list[float]] | None = None  # the version of masks they are of
        first = 1.0 if start is None else self._begin(start)
        self.schedule = self._falling_from(first)
        self._pull_after = config.consensus_start * config.n_steps  # steps
        self._settles = False

    def _begin(self, start: Tensor) -> float:
        """Take over given particles and return their mean density."""
        if not isinstance(start, Tensor):
            raise TypeError(f"start: wanted a tensor such as result.particles, got {type(start).__name__}")
        if tuple(start.shape) != tuple(self.masks.shape):
            raise ValueError(f"start: wanted shape {tuple(self.masks.shape)}, got {tuple(start.shape)}")
        self.masks.copy_(start)
        density, target = float(self.densities.mean()), self._config.target_density
        if not target < density <= 1.0 + 1e-6:  # rounding of fp32 particles
            raise ValueError(
                f"start: wanted particles of a mean density above the target {target:g}, at most 1, got {density:g}"
            )
        return min(density, 1.0)

    def _falling_from(self, start: float, stops: Sequence[float] = ()) -> list[float]:
        """The densities that the settings say, from the first on."""
        config = self._config
        return density_schedule(config.schedule, config.target_density, config.n_steps, start, stops, hold=config.hold)

    def settle_at(
        self,
        stops: Sequence[float],  # densities, falling
    ) -> None:
        """Have the schedule slow down towards each of them, and the pull to the mean begin before the first.

        Raises:
            ValueError: fewer steps than parts.
        """
        config = self._config
        if stops:
            schedule = self._falling_from(self.schedule[0], stops)
            self._pull_after = config.consensus_start * schedule.index(stops[0])
            self.schedule, self._settles = schedule, True

    @property
    def done(self) -> bool:
        """Whether the schedule has been passed."""
        return self.step >= self._config.n_steps

    @property
    def passes_left(self) -> int:
        """Forward and backward passes, and batches, of the steps to come."""
        return passes(self._config) - passes(self._config, self.step)

    @property
    def merge_is_due(self) -> bool:
        """Whether all particles have taken their last step, and have yet to become one."""
        return len(self.masks) > particles_after(self._config, self.step)

    @property
    def stats(self) -> TransitionStats | None:
        """Statistics the last step left, or None where they no longer describe ``masks``."""
        return self._stats if self.masks._version == self._version else None

    @property
    def known_densities(self) -> list[float] | None:
        """ρ(m_i) as the last step's read left them with the host, or None where it would have to wait for them."""
        return self._known[1] if self._known is not None and self._known[0] == self.masks._version else None

    @property
    def mean_density(self) -> float:
        """Their mean; waits for the device only where they are not known."""
        known = self.known_densities
        return float(self.densities.mean()) if known is None else sum(known) / len(known)

    @property
    def densities(self) -> Tensor:
        """ρ(m_i), (n,) fp64."""
        stats = self.stats
        if stats is not None:
            return stats.densities
        share = _squares(self.masks) / self.masks.shape[1]
        return share.sqrt() if self._config.density == "l2" else share

    def average_(
        self,
        weight_grads: Tensor,  # (n, d) ∂L/∂W, averaged in place where config.averaging says so; (1, d) with row
        row: int | None = None,
        staying: float = 0.0,  # β: what stays of the averages, where there are any
    ) -> GradientStats:
        """Before :meth:`move_`: what is measured of gradients, which then become averages; waits for nothing.

        What particles move along is behind the step what the next gradients are averaged with.
        """
        average = None if self._average is None else self._average[_rows(row)]
        return average_gradients_(
            weight_grads, average, 0.0 if average is None else staying, weights=self._theta, backend=self._backend
        )

    def move_(
        self,
        weight_grads: Tensor,  # (n, d) ∂L/∂W, or what average_ made of them; (1, d) with row
        row: int | None = None,
        angle: float | None = None,
    ) -> TransitionStats:
        """Steps 3 to 7 of the method: repulsion, transition, retraction, consensus; by the radius without ``angle``.

        With ``row`` that particle alone moves. Never waits for the device: where a gradient is not finite, as
        ``config.nonfinite`` says, its particle or all of them stay, and its cosine is NaN. The step is done with
        :meth:`end_step`.
        """
        config = self._config
        target = self.schedule[self.step + 1]
        pulls, skips = self.step + 1 > self._pull_after, config.nonfinite == "skip_particle"
        moving = len(self.masks) if row is None else 1
        self.moves += moving  # before the call, which may end anywhere
        stats = transition_(
            self.masks,
            weight_grads,
            step=self.schedule[self.step] - target,
            radius=config.radius,
            repulsion=config.repulsion,
            kernel=config.kernel,
            saliency=self._saliency,
            density=config.density,
            target_density=target if config.retract else None,
            consensus=config.consensus if pulls else 0.0,
            weights=self._theta,
            state=self.stats,
            eps=config.eps,
            residual=self._residual,
            seed=config.seed,
            step_index=self.step,
            row=row,
            angle=angle,
            nonfinite="skip" if skips else "hold",
            backend=self._backend,
        )
        self._stats, self._version = stats, self.masks._version
        if self._average is not None:
            rows = _rows(row)
            averaging.keep_(self._average[rows], weight_grads, stats.cosines[rows], skips)
        return stats

    @property
    def averages(self) -> Tensor | None:
        """(n, d) of the gradients ∂L/∂W behind the last step; None where nothing is averaged."""
        return self._average

    def end_step(self, densities: list[float]) -> None:
        """All have moved, to these densities."""
        self.step += 1
        self._known = (self.masks._version, densities)

    def merge_(self) -> None:
        """The particles become their mean, one, on the schedule where particles are retracted: the memory is freed.

        Only where :attr:`merge_is_due`. Statistics are measured anew. Waits for nothing.
        """
        config = self._config
        square = mean_square(config, self.schedule[self.step]) if config.retract else None
        one, rest = self._empty(1)
        merge_into(one, rest, self.masks, self._residual, square)
        self.masks, self._residual = one, rest
        if self._average is not None:
            self._average = self._average.mean(dim=0, keepdim=True)
        self._stats, self._version, self._known = None, -1, None

    def _empty(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """So many particles and what rounding takes from them, where they lie, unwritten."""
        masks = torch.empty(rows, self.masks.shape[1], **self._options)
        return masks, None if self._residual is None else torch.empty_like(masks)

    def count_moves(self, moves: int) -> None:
        """So many have begun: fewer than was thought where a move found that it must not."""
        self.moves = moves

    def measured(self) -> tuple[TransitionStats | None, list[float] | None]:
        """Statistics and densities as they stand, for :meth:`put_back`."""
        return self.stats, self.known_densities

    def put_back(self, measured: tuple[TransitionStats | None, list[float] | None]) -> None:
        """After a step that moved nothing: the particles are still what was measured of them."""
        stats, known = measured
        self._version = self.masks._version if stats is not None else -1
        self._stats = stats
        self._known = None if known is None else (self.masks._version, known)

    def state_dict(self, copy: bool = True) -> dict[str, Any]:
        """Particles, what rounding took from them, averages, statistics and step: all that decides the next step."""
        stats, residual, average = self.stats, self._residual, self._average
        return {
            "masks": self.masks.clone() if copy else self.masks,
            "residual": residual.clone() if copy and residual is not None else residual,
            "average": average.clone() if copy and average is not None else average,
            "stats": None if stats is None else stats._asdict(),
            "step": self.step,
            "schedule": list(self.schedule),
        }

    def checked(self, state: Mapping[str, Any], prefix: str = "") -> SystemState:
        """What :meth:`state_dict` gave, every entry looked at; ``prefix`` of their names in messages.

        Raises:
            TypeError: an entry of another type or dtype.
            ValueError: an entry that is missing or unknown, or of another shape or range; particles that are not
                finite or not those the statistics were taken of; a schedule of other settings.
        """
        config, device = self._config, self.masks.device
        check.entries(prefix.removesuffix(".") or "state", state, SystemState._fields)
        step = check.integer(f"{prefix}step", state["step"], 0, config.n_steps)
        shape = particles_after(config, step), self.masks.shape[1]
        masks = check.tensor(f"{prefix}masks", state["masks"], shape, self.masks.dtype)
        residual = state["residual"]
        if self._residual is not None:
            residual = check.tensor(f"{prefix}residual", residual, tuple(masks.shape), self._residual.dtype)
            size, most = (float(torch.stack(t.aminmax()).abs().max()) for t in (residual, masks))
            if size > 2.0**-7 * max(1.0, most):
                raise ValueError(f"{prefix}residual: wanted what rounding took from particles, got up to {size:g}")
        elif residual is not None:
            raise ValueError(f"{prefix}residual: wanted None beside {masks.dtype} particles, got {check.got(residual)}")
        average = state["average"]
        if self._average is not None:
            average = check.tensor(f"{prefix}average", average, tuple(masks.shape), self._average.dtype)
        elif average is not None:
            raise ValueError(f"{prefix}average: wanted None where nothing is averaged, got {check.got(average)}")
        schedule = self._checked_schedule(f"{prefix}schedule", state["schedule"])
        stats = None
        if state["stats"] is not None:
            stats = self._checked_stats(f"{prefix}stats", state["stats"], masks)
            stats = TransitionStats(*(part.to(device, copy=True) for part in stats))
        return SystemState(masks, residual, average, stats, step, schedule)

    def _checked_schedule(self, name: str, value: Any) -> list[float]:
        config = self._config
        if isinstance(value, list | tuple) and len(value) != config.n_steps + 1:
            raise ValueError(f"{name}: wanted {config.n_steps + 1} densities, got {len(value)}")
        given = check.reals(name, value, config.n_steps + 1, 0.0, 1.0)
        if self._settles:
            wanted = self.schedule
        elif given[0] <= config.target_density:
            raise ValueError(f"{name}[0]: wanted a density above the target {config.target_density:g}, got {given[0]}")
        else:
            wanted = self._falling_from(given[0])
        for i, (a, b) in enumerate(zip(given, wanted, strict=True)):
            if not math.isclose(a, b, rel_tol=1e-9):  # powers differ from one C library to the next
                raise ValueError(f"{name}[{i}]: wanted {b}, as the settings say, got {a}")
        return given

    def _checked_stats(self, name: str, value: Any, masks: Tensor) -> TransitionStats:
        n = len(masks)
        check.entries(name, value, TransitionStats._fields)
        stats = TransitionStats(**{
            field: check.tensor(
                f"{name}.{field}", value[field], (n, n) if field == "sq_distances" else (n,), torch.float64,
                finite=field != "cosines",
            )
            for field in TransitionStats._fields
        })  # fmt: skip
        squares = _squares(masks).cpu()
        share = squares / masks.shape[1]
        expected = {"densities": share.sqrt() if self._config.density == "l2" else share, "norms": squares.sqrt()}
        for field, measured in expected.items():
            if not torch.allclose(getattr(stats, field).cpu(), measured, rtol=_ROUNDING, atol=1e-6):
                raise ValueError(f"{name}.{field}: wanted those of the particles beside them, got others")
        return stats

    def take_over(self, state: SystemState) -> None:
        """Go on from a checked state."""
        if len(state.masks) != len(self.masks):  # the one is merged, the other not
            self.masks, self._residual = self._empty(len(state.masks))
            self._average = None if self._average is None else torch.empty_like(self._average[:1])
        self.masks.copy_(state.masks)
        if self._residual is not None and state.residual is not None:
            self._residual.copy_(state.residual)
        if self._average is not None and state.average is not None:
            self._average.copy_(state.average)
        self.step, self.schedule, self._known = state.step, state.schedule, None
        self._stats, self._version = state.stats, self.masks._version

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; nothing is changed after an error.

        Raises:
            TypeError, ValueError: as :meth:`checked` says.
        """
        self.take_over(self.checked(state))


def _rows(row: int | None) -> slice:
    """Those of one particle, or of all."""
    return slice(None) if row is None else slice(row, row + 1)


def _squares(masks: Tensor) -> Tensor:  # (n,) fp64
    """‖m_i‖²."""
    # In parts: each is converted to fp64 as a whole. Added up at once: results kept would leave holes in the heap
    # that the next part does not fit in.
    total = torch.zeros(len(masks), dtype=torch.float64, device=masks.device)
    for part in masks.split(max(1, _PART // len(masks)), dim=1):
        total += torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square()
    return total
