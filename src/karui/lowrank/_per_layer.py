"""Techniques that take one layer after the other: what they tell beforehand, and what they offer to a budget."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from karui.lowrank._choice import Choice
from karui.lowrank._scan import Seen, filters_of, is_layer
from karui.model import copied
from karui.technique import Candidate

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench


class PerLayer(ABC):
    """What techniques that take one layer after the other tell before anything is done.

    They give `_scan`, the layers that can be replaced and the choices for those that cannot, and `choice_for`, what is
    to become of one.
    """

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with each layer, and why."""
        return tuple(choice.describe() for choice in self.choose(model))

    def choose(self, model: Model) -> tuple[Choice, ...]:
        """What is to become of each layer, or the reason why it is left."""
        seen, left = self._scan(model)
        return (*map(self.choice_for, seen), *left)

    @abstractmethod
    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        """The layers that can be replaced, and the choices for those that cannot."""

    @abstractmethod
    def choice_for(self, one: Seen) -> Choice:
        """What is to become of a layer."""


SPEEDUPS = (2.0, 4.0)
"""How many times fewer multiply-adds a layer does in the candidates of one technique; few, as each has to be timed."""
NARROW = 64
"""Channels and filters from which layers are looked at: none of these forms pays in narrower ones as a rule."""
SMALL, LARGE = 150_000, 2_500_000
"""Weights of the largest layers that are looked at: by solvers that iterate, and by those in closed form."""
LOOKED_AT = {"images": 32, "positions": 40}
"""Calibration inputs, and positions in each, for candidates that are fitted to data: enough for the rows of a layer."""


class Offering(ABC):
    """Candidates for a budget, from a technique that can act on a single layer without a training.

    They give `_scan`, the layers that can be replaced; `alone`, the settings that do nothing but write one layer with
    so many times fewer multiply-adds, with what becomes of it; and `layer_for`, the layer itself. What a layer is
    fitted to, if it is, comes from `evidence`, once for each place and not for each candidate.
    """

    ladder: ClassVar[tuple[float, ...]] = SPEEDUPS
    """Speed-ups that are offered; a technique whose layers take long to find offers fewer."""
    narrow: ClassVar[int] = NARROW
    """Channels and filters of a group from which a layer is looked at."""
    most: ClassVar[int] = SMALL
    """Weights up to which a layer is looked at, so that the menu of a large network stays affordable."""
    kept: ClassVar[bool] = False
    """Whether a candidate keeps the layer that it has found: for those that take long to find and weigh little."""

    def candidates(self, model: Model, bench: Bench, *, multiple: int = 1) -> Iterator[Candidate]:
        """For a budget: each layer at a few speed-ups. What would not do fewer multiply-adds is not built at all."""
        del multiple  # ranks follow from multiply-adds; the menu strikes off what is measured slower
        recent = _Recent(lambda one: self.evidence(model, one, bench))
        for one in self._scan(model)[0]:
            if not self._worth_a_look(one):
                continue
            made: set[tuple[int, ...]] = set()
            for speedup in self.ladder:
                alone, choice = self.alone(model, one, speedup)
                if choice.replaced and alone.pays(choice) and choice.ranks not in made:
                    made.add(choice.ranks)
                    yield _candidate(alone, one, choice, bench, recent)

    def _worth_a_look(self, one: Seen) -> bool:
        width = min(filters_of(one), one.layer.weight.shape[1])
        return width >= self.narrow and one.layer.weight.numel() <= self.most

    def pays(self, choice: Choice) -> bool:
        """Whether a candidate may gain anything."""
        return choice.macs[1] < choice.macs[0]

    def evidence(self, model: Model, one: Seen, bench: Bench) -> Any:
        """What the layer is fitted to; nothing where it is its weight."""
        del model, one, bench

    @abstractmethod
    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        """The layers that can be replaced, and the choices for those that cannot."""

    @abstractmethod
    def alone(self, model: Model, one: Seen, speedup: float) -> tuple[Any, Choice]:
        """The settings that write this layer alone with so many times fewer multiply-adds, and what becomes of it."""

    @abstractmethod
    def layer_for(self, one: Seen, choice: Choice, bench: Bench, evidence: Any) -> nn.Module:
        """The layer that takes its place."""


def all_others(model: Model, one: Seen) -> list[str]:
    """Paths of all layers but one, to be skipped."""
    return [path for path, layer in model.module.named_modules() if is_layer(layer) and path != one.path]


class _Recent:
    """Evidence for the layer that was asked for last: candidates of one place follow one another."""

    def __init__(self, find: Callable[[Seen], Any]) -> None:
        self.find, self.path, self.value = find, None, None

    def __call__(self, one: Seen) -> Any:
        if self.path != one.path:
            self.path, self.value = one.path, self.find(one)
        return self.value


def _candidate(alone: Any, one: Seen, choice: Choice, bench: Bench, recent: _Recent) -> Candidate:
    found: list[nn.Module] = []

    def layers() -> dict[str, nn.Module]:
        if found:
            return {one.path: copied(found[0])}  # whoever asked may train it
        layer = alone.layer_for(one, choice, bench, recent(one)).eval()
        if alone.kept:
            found.append(copied(layer))
        return {one.path: layer}

    return Candidate(place=one.path, technique=alone, text=choice.made, layers=layers)


RATIOS = (0.75, 0.5, 0.375, 0.25, 0.125)
"""Shares of the full rank that are offered as candidates."""


def rank_ladder(full: int, multiple: int) -> tuple[int, ...]:
    """Ranks below the full one at the shares of `RATIOS`: multiples of `multiple` where the full rank holds several.

    Example:
        >>> rank_ladder(64, 8), rank_ladder(10, 8)
        ((48, 32, 24, 16, 8), (8, 5, 4, 3, 2))
    """
    ranks = [math.ceil(full * ratio) for ratio in RATIOS]
    aligned = [math.ceil(rank / multiple) * multiple if full >= 2 * multiple else rank for rank in ranks]
    return tuple(dict.fromkeys(rank for rank in aligned if rank < full))
