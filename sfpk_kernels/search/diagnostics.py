"""How the particles are doing, cheaply: distances from the step's own matrices, overlaps from a sample."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import SFPKConfig
from ..coordinates.flat import Coordinates
from ..ops import TransitionStats, mask_iou, pack_mask
from . import state_checks as check
from .polarizer import Polarized
from .records import StepRecord
from .unreached import no_gradient_words

logger = logging.getLogger(__name__)

_SAMPLE = 1 << 15  # coordinates that overlaps and layer densities are estimated from
_FEW = 64  # sampled coordinates below which a tensor is counted whole
_COLLAPSED = 1e-6  # relative deviation
_DYING = 0.001  # share of a tensor's weights kept
_WINDOW = 0.1  # of the run: energies averaged for "the loss falls"


class Observed(NamedTuple):
    """The binary masks of a step, on the particles' device."""

    overlaps: Tensor  # (n, n) fp64
    layer_densities: Tensor  # fp64, one per prunable tensor


class Diagnostics:
    """Measures each step.

    Overlaps and layer densities are exact for up to 32,768 coordinates; beyond they come from an even sample of
    about as many (tensors with few coordinates in it are counted whole).

    Args:
        coordinates: of the model.
        config: of the run.
        device: where the particles are; with ``offload`` not where the model is.
    """

    def __init__(self, coordinates: Coordinates, config: SFPKConfig, device: torch.device):
        self._weighted = config.kernel == "weighted_rbf"
        # Odd: rows of weights are often powers of two long, and only some columns would be seen.
        self._stride = math.ceil(coordinates.d / _SAMPLE)
        self._stride += self._stride > 1 and self._stride % 2 == 0
        places = torch.arange(0, coordinates.d, self._stride, dtype=torch.int64, device="cpu")
        ends = torch.tensor(
            [tensor.offset + tensor.numel for tensor in coordinates.tensors], dtype=torch.int64, device="cpu"
        )
        ends = torch.searchsorted(places, ends)
        counts = ends.diff(prepend=torch.zeros(1, dtype=torch.int64, device="cpu"))
        self._ends, self._counts = ends.to(device), counts.clamp_min(1).double().to(device)
        self._whole = [
            (i, tensor.offset, tensor.offset + tensor.numel)
            for i, tensor in enumerate(coordinates.tensors)
            if counts[i] < min(_FEW, tensor.numel)
        ]
        self._places = places.to(device)

    @torch.no_grad()
    def observe(self, keep: Polarized) -> Observed:
        """Overlaps and layer densities of the binary particles; waits for nothing."""
        kept = _kept(keep, slice(None, None, self._stride), self._places)
        zero = torch.zeros(1, dtype=torch.float64, device=kept.device)
        sums = torch.cat([zero, kept.sum(dim=0).double().cumsum(0)])
        shares = sums[self._ends].diff(prepend=zero) / (len(keep) * self._counts)
        for i, begin, end in self._whole:
            places = torch.arange(begin, end, dtype=torch.int64, device=kept.device)
            shares[i] = _kept(keep, slice(begin, end), places).double().mean()
        return Observed(mask_iou(pack_mask(kept)), shares)

    @torch.no_grad()
    def deviation(self, masks: Tensor, stats: TransitionStats) -> Tensor:  # 0-d fp64
        """sqrt(mean ‖m_i - m̄‖²) / sqrt(mean ‖m_i‖²), the paper's Figure 5."""
        if self._weighted:  # its distances are weighted: from the sample
            part = masks[:, :: self._stride].double()
            spread, size = (part - part.mean(dim=0)).square().sum(dim=1).mean(), part.square().sum(dim=1).mean()
        else:
            spread, size = stats.sq_distances.mean() / 2, stats.norms.square().mean()
        return torch.where(size > 0, (spread / size).clamp_min(0).sqrt(), 0.0)


