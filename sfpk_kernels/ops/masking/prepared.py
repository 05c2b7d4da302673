"""The masking ops over the same weights again and again: what they check and choose is done once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..._dispatch import choose
from ..layout import Blocks, normalize, pieces
from ._arguments import Mask
from ._ops import BACKENDS, GRADIENT, GRADIENT_BACKENDS, PRODUCT, widest


class PreparedMasking:
    """:func:`~sfpk_kernels.ops.masked_weights` and :func:`~sfpk_kernels.ops.mask_gradient` for one row and one tensor.

    Small models spend more time around the kernels than in them.

    Args:
        weights: the dense weights (W,), without gaps.
        layout: of these; no coordinate is in two blocks.
        backend: ``None`` for the fastest available, chosen now.

    Raises:
        TypeError, ValueError: a layout or backend that does not fit.
    """

    def __init__(self, weights: Tensor, layout: Sequence[Blocks], backend: str | None = None):
        flat, self.coordinates = normalize(PRODUCT, layout, [weights.numel()])
        found = pieces(flat, [weights.numel()])
        assert found is not None
        self.pieces = found
        self._weights = self.parts(weights)
        self._dtype = widest(weights)
        self._apply = choose(PRODUCT, backend or "", BACKENDS, weights)
        self._sum = choose(GRADIENT, backend or "", GRADIENT_BACKENDS, weights)

    def parts(self, tensor: Tensor) -> list[Tensor]:  # (numel,) each
        """The weights of each block in a tensor (W,)."""
        return [piece.of(tensor) for piece in self.pieces]

    def apply_(
        self,
        mask: Tensor,  # (1, d) bool, or float factors
        outs: Sequence[Tensor],  # per block (1, numel), written
    ) -> None:
        """Write θ ⊙ mask."""
        kept = Mask(mask, self.coordinates, None, None, "value", None, [0, self.coordinates])
        self._apply(self._weights, kept, self.pieces, outs)

    def gradient(
        self,
        grads: Mapping[int, Tensor],  # by block (1, numel)
    ) -> Tensor:  # (d,) fp32, fp64 where the weights are
        """Σ θ_w · ∂L/∂W_w for every coordinate; 0 for the blocks that are not given."""
        out = torch.zeros(1, self.coordinates, dtype=self._dtype, device=self._weights[0].device)
        if grads:
            self._sum([self._weights[i] for i in grads], [*grads.values()], [self.pieces[i] for i in grads], out)
        return out[0]
