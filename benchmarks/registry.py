"""The registry as data: op → shapes → providers, and the targets rows are judged by.

An :class:`Op` builds a :class:`Case` (inputs of one shape, and the test of a result) and lists its providers, each a
way to compute the same thing. Adding a rival or a shape is one entry in a ``cases_*.py``.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

Shape = Mapping[str, Any]  # e.g. {"n": 10, "d": 4_000_000}
Call = Callable[[], Any]  # one timed call

NAIVE = "naive"
SIZES = ("quick", "default", "full")


@dataclass
class Case:
    """One op at one shape: inputs, what they cost at least, and whether a result is right."""

    shape: Shape
    inputs: Any  # what the op's providers take, cases_*.py know its type
    bytes_moved: int  # read and written by the best implementation conceivable
    check: Callable[[Any], str | None]  # what is wrong with a result, None if nothing
    input_bytes: int  # held by the inputs: how many copies a rotation past the caches takes
    forget: Callable[[], None] = lambda: None  # frees what only check needs


@dataclass(frozen=True)
class Provider:
    """One way to compute an op."""

    name: str
    make: Callable[[Case], Call]  # buffers and copies are made here, outside of the timing
    # Why it cannot run at a shape on a device here ("needs pykeops"), or None.
    why_not: Callable[[Shape, torch.device], str | None] = lambda shape, device: None

    @property
    def ours(self) -> bool:
        """Whether it is one of this package's backends."""
        return self.name.startswith("ours")


@dataclass(frozen=True)
class Op:
    """An operation, its shapes by size of run, and its providers."""

    name: str
    what: str  # one line for tables
    shapes: Mapping[str, tuple[Shape, ...]]  # "quick", "default", "full" on a CPU; with "cuda " in front on a GPU
    build: Callable[[Shape, torch.device], Case]
    providers: tuple[Provider, ...]
    group: str = "ops"
    axis: str | None = None  # scaling: the dimension that grows

    def shapes_for(self, size: str, device: torch.device) -> tuple[Shape, ...]:
        """The shapes of a run of that size; a full one has those of a default one, too."""
        prefix = "cuda " if device.type == "cuda" and f"cuda {size}" in self.shapes else ""
        shapes = self.shapes[prefix + size]
        if size == "full":
            usual = self.shapes_for("default", device)
            shapes = (*usual, *(shape for shape in shapes if shape not in usual))
        return shapes


@dataclass(frozen=True)
class Target:
    """What a GPU row should reach; the best of our backends is judged."""

    name: str
    op: str
    shape: Shape  # what the row's shape must contain
    measure: str  # "ceiling_share" or "ratio_to_naive", at least; "copy_passes", at most
    value: float

    def reached(self, row: Mapping[str, Any]) -> float:
        """The row's value in the target's measure."""
        if self.measure == "copy_passes":
            # So many times n·d·4 bytes could have been copied (read and written bytes both count) in the row's time.
            passes = 4 * row["shape"]["n"] * row["shape"]["d"]
            return float(row["bytes"] / row["ceiling_share"] / passes)
        return float(row[self.measure])

    def met(self, row: Mapping[str, Any]) -> bool:
        """Whether the row reaches the target."""
        reached = self.reached(row)
        return reached <= self.value if self.measure == "copy_passes" else reached >= self.value

    def judges(self, row: Mapping[str, Any]) -> bool:
        """Whether it is about this row (the device is looked at elsewhere)."""
        return (
            row["op"] == self.op
            and row["status"] == "ok"
            and str(row["provider"]).startswith("ours")
            and row.get(self.measure if self.measure != "copy_passes" else "ceiling_share") is not None
            and all(row["shape"].get(name) == value for name, value in self.shape.items())
        )


