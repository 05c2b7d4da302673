"""What a run leaves: the mask, masks along the way, other votes, the curve."""

from __future__ import annotations

import logging
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import SFPKConfig
from ..coordinates.flat import Coordinates
from ..execution import Execution
from ..export.measure import Latency
from ..masks.maskset import MaskSet
from ..utils.smoothing import running_median
from .diagnostics import dying, layer_names
from .parts import masks_of
from .planning import Plan
from .polarizer import Polarizer, budget
from .records import StepRecord
from .schedule import steps_within
from .vote import Vote
from .waypoints import Waypoint

logger = logging.getLogger(__name__)

VOTES = ("mean", "soft", "hard", "best", "top_ratio")


@dataclass(frozen=True, repr=False)
class PruneResult:
    """Outcome of a run."""

    mask: MaskSet  # the final mask
    history: list[StepRecord]  # one entry per step done
    particles: Tensor  # (n, d), (1, d) once merged: final particles (of a finished run the live ones, not a copy)
    score: Tensor  # (d,) the vote behind the mask
    config: SFPKConfig
    execution: Execution
    coordinates: Coordinates
    plan: Plan  # memory, and how particles went through the model
    densities: Tensor  # (n,) soft densities of the particles
    energies: Tensor  # (n,) of the last step
    waypoints: list[Waypoint]  # masks along the way, by rising sparsity
    polarizer: Polarizer  # scores of particles, for other votes

    def __repr__(self) -> str:
        return (
            f"PruneResult({self.mask!r}, {self.model_sparsity:.4f} of the whole model, "
            f"{len(self.particles)} particles, {len(self.history)} steps, "
            f"masks on the way at {[waypoint.sparsity for waypoint in self.waypoints]}, {len(self.alarms)} alarms)"
        )

    def apply_(self, model: nn.Module) -> nn.Module:
        """Apply the mask to ``model``; see :meth:`MaskSet.apply_`."""
        return self.mask.apply_(model)

    @property
    def model_sparsity(self) -> float:
        """Fraction of all weights of the model that is removed, whether covered or not."""
        return self.mask.share_removed(self.coordinates.beside)

    @property
    def alarms(self) -> list[str]:
        """What looked wrong on the way, with its step, and layers that the masks leave next to nothing of."""
        steps = [f"step {record.step}: {words}" for record in self.history for words in record.alarms]
        return [*steps, *self.dead_layers]

    @property
    def dead_layers(self) -> list[str]:
        """Layers that lose (nearly) all their weights in the final mask or in one taken on the way.

        The particles' own masks, which the steps look at, need not show it: without retraction they are denser.
        """
        masks = {waypoint.sparsity: waypoint.mask for waypoint in self.waypoints} | {self.config.sparsity: self.mask}
        names = [name for name in layer_names(self.coordinates) if name is not None]
        found = []
        for sparsity, mask in masks.items():
            densities = mask.layer_densities()
            words = dying({name: densities[name] for name in names}, 1.0 - sparsity).values()
            found += [f"mask at {sparsity:g}: {text}" for text in words]
        return found

    def warn_of_dead_layers(self) -> None:
        """Log :attr:`dead_layers`."""
        for words in self.dead_layers:
            logger.warning("%s", words)

    def mask_at(self, sparsity: float) -> MaskSet:
        """The mask of round((1 - sparsity)·d) weights for a sparsity the run has passed.

        The count is exact (with ``selection="threshold"``, preset ``"authors"``, what their threshold keeps).

        For one of ``waypoints`` that taken on the way. For any other, where the run kept scores
        (``keep_scores=True``), the exact selection from the score nearest in sparsity, the final one included.

        Raises:
            TypeError: no number.
            ValueError: a sparsity the run has not passed, or one between waypoints without kept scores.
        """
        _check_number("sparsity", sparsity)
        if math.isclose(sparsity, self.config.sparsity, rel_tol=1e-9):
            return self.mask
        for waypoint in self.waypoints:
            if math.isclose(sparsity, waypoint.sparsity, rel_tol=1e-9):
                return waypoint.mask
        first, last = 1.0 - self.history[0].start_density, 1.0 - self.history[-1].scheduled_density
        if self.config.early_stop:
            last = max(last, 1.0 - float(self.densities.mean()))
        last = min(last, self.config.sparsity)
        if not first < sparsity <= last:
            raise ValueError(f"sparsity: wanted one that the run has passed, {first:g} to {last:g}, got {sparsity!r}")
        known = sorted({*(waypoint.sparsity for waypoint in self.waypoints), self.config.sparsity})
        scores = [(w.sparsity, w.score) for w in self.waypoints if w.score is not None]
        if not scores:
            raise ValueError(
                f"sparsity: wanted one of {', '.join(f'{value:g}' for value in known)}, got {sparsity!r}; for others "
                "run with waypoints=[…], keep_scores=True"
            )
        scores.append((self.config.sparsity, self.score))
        _, score = min(scores, key=lambda pair: abs(pair[0] - sparsity))
        return self._select(score, sparsity)

    def vote(self, rule: str = "soft", *, ratio: float = 0.5, sparsity: float | None = None) -> MaskSet:
        """Another vote of the same particles.

        Args:
            rule: ``"mean"``: the score of the mean particle. ``"soft"``: the mean of the particles' scores.
                ``"hard"``: in how many of the binary particles a weight is kept, equal counts ranked by the soft
                score. ``"best"``: the particle of lowest energy alone. ``"top_ratio"``: soft, the ``ratio`` of lowest
                energy.
            ratio: in (0, 1], for ``"top_ratio"``.
            sparsity: of the mask; ``None`` for the run's.

        Raises:
            TypeError: a ratio or sparsity that is no number.
            ValueError: an unknown rule, or a ratio or sparsity out of range.
        """
        if rule not in VOTES:
            raise ValueError(f"rule: wanted one of {', '.join(VOTES)}, got {rule!r}")
        _check_number("ratio", ratio)
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio: wanted a fraction in (0, 1], got {ratio!r}")
        sparsity = self.config.sparsity if sparsity is None else sparsity
        _check_number("sparsity", sparsity)
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity: wanted a fraction in (0, 1), got {sparsity!r}")
        kind = self.config.final_score or self.config.polarizer
        with torch.no_grad():
            if rule == "mean":
                return self._select(self.polarizer.score(self.particles.float().mean(dim=0), kind), sparsity)
            share = {"best": 1 / len(self.particles), "top_ratio": ratio}.get(rule, 1.0)
            rule = "hard" if rule == "hard" else "soft"
            n = len(self.particles)
            densities = [1.0 - sparsity] * n if rule == "hard" else self.densities.tolist()
            vote = Vote(self.polarizer, kind, rule, share, 0.0, sparsity)
            return self._select(vote.update(self.particles, densities, self.energies.tolist()), sparsity)

    def keep_probability(self) -> dict[str, Tensor]:
        """The share of the binary particles (at the run's sparsity) that keep a weight: fp32, by prunable tensor."""
        tensors = self.coordinates.tensors
        return {t.name: part for t, part in zip(tensors, self.coordinates.split(self._shares()), strict=True)}

    def agreement(self) -> dict[str, Tensor]:
        """By prunable tensor: the share of the binary particles on the majority's side, from 0.5 to 1."""
        return {name: torch.maximum(share, 1 - share) for name, share in self.keep_probability().items()}

    def stable_core(self) -> MaskSet:
        """The weights that every binary particle keeps."""
        return masks_of(self._shares() > 1 - 0.5 / len(self.particles), self.coordinates)

    def curve(self) -> list[dict[str, float]]:
        """Loss over sparsity: one point per step, each particle on its own batch.

        ``sparsity`` is the soft sparsity at the step's start, so the last point lies before the end of the schedule;
        without retraction (presets ``"paper"`` and ``"authors"``) the particles also lag behind it.
        """
        return [
            {
                "sparsity": 1.0 - record.start_density,
                "energy": record.energy,
                "std": record.energy_std,
                "lowest": record.energy_min,
                "highest": max((e for e in record.energies if math.isfinite(e)), default=math.nan),
            }
            for record in self.history
        ]

    def knee(self) -> float | None:
        """The sparsity at which the loss turns up: farthest below the chord of the curve.

        None for too few points, for a rise within what batches differ by (the standard deviation of the particles'
        energies; for one particle that of its energies around the smoothed curve, twice, as one batch says less), and
        for a curve that lies above its chord or less than half of that noise below it: that one flattens. None, too,
        where the run settles at waypoints (``config.settle``): its loss rises and falls between them.

        The curve is smoothed by a running median of five steps first; batches differ.
        """
        curve = self.curve()
        if self.config.hold < 1:  # behind these all points lie at one sparsity
            curve = curve[: steps_within(self.config.n_steps, self.config.hold) + 1]
        points = [point for point in curve if math.isfinite(point["energy"])]
        if len(points) < 8 or self.config.settle:
            return None
        x = torch.tensor([point["sparsity"] for point in points], dtype=torch.float64, device="cpu")
        energies = torch.tensor([point["energy"] for point in points], dtype=torch.float64, device="cpu")
        y = torch.tensor(running_median(energies.tolist()), dtype=torch.float64, device="cpu")
        rise = y[-1] - y[0]
        noise = sum(point["std"] for point in points) / len(points)
        if (
            noise == 0 or len(self.history[-1].energies) == 1
        ):  # one particle; √(π/2) makes a mean distance a standard deviation
            noise = 2 * math.sqrt(math.pi / 2) * float((energies - y).abs().mean())
            rise = torch.minimum(rise, energies[-5:].median() - energies[:5].median())
        if float(rise) <= noise or float(x[-1] - x[0]) <= 0:
            return None
        below = (x - x[0]) / (x[-1] - x[0]) - (y - y[0]) / (y[-1] - y[0])
        depth = float(below.max() * (y[-1] - y[0]))
        return float(x[int(below.argmax())]) if depth > noise / 2 else None

    def report(
        self,
        folder: str | os.PathLike[str],
        baselines: Sequence[Mapping[str, Any]] = (),
        dense_accuracy: float | None = None,
        *,
        dense_eval: float | Mapping[str, float] | None = None,
        pruned_eval: float | Mapping[str, float] | None = None,
        latency: Sequence[Latency] = (),
    ) -> Path:
        """Write report.json, report.html and pictures; see :func:`sfpk_kernels.report.write`."""
        from ..report import write  # here, not above: a report reads a result, and a result does without reports

        evaluations = {"dense_eval": dense_eval, "pruned_eval": pruned_eval}
        return write(self, folder, baselines, dense_accuracy, **evaluations, latency=latency)

    def summary(self) -> Mapping[str, Any]:
        """The outcome in a few plain numbers."""
        return {
            "sparsity": self.mask.sparsity,
            "model_sparsity": self.model_sparsity,
            "kept": self.mask.kept,
            "prunable": self.mask.prunable,
            "fingerprint": self.mask.fingerprint(),
            "steps": len(self.history),
            "seconds": sum(record.seconds for record in self.history),
            "energy": self.history[-1].energy if self.history else None,
            "alarms": self.alarms,
        }

    def _shares(self) -> Tensor:  # (d,) fp32
        kind = self.config.final_score or self.config.polarizer
        densities = [self.config.target_density] * len(self.particles)
        with torch.no_grad():
            share = self.polarizer.keeps(self.particles, densities, kind, range(len(self.particles)))
            return share.div_(len(self.particles))

    def _select(self, score: Tensor, sparsity: float) -> MaskSet:
        budget(sparsity, self.coordinates.d)
        mask = self.polarizer.final(score.to(self.particles.device), sparsity)
        return masks_of(mask, self.coordinates)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: wanted a number, got {value!r}")
