"""The choice: one setting for each place, least harm under all limits at once; a multiple-choice knapsack, exact.

What a layer costs depends on the settings of several places: cutting a group changes what its consumers read, and a
layer that is replaced lies between two groups. So costs come in tables over the settings of a few places; in the
integer program a table's cells have weights of their own whose margins are the places' settings. Since those are whole,
so are the weights: the cost of the pair that is chosen, not a sum of two.

To the solver a variable is whole that is so but for a millionth, and a millionth of a setting that saves megabytes is
worth bytes. So what it chooses is held against the limits by the tables themselves; settings that break one are
forbidden, and it solves again.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_matrix

NODES = 20_000
"""Branches that the solver may look at; what it then has is taken, and is a valid choice, if perhaps not the best. They
are counted, as seconds would make the choice depend on what else the machine does."""
BISECTIONS = 7
"""Tries of how far the way to limits that cannot be kept is possible, its end among them."""

ROUNDING = 1e-10
"""Of the arithmetic by which a sum is held against a limit: a share of the limit, or of the largest amount."""
CUTS = 16
"""How often settings are forbidden that keep a limit only by the solver's tolerances, and
TOLERANCE: the share of a row by which its limit is drawn in where that was not enough: twice what they can hide."""
TOLERANCE = 2e-6

SHARP = 1e3
"""Times the best choice's harm up to which a candidate's may be, for the solver to see what it must."""
ALIKE = 0.02
"""By what share sums of harms may differ and count as the same. From one draw of 128 pictures to another, the harm of a
candidate differs by far more; but many small changes harm one another. On ResNet-56, at 0.75 of its time in 8 bits and
with normalisations seen anew, choices within 0.02 move the output by 0.148 nats instead of 0.145 and take 0.75 of the
bytes instead of 0.85; within 0.05 by 0.18 (0.70), within 0.1 by 0.23 (0.66).
"""


@dataclass(frozen=True, eq=False)
class Table:
    """How quantities change with the settings of a few places.

    Settings:
        places: their names.
        amounts: for each quantity an array with an axis for each place, the change against setting 0 everywhere;
            infinite where those settings do not go together.
    """

    places: tuple[str, ...]
    amounts: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """What is to be chosen from.

    Settings:
        harms: for each place the harm of each of its settings; setting 0 leaves the place as it is.
        tables: the changes of all quantities, which add up.
        limits: the most that the changes of a quantity may add up to (negative: a saving).
    """

    harms: Mapping[str, Sequence[float]]
    tables: Sequence[Table]
    limits: Mapping[str, float] = field(default_factory=dict)

    def total(self, chosen: Mapping[str, int], quantity: str) -> float:
        """What the changes of a quantity add up to."""
        cells = (
            table.amounts[quantity][tuple(chosen.get(place, 0) for place in table.places)]
            for table in self.tables
            if quantity in table.amounts
        )
        return float(sum(cells))

    def harm(self, chosen: Mapping[str, int]) -> float:
        """What the harms add up to."""
        return float(sum(self.harms[place][setting] for place, setting in chosen.items()))

    def raised(self, power: float) -> Problem:
        """The same problem with each harm to a power: below 1, few large changes count less than many small ones."""
        return replace(self, harms={place: [harm**power for harm in harms] for place, harms in self.harms.items()})


def choose(problem: Problem) -> dict[str, int] | None:
    """The settings of least harm within the limits; None where no choice keeps them.

    Example:
        >>> time = Table(("a", "b"), {"time": np.array([[0.0, -2.0], [-3.0, -4.0]])})
        >>> problem = Problem(harms={"a": [0, 1], "b": [0, 1]}, tables=[time], limits={"time": -3})
        >>> choose(problem)
        {'a': 1, 'b': 0}
    """
    found = _Program(problem).solve()
    while found is not None:
        most, worst = problem.harm(found), max((h for harms in problem.harms.values() for h in harms), default=0.0)
        if worst <= SHARP * most:
            break
        # Beside a harm beyond all measure the solver sees no difference among small ones; without it, it does.
        nearer = _Program(problem, harm=most).solve()
        if nearer is None or problem.harm(nearer) >= most:
            break
        found = nearer
    return None if found is None else _descended(problem, found)


def _descended(problem: Problem, chosen: Mapping[str, int]) -> dict[str, int]:
    """The choice without harm that a single place can be spared: beside a harm that has to be, a millionth of it is
    nothing to the solver.
    """
    held = [_Held(q, [t for t in problem.tables if q in t.amounts], limit) for q, limit in problem.limits.items()]
    quantities = {quantity for table in problem.tables for quantity in table.amounts}

    def fits(tried: Mapping[str, int]) -> bool:
        possible = all(np.isfinite(problem.total(tried, quantity)) for quantity in quantities)
        return possible and not any(limit.broken(tried) for limit in held)

    found = dict(chosen)
    for place, harms in problem.harms.items():
        less = sorted((k for k, harm in enumerate(harms) if harm < harms[found[place]]), key=harms.__getitem__)
        spared = next((k for k in less if fits({**found, place: k})), None)
        found[place] = found[place] if spared is None else spared
    return found


def frugal(problem: Problem, quantity: str) -> dict[str, int] | None:
    """As `choose`; but of the choices that do hardly more harm, the one that takes least of a quantity without a limit.

    Harms are measured on few samples: what differs by less than `ALIKE` is alike.

    Example:
        >>> time = Table(("a", "b"), {"time": np.array([[0.0, -2.0], [-2.0, -4.0]])})
        >>> size = Table(("b",), {"bytes": np.array([0.0, -9.0])})
        >>> problem = Problem(harms={"a": [0, 1], "b": [0, 1.01]}, tables=[time, size], limits={"time": -2})
        >>> choose(problem), frugal(problem, "bytes")
        ({'a': 1, 'b': 0}, {'a': 0, 'b': 1})
    """
    least = choose(problem)
    if least is None:
        return None
    found = _Program(problem, aim=quantity, harm=(1 + ALIKE) * problem.harm(least)).solve()
    return least if found is None else found


def farthest(problem: Problem) -> tuple[dict[str, int], dict[str, float]]:
    """Where no choice keeps all limits: the one nearest to them, along the way that is possible; and how far the menu
    goes in each quantity by itself.
    """
    free = replace(problem, limits={})
    ends = {q: free.total(cheapest(free, q), q) for q in problem.limits}
    low, middle, high, found = 0.0, 1.0, 1.0, dict.fromkeys(problem.harms, 0)
    for _ in range(BISECTIONS):
        tried = choose(replace(problem, limits={q: max(problem.limits[q], middle * ends[q]) for q in ends}))
        if tried is None:
            high = middle
        else:
            low, found = middle, tried
        if low == high:
            break  # the end of the menu itself keeps all of them
        middle = (low + high) / 2
    return found, ends


def cheapest(problem: Problem, quantity: str) -> dict[str, int]:
    """The settings that take least of one quantity, whatever the harm: how far the menu reaches."""
    free = Problem(harms=problem.harms, tables=problem.tables)
    found = _Program(free, aim=quantity).solve()
    return found if found is not None else dict.fromkeys(problem.harms, 0)


HARM = "harm"
"""What the bound on harms is called among the limits of a program."""


@dataclass(frozen=True, eq=False)
class _Held:
    """A limit as the tables tell whether it is kept."""

    quantity: str
    tables: Sequence[Table]
    limit: float

    def broken(self, fixed: Mapping[str, int]) -> bool:
        """Whether these settings are beyond the limit, whatever the other places do."""
        return self._least(fixed) > self.limit + ROUNDING * max(abs(self.limit), self._largest)

    @cached_property
    def _largest(self) -> float:
        amounts = [np.abs(table.amounts[self.quantity]) for table in self.tables]
        return max((float(array[np.isfinite(array)].max(initial=0.0)) for array in amounts), default=0.0)

    def _least(self, fixed: Mapping[str, int]) -> float:
        """The least that the sum can be with some settings fixed; the sum itself where all are."""
        return sum(
            float(np.min(table.amounts[self.quantity][tuple(fixed.get(p, slice(None)) for p in table.places)]))
            for table in self.tables
        )


class _Program:
    """The integer program: a binary variable for each setting, a weight for each cell of each table."""

    def __init__(self, problem: Problem, aim: str = "", harm: float = np.inf) -> None:
        self.problem = problem
        self.start: dict[str, int] = {}
        self.costs: list[float] = []
        for place, harms in problem.harms.items():
            self.start[place] = len(self.costs)
            self.costs += [0.0 if aim else float(harm) for harm in harms]
        self.whole = len(self.costs)
        self.rows: list[tuple[dict[int, float], float, float]] = []
        self.spent: dict[str, dict[int, float]] = {quantity: {} for quantity in problem.limits}
        for place, harms in problem.harms.items():
            self.rows.append(({self.start[place] + k: 1.0 for k in range(len(harms))}, 1.0, 1.0))
        for table in problem.tables:
            self._add(table, aim)
        self.held: list[_Held] = []
        self.limited: list[int] = []
        for quantity, limit in problem.limits.items():
            self._hold(quantity, [t for t in problem.tables if quantity in t.amounts], self.spent[quantity], limit)
        if np.isfinite(harm):
            self._bound(harm)

    def _add(self, table: Table, aim: str) -> None:
        """A table over one place needs no weights of its own; others get one for each cell that is possible."""
        arrays = {quantity: np.asarray(array, dtype=float) for quantity, array in table.amounts.items()}
        shape = next(iter(arrays.values())).shape
        possible = np.all([np.isfinite(array) for array in arrays.values()], axis=0)
        single = len(table.places) == 1
        margins: list[list[dict[int, float]]] = [[{} for _ in range(n)] for n in shape]
        for cell in np.ndindex(*shape):
            if single:
                column = self.start[table.places[0]] + cell[0]
                if not possible[cell]:
                    self.rows.append(({column: 1.0}, 0.0, 0.0))
                    continue
            elif possible[cell]:
                column = len(self.costs)
                self.costs.append(0.0)
                for axis, setting in enumerate(cell):
                    margins[axis][setting][column] = 1.0
            else:
                continue
            for quantity, array in arrays.items():
                if quantity in self.spent:
                    self.spent[quantity][column] = self.spent[quantity].get(column, 0.0) + float(array[cell])
                if quantity == aim:
                    self.costs[column] += float(array[cell])
        if not single:
            for axis, place in enumerate(table.places):
                for setting, margin in enumerate(margins[axis]):
                    self.rows.append(({**margin, self.start[place] + setting: -1.0}, 0.0, 0.0))

    def _hold(self, quantity: str, tables: Sequence[Table], spent: dict[int, float], limit: float) -> None:
        self.held.append(_Held(quantity, tables, limit))
        self.limited.append(len(self.rows))
        self.rows.append((spent, -np.inf, limit))

    def _bound(self, most: float) -> None:
        """Settings that do more harm than that alone are out, and do not blur the solver's view of the others' sum."""
        harms = {self.start[p] + k: float(h) for p, told in self.problem.harms.items() for k, h in enumerate(told)}
        for column in [column for column, harm in harms.items() if harm > most]:
            self.rows.append(({column: 1.0}, 0.0, 0.0))
            self.costs[column] = 0.0
            del harms[column]
        told = [Table((place,), {HARM: np.array(each, dtype=float)}) for place, each in self.problem.harms.items()]
        self._hold(HARM, told, harms, most)

    def solve(self) -> dict[str, int] | None:
        """The chosen setting of each place; None where no choice keeps the limits."""
        if not self.whole:
            return {} if all(limit >= 0 for limit in self.problem.limits.values()) else None
        for _ in range(CUTS):
            found = self._solved()
            broken = None if found is None else self._broken(found)
            if found is None or broken is None:
                return found
            self._forbid(found, broken)
        # A choice that keeps a limit to the last byte may be lost so: only where there was no end of cuts.
        self._draw_in()
        found = self._solved()
        return None if found is None or self._broken(found) is not None else found

    def _broken(self, chosen: Mapping[str, int]) -> _Held | None:
        return next((held for held in self.held if held.broken(chosen)), None)

    def _forbid(self, chosen: Mapping[str, int], held: _Held) -> None:
        """Never again all of these settings: as few of them as break the limit whatever the other places do."""
        few = dict(chosen)
        for place in chosen:
            fewer = {other: setting for other, setting in few.items() if other != place}
            if held.broken(fewer):
                few = fewer
        self.rows.append(({self.start[p] + setting: 1.0 for p, setting in few.items()}, -np.inf, len(few) - 1.0))

    def _draw_in(self) -> None:
        """Each limit by more than the solver's tolerances can hide."""
        for row in self.limited:
            cells, low, high = self.rows[row]
            self.rows[row] = (cells, low, high - TOLERANCE * sum(map(abs, cells.values())))

    def _solved(self) -> dict[str, int] | None:
        """What the solver takes for the best choice."""
        places = [
            (row, column, value) for row, (cells, _, _) in enumerate(self.rows) for column, value in cells.items()
        ]
        rows, columns, values = (np.array(part) for part in zip(*places, strict=True))
        # Limits are seconds and bytes: each row is brought to a size of 1, as the solver's tolerances are absolute.
        sizes = np.array([max(map(abs, cells.values()), default=1.0) or 1.0 for cells, _, _ in self.rows])
        matrix = coo_matrix((values / sizes[rows], (rows, columns)), shape=(len(self.rows), len(self.costs)))
        low, high = (np.array([row[side] for row in self.rows]) / sizes for side in (1, 2))
        costs = np.array(self.costs)
        scale = np.abs(costs).max() or 1.0
        with _hushed():
            found = milp(
                costs / scale,
                integrality=(np.arange(len(costs)) < self.whole).astype(int),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(matrix.tocsr(), low, high)],  # pyright: ignore[reportArgumentType]
                # Presolve of HiGHS in SciPy 1.17 calls a choice optimal that is not; the tests hold such a problem.
                options={"node_limit": NODES, "mip_rel_gap": 0.0, "presolve": False},
            )
        if found.x is None:
            return None
        return {
            place: int(np.argmax(found.x[start : start + len(self.problem.harms[place])]))
            for place, start in self.start.items()
        }


@contextmanager
def _hushed() -> Iterator[None]:
    """HiGHS writes some remarks to the process's standard output though it is told not to, where JSON may be due."""
    if os.name != "posix":
        yield
        return
    flush = ctypes.CDLL(None).fflush  # its text waits in the buffers of C, and would come out later
    sys.stdout.flush()
    flush(None)
    kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)
