"""The way to a budget: part of the way, recover, measure, choose again; then nearly all epochs for one point.

A visit trains for a share of the epochs, which is enough to say how far its network will come with the rest (see
`karui.recipes.budget.epochs`), and too little to keep a floor. So a point is judged by what is foreseen of it. Where
even that breaks the floor, the way goes back by bisection. In the end the lightest point that is thought to hold gets
most of what is left, and the result is the lightest that does hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from karui.recipes.budget.epochs import HALVINGS, Curve, Purse
from karui.recipes.budget.front import Point, cost, front, knee, latest

STEP = 0.65
"""The most that a stage shrinks a quantity by: beyond, what candidates do alone tells little about them together."""
FAR = 0.2
"""How far to go where no budget says: a fifth of the dense model's time."""
CLOSE = 1.08
"""A bisection ends where what is left between the two is less than this factor."""
LIGHTER = 1.03
"""By how much a point must be lighter than another to be worth a training."""
STUCK = 0.97
"""Two stages in a row that leave more than this of what they were to shrink have come to the end of the menu."""
MORE = 2
"""Stages that are added where the last one was measured short of the goal."""
ASIDE = (0.3, 0.7)
"""How near to its ends a bisection may cut."""
SAFE = 0.9
"""Share of the floor that may be foreseen of a point that gets the epochs: what is foreseen is not certain. On the way
to a goal that was asked for the whole of it may be: the next step says more, and a bisection follows where it fails."""
ROOM, PUSH = 0.6, 0.92
"""A final point that loses less than this share of the floor is made lighter once more: towards the next one that
broke the floor, or to this share of its cost where none did. Nor does the way go on, unless a goal was stated, from a
point that breaks the floor and is thought to lose more than that in the end."""


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
        steps = [math.ceil(math.log(share) / math.log(STEP) - 1e-9) for share in self.goal.values() if share < 1]
        return max([1, *steps])

    def target(self, part: float) -> dict[str, float]:
        """The shares after a part of the way, in equal factors."""
        return {quantity: share**part for quantity, share in self.goal.items()}

    def part(self, point: Point) -> float:
        """How far on the way a point is, in the quantity that is farthest behind."""
        return self._part({q: point.share(q) for q in self.goal})

    def tried(self, point: Point) -> float:
        """How far a point is, or was to be: one that breaks the floor may count in a form that is heavier than aimed
        at, since it loses even more in the lighter one.
        """
        return max(self.part(point), self._part(point.target) if point.target else 0.0)

    def _part(self, shares: Mapping[str, float]) -> float:
        parts = (math.log(shares.get(q, 1.0)) / math.log(share) for q, share in self.goal.items() if share < 1)
        return min(parts, default=1.0)

    def holds(self, point: Point) -> bool:
        """Whether the point keeps the floor."""
        return self.max_drop is None or point.form.lost <= self.max_drop + 1e-9

    def met(self, point: Point) -> bool:
        """Whether it was measured to keep the floor and every limit."""
        return self.holds(point) and not point.beyond(self.goal)

    def order(self, point: Point) -> tuple[int, float]:
        """What makes a point better: to reach the goal, and then to lose less; else to be lighter."""
        return (1, cost(point, list(self.goal))) if point.beyond(self.goal) else (0, point.form.lost)


def travel(visits: Visits, dense: Point, plan: Plan) -> Point:
    """Go as far as plan and floor allow; the point where the journey ends, trained on with the epochs that are left."""
    way = _Way(visits, plan)
    good, broken = way.stages(dense)
    if broken is not None:
        way.bisect(good, broken)
    if plan.max_drop is not None:
        return way.settled()
    if not plan.stated:
        good = knee(front(latest(visits.points)))
    return way.polished(good)


