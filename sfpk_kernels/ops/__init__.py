"""The mask kernels: validated public functions over registered torch ops with several backends."""

from .masking import masked_weights
from .selection import Cut, topk_mask, topk_threshold
from .transition import TransitionStats, transition_

__all__ = ["Cut", "TransitionStats", "masked_weights", "topk_mask", "topk_threshold", "transition_"]
