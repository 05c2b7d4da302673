"""What a step of the transition is told: its settings and the vectors over coordinates, each named here alone.

The schemas of the ops are made from these fields; backends read them by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from .. import _checks as check
from .rounding import rounding_key

KERNELS = ("rbf", "weighted_rbf")
DENSITIES = ("l2", "l2_squared")
NONFINITE = ("raise", "skip", "hold")


class TransitionStats(NamedTuple):
    """What one transition leaves behind, all fp64 on the particles' device; pass it on as ``state``."""

    densities: Tensor  # (n,) soft density ρ(m_i) after the step
    norms: Tensor  # (n,) ‖m_i‖₂ after the step
    slope_norms: Tensor  # (n,) ‖c ⊙ m_i‖₂ after the step; equals norms where sizes is None
    saliency_norms: Tensor  # (n,) Σ_e a_e m_ie² after the step; zeros for kernel "rbf"
    sq_distances: Tensor  # (n, n) q_ij = Σ_e w_e (m_ie - m_je)² after the step
    cosines: Tensor  # (n,) cosine between the transition's move and the descent direction -∂L/∂m_i; NaN if skipped


class Columns(NamedTuple):
    """The vectors over coordinates, any float dtype on the particles' device."""

    weights: Tensor | None = None  # (d,) θ
    saliency: Tensor | None = None  # (d,) a_e ≥ 0
    sizes: Tensor | None = None  # (d,) c_e > 0; None: 1 for every coordinate


class Shard(NamedTuple):
    """What the holder of a part of the coordinates knows of the whole, for the stages."""

    d: int  # coordinates of all shards together
    total: Tensor | None = None  # (1,) fp64: D = Σ c over all shards, where sizes are given and only there
    first_column: int = 0  # the place of this shard's first coordinate among all


class TransitionSpec(NamedTuple):
    """The settings of one step; what each means is said at :func:`sfpk_kernels.ops.transition_`."""

    step: float  # Δt > 0, or ≥ 0 with an angle
    radius: float  # r > 1
    repulsion: float  # λ ≥ 0
    kernel: str = "rbf"
    density: str = "l2"
    target_density: float | None = None  # ρ in (0, 1]
    consensus: float = 0.0  # η in [0, 1]
    eps: float = 0.0
    seed: int = 0
    step_index: int = 0
    nonfinite: str = "raise"
    only: int = -1  # the one particle that moves (Gauss-Seidel order), -1 for all (Jacobi)
    angle: float | None = None  # α ≥ 0, in place of the radius

    @property
    def weighted(self) -> bool:
        """Whether the kernel weighs coordinates by their saliency."""
        return self.kernel == "weighted_rbf"

    @property
    def squared(self) -> bool:
        """Whether ρ is Σ c m² / D, and not its root."""
        return self.density == "l2_squared"

    @property
    def skip(self) -> bool:
        """Whether particles move although the gradient of another one is not finite."""
        return self.nonfinite == "skip"

    @property
    def root(self) -> float:
        """sqrt(r² - 1), the length of the tangential part of a move in units of the radial one."""
        return math.sqrt(self.radius**2 - 1)

    @property
    def reach(self) -> float:
        """The length of the tangential part of a move: α of the moved particle, else sqrt(r² - 1) of the radial one."""
        return self.root if self.angle is None else self.angle

    @property
    def key(self) -> int:
        """Of the random bits that round fp16 particles."""
        return rounding_key(self.seed, self.step_index)

    def repels(self, n: int) -> bool:
        """Whether n particles repel each other."""
        return self.repulsion > 0 and n > 1

    def pulls(self, n: int) -> bool:
        """Whether n particles are drawn to their mean."""
        return self.consensus > 0 and n > 1

    def retracts_after_pull(self, n: int) -> bool:
        """Whether n particles are scaled again behind a pull, for which the first pass sums Gram matrices."""
        return self.pulls(n) and self.target_density is not None

    def checked(self, op: str) -> TransitionSpec:
        """The settings as the ops take them: floats as floats, integers within 64 bits.

        Raises:
            TypeError: a number of the wrong type.
            ValueError: a number outside its range, or an unknown word.
        """
        check_integer(op, "seed", self.seed)
        check_integer(op, "step_index", self.step_index)
        check.is_one_of(op, "nonfinite", self.nonfinite, NONFINITE)
        check.is_one_of(op, "kernel", self.kernel, KERNELS)
        check.is_one_of(op, "density", self.density, DENSITIES)
        target = self.target_density
        if target is not None:
            target = check.is_real(op, "target_density", target, "in (0, 1]", 0.0, 1.0)
        angle = self.angle
        if angle is not None:
            angle = check.is_real(op, "angle", angle, "≥ 0", 0.0, math.inf, open_low=False)
        wanted = "> 0" if angle is None else "≥ 0"
        # In the order of the fields, as everything here is on the way of every step.
        return TransitionSpec(
            check.is_real(op, "step", self.step, wanted, 0.0, math.inf, open_low=angle is None),
            check.is_real(op, "radius", self.radius, "> 1", 1.0, math.inf),
            check.is_real(op, "repulsion", self.repulsion, "≥ 0", 0.0, math.inf, open_low=False),
            self.kernel,
            self.density,
            target,
            check.is_real(op, "consensus", self.consensus, "in [0, 1]", 0.0, 1.0, open_low=False),
            check.is_real(op, "eps", self.eps, "≥ 0", 0.0, math.inf, open_low=False),
            _word(self.seed),
            _word(self.step_index),
            self.nonfinite,
            self.only,
            angle,
        )


class Step(NamedTuple):
    """The particles of one step, and all that moves them."""

    masks: Tensor  # (n, d) fp32, fp64, fp16, or bf16 with residual
    grads: Tensor  # (n, d) any float, or (1, d) with spec.only: ∂L/∂m, or ∂L/∂W with columns.weights
    spec: TransitionSpec
    columns: Columns = Columns()
    residual: Tensor | None = None  # (n, d) bf16: what rounding took from bf16 particles
    state: TransitionStats | None = None  # before the step; None: to be measured first


def check_integer(op: str, name: str, value: Any, wanted: str = "an integer") -> None:
    """``value`` is a whole number of any type."""
    if type(value) is not int and not check.is_integer(value):
        raise TypeError(f"{op}: {name}: wanted {wanted}, got {value!r}")


def part_of(fields: Any) -> Callable[[Any], Any]:
    """Takes the fields of one of the classes above from the arguments of an op, which has them all."""
    get = attrgetter(*fields._fields)
    return lambda arguments: fields._make(get(arguments))


def _word(value: Any) -> Any:
    """Any integer as a signed one of 64 bits, which is all that the random bits depend on."""
    number = check.plain(value)
    return number if -(1 << 63) <= number < 1 << 63 else (number + (1 << 63)) % (1 << 64) - (1 << 63)
