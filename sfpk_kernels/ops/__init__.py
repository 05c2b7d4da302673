"""The mask kernels: validated public functions over registered torch ops with several backends."""

from .averaging import GradientStats, average_gradients_
from .bits import mask_hamming, mask_iou, pack_mask, popcount, unpack_mask
from .masking import Blocks, mask_gradient, masked_weights
from .selection import Cut, topk_mask, topk_threshold
from .transition import TransitionStats, transition_

__all__ = [
    "Blocks",
    "Cut",
    "GradientStats",
    "TransitionStats",
    "average_gradients_",
    "mask_gradient",
    "mask_hamming",
    "mask_iou",
    "masked_weights",
    "pack_mask",
    "popcount",
    "topk_mask",
    "topk_threshold",
    "transition_",
    "unpack_mask",
]
