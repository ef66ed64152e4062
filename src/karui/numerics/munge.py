"""Pseudo data from a table: MUNGE, and the independent draws that it has to beat (survey 36, sections 3.1 and 3.3).

MUNGE walks through a copy of the table and lets each row exchange attributes with its nearest neighbour, so that what
comes out lies about the same manifold as what went in. The neighbour is looked for in the table *as it has become*.
That is n searches among n rows, none of which may be prepared for all; here the distances of a block of rows come from
one matrix product, and are corrected for the few rows that have changed since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from karui.errors import require

Neighbours = Literal["current", "original"]
Wait = Callable[[Iterable[int]], Iterable[int]]
BLOCK = 2_000_000
"""Most distances that are held at a time: 16 MB."""
ROUNDING = 1e-9
"""Squared distances by a matrix product closer than this are told apart by subtracting, which rounds less."""


def munge(
    table: Float[np.ndarray, "samples attributes"],
    *,
    copies: int,
    swap: float,
    tightness: float,
    nominal: Sequence[int] = (),
    seed: int = 0,
    neighbours: Neighbours = "current",
    wait: Wait = iter,
) -> Float[np.ndarray, "rows attributes"]:
    """MUNGE(T, k, p, s): k tables of pseudo data, one below the other (algorithm 1).

    Each row e of a copy meets its nearest other row e'. With probability p an attribute is exchanged: a nominal one is
    swapped; of a continuous one each row draws from a normal distribution about the other's old value, of standard
    deviation |e_a - e'_a| / s. Distance: squared differences of continuous attributes, scaled to [0, 1], plus the
    number of nominal ones that differ.

    Args:
        table: T, of finite numbers; left as it is.
        copies: k.
        swap: p, in [0, 1].
        tightness: s, positive; infinite for plain swaps.
        nominal: columns whose numbers are names.
        seed: of all draws.
        neighbours: "current" looks among the rows as they have become, as the paper does; "original" among T, once,
            which is faster and a little less like it.
        wait: is given the numbers of all rows, and may show a bar.

    Raises:
        SettingError: a setting is out of range, there is no other row, or a column that is not there.

    Example:
        >>> table = np.array([[0.0, 1.0], [0.1, 1.0], [5.0, 2.0]])
        >>> made = munge(table, copies=2, swap=0.5, tightness=np.inf, nominal=[1])
        >>> made.shape, sorted(made[:3, 0].tolist())
        ((6, 2), [0.0, 0.1, 5.0])
    """
    table, numbers = _checked(table, nominal)
    require(copies >= 0, f"copies is {copies}; give a number from 0")
    require(0 <= swap <= 1, f"swap is {swap}; give a probability in [0, 1], for example 0.2")
    require(tightness > 0, f"tightness is {tightness}; give a positive number, for example 5")
    require(len(table) > 1, "MUNGE exchanges attributes between neighbours, and the table has no two rows.")
    draw, rows, attributes = np.random.default_rng(seed), len(table), table.shape[1]
    continuous = ~np.isin(np.arange(attributes), numbers)
    code = _Code(table, continuous)
    fixed = _Search(code(table)).all() if neighbours == "original" else None
    made = np.tile(table, (copies, 1))
    search: _Search | None = None
    for number in wait(range(copies * rows)):
        turn, row = divmod(number, rows)
        copy = made[turn * rows : (turn + 1) * rows]
        if row == 0 and fixed is None:
            search = _Search(code(copy))
        other = int(fixed[row]) if fixed is not None or search is None else search.nearest(row)  # pyright: ignore[reportOptionalSubscript]
        exchanged = draw.random(attributes) < swap
        noise = draw.standard_normal((2, attributes))
        if not exchanged.any():
            continue
        pair = copy[[other, row]]
        deviation = np.where(continuous, np.abs(pair[0] - pair[1]) / tightness, 0.0)
        copy[[row, other]] = np.where(exchanged, pair + deviation * noise, pair[::-1])
        if search is not None:
            search.change(np.array([row, other]), code(copy[[row, other]]))
    return made


def independent(
    table: Float[np.ndarray, "samples attributes"], *, rows: int, seed: int = 0
) -> Float[np.ndarray, "rows attributes"]:
    """RANDOM: each attribute is drawn on its own from the values that it has in the table (section 3.1).

    Args:
        table: whose columns are drawn from; left as it is.
        rows: number of rows.
        seed: of the draws.

    Example:
        >>> independent(np.array([[0.0, 10.0], [1.0, 20.0]]), rows=3).shape
        (3, 2)
    """
    table, _ = _checked(table, ())
    require(rows >= 0, f"rows is {rows}; give a number from 0")
    picks = np.random.default_rng(seed).integers(len(table), size=(rows, table.shape[1]))
    return np.take_along_axis(table, picks, 0)


def _checked(table: np.ndarray, nominal: Sequence[int]) -> tuple[Float[np.ndarray, "samples attributes"], list[int]]:
    table = np.asarray(table, dtype=np.float64)
    require(table.ndim == 2 and table.size > 0, f"The table is of shape {table.shape}; give [samples, attributes].")
    require(bool(np.isfinite(table).all()), "The table holds numbers that are not finite.", "Fill the gaps first.")
    wrong = [column for column in nominal if not 0 <= column < table.shape[1]]
    require(not wrong, f"nominal names column {wrong}; the table has {table.shape[1]}, counted from 0.")
    return table, list(nominal)


class _Code:
    """Rows as points whose squared Euclidean distance is the one of MUNGE: a nominal value is a corner of length √½."""

    def __init__(self, table: Float[np.ndarray, "samples attributes"], continuous: Bool[np.ndarray, "attributes"]):
        low, high = table[:, continuous].min(0), table[:, continuous].max(0)
        span = high - low
        self._low, self._span = low, np.where(span > 0, span, 1.0)
        self._continuous = continuous
        self._names = [np.unique(column) for column in table[:, ~continuous].T]

    def __call__(self, rows: Float[np.ndarray, "samples attributes"]) -> Float[np.ndarray, "samples numbers"]:
        scaled = (rows[:, self._continuous] - self._low) / self._span
        columns = zip(rows[:, ~self._continuous].T, self._names, strict=True)
        corners = [np.sqrt(0.5) * (column[:, None] == names) for column, names in columns]
        return np.concatenate([scaled, *corners], 1)


class _Search:
    """The nearest other point of each, among points that change; the first of several equally near."""

    def __init__(self, points: Float[np.ndarray, "samples numbers"]) -> None:
        self._points = points
        self._size = max(1, min(128, BLOCK // len(points)))
        self._start = self._stop = 0
        self._changed = np.zeros(len(points), dtype=bool)

    def all(self) -> Int[np.ndarray, "samples"]:
        """Of every point, while none has changed."""
        return np.array([self.nearest(row) for row in range(len(self._points))])

    def nearest(self, row: int) -> int:
        """Of the point with this number."""
        if not self._start <= row < self._stop:
            self._begin(row)
        if self._changed[row]:
            near = np.arange(len(self._points))
        else:
            distances = self._distances[row - self._start]
            near = np.flatnonzero((distances <= distances.min() + ROUNDING) | self._changed)
        near = near[near != row]
        return int(near[np.square(self._points[near] - self._points[row]).sum(1).argmin()])

    def change(self, rows: Int[np.ndarray, "rows"], points: Float[np.ndarray, "rows numbers"]) -> None:
        """Points have moved."""
        self._points[rows] = points
        self._changed[rows] = True
        self._distances[:, rows] = np.inf

    def _begin(self, row: int) -> None:
        """The squared distances of a block of points from all, as they are now."""
        self._start, self._stop = row, min(row + self._size, len(self._points))
        self._changed[:] = False
        block, squares = self._points[row : self._stop], np.square(self._points).sum(1)
        self._distances = squares[row : self._stop, None] + squares - 2 * block @ self._points.T
        self._distances[np.arange(len(block)), np.arange(row, self._stop)] = np.inf