RESNET50 = {"n": 10, "d": 25_600_000}
TARGETS = (
    Target("transition: at least 80 % of the copy bandwidth", "transition", RESNET50, "ceiling_share", 0.80),
    Target("selection: at least 75 % of the copy bandwidth", "selection", RESNET50, "ceiling_share", 0.75),
    Target("apply: at least 75 % of the copy bandwidth", "apply", RESNET50, "ceiling_share", 0.75),
    Target("apply by cut: at least 75 % of the copy bandwidth", "apply_cut", RESNET50, "ceiling_share", 0.75),
    Target("arithmetic of a step: at most 10 passes of n·d·4 bytes", "step", RESNET50, "copy_passes", 10.0),
    Target("ResNet-50 step, batch 256: at least 5 × naive", "end_to_end",
           {"model": "resnet-50", "particles": 10, "batch": 256}, "ratio_to_naive", 5.0),
)  # fmt: skip


def ours(
    op: str,  # the folder in sfpk_kernels/ops, "bits.pack_mask" where its functions have backends of their own
    make: Callable[[Case, str], Call],  # the call with a given backend
    variant: str = "",  # e.g. "warm"
    backends: tuple[str, ...] = ("cpp", "cuda", "triton", "reference"),
    largest_reference: int = 5_000_000,  # n·d
) -> tuple[Provider, ...]:
    """One provider per backend of an op."""

    def provider(backend: str) -> Provider:
        def why_not(shape: Shape, device: torch.device) -> str | None:
            if backend == "triton" and device.type != "cuda":
                return "Triton kernels run on GPUs; their interpreter is not timed"
            if backend == "reference" and shape.get("n", 1) * shape["d"] > largest_reference:
                return "the reference takes too long at this size"
            folder, _, function = op.partition(".")
            available = importlib.import_module(f"sfpk_kernels.ops.{folder}").BACKENDS
            available = available[function] if function else available
            reason: str | None = available[backend].why_not(torch.ones(1, 1, dtype=torch.float32, device=device))
            return reason.splitlines()[0] if reason else None

        name = f"ours[{backend}]" + (f" {variant}" if variant else "")
        return Provider(name, lambda case: make(case, backend), why_not)

    return tuple(provider(backend) for backend in backends)


def compiled(make: Callable[[Case], Call], why_not: Any = None) -> Provider:
    """The provider ``torch.compile``."""

    def reason(shape: Shape, device: torch.device) -> str | None:
        return cannot_compile(device.type) or (why_not(shape, device) if why_not else None)

    return Provider("torch.compile", make, reason)


@cache
def cannot_compile(device_type: str) -> str | None:
    """Why torch.compile cannot run here, or None."""
    if sys.platform == "win32":
        return "torch.compile: not on Windows"
    if device_type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        return "torch.compile needs a C++ compiler"
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton"
    return None


def at_most(most: float, reason: str = "takes minutes at this size") -> Callable[[Shape, torch.device], str | None]:
    """A ``why_not`` for providers that are too slow from some n·d on."""
    return lambda shape, device: reason if shape.get("n", 1) * shape["d"] > most else None


@dataclass
class Seeded:
    """Random inputs that are the same whenever a case is built again."""

    device: torch.device
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(0)

    def rand(self, *shape: int) -> torch.Tensor:
        """Uniform in [0, 1), fp32."""
        return torch.rand(*shape, generator=self.generator, dtype=torch.float32, device=self.device)

    def randn(self, *shape: int) -> torch.Tensor:
        """Normal, fp32."""
        return torch.randn(*shape, generator=self.generator, dtype=torch.float32, device=self.device)


def all_ops() -> dict[str, Op]:
    """Every op of the suite by name, in the order they are measured."""
    from .cases import averaging as cases_averaging
    from .cases import masking as cases_masking
    from .cases import scaling as cases_scaling
    from .cases import selection as cases_selection
    from .cases import step as cases_step
    from .cases import structured as cases_structured
    from .cases import structured_step as cases_structured_step
    from .cases import transition as cases_transition

    modules = (
        cases_transition, cases_averaging, cases_selection, cases_masking, cases_step, cases_scaling, cases_structured,
        cases_structured_step,
    )  # fmt: skip
    return {op.name: op for module in modules for op in module.OPS}
