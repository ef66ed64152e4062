"""CP by non-linear least squares: damped Gauss-Newton on all factors at once.

Lebedev et al. (survey 17) fit their kernels by `cpd_nls` of Tensorlab, a Gauss-Newton method. Its systems are in
`karui.numerics.cp_normal`: solved directly where they are small, else by conjugate gradients. The damping is
Levenberg-Marquardt's, moved by the ratio of the gain seen and the gain foretold (Nielsen).

Alternating least squares crawls where components are nearly parallel; this does not, since it sees how the factors
depend on one another. Where components cancel one another, the valley that leads down is narrow and bends, and straight
steps along it must be short. So a step that is solved for directly is bent by its second-order correction, which costs
one more right-hand side (Transtrum, Sethna 2012, "Improvements to the Levenberg-Marquardt algorithm for nonlinear
least-squares minimization").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from karui.numerics.cp import CP, Watch, balanced, khatri_rao, mttkrp, ridge_weight
from karui.numerics.cp_normal import Normal, dot, solver

_REJECTED = 12
_PATIENCE = 3  # a single short step, when the damping has just risen, is no sign of the end
# Longest correction of a step, relative to it: beyond, the second order says nothing of the way (Transtrum, Sethna).
_BEND = 0.375


@dataclass
class _Point:
    """Factors, and what the steps need at them: Gram matrices, gradient, and half the squared residual with ridge."""

    factors: list[np.ndarray]
    grams: list[np.ndarray]
    gradient: list[np.ndarray]
    residual: float
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
    # the largest mode first: direct solutions eliminate it
    order = sorted(range(tensor.ndim), key=lambda mode: -tensor.shape[mode])
    flat = tensor.permute(order).reshape(tensor.shape[order[0]], -1).numpy()
    scale, weight = float(np.linalg.norm(flat)), ridge_weight(ridge, tensor)
    point = _at(flat, balanced([start[mode].numpy() for mode in order]), weight)
    errors, damping, growth = [point.residual / scale if scale else 0.0], 1e-3, 2.0
    for iteration in range(iterations if scale else 0):
        normal = Normal(point.factors, point.grams)
        for _ in range(_REJECTED):
            step, foretold = _step(normal, point.gradient, weight, damping * normal.size)
            after = _at(flat, [factor + change for factor, change in zip(point.factors, step, strict=True)], weight)
            gain = (point.value - after.value) / foretold if foretold > 0 else -1.0
            if gain > 1e-4:
                break
            damping, growth = damping * growth, 2 * growth
        else:
            break
        damping, growth = max(damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 1e-12), 2.0
        point = after
        errors.append(point.residual / scale)
        if watch is not None:
            watch("least squares", iteration + 1, errors[-1])
        if len(errors) > _PATIENCE and errors[-1 - _PATIENCE] - errors[-1] < tolerance:
            break
    factors = [torch.from_numpy(factor) for factor in balanced(point.factors)]
    return CP(tuple(factors[order.index(mode)] for mode in range(tensor.ndim)), tuple(errors))


def gradient(
    tensor: Float[Tensor, "..."], factors: Sequence[Float[Tensor, "size rank"]], ridge: float = 0.0
) -> list[Tensor]:
    """Gradient of half the squared residual (and half `ridge` times the factors' squared norms), mode by mode."""
    flat = tensor.reshape(len(tensor), -1).numpy()
    return [torch.from_numpy(slope) for slope in _at(flat, [factor.numpy() for factor in factors], ridge).gradient]


def _at(flat: np.ndarray, factors: list[np.ndarray], ridge: float) -> _Point:
    # the residual itself, since the formula of norms loses half the digits near an exact fit
    left = factors[0] @ khatri_rao(factors[1:]).T - flat
    slopes = [slope + ridge * factor for slope, factor in zip(mttkrp(left, factors), factors, strict=True)]
    square = float(np.vdot(left, left))
    value = 0.5 * (square + ridge * dot(factors, factors))
    return _Point(factors, [factor.T @ factor for factor in factors], slopes, math.sqrt(square), value)


def _step(normal: Normal, slopes: list[np.ndarray], ridge: float, damping: float) -> tuple[list[np.ndarray], float]:
    """The damped Gauss-Newton step, bent if that is cheap, and the gain that is foretold of the straight one."""
    shift = ridge + damping
    solve = solver(normal, shift)
    if solve is None:
        return [np.zeros_like(slope) for slope in slopes], 0.0
    step = solve([-slope for slope in slopes])
    # gain of the quadratic model without the damping: -g d - d (J'J + ridge) d / 2
    curvature = dot(step, normal.product(step)) + ridge * dot(step, step)
    foretold = -dot(slopes, step) - 0.5 * curvature
    # conjugate gradients would have to run once more for it, and, stopped early, came out no lower on trained kernels
    if normal.direct:
        bend = solve([-one for one in normal.bend(step)])
        if dot(bend, bend) < _BEND**2 * dot(step, step):
            step = [straight + more for straight, more in zip(step, bend, strict=True)]
    return step, foretold
