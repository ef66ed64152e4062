"""What a choice aims at, corrected by what was measured of the choices before it; and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from karui.recipes.budget.deployments import NARROW

if TYPE_CHECKING:
    from karui.model import Model
    from karui.recipes.budget.front import Form, Point

MARGIN = {"time": 0.01, "bytes": 0.0}
"""How far below its target a choice is to be measured, so that another race confirms it. Bytes are exact."""
EXACT = 1e-9
"""Of the arithmetic by which a measurement is held against an aim."""
SPARE = 0.06
"""How far below it may be before a choice that does less is tried."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """The form that a menu is timed in, and what shares of the dense model are in it.

    Time is that of the form that counts where the menu is timed in it, else of fp32; bytes are those of fp32.

    Settings:
        timed: the form.
        factors: a quantity of the form that counts as a share of that in `timed`.
        now: seconds and bytes of the point.
        whole: those of the dense model.
    """

    timed: Form
    factors: Mapping[str, float]
    now: Mapping[str, float]
    whole: Mapping[str, float]

    @classmethod
    def of(cls, parent: Point, seconds: float, size: int) -> Scale:
        """The scale of a point, of a dense model that takes so many seconds and bytes."""
        timed = parent.form if parent.form.told == NARROW else parent.fp32
        return cls(
            timed=timed,
            factors={"time": parent.form.time / timed.time, "bytes": parent.form.bytes / parent.fp32.bytes},
            now={"time": timed.time * seconds, "bytes": parent.fp32.bytes * size},
            whole={"time": seconds, "bytes": float(size)},
        )


@dataclass
class Aims:
    """Aims a little below a target: where a prediction was off, the next aim is off by as much the other way.

    A prediction may jump, as choices do; so what is corrected is its ratio to what was measured, and not what is left
    to the target: a choice that went too far by itself would be taken for a wrong prediction.

    Settings:
        wanted: the target, by quantity.
        off: times its prediction that the last choice was measured at.
        seen: what each choice was measured at, as a share of what was aimed at.

    Example:
        >>> aims = Aims({"time": 0.5})
        >>> aims.see({"time": 0.5}, {"time": 0.55})
        >>> round(aims.next["time"], 3), aims.met
        (0.45, False)
        >>> aims.see({"time": 0.445}, {"time": 0.489})
        >>> aims.met, aims.nearest
        (True, 1)
    """

    wanted: Mapping[str, float]
    off: dict[str, float] = field(init=False)
    seen: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.off = dict.fromkeys(self.wanted, 1.0)

    @property
    def aim(self) -> dict[str, float]:
        """What is to be measured."""
        return {q: share * (1 - MARGIN[q]) for q, share in self.wanted.items()}

    @property
    def next(self) -> dict[str, float]:
        """What is to be predicted of the next choice."""
        return {q: share / self.off[q] for q, share in self.aim.items()}

    def see(self, predicted: Mapping[str, float], measured: Mapping[str, float]) -> None:
        """What became of a choice: each quantity as a share of the dense model's."""
        self.seen.append(max((measured[q] / share for q, share in self.aim.items()), default=1.0))
        self.off = {q: measured[q] / predicted[q] for q in self.wanted}

    @property
    def met(self) -> bool:
        """Whether the last choice is where it was aimed at: not above, and not far below."""
        return 1 - SPARE <= self.seen[-1] <= 1 + EXACT

    @property
    def nearest(self) -> int:
        """The choice that is nearest to the aim from below; where none is below, the lightest."""
        below = [k for k, share in enumerate(self.seen) if share <= 1 + EXACT]
        return (
            max(below, key=lambda k: self.seen[k]) if below else min(range(len(self.seen)), key=lambda k: self.seen[k])
        )


@dataclass(frozen=True)
class Chosen:
    """What was chosen: in words by place, what was predicted of it, and the model, until it is taken."""

    told: dict[str, str]
    predicted: dict[str, float]
    light: list[Model]

    def taken(self) -> Model:
        """The model, which is not held here from then on."""
        return self.light.pop()


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How far a menu goes, noted where it did not go to a target.

    Settings:
        parent: the point whose menu it is.
        target: the shares that were aimed at.
        shares: the least that would be left of each quantity, whatever the harm, as shares of the dense model: as
            predicted, and corrected by what was measured of the choices before.
    """

    parent: int
    target: dict[str, float]
    shares: dict[str, float]