def _kept(keep: Polarized, columns: slice, places: Tensor) -> Tensor:  # (n, count) bool
    """The binary masks at some coordinates, decided by the cut: the score, and ties by index."""
    values = keep.values[:, columns]
    if keep.cut is None:
        return values != 0
    score = values.to(torch.promote_types(values.dtype, torch.float32))
    if keep.saliency is not None:
        score = (score if keep.score == "value_saliency" else score.abs()) * keep.saliency[columns]
    threshold = keep.cut.threshold.to(score.dtype)
    return (score > threshold) | ((score == threshold) & (places < keep.cut.tie_end))


def layer_names(coordinates: Coordinates) -> list[str | None]:
    """Of the prunable tensors, None for biases and norms: a layer lives without them, and zeros are often dense."""
    return [tensor.name if len(tensor.shape) > 1 else None for tensor in coordinates.tensors]


def dying(shares: Mapping[str, float], density: float) -> dict[str, str]:
    """Of tensors kept in these shares where ``density`` is kept of all: those that die, and what to say of them."""
    return {
        name: f"{name} is about to die: {100 * share:.2g} % of its weights are kept"
        if share > 0
        else f"{name} is dead: none of its weights is kept"
        for name, share in shares.items()
        if share < min(_DYING, 0.1 * density)
    }


class Alarms:
    """Says once each: particles that collapse, a layer about to die, a loss that falls when it should rise.

    Args:
        config: of the run.
        names: of the prunable tensors; None for those that may die unsaid.
    """

    def __init__(self, config: SFPKConfig, names: Sequence[str | None]):
        self._config = config
        self._names = names
        self._given: set[str] = set()  # keys of alarms given

    def check(self, history: Sequence[StepRecord], record: StepRecord, unreached: Sequence[str] = ()) -> list[str]:
        """What is new in this step, and the tensors without a gradient; also logged as warnings."""
        found = {
            **({"no gradient": no_gradient_words(unreached)} if unreached else {}),
            **self._collapse(record),
            **self._dying(record),
            **self._falling([*history, record]),
            **{f"skipped {i}": f"particle {i} had no finite loss and gradient and stood still" for i in record.skipped},
        }
        new = [words for key, words in found.items() if key not in self._given]
        self._given.update(found)
        for words in new:
            logger.warning("step %d: %s", record.step, words)
        return new

    def state_dict(self) -> list[str]:
        """Keys of the alarms given."""
        return sorted(self._given)

    def checked(self, name: str, state: Any) -> set[str]:
        """What :meth:`state_dict` gave.

        Raises:
            TypeError, ValueError: something else.
        """
        return set(check.texts(name, state))

    def take_over(self, given: set[str]) -> None:
        """Go on from what was checked."""
        self._given = given

    def _collapse(self, record: StepRecord) -> dict[str, str]:
        """Particles on top of each other explore nothing. The pull to their mean does not make them so."""
        if len(record.energies) < 2 or record.deviation >= _COLLAPSED:
            return {}
        if not any(record.cosines):  # no gradient yet that would part them
            return {}
        return {"collapse": f"the particles have collapsed: they lie within {record.deviation:.1e} of their mean"}

    def _dying(self, record: StepRecord) -> dict[str, str]:
        shares = {
            name: share for name, share in zip(self._names, record.layer_densities, strict=False) if name is not None
        }
        return {f"dying {name}": words for name, words in dying(shares, self._config.target_density).items()}

    def _falling(self, history: Sequence[StepRecord]) -> dict[str, str]:
        """A.1 of the paper: removing weights from a trained model raises its loss; batches differ by chance."""
        alone = len(history[0].energies) < 2
        window = max(5 if len(history[-1].energies) < 2 else 3, math.ceil(_WINDOW * self._config.n_steps))
        if len(history) <= (2 * window if alone else window):
            return {}
        # One particle has no spread in a step: its first steps, which remove little, stand in.
        start, noise = history[0].energy, history[0].energy_std
        if alone:
            energies = [record.energy for record in history[:window]]
            start, noise = statistics.fmean(energies), statistics.pstdev(energies)
        recent = statistics.fmean(record.energy for record in history[-window:])
        if not (start - recent > 2.0 * noise and start - recent > 0.1 * abs(start)):
            return {}
        return {
            "falling": f"the loss falls ({start:.3g} at the start, {recent:.3g} now) while weights are removed: "
            "is the model trained, and is this its loss?"
        }
