"""Norms in which a kernel may be approximated, and descent in them within a structure.

Denton et al. 2014 (survey 18) weigh each weight by the gradients that it gets, or the whole kernel by the covariance of
what it sees. An approximation of the weighted kernel, weighed back, is best in that norm but leaves the structure that
makes it cheap: so here the factors themselves descend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor


class Metric(Protocol):
    """A squared norm of kernels."""

    def __call__(self, kernel: Float[Tensor, "filters channels *taps"]) -> Float[Tensor, ""]:
        """The square of the norm."""
        ...


@dataclass(frozen=True, eq=False)
class Weighted:
    """`sum_p (weights_p W_p)^2`, a weight for each entry; weights of 1 give the Frobenius norm."""

    weights: Float[Tensor, "filters channels *taps"]

    def __call__(self, kernel: Float[Tensor, "filters channels *taps"]) -> Float[Tensor, ""]:
        """The square of the norm."""
        return (self.weights * kernel).square().sum()


@dataclass(frozen=True, eq=False)
class Covariance:
    """`tr(W S W^T)` with filters as rows: the mean square of the responses to inputs of second moment `S`."""

    moment: Float[Tensor, "seen seen"]

    def __call__(self, kernel: Float[Tensor, "filters channels *taps"]) -> Float[Tensor, ""]:
        """The square of the norm."""
        flat = kernel.flatten(1)
        return ((flat @ self.moment) * flat).sum().clamp(min=0)


def descend(
    factors: Sequence[Tensor],
    kernel_of: Callable[[Sequence[Tensor]], Tensor],
    wanted: Tensor,
    metric: Metric,
    iterations: int,
) -> list[Tensor]:
    """Factors whose kernel is nearer to `wanted` in the metric than that of the given ones, or these.

    L-BFGS on all of them at once, by back-propagation. The error never rises.

    Example:
        >>> wanted, start = torch.eye(3).double(), [torch.ones(3, 1).double(), torch.ones(1, 3).double()]
        >>> found = descend(start, lambda f: f[0] @ f[1], wanted, Weighted(torch.ones(3, 3)), 50)
        >>> round(float((wanted - found[0] @ found[1]).square().sum()), 4)
        2.0
    """
    start = [factor.detach().double() for factor in factors]
    free = [factor.clone(memory_format=torch.contiguous_format).requires_grad_() for factor in start]
    scale = float(metric(wanted)) or 1.0
    settings = {"history_size": 20, "tolerance_grad": 1e-12, "tolerance_change": 1e-12}
    optimizer = torch.optim.LBFGS(free, max_iter=iterations, line_search_fn="strong_wolfe", **settings)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = metric(wanted - kernel_of(free)) / scale
        loss.backward()
        return loss

    if iterations:
        with torch.enable_grad():
            optimizer.step(closure)  # pyright: ignore[reportArgumentType]  (its loss is a tensor, which torch takes)
    found = [factor.detach() for factor in free]
    better = bool(metric(wanted - kernel_of(found)) < metric(wanted - kernel_of(start)))
    return found if better else start
