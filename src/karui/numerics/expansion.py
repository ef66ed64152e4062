"""Kernels `last design(first)` fitted to responses: the data reconstruction of "Low Rank Expansions" (survey 13).

A factored layer is linear in its last factor, whose inputs are the maps that the first ones make. Its error on any
number of responses is a function of their second moments alone, so it is minimised exactly on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from karui.numerics.regression import Moments, inverse

Design = Callable[[Sequence[Tensor], int], Tensor]
"""From the first factors and a group's number: what its features see, `[features, inputs]`."""


@dataclass(frozen=True)
class Expansion:
    """First factors, and for each group the last one `[outputs, features]`; `error` is relative, on centred responses.

    `errors` are those at the start and after each step.
    """

    first: tuple[Tensor, ...]
    last: tuple[Float[Tensor, "outputs features"], ...]
    errors: tuple[float, ...]

    def offsets(self, moments: Sequence[Moments], design: Design) -> list[Float[Tensor, "outputs"]]:
        """For each group what must be added so that responses agree on average."""
        means = [one.centred() for one in moments]
        return [
            mean.y - last @ (design(self.first, group) @ mean.x)
            for group, (mean, last) in enumerate(zip(means, self.last, strict=True))
        ]


def fit_expansion(
    moments: Sequence[Moments],
    design: Design,
    first: Sequence[Tensor],
    last: Sequence[Float[Tensor, "outputs features"]],
    iterations: int,
) -> Expansion:
    """Factors with a small `sum ||y - last design(first) x - offset||^2` over all groups and pairs, offsets free.

    Gradient descent by back-propagation on all factors at once (L-BFGS, full batch), between two exact solutions for
    the last factor. The error never rises: what does not help is not taken.

    Args:
        moments: of each group's pairs of window and response.
        design: how the first factors make features.
        first: first factors to start from.
        last: last factors to start from, of each group.
        iterations: most steps of descent.
    """
    centred = [one.centred() for one in moments]
    total = max(sum(float(one.yy.trace()) for one in centred), 1e-300)
    current = Expansion(tuple(t.double() for t in first), tuple(t.double() for t in last), ())
    current = replace(current, errors=(_error(centred, design, current.first, current.last, total),))
    current = _better(current, _solved(centred, design, current), centred, design, total)
    if iterations:
        current = _better(current, _descended(centred, design, current, iterations, total), centred, design, total)
        current = _better(current, _solved(centred, design, current), centred, design, total)
    return current


def _better(
    current: Expansion, other: Expansion, centred: Sequence[Moments], design: Design, total: float
) -> Expansion:
    error = _error(centred, design, other.first, other.last, total)
    if not error < current.errors[-1]:
        return replace(current, errors=(*current.errors, current.errors[-1]))
    return replace(other, errors=(*current.errors, error))


def _error(
    centred: Sequence[Moments], design: Design, first: Sequence[Tensor], last: Sequence[Tensor], total: float
) -> float:
    with torch.no_grad():
        return float(_loss(centred, design, first, last, total).clamp(min=0).sqrt())


def _loss(
    centred: Sequence[Moments], design: Design, first: Sequence[Tensor], last: Sequence[Tensor], total: float
) -> Tensor:
    """Squared error of all groups, relative to the responses' own variance."""
    lost = torch.zeros((), dtype=torch.float64)
    for group, (one, outer) in enumerate(zip(centred, last, strict=True)):
        kernel = outer @ design(first, group)
        lost = lost + one.yy.trace() + (kernel * (kernel @ one.xx - 2 * one.yx)).sum()
    return lost / total


def _solved(centred: Sequence[Moments], design: Design, current: Expansion) -> Expansion:
    """The best last factors for these first ones."""
    last = []
    for group, one in enumerate(centred):
        seen = design(current.first, group)
        last.append(one.yx @ seen.T @ inverse(seen @ one.xx @ seen.T))
    return replace(current, last=tuple(last))


def _descended(
    centred: Sequence[Moments], design: Design, current: Expansion, iterations: int, total: float
) -> Expansion:
    first, last = (
        [t.clone(memory_format=torch.contiguous_format).requires_grad_() for t in side]
        for side in (current.first, current.last)
    )
    optimizer = torch.optim.LBFGS(
        [*first, *last],
        max_iter=iterations,
        history_size=20,
        tolerance_grad=1e-12,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(centred, design, first, last, total)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # pyright: ignore[reportArgumentType]  (its loss is a tensor, which torch takes)
    return replace(current, first=tuple(t.detach() for t in first), last=tuple(t.detach() for t in last))
