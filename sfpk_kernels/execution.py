"""How a run is computed. None of it decides the mask, beyond rounding."""

from __future__ import annotations

import dataclasses
from typing import Any

from ._dispatch import BACKENDS
from .utils.settings import Settings, described, known_fields, setting

ENERGY_MODES = ("auto", "timed", "vmap", "sequential", "cudagraph")


@described
@dataclasses.dataclass(frozen=True)
class Execution(Settings):
    """How a run is computed, checked when constructed.

    None of it decides the mask, beyond rounding; what does stands in :class:`~sfpk_kernels.SFPKConfig`. With the
    defaults a run repeats bit for bit on one machine.
    """

    energy_mode: str = setting(
        "auto",
        'particles through the model at once (``"vmap"``), one by one (``"sequential"``), one by one with the pass '
        'captured and replayed (``"cudagraph"``, GPU); ``"auto"``: vmap for a model whose weights all stand in linear '
        "layers, 2²⁰ at most together, and one by one for all others, where launching is a small part of a pass or "
        'batching costs more than it saves; ``"timed"``: the fastest in a short trial before the first step. The '
        "ways differ in rounding, and two trials may choose differently.",
        choices=ENERGY_MODES,
    )
    chunk_size: int | None = setting(None, "particles per vmap call, ``None`` for all.", least=1)
    dtype: str | None = setting(
        None,
        '``"bf16"`` or ``"fp16"`` runs the model under autocast (fp16 with loss scaling), ``None`` as it is. '
        "Particles, gradients and losses stay in fp32.",
        choices=("bf16", "fp16", None),
    )
    microbatch: int | None = setting(
        None,
        "samples per forward/backward, ``None`` for whole batches. The gradients of a batch are added up, which gives "
        "the same result for losses that are means over samples; refused where batch-norm uses the statistics of the "
        'batch (``bn="batch"``), which would be those of the micro-batch.',
        least=1,
    )
    compile: bool = setting(False, "run the loss through ``torch.compile``.")
    offload: str | None = setting(
        None,
        '``"cpu"`` keeps particles, and the arithmetic on them, in host memory; masked weights and gradients cross '
        "over, one particle at a time. ``None``: on the model's device.",
        choices=("cpu", None),
    )
    memory_limit: int | None = setting(
        None,
        "bytes a run may take beyond what the process holds before; ``None`` for what the device has left. A run that "
        "will not fit is refused, with what would fit.",
        least=1,
    )
    backend: str | None = setting(
        None, "kernel backend of the ops that have it, ``None`` for the fastest available.", choices=(*BACKENDS, None)
    )

    def __new__(cls, *values: Any, **fields: Any) -> Execution:
        """Names that are no field are said to be none."""
        known_fields(cls, fields, {})
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.energy_mode == "vmap" and self.offload is not None:
            raise ValueError("energy_mode: wanted another than 'vmap' with offload, where particles go one by one")


EXECUTION_FIELDS = tuple(field.name for field in dataclasses.fields(Execution))
