"""Truncated singular value decomposition, and the policies that choose its rank."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from karui.errors import require
from karui.numerics.evbmf import evbmf_of_values


@dataclass(frozen=True)
class LowRank:
    """A matrix `left diag(values) right` of rank `k`, and the singular values that were left out.

    Shapes: `left` `[rows, k]`, `values` `[k]`, `right` `[k, columns]`, all in float64.
    """

    left: Float[Tensor, "rows rank"]
    values: Float[Tensor, "rank"]
    right: Float[Tensor, "rank columns"]
    discarded: Float[Tensor, "rest"]

    @property
    def rank(self) -> int:
        """Its rank."""
        return len(self.values)

    @property
    def error(self) -> float:
        """Relative Frobenius error: the root of the share of squared energy that was left out."""
        kept, lost = float(self.values.square().sum()), float(self.discarded.square().sum())
        return math.sqrt(lost / (kept + lost)) if lost else 0.0

    def matrix(self) -> Float[Tensor, "rows columns"]:
        """The product."""
        return (self.left * self.values) @ self.right

    def factors(self, *, balanced: bool = False) -> tuple[Float[Tensor, "rows rank"], Float[Tensor, "rank columns"]]:
        """Two matrices whose product it is: the values go to the right one, or their roots to both (`balanced`)."""
        if not balanced:
            return self.left, self.values.unsqueeze(1) * self.right
        root = self.values.sqrt()
        return self.left * root, root.unsqueeze(1) * self.right


def truncated_svd(matrix: Float[Tensor, "rows columns"], rank: int) -> LowRank:
    """The best approximation of that rank in the Frobenius and in the spectral norm (Eckart, Young, Mirsky).

    Example:
        >>> truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2).discarded.tolist()
        [1.0]
    """
    require(1 <= rank <= min(matrix.shape), f"rank is {rank}; give 1 to {min(matrix.shape)} for {tuple(matrix.shape)}")
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return LowRank(left[:, :rank], values[:rank], right[:rank], values[rank:])


def factored_size(shape: tuple[int, int], rank: int) -> int:
    """Numbers in the two factors of a matrix of that shape: `rank (rows + columns)`."""
    return rank * (shape[0] + shape[1])


def saves(shape: tuple[int, int], rank: int) -> bool:
    """Whether two factors hold fewer numbers than the matrix itself."""
    return factored_size(shape, rank) < shape[0] * shape[1]


class RankPolicy(Protocol):
    """Chooses a rank from all the singular values (falling) of a matrix and its shape: a number from 1 to full."""

    def __call__(self, values: Float[Tensor, "count"], shape: tuple[int, int]) -> int:
        """The rank to keep."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The same rank for every matrix, or the full one where that is smaller."""

    rank: int

    def __call__(self, values: Float[Tensor, "count"], shape: tuple[int, int]) -> int:
        """The rank to keep."""
        del shape
        return min(self.rank, len(values))


@dataclass(frozen=True)
class Energy:
    """The smallest rank whose singular values hold `share` of the sum of all; of the sum of squares if `squared`.

    Example:
        >>> values = torch.tensor([4.0, 3.0, 2.0, 1.0])
        >>> Energy(0.7)(values, (4, 4)), Energy(0.8)(values, (4, 4)), Energy(0.8, squared=True)(values, (4, 4))
        (2, 3, 2)
    """

    share: float
    squared: bool = False

    def __call__(self, values: Float[Tensor, "count"], shape: tuple[int, int]) -> int:
        """The rank to keep."""
        del shape
        mass = values.double().square() if self.squared else values.double()
        held = mass.cumsum(0)
        total = float(held[-1])
        # Rounding in the sum must not ask for one value more than an exact sum would.
        enough = held >= self.share * total - 1e-12 * total
        return 1 + int((~enough).sum())


@dataclass(frozen=True)
class Error:
    """The smallest rank with a relative error of at most `limit` in the Frobenius norm.

    Example:
        >>> Error(0.5)(torch.tensor([4.0, 3.0, 2.0, 1.0]), (4, 4))
        2
    """

    limit: float

    def __call__(self, values: Float[Tensor, "count"], shape: tuple[int, int]) -> int:
        """The rank to keep, at least 1."""
        return Energy(1 - self.limit**2, squared=True)(values, shape)


@dataclass(frozen=True)
class Parameters:
    """The largest rank whose two factors hold at most `share` of the matrix's numbers (at least 1).

    That is the same share of its multiply-adds, since both factors are applied where the matrix was.
    """

    share: float

    def __call__(self, values: Float[Tensor, "count"], shape: tuple[int, int]) -> int:
        """The rank to keep."""
        room = math.floor(self.share * shape[0] * shape[1] / (shape[0] + shape[1]) + 1e-9)
        return min(max(1, room), len(values))


@dataclass(frozen=True)
class Worth:
    """The singular values whose share of the squared energy, for each parameter of their factors, is above a threshold.

    With one threshold for several matrices, no other ranks of the same total size hold a larger sum of such shares.
    """

    threshold: float

    def __call__(self, values: Float[Tensor, "count"], shape: tuple[int, int]) -> int:
        """The rank to keep, at least 1."""
        shares = values.double().square() / values.double().square().sum().clamp(min=1e-300)
        return max(1, int((shares > self.threshold * sum(shape)).sum()))


@dataclass(frozen=True)
class Vbmf:
    """The rank that variational Bayes finds in the noise (`karui.numerics.evbmf`), at least 1."""

    def __call__(self, values: Float[Tensor, "count"], shape: tuple[int, int]) -> int:
        """The rank to keep."""
        return max(1, evbmf_of_values(values, shape).rank)
