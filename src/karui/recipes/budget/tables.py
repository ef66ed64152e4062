"""What candidates cost, alone and together: each layer timed at every width that its neighbours' settings give it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from karui.measuring import onnx_form
from karui.measuring.bar import bar
from karui.model import remove_units, replace_layers
from karui.recipes.budget.apart import exclusions, one_at_most, reached
from karui.recipes.budget.cache import SURE, Measured, added
from karui.recipes.budget.cells import Cell, Cells
from karui.recipes.budget.choice import Table
from karui.recipes.budget.refusals import Refusals

if TYPE_CHECKING:
    from karui.technique import Candidate

CELLS = 256
"""Combinations of neighbours' settings that are timed for a layer; beyond, each place is timed by itself."""


EXPECTED = "expected time"
"""Quantity of a table: seconds as they were measured. A choice goes by "time", where what the clock cannot tell apart
is nothing; to foretell what it takes, small savings in many places are added up, though each drowns in the noise."""
DOUBT = 5.0
"""A candidate that looks slower by fewer standard errors is timed head to head with what it replaces, and so is one
whose time is within the noise of that."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a candidate alone changes: seconds and bytes of the whole model."""

    seconds: Measured
    bytes: float

    @property
    def slower(self) -> bool:
        """Whether it is slower than what it replaces, beyond what the clock cannot tell."""
        return self.seconds.value > 0 and self.seconds.clear

    @property
    def doubtful(self) -> bool:
        """Whether it is neither clearly faster nor so much slower that a closer look is needless."""
        return -SURE * self.seconds.error < self.seconds.value <= DOUBT * self.seconds.error


