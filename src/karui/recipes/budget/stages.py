"""The way to a budget: part of the way, recover, measure, choose again; back by bisection where the floor breaks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from karui.recipes.budget.front import Point, cost, front, knee

STEP = 0.65
"""The most that a stage shrinks a quantity by: beyond, what candidates do alone tells little about them together."""
FAR = 0.2
"""How far to go where no budget says: a fifth of the dense model's time."""
PROMISING = 2.0
"""Times the floor that a point may lose after the short training of a visit and still be thought to keep it in the end;
the epochs that are kept for the final point show it."""
HALVINGS = 3
"""Bisections between a point that keeps the floor and a target that breaks it."""
CLOSE = 1.08
"""A bisection ends where what is left between the two is less than this factor."""
STUCK = 0.97
"""Two stages in a row that leave more than this of what they were to shrink have come to the end of the menu."""
MORE = 2
"""Stages that are added where the last one was measured short of the goal."""
POLISH = 0.4
"""Share of the epochs that is kept for training the final point on."""


class Visits(Protocol):
    """Makes points; see `karui.recipes.budget.visits.Visitor`."""

    points: list[Point]

    def lighten(self, parent: Point, target: Mapping[str, float], epochs: int) -> Point | None:
        """A lighter point, or None where there is no way on."""
        ...

    def polish(self, parent: Point, epochs: int) -> Point:
        """The same point, trained on."""
        ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a budget is approached.

    Settings:
        goal: shares of the dense model, by quantity.
        stated: whether the goal was asked for; otherwise it is as far as makes sense.
        max_drop: the floor; None where there is none.
        epochs: passes of recovery, all stages together.
    """

    goal: Mapping[str, float]
    stated: bool
    max_drop: float | None
    epochs: int

    @property
    def stages(self) -> int:
        """How many steps lead to the goal."""
        return max(
            1, *(math.ceil(math.log(share) / math.log(STEP) - 1e-9) for share in self.goal.values() if share < 1)
        )

    def target(self, part: float) -> dict[str, float]:
        """The shares after a part of the way, in equal factors."""
        return {quantity: share**part for quantity, share in self.goal.items()}

    def part(self, point: Point) -> float:
        """How far on the way a point is, in the quantity that is farthest behind."""
        parts = (math.log(point.share(q)) / math.log(share) for q, share in self.goal.items() if share < 1)
        return min(parts, default=1.0)

    def holds(self, point: Point) -> bool:
        """Whether the point keeps the floor."""
        return self.max_drop is None or point.form.lost <= self.max_drop + 1e-9

    def met(self, point: Point) -> bool:
        """Whether it keeps the floor and every limit, as far as the clock can tell."""
        return self.holds(point) and not point.beyond(self.goal)


def travel(visits: Visits, dense: Point, plan: Plan) -> Point:
    """Go as far as plan and floor allow; the point where the journey ends, trained on with the epochs that are left."""
    purse = Purse(plan)
    good, reached, broken, slow = dense, 0.0, None, False
    for stage in range(1, plan.stages + MORE + 1):
        part = min(1.0, stage / plan.stages)
        target = plan.target(part)
        near = 1.0 if part == 1 else CLOSE  # on the way, what is left of a step goes into the next
        if all(good.share(q) <= near * share for q, share in target.items()) or (part == 1 and not good.beyond(target)):
            reached = max(part, plan.part(good))
            continue
        point = visits.lighten(good, target, purse.take())
        if point is None:
            break
        if not plan.holds(point):
            broken = part
            break
        gains = [point.share(q) / good.share(q) for q in point.beyond(target)]
        if gains and min(gains) >= 1:
            break  # no lighter in anything that is missed
        small = bool(gains) and min(gains) > STUCK
        good, reached = point, max(part, plan.part(point))
        if small and slow:
            break
        slow = small
    if broken is not None:
        good = _bisect(visits, good, plan, purse, (reached, broken))
    if not plan.stated and plan.max_drop is None:
        good = knee(front(visits.points))
    return _trained_on(visits, good, plan, purse)


class Purse:
    """The epochs: equal shares for the stages and bisections that may come, the rest for the final point."""

    def __init__(self, plan: Plan) -> None:
        self.left = plan.epochs
        visits = plan.stages + (HALVINGS if plan.max_drop is not None else 0)
        self.share = max(1, int(plan.epochs * (1 - POLISH) / visits)) if plan.epochs else 0

    def take(self, wanted: int | None = None) -> int:
        """So many epochs, by default a share of a visit; or what is left."""
        taken = min(self.share if wanted is None else wanted, self.left)
        self.left -= taken
        return taken

    def rest(self) -> int:
        """All that is left."""
        taken, self.left = self.left, 0
        return taken


def _trained_on(visits: Visits, good: Point, plan: Plan, purse: Purse) -> Point:
    """The final point, trained with the epochs that are left.

    First, with all but a share of them, a lighter point that breaks the floor by little: it was judged after a share.
    """
    point = _promising(visits.points, good, plan)
    if point is not None and purse.left > purse.share:
        polished = visits.polish(point, purse.take(purse.left - purse.share))
        good = polished if plan.holds(polished) else good
    left = purse.rest()
    if left and good.number:
        polished = visits.polish(good, left)
        good = polished if polished.form.lost <= good.form.lost else good
    return good


def _promising(points: Sequence[Point], good: Point, plan: Plan) -> Point | None:
    """The lightest point that breaks the floor by so little that more training may save it."""
    if plan.max_drop is None:
        return None
    quantities = list(plan.goal)
    near = [
        point
        for point in points
        if plan.max_drop < point.form.lost <= PROMISING * plan.max_drop
        and cost(point, quantities) < cost(good, quantities) / CLOSE
    ]
    return min(near, key=lambda point: cost(point, quantities), default=None)


def _bisect(visits: Visits, good: Point, plan: Plan, purse: Purse, parts: tuple[float, float]) -> Point:
    """The lightest point between one that holds and a part of the way that does not."""
    low, high = parts
    for _ in range(HALVINGS):
        if min(plan.goal.values()) ** (low - high) < CLOSE or (plan.epochs and not purse.left):
            break
        middle = (low + high) / 2
        target = plan.target(middle)
        if all(good.share(q) <= share for q, share in target.items()):
            low = middle  # a point went farther than it was asked to
            continue
        point = visits.lighten(good, target, purse.take())
        if point is None:
            break
        if plan.holds(point):
            good, low = point, max(middle, plan.part(point))
        else:
            high = middle
    return good
