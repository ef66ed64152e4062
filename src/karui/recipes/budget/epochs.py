"""Where the epochs of a budget go, and how far a network that has had few of them will come with more."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from karui.recipes.budget.stages import Plan

EXPLORE = 0.35
"""Share of the epochs that goes into looking around, where a floor says what is looked for."""
STAGES = 0.6
"""Share of the epochs that goes into the stages where no floor says; the rest trains the final point on."""
HALVINGS = 3
"""Bisections between a point that keeps the floor and a target that breaks it."""
COMMIT = 0.7
"""Share of what is left that the most promising point gets at once: one long training recovers more than two short
ones, and what is kept back pays for another point where this one disappoints."""
RECOVERS = 0.5
"""A loss falls with the passes to the power of minus this, until a run's own points tell better.
ResNet-20 on CIFAR-10 with two parts of nine left out and inner widths cut: 3.6 points after one pass, 1.55 after five
(0.52); with one of nine left out and five to eight layers factored: 1.5 after one, 0.8 after five (0.40), and 1.6 after
one, 1.2 after four (0.21); ResNet-56 with six of 27 left out, widths cut and layers factored: 2.15 after one, 0.8 after
four (0.71).
"""
STEEP = 1.5
"""The largest power that is believed: a loss near 0 would tell any."""


class Purse:
    """The epochs that are left.

    Args:
        plan: how many there are, and what they are for.
    """

    def __init__(self, plan: Plan) -> None:
        self.all = self.left = plan.epochs
        judged = plan.max_drop is not None
        visits = plan.stages + (HALVINGS if judged else 0)
        self.share = max(1, int(plan.epochs * (EXPLORE if judged else STAGES) / visits)) if plan.epochs else 0

    @property
    def explored(self) -> bool:
        """Whether the epochs for looking around are spent."""
        return self.all > 0 and self.left <= (1 - EXPLORE) * self.all

    @property
    def large(self) -> int:
        """What the most promising point gets."""
        chunk = math.ceil(COMMIT * self.left)
        return self.left if self.left - chunk < self.share else chunk

    def take(self, wanted: int | None = None) -> int:
        """So many epochs, by default a share of a visit; or what is left."""
        taken = min(self.share if wanted is None else wanted, self.left)
        self.left -= taken
        return taken


@dataclass
class Curve:
    """How losses fall with passes of training: as a power of them.

    Settings:
        seen: the powers of trainings that were seen.

    Example:
        >>> round(Curve().after(4.0, 1, 3), 2)
        2.0
    """

    seen: list[float] = field(default_factory=list)

    @property
    def power(self) -> float:
        """The mean of what was seen; what is usual counts as one of them."""
        return (RECOVERS + sum(self.seen)) / (1 + len(self.seen))

    def after(self, lost: float, passes: int, more: int) -> float:
        """The loss to expect.

        Args:
            lost: after so many passes.
            passes: these.
            more: how many are to come.
        """
        if lost <= 0 or passes <= 0 or more <= 0:
            return lost
        return lost * (passes / (passes + more)) ** self.power

    def learn(self, lost: float, passes: int, then: float, more: int) -> None:
        """See what a loss after some passes became after more."""
        if lost > 0 and passes > 0 and more > 0:
            power = math.log(lost / max(then, lost / 1e3)) / math.log((passes + more) / passes)
            self.seen.append(min(max(power, 0.0), STEEP))
