"""The stages of the transition that read particles, by the kernels of the fused one (triton_kernels.py).

The algebra between them, plan and stats, is that of reference_stages.py: a few small launches, and nothing waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference_stages
from .spec import Columns, Shard, Step, TransitionSpec
from .triton_backend import Launches, sums_gram_matrices


def measure(masks: Tensor, columns: Columns, residual: Tensor | None, spec: TransitionSpec) -> Tensor:
    """As :func:`.reference_stages.measure`."""
    if masks.shape[1] == 0:
        return _zeros(masks, 4 + len(masks))
    launches = Launches(Step(masks, masks, spec, columns, residual))  # in place of gradients, which are not read
    launches.reduce("measure")
    return _sums_of_particles(launches)


def sample(step: Step, shard: Shard) -> Tensor:
    """As :func:`.reference_stages.sample`, of a part of the columns."""
    if step.masks.shape[1] == 0:
        return _zeros(step.masks, 2)
    launches = Launches(step, shard)
    launches.prepare()
    return launches.rows(6, 8).clone()


def sums(step: Step, shard: Shard, sample: Tensor) -> Tensor:
    """As :func:`.reference_stages.sums`, which also runs where the kernels have no registers for the products."""
    n, sized = len(step.masks), step.columns.sizes is not None
    products = step.spec.retracts_after_pull(n)
    if step.masks.shape[1] == 0:
        return _zeros(step.masks, 8 + 6 * n * products)
    if products and not sums_gram_matrices(n, sized, step.spec.weighted):
        return reference_stages.sums(step, shard, sample)
    launches = Launches(step, shard)
    launches.prepare()
    launches.guess[:n].copy_(reference_stages.lean_of(sample))
    launches.reduce()
    rows = launches.rows(0, 8)
    if not products:
        return rows.clone()
    count = 6 if sized else 3
    return torch.cat([rows, launches.matrices(8, count).reshape(count * n, n), _zeros(step.masks, (6 - count) * n)])


def apply_(step: Step, shard: Shard, coefficients: Tensor) -> Tensor:
    """As :func:`.reference_stages.apply_`."""
    n = len(step.masks)
    if step.masks.shape[1] == 0:
        return _zeros(step.masks, 4 + n)
    launches = Launches(step, shard)
    launches.prepare()
    slope = coefficients[:1]
    high = slope.float()
    launches.moves.zero_()  # the rows of padding, too
    launches.moves[:, :n].copy_(torch.cat([high.double(), slope - high.double(), coefficients[1:]]))
    launches.reduce("update")
    return _sums_of_particles(launches)


def _sums_of_particles(launches: Launches) -> Tensor:  # (4 + n, n)
    return torch.cat([launches.rows(0, 4), launches.matrices(4, 1)[0]])


def _zeros(masks: Tensor, rows: int) -> Tensor:
    return torch.zeros((rows, len(masks)), dtype=torch.float64, device=masks.device)
