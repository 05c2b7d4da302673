"""The mask kernels: validated public functions over registered torch ops with several backends."""

from .masking import masked_weights
from .selection import topk_mask
from .transition import TransitionStats, transition_

__all__ = ["TransitionStats", "masked_weights", "topk_mask", "transition_"]
