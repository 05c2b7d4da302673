"""The parts of a run that depend on what a coordinate is: a single weight, or a channel, head or neuron."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._dispatch import where_present
from ..config import SFPKConfig
from ..coordinates.flat import Coordinates
from ..execution import Execution
from ..masks.maskset import MaskSet
from ..modeling.batches import default_loss
from ..structure import Structure
from ..utils.arguments import check_model
from . import energy as energies
from .energy import LossFn, ParticleEnergy
from .polarizer import Polarizer, budget
from .settings import check_together
from .structured.coordinates import StructuredCoordinates
from .structured.energy import StructuredEnergy
from .structured.polarizer import StructuredPolarizer


def coordinates_of(
    model: nn.Module,
    config: SFPKConfig,
    execution: Execution,
    *,
    example_inputs: Any = None,
    structure: Structure | None = None,
    **options: Any,
) -> Coordinates:
    """The coordinates that ``config.granularity`` says.

    Args:
        model: the trained model.
        config, execution: of the run.
        example_inputs: what the model is called with; for channels, heads and neurons.
        structure: of them, where it was found before.
        options: of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        TypeError, ValueError: as there, or for :class:`StructuredCoordinates`; example inputs for single weights, or
            none for others; settings that do not go together; a sparsity that keeps nothing.
    """
    check_model(model)
    check_together(config, execution, model)
    if config.granularity == "weight":
        if structure is not None:
            raise ValueError("structure: wanted None with granularity='weight', which has none, got some")
        if example_inputs is not None:
            raise ValueError("example_inputs: wanted None with granularity='weight', which needs no call, got some")
        coordinates = Coordinates(model, **options)
        budget(config.sparsity, coordinates.d)
        return coordinates
    if example_inputs is None:
        raise TypeError(
            f"example_inputs: wanted what the model is called with, with granularity={config.granularity!r}, got None"
        )
    ignored = options.pop("ignored_layers", ())
    for name, value in options.items():
        if value:
            raise ValueError(
                f"{name}: wanted False with granularity={config.granularity!r}, where biases and norms go with their "
                f"channels, got {value!r}"
            )
    return StructuredCoordinates(model, config, example_inputs, ignored_layers=ignored, structure=structure)


def polarizer_of(
    model: nn.Module, coordinates: Coordinates, theta: Tensor, config: SFPKConfig, execution: Execution
) -> Polarizer:
    """What makes particles binary."""
    if isinstance(coordinates, StructuredCoordinates):
        return StructuredPolarizer(coordinates, coordinates.saliency(model), config.signed_score)
    backend = where_present(execution.backend)
    return Polarizer(coordinates, theta, config.selection, backend, config.signed_score, config.pattern)


def energy_of(
    model: nn.Module, loss_fn: LossFn | None, coordinates: Coordinates, theta: Tensor, execution: Execution
) -> ParticleEnergy:
    """The energies of a run."""
    if not isinstance(coordinates, StructuredCoordinates):
        return energies.energy_of(model, loss_fn, coordinates, theta, execution)
    loss_fn = loss_fn or default_loss
    return StructuredEnergy(
        model,
        loss_fn,
        coordinates,
        theta,
        backend=where_present(execution.backend),
        precision=execution.dtype,
        microbatch=execution.microbatch,
    )


def masks_of(
    flat: Tensor,  # (d,) bool
    coordinates: Coordinates,
) -> MaskSet:
    """The masks of the model's weights for what is kept."""
    if isinstance(coordinates, StructuredCoordinates):
        return coordinates.masks_of(flat)
    return MaskSet.from_flat(flat, coordinates)


def flat_of(masks: MaskSet, coordinates: Coordinates) -> Tensor:  # (d,) bool, on the CPU
    """What :func:`masks_of` made these masks of."""
    return coordinates.keep_of(masks) if isinstance(coordinates, StructuredCoordinates) else masks.flat()


def structure_fingerprint(coordinates: Coordinates) -> str | None:
    """Of channels, heads and neurons; single weights go by the names of their tensors."""
    return coordinates.fingerprint() if isinstance(coordinates, StructuredCoordinates) else None
