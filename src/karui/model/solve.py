"""Resolve what was said of the labels into units that can be cut, each by itself.

Merged labels are one class (connected components). Grids are simplified until nothing changes: an axis that must stay
drops out, rows with the same cells are one, a grid with one axis left is plain merging; grids over the same cells, or
over the same axes, are one. Where a class is still the cell of two different grids (a channel shuffle into channels
that are split elsewhere), the shorter axis is held in place. What is left is free: any set of *base* classes may die,
and a cell dies where one of its axes does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from karui.model.labels import Labels

GridArrays = tuple[np.ndarray, tuple[np.ndarray, ...]]

HELD = "two ways of splitting the same channels meet, and only one of them can shrink"
WHOLE = "every index along it is the same unit"


@dataclass
class Resolved:
    """Classes of labels, and of each whether it may die.

    Settings:
        classes: the class of each label.
        locked: the code of the reason why a class must stay, or -1.
        counted: the code of the normalisation that counts a class, or -1.
        grids: what is left: (cells [n, m, ...], axes), of classes.
    """

    classes: np.ndarray
    locked: np.ndarray
    counted: np.ndarray
    grids: list[GridArrays] = field(default_factory=list)

    def of(self, labels: np.ndarray) -> np.ndarray:
        """The class of each label; -1 where it must stay."""
        return self._free[np.maximum(labels, -1)]

    @cached_property
    def _free(self) -> np.ndarray:
        """The class of each label, -1 where it must stay, and -1 once more for what has no label."""
        if not self.classes.size:
            return np.full(1, -1)
        return np.append(np.where(self.locked[self.classes] < 0, self.classes, -1), -1)

    def bases(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (cell, axis) of classes: the first dies if the second does."""
        for cells, axes in self.grids:
            for place, axis in enumerate(axes):
                shape = [-1 if k == place else 1 for k in range(len(axes))]
                yield cells.reshape(-1), np.broadcast_to(axis.reshape(shape), cells.shape).reshape(-1)


@dataclass
class _State:
    """Merges and locks in the course of resolving."""

    labels: Labels
    edges: list[tuple[np.ndarray, np.ndarray]]
    locks: list[tuple[np.ndarray, int]]
    changed: bool = False

    def merge(self, one: np.ndarray, other: np.ndarray) -> None:
        self.edges.append((one.reshape(-1), other.reshape(-1)))
        self.changed = True

    def lock(self, labels: np.ndarray, reason: int) -> None:
        self.locks.append((labels.reshape(-1), reason))
        self.changed = True


def solve(labels: Labels) -> Resolved:
    """The classes of `labels`, with grids brought to their simplest form."""
    state = _State(labels, list(labels.merges), list(labels.locks))
    grids = [(g.target, g.axes) for g in labels.grids]
    while True:
        found = _classes(state)
        state.changed = False
        grids = [g for grid in grids for g in _simplify(grid, found, state)]
        if not state.changed:
            grids = _same(grids, found, state)
        if not state.changed:
            _conflicts(grids, found, state)
        if not state.changed:
            break
    counted = np.full(len(found.locked), -1)
    for flagged, code in labels.counted:
        live = found.of(flagged)
        counted[live[live >= 0]] = code
    kept = [(found.of(cells), tuple(found.of(a) for a in axes)) for cells, axes in grids]
    return Resolved(found.classes, found.locked, counted, kept)


def components(count: int, one: np.ndarray, other: np.ndarray) -> tuple[int, np.ndarray]:
    """Connected components of the graph of `count` nodes and edges one[k] - other[k].

    By hooking roots to smaller roots, and halving paths. As fast as scipy's, whose import takes longer than a cut.

    Returns:
        Their number, and the component of each node; components are numbered in the order of their smallest nodes.

    Example:
        >>> components(4, np.array([3]), np.array([1]))
        (3, array([0, 1, 2, 1]))
    """
    nodes = np.arange(count)
    root = nodes.copy()
    while True:
        ends = root[one], root[other]
        apart = ends[0] != ends[1]
        if not apart.any():
            break
        one, other = one[apart], other[apart]
        np.minimum.at(root, np.maximum(*ends)[apart], np.minimum(*ends)[apart])
        while not np.array_equal(above := root[root], root):
            root = above
    first = root == nodes
    return int(first.sum()), (np.cumsum(first) - 1)[root]


def distinct(values: np.ndarray) -> np.ndarray:
    """The different integers of an array [n], in order. As `numpy.unique`, which imports masked arrays to ask for them.

    Example:
        >>> distinct(np.array([3, 1, 3]))
        array([1, 3])
    """
    values = np.sort(values)
    return values[np.concatenate([np.ones(1, dtype=bool)[: len(values)], values[1:] != values[:-1]])]


def _classes(state: _State) -> Resolved:
    """Connected components of the merges, and which of them must stay."""
    count = state.labels.count
    if count == 0:
        empty = np.zeros(0, dtype=np.int64)
        return Resolved(empty, empty, empty)
    one = np.concatenate([e[0] for e in state.edges] or [np.zeros(0, dtype=np.int64)])
    other = np.concatenate([e[1] for e in state.edges] or [np.zeros(0, dtype=np.int64)])
    both = (one >= 0) & (other >= 0)
    one_, other_ = one[both], other[both]
    total, classes = components(count, one_, other_)
    locked = np.full(total, -1)
    half = ~both & ((one >= 0) | (other >= 0))
    ends, held = np.maximum(one[half], other[half]), np.minimum(one[half], other[half])
    locked[classes[ends]] = -1 - held
    for what, reason in state.locks:
        live = what[what >= 0]
        locked[classes[live]] = reason
    return Resolved(classes, locked, locked)


