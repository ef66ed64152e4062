"""Least squares from streamed second moments, also at a bounded rank.

The error of an affine map on any number of samples depends on nothing but the sums of `x`, `y`, `x x^T`, `y x^T` and
`y y^T`. They are added up batch by batch, so that a layer is fitted to hundreds of thousands of responses while none
is kept. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from karui.errors import require

CUT = 1e-10
"""Directions of the regressor with less than this share of the largest variance count as constant."""


@dataclass
class Moments:
    """First and second moments of pairs of a regressor `x` and a target `y`, summed.

    Settings:
        count: how many pairs.
        x, y: their sums.
        xx, yx, yy: sums of `x x^T`, `y x^T` and `y y^T`.

    Example:
        >>> moments = Moments.zeros(3, 2)
        >>> moments.add(torch.ones(5, 3), torch.zeros(5, 2))
        >>> moments.count, moments.xx[0].tolist()
        (5, [5.0, 5.0, 5.0])
    """

    count: int
    x: Float[Tensor, "inputs"]
    y: Float[Tensor, "outputs"]
    xx: Float[Tensor, "inputs inputs"]
    yx: Float[Tensor, "outputs inputs"]
    yy: Float[Tensor, "outputs outputs"]

    @classmethod
    def zeros(cls, inputs: int, outputs: int) -> Moments:
        """Of no pairs yet."""
        shapes = ((inputs,), (outputs,), (inputs, inputs), (outputs, inputs), (outputs, outputs))
        return cls(0, *(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    @classmethod
    def of(cls, x: Float[Tensor, "rows inputs"], y: Float[Tensor, "rows outputs"]) -> Moments:
        """Of these pairs."""
        moments = cls.zeros(x.shape[1], y.shape[1])
        moments.add(x, y)
        return moments

    def add(self, x: Float[Tensor, "rows inputs"], y: Float[Tensor, "rows outputs"]) -> None:
        """Count pairs in, one a row."""
        x, y = x.double(), y.double()
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.yx.addmm_(y.T, x)
        self.yy.addmm_(y.T, y)

    def centred(self) -> Moments:
        """The means in place of the sums, and covariances in place of the products."""
        require(self.count > 0, "there are no samples to take moments of")
        x, y = self.x / self.count, self.y / self.count
        products = (
            (self.xx / self.count, x, x),
            (self.yx / self.count, y, x),
            (self.yy / self.count, y, y),
        )
        return Moments(self.count, x, y, *(total - left.outer(right) for total, left, right in products))

    def with_isotropic(self, weight: Float[Tensor, "outputs inputs"], variance: float) -> Moments:
        """With as many pairs again of inputs around zero, of this variance in every direction, and `weight`'s outputs.

        A fit then stays near `weight` where the inputs hardly vary, in place of being free to take any size there.
        """
        weight, total = weight.detach().double().cpu(), self.count * variance
        xx = self.xx + total * torch.eye(len(self.xx), dtype=torch.float64)
        return replace(self, xx=xx, yx=self.yx + total * weight, yy=self.yy + total * weight @ weight.T)

    def error(self, weight: Float[Tensor, "outputs inputs"], offset: Float[Tensor, "outputs"] | None = None) -> float:
        """Sum over the pairs of `||y - weight x - offset||^2`."""
        cross, square = (weight * self.yx).sum(), ((weight @ self.xx) * weight).sum()
        total = self.yy.trace() - 2 * cross + square
        if offset is not None:
            total = total - 2 * offset @ (self.y - weight @ self.x) + self.count * offset @ offset
        return max(0.0, float(total))


@dataclass(frozen=True)
class AffineMap:
    """The map `x -> left right x + offset`; `left` has orthonormal columns."""

    left: Float[Tensor, "outputs rank"]
    right: Float[Tensor, "rank inputs"]
    offset: Float[Tensor, "outputs"]

    def matrix(self) -> Float[Tensor, "outputs inputs"]:
        """The product of the factors."""
        return self.left @ self.right

    def __call__(self, x: Float[Tensor, "rows inputs"]) -> Float[Tensor, "rows outputs"]:
        """The map, a row a sample."""
        return x @ self.right.T @ self.left.T + self.offset


def inverse(covariance: Float[Tensor, "size size"]) -> Float[Tensor, "size size"]:
    """Its pseudo-inverse: directions in which nothing varies are left out, by a cut relative to the largest."""
    return torch.linalg.pinv(covariance, rtol=CUT, hermitian=True)


def reduced_rank_regression(moments: Moments, rank: int, inverted: Tensor | None = None) -> AffineMap:
    """The affine map of that rank with the least squared error on the pairs (Izenman 1975).

    With `L` the least-squares solution on centred data and `C` the covariance of the regressor, the leading
    eigenvectors `V` of `L C L^T` span the best outputs, and the map is `V V^T L`. Where target and regressor are one,
    that is their principal component analysis.

    Args:
        moments: of the pairs.
        rank: 1 to the number of outputs.
        inverted: pseudo-inverse of the regressor's covariance, if it is known already.

    Example:
        >>> x = torch.randn(100, 4, dtype=torch.float64)
        >>> torch.allclose(reduced_rank_regression(Moments.of(x, x), 4).matrix(), torch.eye(4).double())
        True
    """
    require(1 <= rank <= len(moments.y), f"rank is {rank}; give 1 to {len(moments.y)}, the number of outputs")
    centred = moments.centred()
    inverted = inverse(centred.xx) if inverted is None else inverted
    least = centred.yx @ inverted
    # Explained covariance; in exact arithmetic symmetric, and eigh reads one triangle only.
    explained = least @ centred.yx.T
    _, vectors = torch.linalg.eigh((explained + explained.T) / 2)
    left = vectors[:, -rank:].flip(1)
    right = left.T @ least
    return AffineMap(left, right, centred.y - left @ (right @ centred.x))
