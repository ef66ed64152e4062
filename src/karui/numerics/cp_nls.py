"""CP by non-linear least squares: damped Gauss-Newton on all factors at once.

Lebedev et al. (survey 17) fit their kernels by `cpd_nls` of Tensorlab, a Gauss-Newton method whose systems are solved
by conjugate gradients. `J^T J` is never formed: its product with a direction needs only Gram matrices of rank x rank,
and its diagonal blocks (the element-wise product of the other modes' Gram matrices) precondition it. The damping is
Levenberg-Marquardt's, moved by the ratio of the gain seen and the gain foretold (Nielsen).

Alternating least squares crawls where components are nearly parallel; this does not, since it sees how the factors
depend on one another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from karui.numerics.cp import CP, Watch, balanced, khatri_rao, mttkrp, relative_error, ridge_weight
from karui.numerics.unfold import unfold

_CG_STEPS = 40
_REJECTED = 12
_PATIENCE = 3  # a single short step, when the damping has just risen, is no sign of the end


@dataclass
class _Point:
    """Factors, and what the steps need at them: Gram matrices, gradient, and half the squared residual with ridge."""

    factors: list[Tensor]
    grams: list[Tensor]
    gradient: list[Tensor]
    value: float


def nls(
    tensor: Float[Tensor, "..."],
    start: Sequence[Float[Tensor, "size rank"]],
    *,
    iterations: int = 100,
    tolerance: float = 1e-6,
    ridge: float = 0.0,
    watch: Watch | None = None,
) -> CP:
    """Non-linear least squares from `start`; it never ends above it.

    It stops after `iterations`, or when three lower the relative error by less than `tolerance`. `ridge` as in `als`.
    """
    flat, scale, weight = unfold(tensor, (0,)), float(tensor.norm()), ridge_weight(ridge, tensor)
    point = _at(flat, balanced(start), weight)
    errors, damping, growth = [relative_error(tensor, point.factors)], 1e-3, 2.0
    if not scale:
        return CP(tuple(point.factors), tuple(errors))
    for iteration in range(iterations):
        for _ in range(_REJECTED):
            step, foretold = _step(point, weight, damping * _size(point))
            moved = [factor + change for factor, change in zip(point.factors, step, strict=True)]
            after = _at(flat, moved, weight)
            gain = (point.value - after.value) / foretold if foretold > 0 else -1.0
            if gain > 1e-4:
                break
            damping, growth = damping * growth, 2 * growth
        else:
            break
        damping, growth = max(damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 1e-12), 2.0
        point = after
        errors.append(_error(point, weight, scale))
        if watch is not None:
            watch("least squares", iteration + 1, errors[-1])
        if len(errors) > _PATIENCE and errors[-1 - _PATIENCE] - errors[-1] < tolerance:
            break
    factors = balanced(point.factors)
    return CP(tuple(factors), (*errors[:-1], relative_error(tensor, factors)))


def gradient(
    tensor: Float[Tensor, "..."], factors: Sequence[Float[Tensor, "size rank"]], ridge: float = 0.0
) -> list[Tensor]:
    """Gradient of half the squared residual (and half `ridge` times the factors' squared norms), mode by mode."""
    return _at(unfold(tensor, (0,)), list(factors), ridge).gradient


def gauss_newton_product(
    factors: Sequence[Float[Tensor, "size rank"]],
    grams: Sequence[Float[Tensor, "rank rank"]],
    direction: Sequence[Float[Tensor, "size rank"]],
) -> list[Tensor]:
    """`J^T J` times a direction, from Gram matrices alone."""
    crossed = [way.T @ factor for way, factor in zip(direction, factors, strict=True)]
    result = []
    for mode, factor in enumerate(factors):
        mixed = torch.zeros_like(grams[0])
        for other in range(len(factors)):
            if other != mode:
                mixed += _product(grams, {mode, other}) * crossed[other]
        result.append(direction[mode] @ _product(grams, {mode}) + factor @ mixed)
    return result


def _product(grams: Sequence[Tensor], without: set[int]) -> Tensor:
    product = torch.ones_like(grams[0])
    for number, one in enumerate(grams):
        if number not in without:
            product = product * one
    return product


def _at(flat: Tensor, factors: list[Tensor], ridge: float) -> _Point:
    grams = [factor.T @ factor for factor in factors]
    inner = mttkrp(flat, factors)
    slopes = [factor @ _product(grams, {mode}) - inner[mode] + ridge * factor for mode, factor in enumerate(factors)]
    # the residual itself, since the formula of norms loses half the digits near an exact fit
    residual = flat - factors[0] @ khatri_rao(factors[1:]).T
    norms = sum(float(one.diagonal().sum()) for one in grams)
    return _Point(factors, grams, slopes, 0.5 * (float(residual.square().sum()) + ridge * norms))


def _error(point: _Point, ridge: float, scale: float) -> float:
    norms = sum(float(one.diagonal().sum()) for one in point.grams)
    return math.sqrt(max(0.0, 2 * point.value - ridge * norms)) / scale


def _size(point: _Point) -> float:
    """Mean of the diagonal of `J^T J`: what the damping is measured in."""
    blocks = [_product(point.grams, {mode}).diagonal().mean() for mode in range(len(point.grams))]
    return float(torch.stack(blocks).mean())


def _step(point: _Point, ridge: float, damping: float) -> tuple[list[Tensor], float]:
    """The damped Gauss-Newton step by preconditioned conjugate gradients, and the gain that the model foretells."""
    shift = ridge + damping
    eye = torch.eye(len(point.grams[0]), dtype=point.grams[0].dtype)
    lowers = [torch.linalg.cholesky(_product(point.grams, {mode}) + shift * eye) for mode in range(len(point.grams))]

    def precondition(residual: list[Tensor]) -> list[Tensor]:
        return [torch.cholesky_solve(one.T, lower).T for one, lower in zip(residual, lowers, strict=True)]

    step = [torch.zeros_like(one) for one in point.gradient]
    residual = [-one for one in point.gradient]
    eased = precondition(residual)
    way, size = eased, _dot(residual, eased)
    start = size
    # solved to a share that falls with the gradient, so that the last steps converge faster than linearly
    for _ in range(_CG_STEPS):
        image = gauss_newton_product(point.factors, point.grams, way)
        image = [one + shift * other for one, other in zip(image, way, strict=True)]
        curvature = _dot(way, image)
        if curvature <= 0:
            break
        length = size / curvature
        step = [one + length * other for one, other in zip(step, way, strict=True)]
        residual = [one - length * other for one, other in zip(residual, image, strict=True)]
        eased = precondition(residual)
        before, size = size, _dot(residual, eased)
        if size <= 1e-4 * start:
            break
        way = [one + size / before * other for one, other in zip(eased, way, strict=True)]
    # gain of the quadratic model without the damping: -g d - d (J'J + ridge) d / 2, by the system just solved
    straight = -_dot(point.gradient, step)
    rest = [-slope - left for slope, left in zip(point.gradient, residual, strict=True)]
    return step, straight - 0.5 * (_dot(step, rest) - damping * _dot(step, step))


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return sum(float((a * b).sum()) for a, b in zip(first, second, strict=True))
