"""``sparsity`` or ``config``, and ``execution``: what every entry takes them to mean."""

from __future__ import annotations

import dataclasses
import logging
import numbers
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..config import SFPKConfig
from ..execution import Execution
from ..modeling.state import BATCH_NORMS
from ..structure.axes import BUDGETS
from .merging import steps_of_all, with_passes

logger = logging.getLogger(__name__)

_RADIUS = SFPKConfig(0.5).radius  # that of the default
_FEW_STEPS = 100  # below it particles throughout cost quality in all tasks of the study
_said: set[str] = set()  # in this process

# Fields given to an entry by themselves, and how they are given.
FIELDS = {
    **{field.name: f"config=SFPKConfig(sparsity=…, {field.name}=…)" for field in dataclasses.fields(SFPKConfig)},
    **{field.name: f"execution=Execution({field.name}=…)" for field in dataclasses.fields(Execution)},
}
del FIELDS["sparsity"]


def chosen(
    call: str,  # how the entry is called, for messages
    sparsity: Any,
    config: Any,
    execution: Any,
    passes: Any = None,
) -> tuple[SFPKConfig, Execution]:
    """The settings of a run; with ``passes`` as many steps as these allow.

    Raises:
        TypeError: an argument of the wrong type, both ``sparsity`` and ``config``, or neither.
        ValueError: a sparsity outside (0, 1), passes below 1.
    """
    if isinstance(sparsity, SFPKConfig):
        raise TypeError(f"sparsity: wanted a number in (0, 1), got an SFPKConfig: pass config=…; the call is {call}")
    if sparsity is not None and (isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real)):
        got = getattr(sparsity, "__name__", type(sparsity).__name__)
        raise TypeError(f"sparsity: wanted a number in (0, 1), got {got}; the call is {call}")
    if config is not None and not isinstance(config, SFPKConfig):
        wrong = isinstance(config, Mapping | type)
        made = ": make one with SFPKConfig(sparsity=…)" if wrong else f"; the call is {call}"
        name = f"the class {config.__name__}" if isinstance(config, type) else type(config).__name__
        raise TypeError(f"config: wanted an SFPKConfig, got {name}{made}")
    if execution is not None and not isinstance(execution, Execution):
        raise TypeError(f"execution: wanted an Execution, got {type(execution).__name__}: make one with Execution(…)")
    if sparsity is not None and config is not None:
        raise TypeError(
            f"sparsity: wanted it in config alone, got {sparsity!r} beside config with sparsity={config.sparsity:g}"
        )
    if config is None:
        if sparsity is None:
            raise TypeError(
                f"sparsity: wanted a number in (0, 1), or config=SFPKConfig(…), got neither; the call is {call}"
            )
        config = SFPKConfig(sparsity=float(sparsity))
    elif passes is not None:
        raise TypeError(
            f"passes: wanted it beside sparsity, or n_steps in config, got {passes!r} beside config with "
            f"n_particles={config.n_particles}, n_steps={config.n_steps}"
        )
    return config if passes is None else with_passes(config, passes), execution or Execution()


def check_together(config: SFPKConfig, execution: Execution, model: nn.Module) -> None:
    """Refuse what would decide the mask by how it is computed, cannot be computed so, or would do nothing.

    Raises:
        ValueError: settings that do not go together.
    """
    if config.hold < 1 and config.step_length == "radius":
        raise ValueError(
            "hold: wanted 1 with step_length='radius', by which nothing moves while the density is held, "
            f"got {config.hold!r}; SFPKConfig.preset('population', …) has both"
        )
    if config.pattern is not None and config.selection != "exact":
        raise ValueError(
            f"pattern: wanted None with selection={config.selection!r}, whose thresholds know no groups, "
            f"got {config.pattern}"
        )
    if config.step_scale != 1 and config.step_length == "radius":
        raise ValueError(
            "step_scale: wanted 1 with step_length='radius', where radius says how far particles move, "
            f"got {config.step_scale!r}"
        )
    if config.merge is not None and config.n_particles > 1 and steps_of_all(config) >= config.n_steps:
        raise ValueError(
            f"merge: wanted a fraction that leaves a step for one particle, of n_steps={config.n_steps}, "
            f"got {config.merge!r}"
        )
    _check_granularity(config, execution)
    if execution.energy_mode == "vmap" and config.update == "gauss_seidel":
        raise ValueError(
            "energy_mode: wanted another than 'vmap' with update='gauss_seidel', where particles go one by one"
        )
    if (
        execution.microbatch is not None
        and config.bn == "batch"
        and any(isinstance(module, BATCH_NORMS) for module in model.modules())
    ):
        raise ValueError(
            f"microbatch: wanted None, or bn='running' beside it, got {execution.microbatch} with bn='batch': "
            "batch-norm would use the statistics of the micro-batch, and the mask depend on its size"
        )


def _check_granularity(config: SFPKConfig, execution: Execution) -> None:
    """Refuse what channels, heads and neurons do not have, and what single weights do not.

    Raises:
        ValueError: a setting that does not go with the granularity; the message names it.
    """
    structured = config.granularity != "weight"
    if not structured:
        wanted: dict[str, tuple[Any, ...]] = {
            "budget": ("weights",),
            "min_keep": (1,),
            "round_to": (1,),
            "on_refusal": ("raise",),
        }
    else:
        wanted = {
            "budget": BUDGETS,
            "pattern": (None,),
            "sparsity_of": ("covered",),
            "selection": ("exact",),
            "kernel": ("rbf",),
            "energy_mode": ("auto", "timed", "sequential"),
            "offload": (None,),
            "compile": (False,),
        }
    for name, allowed in wanted.items():
        got = getattr(config if hasattr(config, name) else execution, name)
        if got not in allowed:
            words = ", ".join(map(repr, allowed))
            raise ValueError(f"{name}: wanted {words} with granularity={config.granularity!r}, got {got!r}")


def warn_of_poor(config: SFPKConfig) -> None:
    """Say of settings that do nothing, or that the study found worse than others at the same cost; each once."""
    for words in _poor(config):
        if words not in _said:
            _said.add(words)
            logger.warning("%s", words)


def _poor(config: SFPKConfig) -> list[str]:
    found = []
    if config.step_length != "radius" and config.radius != _RADIUS:
        found.append(
            f"radius={config.radius:g} does nothing with step_length={config.step_length!r}; step_scale is a factor on "
            "its moves, and SFPKConfig.preset('population', …) moves by the radius"
        )
    n, steps = config.n_particles, config.n_steps
    if n > 1 and config.merge is None and steps < _FEW_STEPS:
        found.append(
            f"{n} particles with {steps} steps: as many passes make a better mask with n_particles=1, "
            f"n_steps={n * steps}"
        )
    return found
