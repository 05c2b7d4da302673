"""Coupled channels, heads and neurons: what goes together, the masked model, the smaller one, and what both cost."""

from .axes import Attribute, CoordinateGroup, Entry, Norm, Structure
from .cost import Costs
from .find import find_structure
from .gate_buffers import GateBuffers
from .gates import gate_gradient, gated_call, gated_weights, kept_statistics
from .recipe import ShrinkRecipe, shrink
from .select import select
from .sums import coordinate_sums
from .verify import verify

__all__ = [
    "Attribute",
    "CoordinateGroup",
    "Costs",
    "Entry",
    "GateBuffers",
    "Norm",
    "ShrinkRecipe",
    "Structure",
    "coordinate_sums",
    "find_structure",
    "gate_gradient",
    "gated_call",
    "gated_weights",
    "kept_statistics",
    "select",
    "shrink",
    "verify",
]
