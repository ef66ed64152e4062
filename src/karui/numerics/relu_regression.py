"""Regression of bounded rank through a ReLU, as of "Accelerating Very Deep Convolutional Networks" (survey 16)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from karui.numerics.regression import AffineMap, Moments, inverse, reduced_rank_regression

_ROWS = 4096


def nearest_hidden(
    fitted: Float[Tensor, "*shape"], wanted: Float[Tensor, "*shape"], penalty: float
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """The `z` that minimises `(wanted - relu(z))^2 + penalty (z - fitted)^2`, elementwise, and its cost.

    `wanted` is what comes out of a ReLU. The best negative and the best positive `z` are compared (section 2.2, i).
    """
    negative = fitted.clamp(max=0)
    positive = ((penalty * fitted + wanted) / (penalty + 1)).clamp_(min=0)
    below = wanted.square() + penalty * (negative - fitted).square_()
    above = (wanted - positive).square_() + penalty * (positive - fitted).square_()
    return torch.where(below < above, negative, positive), torch.minimum(below, above)


@dataclass(frozen=True)
class Fit:
    """A map of bounded rank through a ReLU, and how it was found.

    Settings:
        found: the map.
        start, error: error after the ReLU, relative to the wanted outputs, of the linear start and of the map.
        relaxed: the relaxed objective at the start of each penalty and after each of its sweeps.
    """

    found: AffineMap
    start: float
    error: float
    relaxed: tuple[tuple[float, ...], ...] = ()


def relu_regression(
    made: Float[Tensor, "rows inputs"],
    wanted: Float[Tensor, "rows outputs"],
    rank: int,
    penalties: Sequence[float] = (0.01, 1.0),
    sweeps: int = 25,
    *,
    variance: float = 0.0,
) -> Fit:
    """The map `M, b` of that rank with a small `||relu(wanted) - relu(M made + b)||^2` (section 2.2).

    From the linear solution it alternates, `sweeps` times for each penalty: the nearest hidden responses, then the
    best map to them, which is a reduced-rank regression. The relaxed objective never rises at a fixed penalty. Of all
    the maps, the one with the smallest error is kept.

    Args:
        made: what the map is given.
        wanted: what comes out of the ReLU, before it.
        rank: of the map.
        penalties: weights of the hidden responses' distance from the map's outputs, one after the other.
        sweeps: alternations at each.
        variance: of isotropic pairs that are added, to which hidden responses are what is given: with fewer rows than a
            map has directions it would else fit them and nothing else. Needs as many inputs as outputs.
    """
    moments = Moments.of(made, wanted)
    if variance:
        moments = moments.with_isotropic(torch.eye(made.shape[1]), variance)
    inverted = inverse(moments.centred().xx)
    scale = max(float(wanted.double().clamp(min=0).square().sum()), 1e-300)
    current = reduced_rank_regression(moments, rank, inverted)
    sweep = _look(current, made, wanted, moments, penalties[0], variance=variance)
    best, start, least, relaxed = current, sweep.error, sweep.error, []
    for penalty in penalties:
        sweep = _look(current, made, wanted, moments, penalty, variance=variance)
        trace = [sweep.objective]
        for _ in range(sweeps):
            current = reduced_rank_regression(sweep.hidden, rank, inverted)
            sweep = _look(current, made, wanted, moments, penalty, variance=variance)
            trace.append(sweep.objective)
            if sweep.error < least:
                best, least = current, sweep.error
        relaxed.append(tuple(trace))
    return Fit(best, math.sqrt(start / scale), math.sqrt(least / scale), tuple(relaxed))


@dataclass(frozen=True)
class _Look:
    """A map on all rows: the moments of what it is given and the nearest hidden responses, and two errors."""

    hidden: Moments
    objective: float
    error: float


def _look(
    current: AffineMap, made: Tensor, wanted: Tensor, moments: Moments, penalty: float, *, variance: float
) -> _Look:
    total, products = torch.zeros_like(moments.y), torch.zeros_like(moments.yx)
    objective = error = 0.0
    # A few rows at a time in float64: all of them would be larger than the network.
    for rows, outputs in zip(made.split(_ROWS), wanted.split(_ROWS), strict=True):
        x, target = rows.double(), outputs.double().clamp(min=0)
        fitted = current(x)
        hidden, cost = nearest_hidden(fitted, target, penalty)
        total += hidden.sum(0)
        products.addmm_(hidden.T, x)
        objective += float(cost.sum())
        error += float((target - fitted.clamp_(min=0)).square_().sum())
    if variance:
        weight, eye = moments.count * variance, torch.eye(len(products), dtype=products.dtype)
        products += weight * eye
        objective += penalty * weight * float((current.matrix() - eye).square().sum())
    return _Look(replace(moments, y=total, yx=products), objective, error)
