"""The rows of a patch matrix (im2col) that are asked for, and no others: what a group-sparse convolution gathers (26).

A convolution is the product of its filters with a matrix of patches, which has a row for each pair of an input channel
and a position of the kernel. The plain form is torch's, and serves everywhere: gradients, any device, export. With
numba installed (`karui[fast]`) inference on the CPU takes a kernel, the operator `karui::patch_rows`, which copies each
row in one pass over the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from karui.numerics.kernels import serves

_LIBRARY = torch.library.Library("karui", "FRAGMENT")
_LIBRARY.define(
    "patch_rows(Tensor padded, Tensor channels, int[] counts, int[] kernel, int[] stride, int[] dilation) -> Tensor"
)


class Geometry(NamedTuple):
    """Kernel, stride and dilation of a convolution, in as many dimensions as there are of space."""

    kernel: Sequence[int]
    stride: Sequence[int]
    dilation: Sequence[int]


def patch_rows(
    padded: Float[Tensor, "batch channels *space"],
    channels: Int[Tensor, "live"],
    counts: Sequence[int],
    geometry: Geometry,
) -> Float[Tensor, "batch live *made"]:
    """Rows of the patch matrix of a padded input: by the operator with the kernel where it serves, else in plain torch.

    Args:
        padded: the input, with what the convolution puts around it.
        channels: of each row, ordered by positions of the kernel.
        counts: how many of them are at each position; positions are counted row by row, as kernels are flat.
        geometry: of the convolution.

    Example:
        >>> x = torch.arange(4.0).reshape(1, 1, 4)
        >>> patch_rows(x, torch.tensor([0, 0]), (1, 0, 1), Geometry((3,), (1,), (1,))).tolist()
        [[[0.0, 1.0], [2.0, 3.0]]]
    """
    if not serves(padded):
        return plain_patch_rows(padded, channels, counts, geometry)
    return torch.ops.karui.patch_rows(padded, channels, list(counts), *map(list, geometry))


def plain_patch_rows(
    padded: Float[Tensor, "batch channels *space"],
    channels: Int[Tensor, "live"],
    counts: Sequence[int],
    geometry: Geometry,
) -> Float[Tensor, "batch live *made"]:
    """The same in operators of torch: what each position of the kernel sees, the channels that are asked for of it."""
    rows, first = [], 0
    for tap, count in enumerate(counts):
        if count:
            seen = padded[(..., *window(tap, padded.shape[2:], *geometry))]
            rows.append(seen.index_select(1, channels[first : first + count]))
            first += count
    return torch.cat(rows, 1)


def made(space: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Sizes in space of a convolution's output, for a padded input."""
    dims = zip(space, kernel, stride, dilation, strict=True)
    return [(size - spread * (taps - 1) - 1) // step + 1 for size, taps, step, spread in dims]


def window(
    tap: int, space: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[slice, ...]:
    """What one position of a kernel sees of a padded input, for all outputs.

    Example:
        >>> window(5, (6, 6), (3, 3), (1, 2), (1, 1))
        (slice(1, 5, 1), slice(2, 5, 2))
    """
    slices, rest, sizes = [], tap, made(space, kernel, stride, dilation)
    for dim in reversed(range(len(kernel))):
        rest, place = divmod(rest, kernel[dim])
        start, step = place * dilation[dim], stride[dim]
        slices.append(slice(start, start + step * (sizes[dim] - 1) + 1, step))
    return tuple(slices[::-1])


def _on_the_cpu(  # noqa: PLR0917  (as the operator has them)
    padded: Tensor,
    channels: Tensor,
    counts: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    ones = [1] * (3 - len(kernel))  # fewer dimensions of space are three, of which the first have one place
    sizes = made(padded.shape[2:], kernel, stride, dilation)
    out = torch.empty(len(padded), len(channels), *ones, *sizes)
    volume = padded.detach().contiguous().reshape(*padded.shape[:2], *ones, *padded.shape[2:])
    starts = _starts(*map(tuple, (counts, padded.shape[2:], kernel, stride, dilation)))
    compiled()(volume.numpy(), channels.contiguous().numpy(), starts, (*ones, *stride), out.numpy())
    return out.reshape(*out.shape[:2], *sizes)


@lru_cache(maxsize=1024)
def _starts(counts: tuple[int, ...], space: tuple[int, ...], *geometry: tuple[int, ...]) -> np.ndarray:
    """Where in the padded input each row begins, in three dimensions. The same from call to call, and slow to find."""
    kernel, stride, dilation = geometry
    firsts = [[one.start for one in window(tap, space, kernel, stride, dilation)] for tap in range(len(counts))]
    return np.pad(np.repeat(np.array(firsts), counts, axis=0), ((0, 0), (3 - len(kernel), 0)))


def _shape(  # noqa: PLR0917
    padded: Tensor,
    channels: Tensor,
    counts: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    del counts
    sizes = made(padded.shape[2:], kernel, stride, dilation)
    return padded.new_empty(len(padded), len(channels), *sizes)


_LIBRARY.impl("patch_rows", _on_the_cpu, "CPU")
_LIBRARY.impl("patch_rows", _shape, "Meta")


@cache
def compiled() -> Any:
    """The compiled loop."""
    import numba

    return numba.njit(nogil=True, error_model="numpy")(_copied)


def _copied(padded: Any, channels: Any, starts: Any, stride: Any, out: Any) -> None:
    step, down, across = stride
    batch, live, planes, lines, places = out.shape
    for sample in range(batch):
        for row in range(live):
            front, top, left = starts[row]
            for plane in range(planes):
                seen = padded[sample, channels[row], front + plane * step]
                for line in range(lines):
                    # Slices of lines: an index that is computed in the loop could be negative, and is not vectorised.
                    into, given = out[sample, row, plane, line], seen[top + line * down, left:]
                    if across == 1:
                        for place in range(places):
                            into[place] = given[place]
                    else:
                        for place in range(places):
                            into[place] = given[place * across]
