"""Every hyper-parameter of a run: its meaning, its range, and the three presets."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import numbers
import re
from collections.abc import Mapping
from typing import Any

from ._dispatch import BACKENDS

PRESETS: dict[str, dict[str, Any]] = {
    # What we recommend: the field defaults below.
    "default": {},
    # The paper's Algorithms 2 and 3. Its radius differs by model (1.1 to 8, Tables 3-4).
    "paper": {
        "density": "l2_squared",
        "schedule": "linear",
        "polarizer": "mask",
        "radius": 1.4,
        "retract": False,
        "consensus": 0.0,
    },
    # The authors' released code, followed to the letter, its thresholds and stabilisers included.
    "authors": {
        "density": "l2",
        "schedule": "exponential",
        "polarizer": "mask_weight",
        "kernel": "weighted_rbf",
        "radius": 1.4,
        "retract": False,
        "consensus": 0.0,
        "momentum": 0.1,
        "selection": "threshold",
        "early_stop": True,
        "eps": 1e-12,
        "model_mode": "train",
    },
}

POLARIZERS = ("mask_normalized", "mask_weight", "mask")
ENERGY_MODES = ("auto", "vmap", "sequential", "cudagraph")

CHOICES: dict[str, tuple[str | None, ...]] = {
    "kernel": ("rbf", "weighted_rbf"),
    "density": ("l2", "l2_squared"),
    "schedule": ("cubic", "exponential", "linear"),
    "polarizer": POLARIZERS,
    "final_score": (*POLARIZERS, None),
    "vote": ("soft", "hard", "masked"),
    "selection": ("exact", "threshold"),
    "bn": ("batch", "running"),
    "model_mode": ("eval", "train"),
    "energy_mode": ENERGY_MODES,
    "dtype": ("bf16", "fp16", None),
    "memory": ("auto", "fast", "lean"),
    "offload": ("cpu", None),
    "nonfinite": ("raise", "skip_particle"),
    "backend": (*BACKENDS, None),
    "particle_dtype": ("float32", "float16", "bfloat16"),
}


@dataclasses.dataclass(frozen=True)
class SFPKConfig:
    """Hyper-parameters of one run, checked when constructed.

    Args:
        sparsity: fraction of the prunable weights that is REMOVED, in (0, 1).
        n_particles: mask particles n ≥ 1. A run costs n · K forward/backward passes.
        n_steps: simulation steps K ≥ 1.
        radius: relative localization radius r > 1; the tangential part of a move is sqrt(r² - 1) times the
            radial part.
        repulsion: λ ≥ 0, weight of the pairwise kernel repulsion.
        kernel: ``"rbf"`` (paper) or ``"weighted_rbf"`` (authors: distances weighted by the squared weights).
        density: soft density ρ(m): ``"l2"`` = sqrt(Σm²/D), ``"l2_squared"`` = Σm²/D.
        schedule: how ρ falls from 1 to 1 - sparsity: ``"cubic"``, ``"exponential"`` or ``"linear"``.
        polarizer: score that ranks coordinates when a particle is made binary: ``"mask_normalized"`` (|m|·|θ|,
            θ divided by its tensor's mean), ``"mask_weight"`` (|m|·|θ|) or ``"mask"`` (m).
        final_score: score behind the final mask, same names; ``None`` takes the polarizer's.
        retract: rescale every particle onto the schedule after each move.
        consensus: η in [0, 1]: how far particles are pulled to their mean in each step, late in the run.
        consensus_start: fraction of the run in [0, 1] after which the pull acts.
        settle: with checkpoints: slow down towards each of them as towards the target (the exponential schedule stays
            as it is), and let the pull begin before the first: ``consensus_start`` is then a fraction of the way there.
            For better masks on the way; the run is another one.
        momentum: in [0, 1): share of the previous steps' vote kept in the final score.
        vote: ``"soft"`` averages the scores of the voting particles, ``"hard"`` counts in how many of their
            binary masks a coordinate is kept (equal counts are ranked by the soft score), ``"masked"`` averages
            scores that are 0 outside each particle's own best at the final sparsity (the authors' hard vote).
        vote_ratio: fraction in (0, 1] of the particles that vote, best (lowest energy) first.
        selection: ``"exact"`` keeps exactly the counted coordinates, ties to the lower index;
            ``"threshold"`` keeps what the authors' thresholds keep, for parity with their code.
        early_stop: stop once the particles' mean density has reached the target.
        eps: added to (‖s‖‖u‖)², u the tangential part of the gradient (authors: 1e-12, for parity).
        bn: batch-norm in the energies uses the ``"batch"`` statistics of the particle's batch, or the model's
            ``"running"`` ones. The model's own statistics never change.
        model_mode: how ``loss_fn`` finds the model: in ``"eval"`` mode, or in ``"train"`` mode (dropout, stochastic
            depth and heads for training on, seeded). Batch-norm goes by ``bn`` in both.
        energy_mode: particles through the model at once (``"vmap"``), one by one (``"sequential"``), one by one with
            the pass captured and replayed (``"cudagraph"``, GPU), or ``"auto"``: the fastest in a short trial before
            the first step. The ways differ in rounding: where runs must repeat bit for bit, name one (under
            ``torch.use_deterministic_algorithms(True)`` auto means one by one).
        chunk_size: particles per vmap call, ``None`` for all.
        dtype: ``"bf16"`` or ``"fp16"`` runs the model under autocast (fp16 with loss scaling), ``None`` as it is.
            Particles, gradients and losses stay in fp32.
        microbatch: samples per forward/backward; the gradients of a batch are added up, which gives the same result for
            losses that are means over samples (not with ``bn="batch"``, whose statistics become those of the
            micro-batch). ``None`` for whole batches.
        compile: run the loss through ``torch.compile``.
        memory: ``"fast"`` keeps the gradients of all particles, which then move together (Jacobi). ``"lean"`` keeps
            one: each particle moves as soon as its gradient is there (Gauss-Seidel), otherwise the step is the same.
            ``"auto"``: fast where it fits (see :func:`sfpk_kernels.plan`).
        offload: ``"cpu"`` keeps particles, and the arithmetic on them, in host memory; masked weights and gradients
            cross over, one particle at a time. ``None``: on the model's device.
        memory_limit: bytes a run may take beyond what the process holds before; ``None`` for what the device has left.
            A run that will not fit is refused.
        nonfinite: what to do about a loss or gradient that is not finite: ``"raise"``, or ``"skip_particle"``: that
            particle stands still in this step, which is logged and recorded; a step in which none can move raises.
        backend: kernel backend of the ops that have it, ``None`` for the fastest available.
        particle_dtype: how particles are kept. ``"float16"``: half the memory, rounded stochastically, masks a little
            different (on long runs too). ``"bfloat16"``: with its rounding error beside it, the memory of fp32.
        seed: of every random number the run draws, data order included.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value out of its range; the message names the field.
    """

    sparsity: float
    n_particles: int = 10
    n_steps: int = 100
    radius: float = 2.0
    repulsion: float = 0.2
    kernel: str = "rbf"
    density: str = "l2"
    schedule: str = "cubic"
    polarizer: str = "mask_normalized"
    final_score: str | None = None
    retract: bool = True
    consensus: float = 0.3
    consensus_start: float = 0.5
    settle: bool = False
    momentum: float = 0.0
    vote: str = "soft"
    vote_ratio: float = 1.0
    selection: str = "exact"
    early_stop: bool = False
    eps: float = 0.0
    bn: str = "batch"
    model_mode: str = "eval"
    energy_mode: str = "auto"
    chunk_size: int | None = None
    dtype: str | None = None
    microbatch: int | None = None
    compile: bool = False
    memory: str = "auto"
    offload: str | None = None
    memory_limit: int | None = None
    nonfinite: str = "raise"
    backend: str | None = None
    particle_dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_real("sparsity", "in (0, 1)", lambda x: 0 < x < 1)
        self._check_int("n_particles", 1)
        self._check_int("n_steps", 1)
        self._check_real("radius", "> 1", lambda x: x > 1)
        self._check_real("repulsion", "≥ 0", lambda x: x >= 0)
        self._check_real("consensus", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_real("consensus_start", "in [0, 1]", lambda x: 0 <= x <= 1)
        self._check_real("momentum", "in [0, 1)", lambda x: 0 <= x < 1)
        self._check_real("vote_ratio", "in (0, 1]", lambda x: 0 < x <= 1)
        self._check_real("eps", "≥ 0", lambda x: x >= 0)
        self._check_int("seed", 0)
        for name in ("chunk_size", "microbatch", "memory_limit"):
            if getattr(self, name) is not None:
                self._check_int(name, 1)
        for name in ("retract", "settle", "early_stop", "compile"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: wanted a bool, got {getattr(self, name)!r}")
        if self.energy_mode == "vmap" and (self.memory == "lean" or self.offload is not None):
            wanted = "memory other than 'lean'" if self.memory == "lean" else "offload None"
            raise ValueError(f"energy_mode: 'vmap' wanted {wanted}: particles go through the model one by one there")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                wanted = ", ".join(repr(choice) for choice in choices)
                raise ValueError(f"{name}: wanted one of {wanted}, got {getattr(self, name)!r}")

    def _check_real(self, name: str, wanted: str, accepts: Any) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: wanted a number {wanted}, got {value!r}")
        if not math.isfinite(value) or not accepts(value):
            raise ValueError(f"{name}: wanted a number {wanted}, got {value!r}")
        object.__setattr__(self, name, float(value))

    def _check_int(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name}: wanted an integer ≥ {least}, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: wanted an integer ≥ {least}, got {value!r}")
        object.__setattr__(self, name, int(value))

    @classmethod
    def preset(cls, name: str = "default", *, sparsity: float, **overrides: Any) -> SFPKConfig:
        """The preset ``"default"``, ``"paper"`` or ``"authors"``, with any field overridden.

        Raises:
            ValueError: no preset of that name.
            TypeError: an override that is no field of the config.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: wanted one of {', '.join(PRESETS)}, got {name!r}")
        return cls.from_dict({**PRESETS[name], "sparsity": sparsity, **overrides})

    @property
    def target_density(self) -> float:
        """1 - sparsity: the soft density at the end of the schedule."""
        return 1.0 - self.sparsity

    def replace(self, **changes: Any) -> SFPKConfig:
        """A copy with some fields changed, checked again."""
        return self.from_dict({**self.to_dict(), **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, booleans and None by field name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SFPKConfig:
        """The inverse of :meth:`to_dict`; unknown names are an error, missing ones take their default."""
        values = dict(values)
        if isinstance(values.get("dropout"), bool):  # as configs of earlier versions say it
            values.setdefault("model_mode", "train" if values.pop("dropout") else "eval")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise TypeError(f"SFPKConfig: unknown field {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        if "sparsity" not in values:
            raise TypeError("SFPKConfig: the field sparsity is missing")
        return cls(**values)

    def to_json(self) -> str:
        """The config as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SFPKConfig:
        """The inverse of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))


def described_fields() -> dict[str, str]:
    """What the docstring of :class:`SFPKConfig` says of its fields; nothing under ``python -OO``."""
    # Without its margin, which Python 3.13 leaves out itself.
    text = inspect.cleandoc(SFPKConfig.__doc__ or "").split("Args:", 1)[-1].split("Raises:", 1)[0]
    text = re.sub(r":[a-z]+:`~?([^`]*)`", r"\1", text)  # cross-references
    parts = re.split(r"\n {4}(?=[a-z_]+: )", text)[1:]
    pairs = (part.split(":", 1) for part in parts)
    return {name.strip(): re.sub(r"\s+", " ", words).replace("``", "").strip() for name, words in pairs}
