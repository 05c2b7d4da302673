"""Masks along the way: one trajectory passes every sparsity below its last."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import SFPKConfig
from ..coordinates.flat import Coordinates
from ..masks.maskset import MaskSet
from ..ops import pack_mask, unpack_mask
from . import state_checks as check
from .parts import flat_of, masks_of
from .schedule import steps_within


@dataclass(frozen=True)
class Waypoint:
    """The mask taken when the schedule passed a sparsity."""

    sparsity: float
    step: int  # after which it was taken
    mask: MaskSet  # exactly round((1 - sparsity)·d) weights, one bit each
    score: Tensor | None  # (d,) the vote behind it, on the CPU, where kept


class Waypoints:
    """The masks a run takes on its way.

    Args:
        wanted: sparsities, in any order.
        config: of the run.
        first: soft density at its start.
        keep_scores: keep the scores behind the masks.

    Raises:
        TypeError, ValueError: as :func:`check_waypoints`.

    Attributes:
        taken: by rising sparsity.
    """

    def __init__(self, wanted: Iterable[float], config: SFPKConfig, first: float, keep_scores: bool):
        self._wanted = check_waypoints(wanted, config, 1.0 - first, keep_scores)
        self._last, self._steps = config.sparsity, config.n_steps
        self._keeps = keep_scores
        self._due = list(self._wanted)
        self.taken: list[Waypoint] = []

    @property
    def stops(self) -> list[float]:
        """Densities of those before the end, falling."""
        return [1.0 - sparsity for sparsity in self._wanted if sparsity < self._last]

    def passed(
        self,
        number: int,  # of the step
        density: float,  # of the schedule after it
        score: Callable[[], Tensor],
        mask: Callable[[Tensor, float], MaskSet],  # of a score and a sparsity
    ) -> list[Waypoint]:
        """The masks of the sparsities that the schedule passes in a step; :meth:`take` them once it is done."""
        found = []
        for sparsity in self._due:
            if not self._is_due(sparsity, number, density):
                break
            current = score()
            kept = current.to("cpu", copy=True) if self._keeps else None
            found.append(Waypoint(sparsity, number, mask(current, sparsity), kept))
        return found

    def take(self, passed: list[Waypoint]) -> None:
        """They belong to the run."""
        self.taken, self._due = [*self.taken, *passed], self._due[len(passed) :]

    def state_dict(self, coordinates: Coordinates) -> list[dict[str, Any]]:
        """The masks taken, one bit a coordinate."""
        return [
            {"sparsity": w.sparsity, "step": w.step, "bits": pack_mask(flat_of(w.mask, coordinates)), "score": w.score}
            for w in self.taken
        ]

    def checked(
        self,
        name: str,
        state: Any,
        coordinates: Coordinates,
        schedule: Sequence[float],
        step: int,  # done
        dtypes: Sequence[torch.dtype],  # that scores may have
    ) -> list[Waypoint]:
        """What :meth:`state_dict` gave.

        Raises:
            TypeError, ValueError: something else, or one of those wanted that the saved run passed without taking it.
        """
        found: list[Waypoint] = []
        for i, item in enumerate(check.sequence(name, state)):
            where = f"{name}[{i}]"
            check.entries(where, item, ("sparsity", "step", "bits", "score"))
            sparsity = check.real(f"{where}.sparsity", item["sparsity"], 0.0, 1.0)
            if found and sparsity <= found[-1].sparsity:
                raise ValueError(f"{where}.sparsity: wanted more than {found[-1].sparsity:g}, got {sparsity:g}")
            at = check.integer(f"{where}.step", item["step"], 1, step)
            if not self._is_due(sparsity, at, schedule[at]) or self._is_due(sparsity, at - 1, schedule[at - 1]):
                raise ValueError(f"{where}.step: wanted that in which the schedule passes {sparsity:g}, got {at}")
            d = coordinates.d
            bits = check.tensor(f"{where}.bits", item["bits"], (-(-d // 8),), torch.uint8).cpu()
            mask = masks_of(unpack_mask(bits, d), coordinates)
            score = item["score"]
            if score is not None:
                score = check.tensor(f"{where}.score", score, (d,), *dtypes).to("cpu", copy=True)
            found.append(Waypoint(sparsity, at, mask, score))
        passed = [sparsity for sparsity in self._without(found) if self._is_due(sparsity, step, schedule[step])]
        if passed:
            raise ValueError(
                "waypoints: wanted sparsities that the saved run took or has yet to pass (now "
                f"{1 - schedule[step]:.4g}), got {passed[0]:g}, which is not among its waypoints"
            )
        return found

    def take_over(self, taken: list[Waypoint]) -> None:
        """Go on from what was checked."""
        self.taken, self._due = taken, self._without(taken)

    def _is_due(self, sparsity: float, number: int, density: float) -> bool:
        """Whether the schedule, at this density after so many steps, has passed it: the last one where the run ends."""
        return reached(sparsity, density) and (sparsity < self._last or number == self._steps)

    def _without(self, taken: list[Waypoint]) -> list[float]:
        sparsities = {waypoint.sparsity for waypoint in taken}
        return [sparsity for sparsity in self._wanted if sparsity not in sparsities]


def reached(sparsity: float, density: float) -> bool:
    """Whether a schedule that stands at this density has passed that sparsity."""
    return density <= 1.0 - sparsity + 1e-12


def check_waypoints(
    wanted: Iterable[float],
    config: SFPKConfig,
    first: float = 0.0,  # sparsity at the start of the run
    keep_scores: bool = False,
) -> list[float]:
    """Those of ``waypoints``, in order, each once.

    Raises:
        TypeError: no iterable of numbers.
        ValueError: one that the run does not pass, or what does not go together with ``config`` and ``keep_scores``.
    """
    if isinstance(wanted, str) or not isinstance(wanted, Iterable):
        raise TypeError(f"waypoints: wanted a list of sparsities, got {wanted!r}")
    values, last = list(wanted), config.sparsity
    for value in values:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"waypoints: wanted sparsities, got {value!r}")
        if not first < value <= last:
            raise ValueError(
                f"waypoints: wanted sparsities above {first:g} and up to the run's {last:g}, got {value!r}"
            )
    found = sorted({float(value) for value in values})
    early = [value for value in found if value < last]
    if keep_scores and not found:
        raise ValueError("keep_scores: wanted waypoints=[…] beside it, at which scores are kept, got none")
    if config.vote == "masked" and (early or keep_scores):
        what = f"waypoints: wanted none below {last:g}, got {early[0]:g}" if early else "keep_scores: wanted False"
        raise ValueError(f"{what}: the scores of vote='masked' are of the final sparsity alone")
    if config.settle and not found:
        raise ValueError("settle: wanted waypoints=[…] to settle at, got none")
    steps = steps_within(config.n_steps, config.hold)
    if config.settle and len(early) + 1 > steps:
        before = "" if steps == config.n_steps else f" before the hold, of {config.n_steps}"
        raise ValueError(
            f"n_steps: wanted ≥ {len(early) + 1} to settle at {len(early)} waypoints and the end, got {steps}{before}"
        )
    return found
