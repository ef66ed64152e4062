"""Mean and covariance of rows that arrive batch by batch, none of which is kept.

Two parts of a sample are joined by the formula of Chan, Golub and LeVeque (1983): it subtracts no large sums from one
another, so that a small variance about a large mean is not lost. In float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from karui.errors import require


@dataclass
class Running:
    """Number, mean and scatter of the rows seen so far.

    Settings:
        count: how many rows.
        mean: of each feature.
        scatter: sum of `(x - mean)(x - mean)^T`; its diagonal alone, a vector, where covariances are not wanted.

    Example:
        >>> running = Running.zeros(2)
        >>> running.add(torch.tensor([[1.0, 0.0]]))
        >>> running.add(torch.tensor([[3.0, 0.0], [5.0, 0.0]]))
        >>> running.mean.tolist(), [round(value, 4) for value in running.variance().tolist()]
        ([3.0, 0.0], [2.6667, 0.0])
    """

    count: int
    mean: Float[Tensor, "features"]
    scatter: Tensor

    @classmethod
    def zeros(cls, features: int, *, full: bool = True) -> Running:
        """Of no rows yet; `full` for the whole covariance, otherwise variances alone."""
        shape = (features, features) if full else (features,)
        return cls(0, torch.zeros(features, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64))

    def add(self, rows: Float[Tensor, "rows features"]) -> None:
        """Count rows in."""
        if len(rows) == 0:
            return
        rows = rows.detach().to("cpu", torch.float64)
        mean = rows.mean(0)
        centred, apart = rows - mean, mean - self.mean
        total = self.count + len(rows)
        weight = self.count * len(rows) / total
        if self.scatter.ndim == 2:
            self.scatter += centred.T @ centred + weight * apart.outer(apart)
        else:
            self.scatter += centred.square().sum(0) + weight * apart.square()
        self.mean = self.mean + apart * (len(rows) / total)
        self.count = total

    def covariance(self) -> Float[Tensor, "features features"]:
        """Mean of `(x - mean)(x - mean)^T`: divided by the number of rows, as for a population."""
        require(self.scatter.ndim == 2, "only variances were counted; ask for Running.zeros(..., full=True)")
        return self.scatter / self._rows()

    def variance(self) -> Float[Tensor, "features"]:
        """Mean square distance from the mean, of each feature."""
        diagonal = self.scatter if self.scatter.ndim == 1 else self.scatter.diagonal()
        return diagonal / self._rows()

    def _rows(self) -> int:
        require(self.count > 0, "there are no samples to take moments of")
        return self.count