class Coster:
    """Costs of candidates for one model.

    Args:
        cells: its layers.
        refusals: learns which candidates cannot be measured.
    """

    def __init__(self, cells: Cells, refusals: Refusals | None = None) -> None:
        self.cells = cells
        self.model, self.analysis, self.watch = cells.model, cells.analysis, cells.watch
        self.refusals = Refusals() if refusals is None else refusals
        self.singles: dict[int, Cost] = {}

    def alone(self, candidates: Sequence[Candidate]) -> list[Cost]:
        """What each candidate changes by itself; head to head with what it replaces, where that is in doubt.

        Of those that can be measured, in their order; `refusals` tells which are left.
        """
        wanted: list[tuple[str, dict[int, int]]] = []
        for candidate in candidates:
            with self.refusals.trying(candidate):
                wanted += self._wanted(candidate)
        self.cells.time(wanted)
        left = self.refusals.left(candidates)
        with bar("new layers", len(left), self.watch.progress) as step:
            for candidate in left:
                with self.refusals.trying(candidate):
                    self.cells.prepare(candidate)
                step()
        self.cells.exchange()
        for candidate in self.refusals.left(candidates):
            with self.refusals.trying(candidate):
                self.singles[id(candidate)] = self._alone(candidate)
        doubtful = [
            c for c in self.refusals.left(candidates) if self.singles[id(c)].doubtful and self.cells.comparable(c)
        ]
        with bar("head to head", len(doubtful), self.watch.progress and bool(doubtful)) as step:
            for candidate in doubtful:
                with self.refusals.trying(candidate):
                    self.cells.look_closer(candidate)
                    self.singles[id(candidate)] = self._alone(candidate)
                step()
        return [self.singles[id(candidate)] for candidate in self.refusals.left(candidates)]

    def _wanted(self, candidate: Candidate) -> list[tuple[str, dict[int, int]]]:
        """The layers whose time it changes, and how many indices they lose."""
        return list(self.cells.lost(candidate).items()) if candidate.cut and not self.cells.blind(candidate) else []

    def _alone(self, candidate: Candidate) -> Cost:
        if not self.cells.layerwise(candidate):
            return self._whole(candidate)
        pairs = self.cells.of(candidate).items()
        return Cost(
            seconds=added([new.change for _, new in pairs]),
            bytes=sum(new.bytes - self.cells.at(path, {}).bytes for path, new in pairs),
        )

    def _whole(self, candidate: Candidate) -> Cost:
        """By carrying it out: for what acts on layers that cannot be resized by themselves, as recurrent ones."""
        if candidate.cut:
            light = remove_units(self.model, candidate.cut, analysis=self.analysis, prove=False)
        else:
            assert candidate.layers is not None  # noqa: S101  (one of the two is there)
            light = replace_layers(self.model, candidate.layers())
        form = onnx_form(light)
        ratio = self.watch.ratio(self.model, form, self.cells.graph.form)
        change = Measured((ratio.value - 1) * self.cells.whole, ratio.error * self.cells.whole)
        return Cost(seconds=change, bytes=form.bytes - self.cells.graph.form.bytes)

    def tables(self, menu: Mapping[str, Sequence[Candidate]]) -> tuple[Table, ...]:
        """How time and bytes depend on all places: exact for each layer together with its neighbours."""
        touching: dict[str, list[str]] = {}
        own: list[Table] = []
        for place, candidates in menu.items():
            exact = [c for c in candidates if self.cells.layerwise(c)]
            if len(exact) < len(candidates):
                own.append(self._single_table(place, candidates))
                continue
            for path in dict.fromkeys(path for c in candidates for path in self.cells.paths(c)):
                touching.setdefault(path, []).append(place)
        self.cells.time([w for path, places in touching.items() for w in self._combinations(path, places, menu)])
        for path, places in touching.items():
            own += self._layer_tables(path, places, menu)
        return (*own, *self._apart(menu))

    def _apart(self, menu: Mapping[str, Sequence[Candidate]]) -> list[Table]:
        """Which of the places that have a table of their own do not go with others."""
        whole = {place for place, candidates in menu.items() if not all(map(self.cells.layerwise, candidates))}
        reach = {place: reached(candidates, self.cells.replaced, self.analysis) for place, candidates in menu.items()}
        return [one_at_most(pair, menu, ("time", "bytes", EXPECTED)) for pair in exclusions(menu, whole, reach)]

    def _single_table(self, place: str, candidates: Sequence[Candidate]) -> Table:
        costs = [self.singles[id(c)] for c in candidates]
        amounts = {
            "time": [0.0, *(c.seconds.settled for c in costs)],
            "bytes": [0.0, *(c.bytes for c in costs)],
            EXPECTED: [0.0, *(c.seconds.value for c in costs)],
        }
        return Table((place,), {name: np.array(values) for name, values in amounts.items()})

    def _settings(self, path: str, place: str, menu: Mapping[str, Sequence[Candidate]]) -> list[dict[int, int] | Cell]:
        """What each setting of a place does to a layer: widths that it loses, or another layer."""
        found: list[dict[int, int] | Cell] = [{}]
        for candidate in menu[place]:
            if candidate.layers is not None:
                found.append(self.cells.exchanged[id(candidate)].get(path, {}))
            else:
                found.append(self.cells.lost(candidate).get(path, {}))
        return found

    def _combinations(
        self, path: str, places: Sequence[str], menu: Mapping[str, Sequence[Candidate]]
    ) -> list[tuple[str, dict[int, int]]]:
        cut = [place for place in places if menu[place][0].cut]
        if math.prod(len(menu[place]) + 1 for place in cut) > CELLS:
            return []
        sides = [self._settings(path, place, menu) for place in cut]
        return [(path, _joined(cell)) for cell in product(*sides)]

    def _layer_tables(self, path: str, places: Sequence[str], menu: Mapping[str, Sequence[Candidate]]) -> list[Table]:
        cut = [place for place in places if menu[place][0].cut]
        many = math.prod(len(menu[place]) + 1 for place in cut) > CELLS
        new = [place for place in places if place not in cut]
        if many:
            pairs = [self._table(path, [*new, place], menu, exclusive=True) for place in cut] if new else []
            return [*(self._table(path, [place], menu) for place in cut), *pairs, *self._new_only(path, new, menu)]
        return [self._table(path, list(places), menu)]

    def _new_only(self, path: str, new: Sequence[str], menu: Mapping[str, Sequence[Candidate]]) -> list[Table]:
        return [self._table(path, list(new), menu)] if new else []

    def _table(
        self, path: str, places: list[str], menu: Mapping[str, Sequence[Candidate]], *, exclusive: bool = False
    ) -> Table:
        """A layer's changes over the settings of some places; with `exclusive`, only which of them go together."""
        sides = [self._settings(path, place, menu) for place in places]
        shape = tuple(map(len, sides))
        amounts = {quantity: np.zeros(shape) for quantity in ("time", "bytes", EXPECTED)}
        whole = self.cells.at(path, {})
        for index in np.ndindex(*shape):
            found = self._together([side[k] for side, k in zip(sides, index, strict=True)], path, apart=exclusive)
            if found is None:
                for held in amounts.values():
                    held[index] = math.inf
            elif not exclusive:
                amounts["time"][index], amounts[EXPECTED][index] = found.change.settled, found.change.value
                amounts["bytes"][index] = found.bytes - whole.bytes
        return Table(tuple(places), amounts)

    def _together(self, parts: Sequence[dict[int, int] | Cell], path: str, *, apart: bool) -> Cell | None:
        """The layer under all these settings; None where they exclude each other: a new layer is not resized.

        With `apart`, cuts and new layers have tables of their own, which would count what is left out twice.
        """
        new = [part for part in parts if isinstance(part, Cell)]
        cuts = [part for part in parts if isinstance(part, dict) and part]
        if new:  # what is left out has no width, and may be as wide as it likes
            return new[0] if len(new) == 1 and (not cuts or (new[0].gone and not apart)) else None
        return self.cells.at(path, _joined(cuts))


def _joined(parts: Sequence[Mapping[int, int] | Cell]) -> dict[int, int]:
    """Widths lost to several places together."""
    lost: dict[int, int] = {}
    for part in parts:
        for dim, count in part.items() if isinstance(part, Mapping) else ():
            lost[dim] = lost.get(dim, 0) + count
    return lost
