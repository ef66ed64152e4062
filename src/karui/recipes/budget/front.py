"""The Pareto front of the points that were visited, and its knee."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from karui.recipes.budget.cache import SURE

ALL = 1e9
"""What is lost where nothing is left, as a score that is not finite tells: more than any floor allows."""
SAME = 1e-9
TOLERATED = 1.02
"""Times a limit that still count as kept: what the clock cannot tell apart at its best, and no more on a worse one."""
EXACT = 1 + 1e-9
"""Of the arithmetic by which bytes are held against a limit."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """A deployment of a point as it was measured.

    Settings:
        name: of the deployment.
        told: precision and engine in words.
        time, bytes: as shares of the dense model in fp32 in ONNX Runtime.
        score: on validation data, as JSON; None where nothing is judged.
        lost: against the dense model, in points of accuracy or per cent of the metric; 0 where nothing is judged.
        left: layers that were left in 32 bits, of a form in 8, to keep the floor.
        error: standard error of its time.
    """

    name: str
    told: str
    time: float
    bytes: float
    score: dict[str, Any] | None = None
    lost: float = 0.0
    left: tuple[str, ...] = ()
    error: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model on the way, in its best form.

    Settings:
        number: 0 is the dense model.
        parent: the point that it was made from.
        target: the shares that were aimed at.
        predicted: time and bytes as the menu predicted them, as shares of the dense model, and
        foreseen: the name of the form that the time was predicted of.
        forms: its deployments, fp32 first.
        best: which of them counts.
        epochs: passes of recovery on the way to it, all stages together.
        chosen: what was done at which place since its parent.
        folder: where its model lies, and the file of its best form, relative to the run's folder.
    """

    number: int
    parent: int = 0
    target: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, float] = field(default_factory=dict)
    foreseen: str = ""
    forms: tuple[Form, ...] = ()
    best: int = 0
    epochs: int = 0
    chosen: dict[str, str] = field(default_factory=dict)
    folder: str = ""

    @property
    def form(self) -> Form:
        """The form that counts."""
        return self.forms[self.best]

    @property
    def fp32(self) -> Form:
        """The form that surgery predicts."""
        return self.forms[0]

    def share(self, quantity: str) -> float:
        """Its "time" or "bytes" as a share of the dense model's."""
        return self.form.time if quantity == "time" else self.form.bytes

    def beyond(self, limits: Mapping[str, float]) -> list[str]:
        """The quantities that it was measured above its limits in. The error counts for nothing here: who is unsure
        has not kept a limit.
        """
        return exceeded({quantity: self.share(quantity) for quantity in limits}, limits)

    def unsure(self, limits: Mapping[str, float]) -> bool:
        """Whether its time is above the limit by no more than the clock's error."""
        least = self.form.time - SURE * self.form.error
        return "time" in self.beyond(limits) and least <= limits["time"]


def exceeded(shares: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """The quantities above their limits, both as shares of the dense model: bytes by anything, time by more than a
    small fixed share.
    """
    most = {"time": TOLERATED, "bytes": EXACT}
    return [quantity for quantity, limit in limits.items() if shares[quantity] > limit * most[quantity]]


def latest(points: Sequence[Point]) -> list[Point]:
    """The points without those that were trained on: what is said of such a network is said of its last training."""
    trained = {point.parent for point in points if point.number and not point.chosen}
    return [point for point in points if point.number not in trained]


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other is at least as good as in accuracy, time and bytes, fastest first."""

    def beats(one: Point, two: Point) -> bool:
        a, b = ((p.form.lost, p.form.time, p.form.bytes) for p in (one, two))
        return all(x <= y + SAME for x, y in zip(a, b, strict=True)) and any(
            x < y - SAME for x, y in zip(a, b, strict=True)
        )

    kept = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(kept, key=lambda point: (point.form.time, point.form.lost))


def cost(point: Point, quantities: Sequence[str] = ("time", "bytes")) -> float:
    """Time and bytes as one number: their geometric mean."""
    return float(np.prod([point.share(quantity) for quantity in quantities]) ** (1 / len(quantities)))


def knee(points: Sequence[Point]) -> Point:
    """The point where the front bends most: farthest below the line between its ends, with both axes scaled to 1.

    Example:
        >>> def at(number, time, lost):
        ...     return Point(number=number, forms=(Form(name="", told="", time=time, bytes=time, lost=lost),))
        >>> knee([at(0, 1.0, 0.0), at(1, 0.5, 0.2), at(2, 0.4, 9.0)]).number
        1
    """
    ends = sorted((p for p in points if p.form.lost < ALL), key=cost) or list(points)
    costs = np.array([cost(point) for point in ends])
    losses = np.array([point.form.lost for point in ends])
    wide, high = np.ptp(costs), np.ptp(losses)
    if wide == 0 or high == 0:
        return ends[int(np.lexsort((costs, losses))[0])]
    x, y = (costs - costs.min()) / wide, (losses - losses.min()) / high
    return ends[int(np.argmin(x + y))]
