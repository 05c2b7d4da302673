"""The parts of a run that depend on what a coordinate is: a single weight, or a channel, head or neuron."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .._dispatch import where_present
from ..config import SFPKConfig
from ..coordinates.coverage import coordinates_for
from ..coordinates.flat import Coordinates
from ..execution import Execution
from ..masks.maskset import MaskSet
from ..modeling.batches import default_loss
from ..utils.arguments import check_model
from . import energy as energies
from .energy import LossFn, ParticleEnergy
from .polarizer import Polarizer, budget
from .settings import check_together
from .structured.coordinates import StructuredCoordinates
from .structured.energy import StructuredEnergy
from .structured.polarizer import StructuredPolarizer


def coordinates_of(
    model: nn.Module, config: SFPKConfig, execution: Execution, *, example_inputs: Any = None, **options: Any
) -> Coordinates:
    """The coordinates that ``config.granularity`` says.

    Args:
        model: the trained model.
        config, execution: of the run.
        example_inputs: what the model is called with; for channels, heads and neurons.
        options: of :class:`~sfpk_kernels.Coordinates`.

    Raises:
        TypeError, ValueError: as there, or for :class:`StructuredCoordinates`; example inputs for single weights, or
            none for others; settings that do not go together; a sparsity that keeps nothing.
    """
    check_model(model)
    check_together(config, execution, model)
    if config.granularity == "weight":
        if example_inputs is not None:
            raise ValueError("example_inputs: wanted None with granularity='weight', which needs no call, got some")
        coordinates = coordinates_for(model, **options)
        budget(of_covered(config, coordinates).sparsity, coordinates.d)
        return coordinates
    if example_inputs is None:
        raise TypeError(
            f"example_inputs: wanted what the model is called with, with granularity={config.granularity!r}, got None"
        )
    ignored = options.pop("ignored_layers", ())
    for name, value in options.items():
        if value:
            none = "nothing" if name == "include" else "False"
            raise ValueError(
                f"{name}: wanted {none} with granularity={config.granularity!r}, where biases and norms go with their "
                f"channels, got {value!r}"
            )
    return StructuredCoordinates(model, config, example_inputs, ignored_layers=ignored)


def of_covered(config: SFPKConfig, coordinates: Coordinates) -> SFPKConfig:
    """The settings with their sparsity as a fraction of the covered weights, of which a run is.

    Raises:
        ValueError: more of the whole model than is covered.
    """
    if config.sparsity_of == "covered":
        return config
    total = coordinates.d + coordinates.beside
    sparsity = config.sparsity * total / coordinates.d
    if not sparsity < 1:
        raise ValueError(
            f"sparsity: wanted less than {coordinates.d / total:.4g} of the whole model, of which {coordinates.d:,} of "
            f"{total:,} weights are covered, got {config.sparsity!r} with sparsity_of='model', which takes "
            f"{sparsity:.4g} of these: cover more (include, include_embeddings), see Coordinates(model).describe()"
        )
    return config.replace(sparsity=sparsity, sparsity_of="covered")


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
        model, loss_fn, coordinates, theta, precision=execution.dtype, microbatch=execution.microbatch
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
