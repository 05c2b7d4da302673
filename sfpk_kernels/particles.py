"""ParticleSystem: the (n, d) state, its soft densities, and the move of one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .config import SFPKConfig
from .ops import TransitionStats, transition_
from .schedule import density_schedule

_PART = 1 << 18  # elements


class ParticleSystem:
    """n mask particles that start at "all weights kept" and follow the density schedule.

    Args:
        d: number of coordinates.
        config: schedule, transition and particle count.
        theta: dense weights (d,); gives dtype and device.
        saliency: a_e (d,) for the weighted kernel, else None.
        start: (n, d) particles to go on from, copied; None for all at 1. The schedule begins at their mean density.

    Raises:
        TypeError: ``start`` is no tensor.
        ValueError: ``start`` of another shape, not finite, or of a mean density not above the target and at most 1.

    Attributes:
        masks: (n, d) in ``config.particle_dtype``, the particles. May be written between steps; the
            statistics are then measured anew.
        step: steps done, 0 … K.
        known_densities: ρ(m_i) as the host knows them, or None.
        moves: of single particles, counted; after an interruption (KeyboardInterrupt) those begun count.
        schedule: K + 1 soft densities, ρ_0 = 1 (or that of ``start``) … ρ_K = 1 - sparsity.
    """

    def __init__(self, d: int, config: SFPKConfig, theta: Tensor, saliency: Tensor | None, start: Tensor | None = None):
        dtype = theta.dtype if config.particle_dtype == "float32" else getattr(torch, config.particle_dtype)
        pinned = config.offload == "cpu" and theta.device.type == "cpu" and torch.cuda.is_available()
        self.masks = torch.ones(config.n_particles, d, dtype=dtype, device=theta.device, pin_memory=pinned)
        # What rounding took from bf16 particles.
        self._residual = torch.zeros_like(self.masks) if dtype == torch.bfloat16 else None
        self.step = self.moves = 0
        self._config = config
        self._theta = theta
        self._saliency = saliency
        self._stats: TransitionStats | None = None
        self._version = self.masks._version
        self._known: tuple[int, list[float]] | None = None  # the version of masks they are of
        first = 1.0 if start is None else self._begin(start)
        self.schedule = density_schedule(config.schedule, config.target_density, config.n_steps, first)
        self._pull_after = config.consensus_start * config.n_steps  # steps

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
            schedule = density_schedule(config.schedule, config.target_density, config.n_steps, self.schedule[0], stops)
            self._pull_after = config.consensus_start * schedule.index(stops[0])
            self.schedule = schedule

    @property
    def done(self) -> bool:
        """Whether the schedule has been passed."""
        return self.step >= self._config.n_steps

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
        # In parts: each is converted to fp64 as a whole. Added up at once: results kept would leave holes in the heap
        # that the next part does not fit in.
        total = torch.zeros(len(self.masks), dtype=torch.float64, device=self.masks.device)
        for part in self.masks.split(max(1, _PART // len(self.masks)), dim=1):
            total += torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).square()
        share = total / self.masks.shape[1]
        return share.sqrt() if self._config.density == "l2" else share

    def move_(
        self,
        weight_grads: Tensor,  # (n, d) ∂L/∂W; (1, d) with row
        row: int | None = None,
    ) -> TransitionStats:
        """Steps 3 to 7 of the method: repulsion, transition, retraction, consensus.

        With ``row`` that particle alone moves. Never waits for the device: where a gradient is not finite, as
        ``config.nonfinite`` says, its particle or all of them stay, and its cosine is NaN. The step is done with
        :meth:`end_step`.
        """
        config = self._config
        target = self.schedule[self.step + 1]
        pulls = self.step + 1 > self._pull_after
        moving = len(self.masks) if row is None else 1
        self.moves += moving  # before the call: an interruption may come right after it
        try:
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
                nonfinite="skip" if config.nonfinite == "skip_particle" else "hold",
                backend=None if config.backend is None else f"{config.backend}?",
            )
        except Exception:
            self.moves -= moving  # an error moves nothing
            raise
        self._stats, self._version = stats, self.masks._version
        return stats

    def end_step(self, densities: list[float]) -> None:
        """All have moved, to these densities."""
        self.step += 1
        self._known = (self.masks._version, densities)

    def state_dict(self, copy: bool = True) -> dict[str, Any]:
        """Particles, what rounding took from them, statistics and step: all that decides the next step."""
        stats, residual = self.stats, self._residual
        return {
            "masks": self.masks.clone() if copy else self.masks,
            "residual": residual.clone() if copy and residual is not None else residual,
            "stats": None if stats is None else stats._asdict(),
            "step": self.step,
            "schedule": list(self.schedule),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: particles of another shape or dtype, or a step outside the schedule.
        """
        masks, step, schedule = state["masks"], state["step"], state["schedule"]
        if tuple(masks.shape) != tuple(self.masks.shape):
            raise ValueError(f"masks: wanted shape {tuple(self.masks.shape)}, got {tuple(masks.shape)}")
        if masks.dtype != self.masks.dtype:
            raise ValueError(f"masks: wanted {self.masks.dtype}, got {masks.dtype}")
        if not 0 <= step <= self._config.n_steps:
            raise ValueError(f"step: wanted 0 … {self._config.n_steps}, got {step}")
        if len(schedule) != self._config.n_steps + 1:
            raise ValueError(f"schedule: wanted {self._config.n_steps + 1} densities, got {len(schedule)}")
        device = self.masks.device
        stats = state["stats"] and TransitionStats(**{k: v.to(device) for k, v in state["stats"].items()})
        self.masks.copy_(masks)
        if self._residual is not None:
            self._residual.copy_(state["residual"])
        self.step, self.schedule, self._known = step, list(schedule), None
        self._stats, self._version = stats, self.masks._version
