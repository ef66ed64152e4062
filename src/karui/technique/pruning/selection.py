"""How many units go, and which: counts rounded to what engines like, and the weakest by score."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from karui.errors import require

# The part of a group that rounding may take beyond what was asked.
MORE = 1 / 16


def removed_count(size: int, ratio: float, multiple: int = 1) -> int:
    """How many of `size` units to remove for a share of `ratio`, so that what is kept is a multiple of `multiple`.

    The share is rounded to the nearest unit (halves up), as the papers do whose counts are known: a tenth of 16 filters
    is two. But rounding takes no more than a sixteenth part of the units beyond what was asked, and in groups of
    fewer than 8 it is down where it would: 30 % of a pair is nobody, not half. At least one unit stays, and rounding
    to a multiple keeps more than was asked, never less.

    Example:
        >>> removed_count(16, 0.5), removed_count(16, 0.1), removed_count(10, 0.25), removed_count(2, 0.3)
        (8, 2, 3, 0)
        >>> removed_count(64, 0.3, multiple=8)
        16
    """
    require(0 <= ratio < 1, f"ratio is {ratio}; give a share in [0, 1), for example 0.3")
    require(multiple >= 1, f"multiple is {multiple}; give a whole number of units, 1 or more")
    asked = size * ratio
    nearest = math.floor(asked + 0.5)
    removed = nearest if nearest - asked <= MORE * size + 1e-9 else math.floor(asked)
    kept = max(1, size - removed)
    return size - min(size, math.ceil(kept / multiple) * multiple)


def weakest(scores: Float[Tensor, "units"], count: int) -> Int[Tensor, "count"]:
    """Numbers of the `count` units of smallest score, ascending; of equal scores the first go.

    Raises:
        SettingError: a score is not finite, or fewer than `count` units are there.

    Example:
        >>> weakest(torch.tensor([3.0, 1.0, 2.0]), 2).tolist()
        [1, 2]
    """
    require(bool(torch.isfinite(scores).all()), "A score is not finite, so units cannot be ranked by it")
    require(0 <= count <= len(scores), f"{count} units are to go, but there are only {len(scores)}")
    return torch.argsort(scores.cpu(), stable=True)[:count].sort().values


def ladder(size: int, multiple: int = 1, rungs: int = 8) -> tuple[int, ...]:
    """How many of `size` units to keep, from nearly all to an eighth: multiples of `multiple`, fewer than `rungs`.

    A group that holds no smaller multiple gets the plain shares: it cannot be aligned anyway.

    Example:
        >>> ladder(64, 8), ladder(128, 8), ladder(6, 8)
        ((56, 48, 40, 32, 24, 16, 8), (112, 96, 80, 64, 48, 32, 16), (5, 4, 3, 2, 1))
    """
    step = multiple if size > multiple else 1
    kept = [math.ceil(size * (rungs - rung) / rungs / step) * step for rung in range(1, rungs)]
    return tuple(dict.fromkeys(count for count in kept if count < size))
