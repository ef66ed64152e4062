"""The full view of SVD-softmax (survey 25): the words of the largest previews, and the rest of their logits.

The plain form is torch's, and serves everywhere: gradients, any device, export. With numba installed (`karui[fast]`)
inference on the CPU takes the operator `karui::full_view`: rows are multiplied where they lie, without a copy of all
that are looked up, and of a single vector only the words are sorted that a sample leaves in question.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from karui.numerics.kernels import serves

# Numbers gathered for the rest of the logits at a time: about what a cache holds. A long batch at once would not even
# fit in memory, and fresh memory costs more than the products.
_GATHERED = 2**20
# A sample has every so many words; it is taken where at most such a part of it is wanted.
_STEP, _PART = 16, 4

_LIBRARY = torch.library.Library("karui", "FRAGMENT")
_LIBRARY.define("full_view(Tensor previews, Tensor rest, Tensor remaining, int count) -> (Tensor, Tensor)")


def full_view(
    previews: Float[Tensor, "*batch words"],
    rest: Float[Tensor, "words width"],
    remaining: Float[Tensor, "*batch width"],
    count: int,
) -> tuple[Float[Tensor, "*batch count"], Int[Tensor, "*batch count"]]:
    """`previews + rest @ remaining` for the words with the `count` largest previews, and these words, in no order.

    Example:
        >>> values, words = full_view(torch.tensor([0.0, 3.0, 1.0]), torch.ones(3, 2), torch.ones(2), 1)
        >>> values.tolist(), words.tolist()
        ([5.0], [1])
    """
    if serves(previews, rest, remaining):
        return torch.ops.karui.full_view(previews, rest, remaining, count)
    return plain_full_view(previews, rest, remaining, count)


def plain_full_view(
    previews: Float[Tensor, "*batch words"],
    rest: Float[Tensor, "words width"],
    remaining: Float[Tensor, "*batch width"],
    count: int,
) -> tuple[Float[Tensor, "*batch count"], Int[Tensor, "*batch count"]]:
    """The same in operators of torch; of a long batch some at a time."""
    top, words = previews.topk(count, sorted=False)
    if torch.compiler.is_compiling() or words.numel() * remaining.shape[-1] <= _GATHERED:
        return top + _dots(rest, words, remaining), words
    positions = max(1, _GATHERED // (count * remaining.shape[-1]))
    flat = zip(words.flatten(0, -2).split(positions), remaining.flatten(0, -2).split(positions), strict=True)
    return top + torch.cat([_dots(rest, *part) for part in flat]).view_as(top), words


def _dots(rest: Tensor, words: Tensor, remaining: Tensor) -> Tensor:
    rows = functional.embedding(words, rest)  # three times as fast as indexing
    return (remaining.unsqueeze(-2) @ rows.mT).squeeze(-2)


def _on_the_cpu(previews: Tensor, rest: Tensor, remaining: Tensor, count: int) -> tuple[Tensor, Tensor]:
    rows = previews.reshape(-1, previews.shape[-1])
    top, words = largest(rows[0], count) if len(rows) == 1 else rows.topk(count, sorted=False)
    words = words.view(len(rows), count)
    out = torch.empty(words.shape)
    arrays = (rest, words, remaining.reshape(len(rows), remaining.shape[-1]))
    kernel()(*(one.detach().contiguous().numpy() for one in arrays), out.numpy())
    shape = (*previews.shape[:-1], count)
    return out.add_(top).view(shape), words.view(shape)


def _shape(previews: Tensor, rest: Tensor, remaining: Tensor, count: int) -> tuple[Tensor, Tensor]:
    del rest, remaining
    shape = (*previews.shape[:-1], count)
    return previews.new_empty(shape), previews.new_empty(shape, dtype=torch.int64)


_LIBRARY.impl("full_view", _on_the_cpu, "CPU")
_LIBRARY.impl("full_view", _shape, "Meta")


def largest(values: Float[Tensor, "words"], count: int) -> tuple[Float[Tensor, "count"], Int[Tensor, "count"]]:
    """The `count` largest values and their places, in no order; of few among many about a third sooner than `topk`.

    A sample tells a bound that somewhat more than `count` values reach; only these are sorted. Where fewer reach it,
    all are.
    """
    sample, wanted = values[::_STEP], math.ceil(1.25 * count / _STEP) + 4
    if wanted * _PART <= len(sample):
        bound = sample.topk(wanted).values[-1]
        places = (~(values < bound)).nonzero().squeeze(1)  # numbers that are none count as large, as in `topk`
        if len(places) >= count:
            found = values.index_select(0, places).topk(count, sorted=False)
            return found.values, places.index_select(0, found.indices)
    return values.topk(count, sorted=False)


@cache
def kernel() -> Any:
    """The compiled loop."""
    import numba

    return numba.njit(nogil=True, fastmath=True, error_model="numpy")(_looked_up)


def _looked_up(rest: Any, words: Any, remaining: Any, out: Any) -> None:
    rows, count = words.shape
    for row in range(rows):
        vector = remaining[row]
        for place in range(count):
            # A slice of its own, so that the loop over it is vectorised.
            taken = rest[words[row, place]]
            total = np.float32(0)
            for column in range(taken.shape[0]):
                total += taken[column] * vector[column]
            out[row, place] = total