def _simplify(grid: GridArrays, found: Resolved, state: _State) -> list[GridArrays]:
    """One grid with dead axes dropped; nothing where it came down to merging."""
    cells, axes = grid
    of_cells = found.of(cells)
    for place, axis in enumerate(axes):
        moved = np.moveaxis(of_cells, place, 0)
        if len(axis) > 1 and (of_cells >= 0).any() and (found.of(axis) >= 0).any() and (moved == moved[:1]).all():
            state.lock(axis, state.labels.code(WHOLE))
            return [grid]
    live = [k for k, a in enumerate(axes) if (found.of(a) >= 0).any()]
    if not live:
        if (of_cells >= 0).any():
            state.lock(cells, _why(axes[0], found))
        return []
    if len(live) < len(axes):
        return _drop(cells, axes, live, state)
    if len(axes) == 1:
        state.merge(cells, axes[0])
        return []
    for place, axis in enumerate(axes):
        seen, again = _distinct(np.moveaxis(of_cells, place, 0).reshape(len(axis), -1))
        if len(seen) < len(axis):
            state.merge(axis, axis[seen][again])
            one = np.sort(seen)
            return [(cells.take(one, axis=place), (*axes[:place], axis[one], *axes[place + 1 :]))]
    _hold(grid, found, state)
    return [grid]


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of rows that differ, and for every row which of them it equals; each is compared as one string."""
    rows = np.ascontiguousarray(rows)
    strings = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).reshape(-1)
    _, seen, again = np.unique(strings, return_index=True, return_inverse=True)
    return seen, again.reshape(-1)


def _hold(grid: GridArrays, found: Resolved, state: _State) -> None:
    """A cell that stays holds its axes in place; a cell whose axes all stay, stays."""
    cells, axes = grid
    dead = found.of(cells) < 0
    alone = np.ones(cells.shape, dtype=bool)
    for place, axis in enumerate(axes):
        others = tuple(k for k in range(len(axes)) if k != place)
        held = found.of(axis) < 0
        alone &= np.expand_dims(held, others)
        stay = dead.any(axis=others) & ~held
        if stay.any():
            state.lock(axis[stay], _why(cells[dead][:1], found))
    if (alone & ~dead).any():
        state.lock(cells[alone & ~dead], _why(axes[0][found.of(axes[0]) < 0][:1], found))


def _drop(cells: np.ndarray, axes: tuple[np.ndarray, ...], live: list[int], state: _State) -> list[GridArrays]:
    """Without the axes that stay; cells along them are one."""
    gone = [k for k in range(len(axes)) if k not in live]
    flat = np.moveaxis(cells, gone, range(len(gone))).reshape(-1, *[len(axes[k]) for k in live])
    for row in flat[1:]:
        state.merge(flat[0], row)
    kept = tuple(axes[k] for k in live)
    state.changed = True
    if len(kept) == 1:
        state.merge(flat[0], kept[0])
        return []
    return [(flat[0], kept)]


def _why(labels: np.ndarray, found: Resolved) -> int:
    """The reason that holds the first of these labels."""
    label = int(labels.reshape(-1)[0])
    return -1 - label if label < 0 else int(max(found.locked[found.classes[label]], 0))


def _same(grids: list[GridArrays], found: Resolved, state: _State) -> list[GridArrays]:
    """Grids over the same axes have the same cells, and the other way round."""
    by_axes: dict[bytes, np.ndarray] = {}
    by_cells: dict[bytes, tuple[np.ndarray, ...]] = {}
    kept = []
    for cells, axes in grids:
        order = sorted(range(len(axes)), key=lambda k: found.of(axes[k]).tobytes())
        turned, sides = cells.transpose(order), tuple(axes[k] for k in order)
        key = b"|".join(found.of(a).tobytes() for a in sides)
        seen = by_axes.setdefault(key, turned)
        if seen is not turned:
            if (found.of(seen) != found.of(turned)).any():
                state.merge(seen, turned)
            continue
        own = repr(cells.shape).encode() + found.of(cells).tobytes()
        if own in by_cells:
            for one, other in zip(by_cells[own], axes, strict=True):
                state.merge(one, other)
            continue
        by_cells[own] = axes
        kept.append((cells, axes))
    return kept


def _conflicts(grids: list[GridArrays], found: Resolved, state: _State) -> None:
    """Hold the shorter axis of grids whose cells belong to another grid too, or that lie on their own axes."""
    owner = np.full(len(found.locked), -1)
    depends: dict[int, set[int]] = {}
    clashing: set[int] = set()
    for number, (cells, _) in enumerate(grids):
        of_cells = found.of(cells)
        flat = of_cells[of_cells >= 0]
        others = owner[flat]
        clashing |= {number} if (others >= 0).any() or len(distinct(flat)) != len(flat) else set()
        clashing |= {int(o) for o in distinct(others) if o >= 0}
        owner[flat] = number
    for number, (_, axes) in enumerate(grids):
        ends = [found.of(a) for a in axes]
        live = np.concatenate([e[e >= 0] for e in ends])
        depends[number] = {int(o) for o in distinct(owner[live]) if o >= 0}
        if len(distinct(live)) != len(live):
            clashing.add(number)
    clashing |= _cyclic(depends)
    for number in sorted(clashing):
        _, axes = grids[number]
        sizes = [len(distinct(found.of(a)[found.of(a) >= 0])) for a in axes]
        state.lock(axes[int(np.argmin(sizes))], state.labels.code(HELD))


def _cyclic(depends: dict[int, set[int]]) -> set[int]:
    """Grids that are left when those without unresolved axes are taken away, again and again."""
    left = dict(depends)
    while True:
        ready = {k for k, needs in left.items() if not needs & left.keys()}
        if not ready:
            return set(left)
        left = {k: v for k, v in left.items() if k not in ready}
