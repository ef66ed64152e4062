"""Labels: an integer for every index of every dimension of every tensor, and what operators say of them.

An index of a dimension (channel 3 of an activation, row 3 of a weight) carries a label. Indices that carry the same
label live and die together. A negative label never dies: it stands for the reason why. Operators say four things:

- two labels are one (`merge`);
- a label must stay (`lock`), and why;
- the labels of a flattened dimension are a grid over several axes (`grid`): flat index (i, j) dies exactly when row i
  or column j does. This is what a view that splits or folds dimensions says, and a grouped convolution;
- a label is counted by a normalisation (`normalised`): cutting it changes what the survivors compute, unless the
  statistics count survivors only.

They are collected as arrays here and resolved all at once in `karui.model.solve`, so analysis is linear in depth.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Dims = tuple[np.ndarray, ...]

SINGLE = "the dimension has one index only"
NO_RULE = "has no rule"


@dataclass(frozen=True)
class Grid:
    """`target[i, j, ...]` dies exactly when one of `axes[0][i]`, `axes[1][j]`, ... does."""

    target: np.ndarray
    axes: tuple[np.ndarray, ...]


@dataclass
class Labels:
    """The labels given out so far and everything that was said of them."""

    count: int = 0
    reasons: list[str] = field(default_factory=lambda: [SINGLE])
    merges: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    locks: list[tuple[np.ndarray, int]] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    counted: list[tuple[np.ndarray, int]] = field(default_factory=list)
    _codes: dict[str, int] = field(default_factory=lambda: {SINGLE: 0})
    _fixed: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    _dead: set[int] = field(default_factory=set)

    def code(self, reason: str) -> int:
        """The number of a reason; a label locked for it is `-1 - code`."""
        if reason not in self._codes:
            self._codes[reason] = len(self.reasons)
            self.reasons.append(reason)
        return self._codes[reason]

    def fresh(self, size: int) -> np.ndarray:
        """New labels for a dimension; a single index cannot be cut, so it gets none."""
        if size == 1:
            return self.fixed(1, SINGLE)
        self.count += size
        return np.arange(self.count - size, self.count)

    def fixed(self, size: int, reason: str) -> np.ndarray:
        """Labels that never die."""
        key = (size, self.code(SINGLE if size == 1 else reason))
        if key not in self._fixed:
            self._fixed[key] = np.full(size, -1 - key[1])
            self._dead.add(id(self._fixed[key]))
        return self._fixed[key]

    def merge(self, one: np.ndarray, other: np.ndarray) -> None:
        """The indices of two dimensions of equal size live and die together."""
        if one.shape != other.shape:
            raise ValueError(f"dimensions of {len(one)} and {len(other)} indices cannot merge")
        if one is not other:
            self.merges.append((one, other))

    def lock(self, labels: np.ndarray, reason: str) -> None:
        """These indices must stay."""
        if id(labels) not in self._dead and labels.size and labels.max() >= 0:
            self.locks.append((labels, self.code(reason)))

    def normalised(self, labels: np.ndarray, reason: str) -> None:
        """A statistic is taken over these indices."""
        if id(labels) not in self._dead and labels.size and labels.max() >= 0:
            self.counted.append((labels, self.code(reason)))

    def grid(self, target: np.ndarray, axes: Sequence[np.ndarray]) -> None:
        """`target`, flattened in row-major order over `axes`, dies where any axis does."""
        shape = tuple(len(a) for a in axes)
        self.grids.append(Grid(target.reshape(shape), tuple(axes)))

    def fold(self, dims: Sequence[np.ndarray]) -> np.ndarray:
        """The labels of several dimensions flattened into one."""
        dims = [d for d in dims if len(d) != 1] or [self.fixed(1, SINGLE)]
        if len(dims) == 1:
            return dims[0]
        shape = tuple(len(d) for d in dims)
        live = [k for k, d in enumerate(dims) if d.max() >= 0]
        if not live:
            return self.fixed(math.prod(shape), self.reasons[-1 - int(dims[-1][0])])
        if len(live) == 1:
            k = live[0]
            return np.broadcast_to(dims[k].reshape([-1 if i == k else 1 for i in range(len(shape))]), shape).reshape(-1)
        flat = self.fresh(math.prod(shape))
        self.grid(flat, dims)
        return flat

    def unfold(self, flat: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        """The labels of the dimensions that `flat` is split into."""
        wide = [n for n in sizes if n != 1]
        if len(wide) == 1:
            split = [flat]
        elif flat.max() < 0:
            split = [self.fixed(n, self.reasons[-1 - int(flat[0])]) for n in wide]
        else:
            split = [self.fresh(n) for n in wide]
            self.grid(flat, split)
        rest = iter(split)
        return [self.fixed(1, SINGLE) if n == 1 else next(rest) for n in sizes]

    def reshape(self, dims: Dims, sizes: Sequence[int]) -> Dims:
        """The labels of a tensor viewed under new sizes.

        Both lists of sizes are cut into the smallest runs of equal product; each run is folded flat, then split.
        """
        out: list[np.ndarray] = []
        i = 0
        run: list[int] = []
        for place, size in enumerate(sizes):
            run.append(size)
            taken = [dims[i]] if i < len(dims) else []
            have, need = math.prod(len(d) for d in taken), math.prod(run)
            j = i + len(taken)
            while have < need and j < len(dims):
                taken.append(dims[j])
                have *= len(dims[j])
                j += 1
            if have != need and place + 1 < len(sizes):
                continue
            if place + 1 == len(sizes):
                taken = list(dims[i:])
                j = len(dims)
            if len(run) == 1 and len(taken) == 1:
                out.append(taken[0])
            else:
                out += self.unfold(self.fold(taken), run)
            i, run = j, []
        return tuple(out)