class _Way:
    """A journey: its points, the epochs that are left, and what was learnt of their worth."""

    def __init__(self, visits: Visits, plan: Plan) -> None:
        self.visits, self.plan, self.purse, self.curve = visits, plan, Purse(plan), Curve()

    def lighten(self, parent: Point, target: Mapping[str, float], epochs: int | None = None) -> Point | None:
        taken = self.purse.take(epochs)
        point = self.visits.lighten(parent, target, taken)
        if point is None:
            self.purse.left += taken
        return point

    def polish(self, point: Point, epochs: int) -> Point:
        """A point trained on."""
        more = self.purse.take(epochs)
        made = self.visits.polish(point, more)
        self.curve.learn(point.form.lost, point.epochs, made.form.lost, more)
        return made

    def foreseen(self, point: Point) -> float:
        """What it would lose with most of the epochs that are left."""
        return self.curve.after(point.form.lost, point.epochs, self.purse.large)

    def hopeful(self, point: Point, share: float = SAFE) -> bool:
        """Whether it keeps the floor, or this share of it after more training."""
        floor = self.plan.max_drop
        return floor is None or self.plan.holds(point) or self.foreseen(point) <= share * floor

    def _full(self, point: Point) -> bool:
        """Whether what is foreseen of it leaves no room for a lighter one: what a further visit takes, it needs."""
        floor = self.plan.max_drop
        return floor is not None and not self.plan.holds(point) and self.foreseen(point) > ROOM * floor

    def stages(self, dense: Point) -> tuple[Point, Point | None]:
        """The last point on the way whose floor holds, or is thought to; and the one after it, where it is not."""
        plan, good, slow = self.plan, dense, False
        for stage in range(1, plan.stages + MORE + 1):
            part = min(1.0, stage / plan.stages)
            target = plan.target(part)
            near = 1.0 if part == 1 else CLOSE  # on the way, what is left of a step goes into the next
            reached = all(good.share(q) <= near * share for q, share in target.items())
            if reached or (part == 1 and not good.beyond(target)):
                continue
            point = self.lighten(good, target)
            if point is None:
                break
            if not self.hopeful(point, 1.0 if plan.stated else SAFE):
                return good, point
            gains = [point.share(q) / good.share(q) for q in point.beyond(target)]
            if gains and min(gains) >= 1:
                break  # no lighter in anything that is missed
            small = bool(gains) and min(gains) > STUCK
            good = point
            if (small and slow) or (not plan.stated and self._full(good)):
                break
            slow = small
        return good, None

    def bisect(self, good: Point, broken: Point) -> None:
        """Points between one that holds and one that does not, where the floor is thought to lie between them.

        Without epochs the way goes on to the first point that holds untrained: the dense network is no result where a
        lighter one keeps the floor as it is.
        """
        plan, low, high = self.plan, self.plan.part(good), max(self.plan.tried(broken), self.plan.part(good))
        for _ in range(HALVINGS):
            if min(plan.goal.values()) ** (low - high) < CLOSE or (self.purse.explored and good.number):
                break
            point = self.lighten(good, plan.target(low + (high - low) * self._where(good, broken)))
            if point is None or not point.chosen:
                break  # nothing lies between: the menu's next choice is a point that is there, which was trained on
            holds = self.hopeful(point)
            part = plan.part(point) if holds else plan.tried(point)
            if part <= low:
                break
            if holds:
                good, low = point, part
                if self._full(good):
                    break
            else:
                broken, high = point, min(high, part)

    def _where(self, good: Point, broken: Point) -> float:
        """How far between two points the floor is met, as a straight line has it."""
        assert self.plan.max_drop is not None  # noqa: S101  (what breaks has a floor)
        ends = self.foreseen(good), self.foreseen(broken)
        share = (SAFE * self.plan.max_drop - ends[0]) / (ends[1] - ends[0]) if ends[1] > ends[0] else 0.5
        return min(max(share, ASIDE[0]), ASIDE[1])

    def settled(self) -> Point:
        """The lightest point that holds, after most epochs went to the lightest that was thought to."""
        best = min(self._held(), key=self.plan.order)
        while self.purse.left:
            point = self._promising(best)
            if point is not None:
                made: Point | None = self.polish(point, self.purse.large)
            elif self._roomy(best):
                made = self.lighten(best, self._onward(best), self.purse.left)
            else:
                break
            if made is None:
                break
            if self.plan.holds(made) and self.plan.order(made) < self.plan.order(best):
                best = made
        return self.polished(best if best.number else self._backed_off(best))

    def _backed_off(self, dense: Point) -> Point:
        """Where training saved none of the points that were thought to hold: one nearer to the dense network, with what
        epochs are left, or as it is; the dense one where that loses too much, too.
        """
        made = [self.plan.tried(p) for p in self.visits.points if p.number]
        start = self.plan.part(dense)
        part = min(made, default=start)
        for _ in range(HALVINGS):
            part = start + ASIDE[0] * (part - start)
            if min(self.plan.goal.values()) ** (start - part) < LIGHTER:
                break
            point = self.lighten(dense, self.plan.target(part), self.purse.left)
            if point is None or not point.chosen:
                break
            if self.plan.holds(point) and self.plan.order(point) < self.plan.order(dense):
                return point
        return dense

    def _held(self) -> list[Point]:
        """The points that hold; of a network that was trained on, with success, the last. That the clock has the same
        network as a little lighter at one time than at another is no reason to go back.
        """
        held = {p.number: p for p in self.visits.points if self.plan.holds(p)}
        more = [(held[p.parent], p) for p in held.values() if p.number and not p.chosen and p.parent in held]
        passed = {
            was.number
            for was, now in more
            if now.form.lost <= was.form.lost and self.plan.order(now)[0] <= self.plan.order(was)[0]
        }
        return [p for p in held.values() if p.number not in passed]

    def _promising(self, best: Point) -> Point | None:
        """The lightest point that breaks the floor by so little that more training may save it."""
        if self.plan.order(best)[0] == 0:
            return None
        quantities = list(self.plan.goal)
        lighter = cost(best, quantities) / LIGHTER
        share = SAFE if best.number else 1.0  # where nothing holds, the epochs have no better use
        hopeful = [p for p in latest(self.visits.points) if cost(p, quantities) < lighter and self.hopeful(p, share)]
        return min((p for p in hopeful if not self.plan.holds(p)), key=self.plan.order, default=None)

    def _roomy(self, best: Point) -> bool:
        """Whether the best point loses so little, or would if it were trained on, that a lighter one may hold."""
        floor = self.plan.max_drop
        return floor is not None and self.plan.order(best)[0] == 1 and self.foreseen(best) < ROOM * floor

    def _onward(self, best: Point) -> dict[str, float]:
        """Lighter than the best point: towards the next that broke the floor, as far as a straight line has it."""
        quantities = list(self.plan.goal)
        now = cost(best, quantities)
        last = latest(self.visits.points)
        lighter = [p for p in last if not self.plan.holds(p) and cost(p, quantities) < now]
        nearest = max(lighter, key=lambda p: cost(p, quantities), default=None)
        share = PUSH if nearest is None else (cost(nearest, quantities) / now) ** self._where(best, nearest)
        return {q: max(goal, share * best.share(q)) for q, goal in self.plan.goal.items()}

    def polished(self, good: Point) -> Point:
        """The final point with the epochs that are left; as it was where they make it worse, or miss what it met."""
        if not self.purse.left or not good.number:
            return good
        made = self.polish(good, self.purse.left)
        missed = self.plan.stated and self.plan.met(good) and not self.plan.met(made)
        return made if made.form.lost <= good.form.lost and self.plan.holds(made) and not missed else good
