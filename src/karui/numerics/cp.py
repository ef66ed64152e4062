"""Canonical polyadic decomposition (CP): a tensor as a sum of `rank` outer products, any number of modes.

`W[a, b, ...] ~ sum_r A[a, r] B[b, r] ...`, with one factor `[size, rank]` for each mode. Three ways to fit it: greedy
deflation (one component at a time, by power iterations) and alternating least squares (one factor at a time) in
`karui.numerics.cp_als`, non-linear least squares (all factors at once) in `karui.numerics.cp_nls`. All in float64.

The least squares run on numpy's views of the tensors: a kernel's products are so small that most of the time goes into
calling them, and numpy's calls take a third of torch's. What both need is written for either kind of array.

TensorLy's `parafac` is alternating least squares too. Here a sweep makes two large products instead of one for each
mode and starts from where the last two lead, a step can never raise the error (it is proximal, and undone where it
overshoots), and the components' norms are watched: at a rank that suits the
tensor ill, components of opposite sign grow without bound while their sum barely improves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Array = TypeVar("Array", Tensor, np.ndarray)

Watch = Callable[[str, int, float], None]
"""Told after each step: the solver's name, steps done from 1, and the relative error so far. It may raise to stop."""


@dataclass(frozen=True)
class CP:
    """Factors `[size, rank]`, one for each mode, and the relative Frobenius errors of the fit, step by step.

    Each component's weight is spread evenly: its column has the same norm in every factor.
    """

    factors: tuple[Float[Tensor, "size rank"], ...]
    errors: tuple[float, ...]

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.factors[0].shape[1]

    @property
    def error(self) -> float:
        """Relative Frobenius error of the approximation."""
        return self.errors[-1]

    @property
    def weights(self) -> Float[Tensor, "rank"]:
        """Frobenius norm of each component."""
        return torch.stack([factor.norm(dim=0) for factor in self.factors]).prod(0)

    @property
    def cancellation(self) -> float:
        """Root of the sum of the components' squared norms, over the norm of their sum.

        About 1 where components hardly interact; large where they cancel one another, which training suffers from.
        """
        total = math.sqrt(max(0.0, float(gram(self.factors).sum())))
        return float(self.weights.norm()) / total if total else 0.0

    def tensor(self) -> Float[Tensor, "..."]:
        """The tensor that it stands for."""
        flat = self.factors[0] @ khatri_rao(self.factors[1:]).T
        return flat.reshape([factor.shape[0] for factor in self.factors])


def khatri_rao(factors: Sequence[Float[Array, "size rank"]]) -> Float[Array, "product rank"]:
    """Column by column Kronecker product: row `(i, j, ...)` is the product of the rows `i`, `j`, ... of the factors."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, None] * factor).reshape(-1, product.shape[1])
    return product


def gram(factors: Sequence[Float[Array, "size rank"]]) -> Float[Array, "rank rank"]:
    """Inner products of the components: the element-wise product of the factors' Gram matrices."""
    product = factors[0].T @ factors[0]
    for factor in factors[1:]:
        product = product * (factor.T @ factor)
    return product


def mttkrp(
    flat: Float[Array, "first rest"], factors: Sequence[Float[Array, "size rank"]]
) -> list[Float[Array, "size rank"]]:
    """For each mode the tensor (unfolded along its first) times all other factors: two large products in all.

    Once the first mode is multiplied away, so is one after the other by small products.
    """
    rank, found, left = factors[0].shape[1], [flat @ khatri_rao(factors[1:])], factors[0].T @ flat
    for mode, factor in enumerate(factors[1:-1], 1):
        left = left.reshape(rank, len(factor), -1)
        found.append((left @ khatri_rao(factors[mode + 1 :]).T[:, :, None])[:, :, 0].T)
        left = (factor.T[:, None] @ left)[:, 0]
    return [*found, left.T]


def balanced(factors: Sequence[Float[Array, "size rank"]]) -> list[Float[Array, "size rank"]]:
    """The same components, each with its weight spread evenly over the modes."""
    norms = [((factor * factor).sum(0) ** 0.5).clip(min=1e-150) for factor in factors]
    even = norms[0] ** (1 / len(norms))
    for norm in norms[1:]:
        even = even * norm ** (1 / len(norms))
    return [factor * (even / norm) for factor, norm in zip(factors, norms, strict=True)]  # pyright: ignore[reportReturnType]


def ridge_weight(ridge: float, tensor: Float[Tensor, "..."]) -> float:
    """The weight of the factors' squared norms that means the same for a tensor of any norm and number of modes."""
    return ridge * float(tensor.norm()) ** (2 - 2 / tensor.ndim) if ridge else 0.0


def relative_error(flat: Float[np.ndarray, "first rest"], factors: Sequence[Float[np.ndarray, "size rank"]]) -> float:
    """Relative Frobenius error, from the residual itself: exact to rounding, where a formula of norms is not."""
    total = float(np.linalg.norm(flat))
    return float(np.linalg.norm(flat - factors[0] @ khatri_rao(factors[1:]).T)) / total if total else 0.0
