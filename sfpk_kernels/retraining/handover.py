"""Particles handed from shot to shot: merged where it is time, and on the density that the next one starts from."""

from __future__ import annotations

from torch import Tensor

from ..config import SFPKConfig
from ..search.merging import mean_square, merge_into
from .shots import Shot


def start_of(
    given: Tensor | None,  # (n, d) of the shot before
    shot: Shot,
    config: SFPKConfig,  # of this shot
) -> Tensor | None:
    """Where the particles of a shot begin: merged, where those of the one before have yet to be."""
    if given is None or len(given) == config.n_particles:
        return given
    one = given.new_empty(1, given.shape[1])
    merge_into(one, None, given, None, mean_square(config, shot.start_density))
    return one


def on_schedule(
    particles: Tensor,  # (n, d), changed in place
    density: float,
    config: SFPKConfig,
) -> Tensor:
    """Particles that were not retracted have drifted: put on the density that the next shot starts from."""
    if config.retract:
        return particles
    share = particles.double().square().mean(dim=1)
    return particles.mul_((mean_square(config, density) / share).sqrt().unsqueeze(1).to(particles.dtype))
