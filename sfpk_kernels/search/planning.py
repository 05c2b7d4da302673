"""The plan: bytes and seconds of a run, known before it starts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import SFPKConfig
from ..coordinates.flat import Coordinates
from ..coordinates.pattern import check_divides
from ..execution import Execution
from ..modeling.batches import BatchStream
from ..modeling.state import autograd_allowed, check_no_inference_tensors, guarded, seeded
from ..utils.arguments import called, check_loader, check_loss_fn
from ..utils.memory import available_bytes, format_bytes
from .averaging import most
from .energy import Choice, LossFn, ParticleEnergy
from .merging import passes
from .parts import coordinates_of, energy_of, of_covered
from .polarizer import score_kinds
from .settings import FIELDS, chosen

CALL = "plan(model, loader, sparsity, loss_fn=…)"

_SHARE = 0.9  # of what is available: allocators and operators take a little more than tensors do
# Passes over the particles, in particles read or written, of everything but forward and backward.
_PASSES = {"jacobi": 8.0, "gauss_seidel": 4.0}  # the latter: and two readings of all particles for each of them
_COPIED = 1 << 21  # elements copied to learn the bandwidth
# Bytes of tensors to bytes of the process, for passes on the CPU: operators' scratch memory and holes in the heap.
_CPU_OVERHEAD = 1.25
# What the C library's allocator holds without use: at most so many bytes, or that share of what is used.
_HEAP_BYTES, _HEAP_SHARE = 25_000_000, 0.125
_TRIAL_BYTES = 64_000_000  # that the trial of a batched pass may always take on the CPU
_TRIAL_SHARE = 0.25  # of a GPU's free memory

_SIZES = {"float32": 4, "float16": 2, "bfloat16": 4}  # bytes; bf16 with the error kept beside it


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes are beyond what the process held before."""

    particles: int  # n
    coordinates: int  # d
    steps: int  # K
    passes: int  # forward and backward, of all steps
    update: str  # "jacobi" or "gauss_seidel": how many gradients are kept
    choice: Choice  # how particles go through the model
    parts: dict[str, int]  # bytes on the device of the particles (and of the model, where it is the same)
    model_parts: dict[str, int]  # bytes on the model's device, where it is another
    available: int | None  # bytes; on the device of the particles
    model_available: int | None
    seconds_per_step: float  # of all particles; 0: not measured, the run was refused before its first pass
    alternatives: dict[str, int]  # what would take less, and its bytes

    @property
    def peak_bytes(self) -> int:
        """On the device of the particles."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the run stays within what is available."""
        return _within(self.parts, self.available) and _within(self.model_parts, self.model_available)

    def check(self) -> None:
        """Refuse a run that does not fit.

        Raises:
            MemoryError: it does not; the message says what would.
        """
        if not self.fits:
            raise MemoryError(f"this run will not fit:\n{self}{self._advice()}")

    def _advice(self) -> str:
        limit = self.available
        lines = [
            f"  {way}: {format_bytes(size)}{'' if limit is None or size <= _SHARE * limit else ' (still too much)'}"
            for way, size in self.alternatives.items()
            if size < self.peak_bytes  # of a run refused before its first pass only the largest parts are known
        ]
        if not lines:
            return ""
        return "\nwhat takes less:\n" + "\n".join(lines)

    def __str__(self) -> str:
        rows = [(name, format_bytes(size)) for name, size in self.parts.items() if size]
        rows.append(("peak", format_bytes(self.peak_bytes) + _of(self.available)))
        if self.model_parts:
            rows += [(f"{name} (GPU)", format_bytes(size)) for name, size in self.model_parts.items() if size]
            rows.append(("peak (GPU)", format_bytes(sum(self.model_parts.values())) + _of(self.model_available)))
        # A step of one particle, after the others were merged into it, takes its share of one of all.
        total = _duration(self.seconds_per_step * self.passes / self.particles)
        whole = self.passes == self.particles * self.steps
        of, passes = ("", "") if whole else (f" of {self.particles}", f" ({self.passes:,} passes)")
        measured = f"{self.seconds_per_step:.3g} s a step{of}, {total} for {self.steps}{passes}"
        rows.append(("time", measured if self.seconds_per_step else "not measured"))
        width = max(len(name) for name, _ in rows)
        head = f"{self.particles} particles of {self.coordinates:,} coordinates, update={self.update!r}"
        how = f"energies: {self.choice.mode} ({self.choice.reason})"
        return "\n".join([head, how, *(f"  {name:<{width}}  {text}" for name, text in rows)])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """From the fields' plain values."""
        known = {field.name: values[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**known, "choice": Choice(**known["choice"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {**dataclasses.asdict(self), "peak_bytes": self.peak_bytes, "fits": self.fits}


@called(CALL, **FIELDS)
@autograd_allowed()
def plan(
    model: nn.Module,
    loader: Iterable[Any],
    sparsity: float | None = None,
    *,
    passes: int | None = None,
    loss_fn: LossFn | None = None,
    config: SFPKConfig | None = None,
    execution: Execution | None = None,
    **coordinate_options: Any,
) -> Plan:
    """Predict memory by part and time per step of pruning ``model``, from a few passes over one batch.

    Nothing of the run is allocated but one copy of the weights; the model is as it was afterwards.

    Args:
        model: the trained, dense model.
        loader: batches, of which the first is read (from a one-shot iterator it is gone then).
        sparsity, passes, config, execution, loss_fn: as for :func:`~sfpk_kernels.prune`.
        coordinate_options: those of :class:`~sfpk_kernels.Coordinates`, and ``example_inputs``.

    Raises:
        TypeError: an argument of the wrong type.
        RuntimeError: ``execution.energy_mode`` names a way that cannot run this model.
        ValueError: an empty loader, a sparsity that keeps no weight, or a model made under
            ``torch.inference_mode()``.
    """
    config, execution = chosen(CALL, sparsity, config, execution, passes)
    coordinates = coordinates_of(model, config, execution, **coordinate_options)
    config = of_covered(config, coordinates)
    check_loader(loader)
    check_loss_fn(loss_fn)
    check_divides(coordinates.tensors, config.pattern)
    check_no_inference_tensors(model)
    with seeded(config.seed, coordinates.device):  # what the loader draws is not missing afterwards
        (batch,) = BatchStream(loader, coordinates.device, 1, "one of the run").take(1)
    theta = coordinates.flatten(model).to(state_device(coordinates, execution))
    energy = energy_of(model, loss_fn, coordinates, theta, execution)
    taken = theta.numel() * theta.element_size()
    with guarded(model, bn=config.bn, training=config.model_mode == "train"):
        return plan_run(energy, config, execution, batch, taken)


def state_device(coordinates: Coordinates, execution: Execution) -> torch.device:
    """Where the particles live."""
    return torch.device("cpu") if execution.offload == "cpu" else coordinates.device


def check_state(coordinates: Coordinates, config: SFPKConfig, execution: Execution) -> None:
    """Refuse a run whose particles and weights alone will not fit, before anything is allocated.

    Raises:
        MemoryError: they will not.
    """
    limit = execution.memory_limit or available_bytes(state_device(coordinates, execution))
    parts = _state(coordinates, config)
    if not _within(parts, limit):
        choice = Choice(execution.energy_mode, "not tried")
        ways = _alternatives(coordinates, config, execution, choice)
        n, d = config.n_particles, coordinates.d
        Plan(n, d, config.n_steps, passes(config), config.update, choice, parts, {}, limit, None, 0.0, ways).check()


def plan_run(
    energy: ParticleEnergy,
    config: SFPKConfig,
    execution: Execution,
    batch: Any,
    taken: int = 0,
) -> Plan:
    """The plan of a run on ``batch``, and with it the way of computing energies; the model must be guarded.

    Args:
        energy: of the run.
        config: of the run.
        execution: of the run.
        batch: on the model's device.
        taken: bytes of the run's parts that are allocated already, on the device of the particles.
    """
    problem = energy.problem
    coordinates, device = problem.coordinates, problem.theta.device
    split = device != problem.device
    limit = execution.memory_limit
    if limit is None:
        free = available_bytes(device)
        limit = None if free is None else free + taken
    together = config.update == "jacobi" and not split
    trial_bytes = _TRIAL_BYTES
    if limit is not None:
        if problem.device.type == "cuda":
            trial_bytes = max(trial_bytes, int(_TRIAL_SHARE * limit))
        trial_bytes = max(0, min(trial_bytes, int(_SHARE * limit) - sum(_state(coordinates, config).values())))
    choice = energy.choose(batch, config.n_particles, together, trial_bytes)
    parts, model_parts = _parts(coordinates, config, execution, choice, split)
    n, d = config.n_particles, coordinates.d
    readings = _PASSES[config.update] + (0.0 if config.update == "jacobi" else 2.0 * n)
    return Plan(
        particles=n,
        coordinates=d,
        steps=config.n_steps,
        passes=passes(config),
        update=config.update,
        choice=choice,
        parts=parts,
        model_parts=model_parts,
        available=limit,
        model_available=available_bytes(problem.device) if split else None,
        seconds_per_step=n * choice.seconds[choice.mode]
        + readings * n * d * _SIZES[config.particle_dtype] / _bytes_per_second(device),
        alternatives=_alternatives(coordinates, config, execution, choice),
    )


def _state(coordinates: Coordinates, config: SFPKConfig) -> dict[str, int]:
    """What lives as long as the run, and the gradients."""
    d, size = coordinates.d, coordinates.dtype.itemsize
    particle = size if config.particle_dtype == "float32" else _SIZES[config.particle_dtype]
    return {
        "particles": config.n_particles * d * particle,
        "dense weights, saliency": d * size * (1 + len(score_kinds(config) - {"mask"})),
        "gradients": d * size * (config.n_particles if config.update == "jacobi" else 1),
        "averages of gradients": d * size * config.n_particles * (most(config) > 0),
        "binary masks": d * config.n_particles * (config.pattern is not None),
    }


def _parts(
    coordinates: Coordinates, config: SFPKConfig, execution: Execution, choice: Choice, split: bool
) -> tuple[dict[str, int], dict[str, int]]:
    parts = _state(coordinates, config)
    d, size = coordinates.d, coordinates.dtype.itemsize
    overhead = _CPU_OVERHEAD if coordinates.device.type == "cpu" else 1.0
    transient = {mode: int(overhead * size) for mode, size in choice.transient.items()}
    passing = {"forward and backward": transient.get(choice.mode, 0)}
    if choice.mode != "vmap":  # of vmap they count as part of the pass
        passing = {"masked weights": coordinates.copied * size, **passing}
    if choice.mode == "cudagraph" or split:
        passing["gradient row"] = d * size
    # The trial before, and the vote at the end (score, a part of it, a mask), take the place of gradients and passes.
    vote = (2 * size + 1) * d
    if config.pattern is not None:  # scores of groups and their ranks, then scores with the best of groups lifted
        vote += (2 * size + 3) * d
    trial = transient.get("vmap", 0) + d * size * min(execution.chunk_size or config.n_particles, config.n_particles)
    if split:
        return {**parts, "crossing": d * size}, passing
    spare = parts["gradients"] + sum(passing.values())
    others = max(vote, trial if "vmap" in transient else 0)
    parts = {**parts, **passing, "trial and vote": max(0, others - spare)}
    heap = int(min(_HEAP_BYTES, _HEAP_SHARE * sum(parts.values()))) if coordinates.device.type == "cpu" else 0
    return {**parts, "held by the allocator": heap}, {}


def _alternatives(coordinates: Coordinates, config: SFPKConfig, execution: Execution, choice: Choice) -> dict[str, int]:
    """Peak bytes of smaller runs."""
    ways: dict[str, dict[str, Any]] = {}
    one_by_one = choice
    if choice.mode == "vmap":  # no batched pass, and no trial of one
        alone = {mode: size for mode, size in choice.transient.items() if mode != "vmap"}
        one_by_one = dataclasses.replace(choice, mode="sequential", transient=alone)
        ways["energy_mode='sequential'"] = {}
    if most(config) > 0:
        ways["averaging=0"] = {"averaging": 0.0}
    lean = {"update": "gauss_seidel"}
    if config.update == "jacobi":
        ways["update='gauss_seidel'"] = lean
    if config.particle_dtype != "float16":
        least = {**lean, "particle_dtype": "float16"}
        ways["update='gauss_seidel', particle_dtype='float16'"] = least
        if most(config) > 0:
            ways["update='gauss_seidel', particle_dtype='float16', averaging=0"] = {**least, "averaging": 0.0}
    if config.n_particles > 1:
        half = config.n_particles // 2
        ways[f"update='gauss_seidel', n_particles={half}"] = {**lean, "n_particles": half}
    return {
        way: sum(_parts(coordinates, config.replace(**changes), execution, one_by_one, False)[0].values())
        for way, changes in ways.items()
    }


def _within(parts: dict[str, int], limit: int | None) -> bool:
    return limit is None or sum(parts.values()) <= _SHARE * limit


def _of(limit: int | None) -> str:
    return "" if limit is None else f" of {format_bytes(limit)} available"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def _bytes_per_second(device: torch.device) -> float:
    """Of a copy: read and written bytes."""
    source = torch.zeros(_COPIED, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    times = []
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return 8.0 * _COPIED / min(times)
