"""What decides the mask: every hyper-parameter of a run, its meaning, its range, and the presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .coordinates.pattern import WANTED, check_pattern, is_pattern, sparsity_of
from .execution import EXECUTION_FIELDS
from .structure.axes import BUDGETS, ON_REFUSAL
from .utils.settings import Settings, described, known_fields, setting

# Ten particles whose moves follow the density, as in all presets but the default.
_BY_RADIUS: dict[str, Any] = {
    "n_particles": 10,
    "n_steps": 100,
    "step_length": "radius",
    "averaging": 0.0,
    "hold": 1.0,
    "signed_score": False,
}

PRESETS: dict[str, dict[str, Any]] = {
    # What we recommend: the field defaults below.
    "default": {},
    # What the default was before: the paper's method with the stabilisers of ours.
    "population": _BY_RADIUS,
    # The paper's Algorithms 2 and 3. Its radius differs by model (1.1 to 8, Tables 3-4).
    "paper": {
        **_BY_RADIUS,
        "density": "l2_squared",
        "schedule": "linear",
        "polarizer": "mask",
        "radius": 1.4,
        "retract": False,
        "consensus": 0.0,
    },
    # The authors' released code, followed to the letter, its thresholds and stabilisers included.
    "authors": {
        **_BY_RADIUS,
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

# What runs did before there was a setting for it.
WITHOUT: dict[str, Any] = {
    "signed_score": False,
    "step_length": "radius",
    "step_scale": 1.0,
    "averaging": 0.0,
    "hold": 1.0,
    "merge": None,
    "pattern": None,
    "granularity": "weight",
    "budget": "weights",
    "sparsity_of": "covered",
    "min_keep": 1,
    "round_to": 1,
    "on_refusal": "raise",
}

POLARIZERS = ("mask_normalized", "mask_weight", "mask")
STEP_LENGTHS = ("radius", "angle", "effective_dimension")
UPDATES = ("jacobi", "gauss_seidel")
GRANULARITIES = ("weight", "group", "channel", "head", "neuron")

# Names that this class had, or that one may look for here.
_ELSEWHERE = {
    **{name: f"execution=Execution({name}=…)" for name in EXECUTION_FIELDS},
    "memory": "update='jacobi' (was memory='fast') or update='gauss_seidel' (was 'lean')",
    "dropout": "model_mode='eval' or 'train'",
}


@described
@dataclasses.dataclass(frozen=True)
class SFPKConfig(Settings):
    """Hyper-parameters of one run, checked when constructed: what decides the mask.

    How it is computed stands in :class:`~sfpk_kernels.Execution`.
    """

    sparsity: float = setting(
        dataclasses.MISSING,
        "fraction of the prunable weights that is REMOVED, in (0, 1).",
        wanted="in (0, 1)",
        accepts=lambda x: 0 < x < 1,
    )
    n_particles: int = setting(
        1, "mask particles n ≥ 1. A run costs n · K forward/backward passes, fewer with ``merge``.", least=1
    )
    n_steps: int = setting(1000, "simulation steps K ≥ 1.", least=1)
    radius: float = setting(
        2.0,
        "relative localization radius r > 1; the tangential part of a move is sqrt(r² - 1) times the radial part, "
        'with ``step_length="radius"``.',
        wanted="> 1",
        accepts=lambda x: x > 1,
    )
    step_length: str = setting(
        "effective_dimension",
        'how long the tangential part of a move is: ``"radius"``: in proportion to the density change of the step; '
        '``"angle"``: an angle that falls linearly to 0 over the run, whatever the density does; '
        '``"effective_dimension"``: such an angle, the larger the more coordinates share the gradient, which is '
        "measured in the first steps.",
        choices=STEP_LENGTHS,
    )
    step_scale: float = setting(
        1.0,
        'factor > 0 on the angle, with another ``step_length`` than ``"radius"``. Half and twice were a little worse '
        "in most trials.",
        wanted="> 0",
        accepts=lambda x: x > 0,
    )
    averaging: float = setting(
        0.03,
        "the longest horizon, as a fraction of the run in [0, 1), over which a particle's gradients are averaged "
        "before it moves along them; how much they are follows from how far new ones point against the average. "
        "Nothing is averaged, and nothing kept for it, where that is one step or less (K ≤ 33).",
        wanted="in [0, 1)",
        accepts=lambda x: 0 <= x < 1,
    )
    repulsion: float = setting(
        0.2, "λ ≥ 0, weight of the pairwise kernel repulsion.", wanted="≥ 0", accepts=lambda x: x >= 0
    )
    kernel: str = setting(
        "rbf",
        '``"rbf"`` (paper) or ``"weighted_rbf"`` (authors: distances weighted by the squared weights).',
        choices=("rbf", "weighted_rbf"),
    )
    density: str = setting(
        "l2",
        'soft density ρ(m): ``"l2"`` = sqrt(Σm²/D), ``"l2_squared"`` = Σm²/D.',
        choices=("l2", "l2_squared"),
    )
    schedule: str = setting(
        "cubic",
        'how ρ falls from 1 to 1 - sparsity: ``"cubic"``, ``"exponential"`` or ``"linear"``.',
        choices=("cubic", "exponential", "linear"),
    )
    hold: float = setting(
        0.7,
        "fraction of the run in (0, 1] after which ρ has reached 1 - sparsity; in the rest it is held, and particles "
        'move on along their gradients (below 1 with another ``step_length`` than ``"radius"``, by which nothing would '
        "move).",
        wanted="in (0, 1]",
        accepts=lambda x: 0 < x <= 1,
    )
    update: str = setting(
        "jacobi",
        'order of the moves in a step: ``"jacobi"``: all particles together, from where all of them were; this keeps '
        'the gradients of all n. ``"gauss_seidel"``: each as soon as its gradient is there, from where those before '
        "it have gone; this keeps one gradient, for models whose n gradients do not fit.",
        choices=UPDATES,
    )
    polarizer: str = setting(
        "mask_normalized",
        'score that ranks coordinates when a particle is made binary: ``"mask_normalized"`` (|m|·|θ|, θ divided by '
        'its tensor\'s mean), ``"mask_weight"`` (|m|·|θ|) or ``"mask"`` (m).',
        choices=POLARIZERS,
    )
    final_score: str | None = setting(
        None,
        "score behind the final mask, same names; ``None`` takes the polarizer's.",
        choices=(*POLARIZERS, None),
    )
    signed_score: bool = setting(
        True,
        "rank by m·|θ| with its sign, in polarizer and final score: a weight pushed below 0 ranks last, and does not "
        "climb back the further it is pushed. ``False`` takes |m|.",
    )
    pattern: tuple[int, int] | None = setting(
        None,
        "(N, M), such as (2, 4): of every M consecutive weights along the inputs of a layer N are kept in the end, and "
        "no fewer on the way; for a sparsity of 1 - N/M. ``None``: wherever they are.",
        wanted=f"None or {WANTED}",
        accepts=is_pattern,
    )
    granularity: str = setting(
        "weight",
        'what a coordinate is: a single ``"weight"``, or what can really be taken out of the model: a ``"channel"`` of '
        'convolutions, a ``"head"`` of attention or a ``"neuron"`` of Linear layers with all that goes with it, or '
        '``"group"``: all of these that are found.',
        choices=GRANULARITIES,
    )
    budget: str = setting(
        "weights",
        'what ``sparsity`` is a fraction of: ``"weights"``, with ``granularity="weight"``; otherwise the ``"params"``, '
        '``"macs"`` or ``"channels"`` (coordinates) of the dense model, of which the smaller one has at most the rest.',
        choices=("weights", *BUDGETS),
    )
    sparsity_of: str = setting(
        "covered",
        'with single weights, what ``sparsity`` is a fraction of: ``"covered"``: the covered (prunable) ones; '
        '``"model"``: all of the model, embeddings, norms and biases included. A run reckons the fraction of the '
        "covered ones that this takes, and refuses where that is all; its own config holds that fraction.",
        choices=("covered", "model"),
    )
    min_keep: int = setting(
        1, "with channels, heads or neurons: at least so many of every group stay, or all of a smaller one.", least=1
    )
    round_to: int = setting(
        1, "with channels, heads or neurons: of every group a multiple of it stays, or all.", least=1
    )
    on_refusal: str = setting(
        "raise",
        'with channels, heads or neurons: ``"raise"`` an error that names what cannot be removed right, or '
        '``"protect"`` it: it stays whole, and ``structure.protected`` says why.',
        choices=ON_REFUSAL,
    )
    retract: bool = setting(True, "rescale every particle onto the schedule after each move.")
    consensus: float = setting(
        0.3,
        "η in [0, 1]: how far particles are pulled to their mean in each step, late in the run.",
        wanted="in [0, 1]",
        accepts=lambda x: 0 <= x <= 1,
    )
    consensus_start: float = setting(
        0.5,
        "fraction of the run in [0, 1] after which the pull acts.",
        wanted="in [0, 1]",
        accepts=lambda x: 0 <= x <= 1,
    )
    merge: float | None = setting(
        None,
        "fraction of the run in (0, 1) after which the n particles become one, their mean, back on the schedule where "
        "``retract`` is set: several explore, one refines. With M the steps until then a run costs n · M + K - M "
        "passes. ``None``: never; nothing of it matters to one particle.",
        wanted="in (0, 1) or None",
        accepts=lambda x: 0 < x < 1,
    )
    settle: bool = setting(
        False,
        "with waypoints: slow down towards each of them as towards the target (the exponential schedule stays as it "
        "is), and let the pull begin before the first: ``consensus_start`` is then a fraction of the way there. For "
        "better masks on the way; the run is another one.",
    )
    momentum: float = setting(
        0.0,
        "in [0, 1): share of the previous steps' vote kept in the final score.",
        wanted="in [0, 1)",
        accepts=lambda x: 0 <= x < 1,
    )
    vote: str = setting(
        "soft",
        '``"soft"`` averages the scores of the voting particles, ``"hard"`` counts in how many of their binary masks '
        'a coordinate is kept (equal counts are ranked by the soft score), ``"masked"`` averages scores that are 0 '
        "outside each particle's own best at the final sparsity (the authors' hard vote).",
        choices=("soft", "hard", "masked"),
    )
    vote_ratio: float = setting(
        1.0,
        "fraction in (0, 1] of the particles that vote, best (lowest energy) first.",
        wanted="in (0, 1]",
        accepts=lambda x: 0 < x <= 1,
    )
    selection: str = setting(
        "exact",
        '``"exact"`` keeps exactly the counted coordinates, ties to the lower index; ``"threshold"`` keeps what the '
        "authors' thresholds keep, for parity with their code.",
        choices=("exact", "threshold"),
    )
    early_stop: bool = setting(False, "stop once the particles' mean density has reached the target.")
    eps: float = setting(
        0.0,
        "added to (‖s‖‖u‖)², u the tangential part of the gradient (authors: 1e-12, for parity).",
        wanted="≥ 0",
        accepts=lambda x: x >= 0,
    )
    bn: str = setting(
        "batch",
        "batch-norm in the energies uses the ``\"batch\"`` statistics of the particle's batch, or the model's "
        '``"running"`` ones. The model\'s own statistics never change.',
        choices=("batch", "running"),
    )
    model_mode: str = setting(
        "eval",
        'how ``loss_fn`` finds the model: in ``"eval"`` mode, or in ``"train"`` mode (dropout, stochastic depth and '
        "heads for training on, seeded). Batch-norm goes by ``bn`` in both.",
        choices=("eval", "train"),
    )
    nonfinite: str = setting(
        "raise",
        'what to do about a loss or gradient that is not finite: ``"raise"``, or ``"skip_particle"``: that particle '
        "stands still in this step, which is logged and recorded; a step in which none can move raises.",
        choices=("raise", "skip_particle"),
    )
    particle_dtype: str = setting(
        "float32",
        'how particles are kept. ``"float16"``: half the memory, rounded stochastically, masks a little different '
        '(on long runs too). ``"bfloat16"``: with its rounding error beside it, the memory of fp32.',
        choices=("float32", "float16", "bfloat16"),
    )
    seed: int = setting(0, "of every random number the run draws, data order included.", least=0)

    def __new__(cls, *values: Any, **fields: Any) -> SFPKConfig:
        """Names that are no field are said to be none, and where they are instead."""
        known_fields(cls, fields, _ELSEWHERE)
        if not values and fields and "sparsity" not in fields:
            raise TypeError("SFPKConfig: the field sparsity is missing")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern is not None and self.sparsity_of != "covered":
            raise ValueError(
                "sparsity_of: wanted 'covered' with a pattern, which says what is kept of the covered weights, got "
                f"{self.sparsity_of!r}"
            )
        check_pattern(self.pattern, self.sparsity)
        if self.pattern is not None:
            object.__setattr__(self, "sparsity", sparsity_of(self.pattern))  # exactly, where it was rounded

    @classmethod
    def preset(cls, name: str = "default", *, sparsity: float, **overrides: Any) -> SFPKConfig:
        """The preset ``"default"``, ``"population"``, ``"paper"`` or ``"authors"``, with any field overridden.

        Raises:
            ValueError: no preset of that name.
            TypeError: an override that is no field of the config.
        """
        if name not in PRESETS:
            raise ValueError(f"preset: wanted one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], "sparsity": sparsity, **overrides})

    @property
    def target_density(self) -> float:
        """1 - sparsity: the soft density at the end of the schedule."""
        return 1.0 - self.sparsity

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SFPKConfig:
        """The inverse of :meth:`to_dict`, as written in files; missing fields take their default, in files of earlier
        versions what runs did then.

        Those of earlier versions are understood: ``memory`` and ``dropout`` were other words for ``update`` and
        ``model_mode``, and what stands in :class:`~sfpk_kernels.Execution` now is passed over.

        Raises:
            TypeError, ValueError: an unknown field, or a value that it does not take.
        """
        values = dict(values)
        if isinstance(values.get("dropout"), bool):
            values.setdefault("model_mode", "train" if values.pop("dropout") else "eval")
        memory = values.pop("memory", None)
        if memory is not None:
            values.setdefault("update", "gauss_seidel" if memory == "lean" else "jacobi")
        if "sparsity" not in values:
            raise TypeError("SFPKConfig: the field sparsity is missing")
        if not {field.name for field in dataclasses.fields(cls)} - WITHOUT.keys() - values.keys():
            values = {**WITHOUT, **values}  # all that an earlier version wrote
        return cls(**{name: value for name, value in values.items() if name not in EXECUTION_FIELDS})
