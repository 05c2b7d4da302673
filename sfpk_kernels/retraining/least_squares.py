"""Least squares on the kept weights of one layer: moments of its inputs and wanted outputs, and their solution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = 1e-30


class Moments:
    """Sums over samples of the inputs x and wanted outputs y of a layer, for G groups of C inputs and R outputs.

    Products are taken in the dtype of what comes (fp32, or fp64) and added up over batches in fp64.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._sums: list[Tensor] = []  # Σ x xᵀ (G, C, C), Σ y xᵀ (G, R, C), Σ x (G, C), Σ y (G, R), Σ y² (G, R)

    def add(
        self,
        x: Tensor,  # (G, samples, C)
        y: Tensor,  # (G, samples, R)
    ) -> None:
        """More samples."""
        self.samples += x.shape[1]
        products = [x.mT @ x, y.mT @ x, x.sum(1), y.sum(1), y.square().sum(1)]
        if self._sums:
            for total, product in zip(self._sums, products, strict=True):
                total += product
        else:
            self._sums = [product.double() for product in products]

    @property
    def finite(self) -> bool:
        """Whether all of them are."""
        return all(bool(total.isfinite().all()) for total in self._sums)

    def problem(self, centred: bool) -> LeastSquares:
        """Of a layer with a bias, which takes the means away, or of one without."""
        xx, yx, x, y, yy = self._sums
        n = self.samples
        if not centred:
            return LeastSquares(xx / n, yx / n, torch.zeros_like(x), torch.zeros_like(y), yy / n)
        x, y = x / n, y / n
        return LeastSquares(
            xx / n - x.unsqueeze(2) * x.unsqueeze(1),
            yx / n - y.unsqueeze(2) * x.unsqueeze(1),
            x,
            y,
            (yy / n - y.square()).clamp(min=0),
        )


@dataclass(frozen=True)
class LeastSquares:
    """min over W and b of the mean of ‖y - W x - b‖², in moments about ``x_mean`` and ``y_mean``, in fp64."""

    xx: Tensor  # (G, C, C)
    yx: Tensor  # (G, R, C)
    x_mean: Tensor  # (G, C); zero for a layer without a bias
    y_mean: Tensor  # (G, R)
    yy: Tensor  # (G, R)

    def bias(self, weight: Tensor) -> Tensor:  # (G, R, C) -> (G, R)
        """The best one beside a weight: mean(y) - W mean(x)."""
        return self.y_mean - torch.einsum("grc,gc->gr", weight.double(), self.x_mean)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """The mean of ‖y - W x - b‖² as a share of the mean of ‖y - mean(y)‖² (‖y‖² without a bias)."""
        weight = weight.double()
        rows = self.yy - 2 * (weight * self.yx).sum(2) + (weight * (weight @ self.xx)).sum(2)
        if bias is not None:
            rows = rows + (self.bias(weight) - bias.double()).square()
        return float(rows.sum().clamp(min=0) / self.yy.sum().clamp(min=_TINY))

    def solve(
        self,
        start: Tensor,  # (G, R, C), the masked weights
        keep: Tensor,  # (G, R, C) bool
        damping: float,
        iterations: int,
    ) -> Tensor:  # (G, R, C), in the dtype of start, 0 where removed
        """The kept weights of every row, by conjugate gradients on (xx + λI) restricted to each row's kept columns.

        λ is ``damping`` times the mean diagonal of xx, and pulls towards ``start``. All rows go at once, whatever they
        keep, preconditioned with the diagonal (Jacobi); a row of k weights is exact after k iterations but for
        rounding, and one that is solved stays. In the dtype of ``start``. An iteration takes 2·G·R·C² operations.
        """
        mean = self.xx.diagonal(dim1=1, dim2=2).mean(1).clamp(min=_TINY).view(-1, 1, 1)  # so that fp32 is enough
        matrix = self.xx / mean
        matrix.diagonal(dim1=1, dim2=2).add_(damping)
        matrix = matrix.to(start.dtype)
        wanted = (self.yx / mean + damping * start.double()).to(start.dtype)
        inverse = matrix.diagonal(dim1=1, dim2=2).reciprocal().unsqueeze(1)
        solution = start * keep
        rest = (wanted - solution @ matrix) * keep
        least = torch.finfo(start.dtype).eps ** 2 * (wanted * keep).square().sum(2, keepdim=True)
        direction = rest * inverse
        power = (rest * direction).sum(2, keepdim=True)
        for _ in range(iterations):
            image = (direction @ matrix) * keep
            curvature = (direction * image).sum(2, keepdim=True)
            going = (curvature > 0) & (rest.square().sum(2, keepdim=True) > least)
            if not bool(going.any()):
                break
            length = torch.where(going, power / torch.where(going, curvature, 1.0), 0.0)
            solution += length * direction
            rest -= length * image
            scaled = rest * inverse
            new_power = (rest * scaled).sum(2, keepdim=True)
            ratio = torch.where(going, new_power / torch.where(going, power, 1.0), 0.0)
            direction = torch.where(going, scaled + ratio * direction, 0.0)
            power = new_power
        return solution * keep
