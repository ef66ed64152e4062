"""The learning rate that a training bears, found by a short test on training data.

The rate rises evenly on a logarithmic scale from far too small to far too large, one step each, and the loss is
watched: it stays, falls, and finally bursts. The largest rate at which it is still at its lowest is the edge; a part of
it is what a whole training bears, since a rate that a single step survives may not be survived for long.

Does not pay where a rate is known already. It knows nothing of how long the training will be: a longer one may prefer
a smaller rate.

Source: Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3. DEPARTURE: he reads the rate
off a plot of accuracy by eye; here the loss is smoothed on both sides, so that the curve does not lag behind the rate,
and the edge is where it leaves its lowest value by more than its noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Subset

from karui.errors import TrainingError, require
from karui.model import Model
from karui.train.influence import Influence, Moment, Together
from karui.train.loop import fit
from karui.train.randomness import generator
from karui.train.training import Training

SHARE = 1 / 3
"""Of the edge: what is taken for a training."""
WIDTH = 0.15
"""Decades of the learning rate over which the loss is smoothed, to each side."""
BURST = 4.0
"""Times the first loss: beyond, the test ends early, as the loss will not come back."""


@dataclass(frozen=True)
class Rising:
    """A schedule that rises evenly on a logarithmic scale, from `low` times the learning rate to all of it.

    Example:
        >>> [round(Rising(0.01).factor(step, 3), 2) for step in range(3)]
        [0.01, 0.1, 1.0]
    """

    low: float

    def factor(self, step: int, steps: int) -> float:
        """The share of this step."""
        return self.low ** (1 - step / max(1, steps - 1))


@dataclass(frozen=True, kw_only=True)
class RateRange:
    """What a range test found.

    Settings:
        rate: the learning rate to train with.
        edge: the largest rate at which the loss was still at its lowest.
        rates, losses: of each step of the test.
        smooth: the losses, smoothed.
    """

    rate: float
    edge: float
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smooth: tuple[float, ...]


def range_test(
    model: Model,
    train: Any,
    *,
    training: Training | None = None,
    influence: Influence | None = None,
    seed: int = 0,
    steps: int = 100,
    span: tuple[float, float] = (1e-3, 30.0),
    progress: bool = False,
) -> RateRange:
    """Find a learning rate for a training of a model; the model is left as it is.

    The same arguments give the same rate, bit for bit.

    Args:
        model: what will be trained.
        train: the training data; the test sees `steps` batches of it.
        training: how it will be trained: optimizer, batch size, augmentation. Its learning rate is only where the test
            looks around; its epochs and schedule are not used.
        influence: what will act on the training (the teacher of a distillation).
        seed: draws the batches.
        steps: number of steps at least (passes over few data are whole ones); below 40 the curve is too coarse.
        span: smallest and largest rate that are tried, as multiples of the optimizer's.
        progress: whether a bar is shown.

    Raises:
        SettingError: the span is empty, or there are too few steps.
        TrainingError: the loss is not finite from the beginning.

    Relations: `with_rate` puts the result into a training.
    """
    low, high = span
    require(0 < low < high, f"span is {span}; give two rising multiples of the rate, for example (1e-3, 30.0)")
    require(steps >= 40, f"steps is {steps}; give at least 40, or the curve is too coarse")
    training = training or Training()
    watch = _Watch()
    short, epochs = _part(train, steps, training.batch_size, seed)
    top = training.optimizer.lr * high
    rising = replace(
        training,
        epochs=epochs,
        optimizer=_at(training.optimizer, top),
        schedule=Rising(low / high),
        devices=1,
        strategy="auto",
    )
    both = watch if influence is None else Together(influence, watch)
    try:
        fit(model, short, training=rising, seed=seed, influence=both, label="learning rate", progress=progress)
    except (_Burst, TrainingError):
        # A loss that bursts is what the test is after; one that is not finite at once is a defect elsewhere.
        require(
            len(watch.losses) > 0,
            "The loss is not finite at the first step, whatever the learning rate.",
            "Check the data, and the loss of the task.",
            TrainingError,
        )
    rates = [top * rising.schedule.factor(number, watch.steps) for number in range(len(watch.losses))]
    return read_range(rates, watch.losses)


def with_rate(training: Training, rate: float) -> Training:
    """The training with another learning rate.

    Example:
        >>> with_rate(Training(), 0.125).optimizer.lr
        0.125
    """
    return replace(training, optimizer=_at(training.optimizer, rate))


def read_range(rates: Sequence[float], losses: Sequence[float]) -> RateRange:
    """The rate that a curve of losses tells.

    The losses are smoothed. Their noise is what single ones scatter around the smooth curve, at the size of the window.

    Example:
        >>> rates = [10 ** (k / 20 - 3) for k in range(80)]
        >>> losses = [3 - min(rate, 0.1) * 20 + max(0, rate - 0.1) * 50 for rate in rates]
        >>> 0.08 < read_range(rates, losses).edge < 0.12
        True
    """
    places = np.log10(np.asarray(rates))
    values = np.asarray(losses, dtype=np.float64)
    smooth = smoothed(places, values)
    weight = np.exp(-0.5 * ((places[:, None] - places) / WIDTH) ** 2)
    spread = float(np.median(np.abs(values - smooth))) * 1.4826 / math.sqrt(float(weight.sum(1).mean()))
    edge = int(np.flatnonzero(smooth <= smooth.min() + spread)[-1])
    return RateRange(
        rate=SHARE * rates[edge],
        edge=rates[edge],
        rates=tuple(rates),
        losses=tuple(losses),
        smooth=tuple(smooth.tolist()),
    )


def smoothed(places: Float[np.ndarray, "steps"], values: Float[np.ndarray, "steps"]) -> Float[np.ndarray, "steps"]:
    """Each value's weighted mean with its neighbours, by a bell of width `WIDTH` over their places."""
    weight = np.exp(-0.5 * ((places[:, None] - places) / WIDTH) ** 2)
    return (weight @ values) / weight.sum(1)


class _Burst(Exception):  # noqa: N818
    """The loss left the range that is of interest."""


class _Watch(Influence):
    """Notes each loss; ends the training when it bursts."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.steps = 1

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        """The loss as it is."""
        value = float(loss.detach())
        self.steps = moment.steps
        if not math.isfinite(value) or (self.losses and value > BURST * max(self.losses[0], 1e-12)):
            raise _Burst
        self.losses.append(value)
        return loss


def _at(optimizer: Any, rate: float) -> Any:
    return dataclasses.replace(optimizer, lr=rate)


def _part(train: Any, steps: int, size: int, seed: int) -> tuple[Any, int]:
    """So much of the data that some passes over it make the steps, and how many passes."""
    count = min(len(train), steps * size)
    order = torch.randperm(len(train), generator=generator(seed, "range test"))[:count]
    return Subset(train, order.tolist()), math.ceil(steps / max(1, count // size))
