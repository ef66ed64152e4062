"""The metrics of Denton et al. 2014 (survey 18): how much each weight of a layer matters.

Plain; by the gradients of the loss towards the most probable wrong class; or by the second moments of what it sees.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from karui.errors import SettingError, did_you_mean, require
from karui.lowrank._calibrate import Calibration
from karui.lowrank._scan import Seen
from karui.model.trace import mode_of
from karui.numerics.metrics import Covariance, Metric, Weighted

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench
    from karui.technique.card import Need

METRICS = ("l2", "maha", "datacov")
EPSILON = 0.5
"""What is added to the weights of "maha", whose mean is 1 (the authors' code)."""


def require_metric(metric: str) -> None:
    """Refuse a metric that there is none of."""
    if metric not in METRICS:
        did_you_mean(metric, list(METRICS), "metric", SettingError)


def metric_needs(metric: str) -> tuple[Need, ...]:
    """What the metric looks at."""
    return () if metric == "l2" else ("calibration",)


def metric_of(name: str, model: Model, one: Seen, bench: Bench, *, images: int, positions: int) -> Metric | None:
    """The metric for one layer; None for "l2", in which the plain decompositions are fitted.

    Raises:
        SettingError: "maha" is asked of a network that gives no class scores.
    """
    if name == "l2":
        return None
    if name == "datacov":
        (moments,) = Calibration(model, bench, images, positions).moments(model, one)
        return Covariance(moments.xx / moments.count)
    strength = gradient_strength(model, one, bench, images)
    return Weighted(EPSILON + strength / strength.mean().clamp(min=1e-300))


def gradient_strength(model: Model, one: Seen, bench: Bench, images: int) -> Float[Tensor, "filters channels *kernel"]:
    """`sqrt(E[(dL / dW_p)^2])` over single inputs, with the most probable wrong class as label.

    The class that the network puts first counts as right, so that no labels are asked for.
    """
    weight, total, seen = one.layer.weight, None, 0
    learns = weight.requires_grad
    weight.requires_grad_(True)
    try:
        with mode_of(model.module, training=False), torch.enable_grad():
            for batch in bench.calibration(images):
                for number in range(len(batch[0])):
                    scores = model.module(*(part[number : number + 1] for part in batch))
                    found = torch.autograd.grad(_towards_wrong(scores), weight)[0].double().square()
                    total, seen = found if total is None else total + found, seen + 1
    finally:
        weight.requires_grad_(learns)
    assert total is not None  # noqa: S101  (there is at least one calibration input)
    return (total / seen).sqrt()


def _towards_wrong(scores: Tensor) -> Tensor:
    told = f'metric "maha" asks for class scores [batch, classes]; the network gives {tuple(scores.shape)}'
    require(scores.ndim == 2 and scores.shape[1] > 1, told, 'Use metric "datacov".')
    return functional.cross_entropy(scores, scores.detach().topk(2).indices[:, 1])
