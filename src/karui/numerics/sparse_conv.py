"""Convolution with a kernel most of whose entries are zero: work for what is not zero, and for nothing else.

The plain form is torch's convolution with the dense kernel, zeros and all: gradients, any device, export. With numba
installed (`karui[fast]`) inference on the CPU takes a kernel, the operator `karui::sparse_conv`. For each entry that is
not zero it adds a shifted run of the input to a run of the output. A run is a stretch of the flattened map, ends of
lines included, so that it is long even on small maps; what it computes between the lines is cut off at the end. A
strided convolution first sorts the map by the phase of the stride, which makes its runs contiguous too.

It pays where at least about two thirds of the entries are zero, less on large maps than on small ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from karui.numerics.columns import Geometry, made

_LIBRARY = torch.library.Library("karui", "FRAGMENT")
_LIBRARY.define(
    "sparse_conv(Tensor padded, Tensor values, Tensor channels, Tensor taps, Tensor ends, int[] kernel, int[] stride, "
    "int[] dilation) -> Tensor"
)
BLOCK = 2048
"""Places of a run that are summed at a time: their sums stay in the first cache, and what they read in the second."""


class Entries(NamedTuple):
    """What is not zero of a convolution's kernel, filter by filter.

    Fields:
        values: the entries.
        channels: of each, the channel of the input (of all groups).
        taps: of each, the position in the kernel, counted row by row.
        ends: where the entries of each filter end.
        share: of the kernel's entries that are not zero.
    """

    values: Float[Tensor, "live"]
    channels: Int[Tensor, "live"]
    taps: Int[Tensor, "live"]
    ends: Int[Tensor, "filters"]
    share: float


def entries_of(weight: Float[Tensor, "filters channels *kernel"], groups: int = 1) -> Entries:
    """The entries of a convolution's weight that are not zero.

    Example:
        >>> found = entries_of(torch.tensor([[[0.0, 2.0]], [[3.0, 0.0]]]), groups=2)
        >>> found.values.tolist(), found.channels.tolist(), found.taps.tolist(), found.ends.tolist()
        ([2.0, 3.0], [0, 1], [1, 0], [1, 2])
    """
    flat = weight.detach().flatten(2)
    filters, channels, taps = flat.nonzero(as_tuple=True)
    group = filters // (len(flat) // groups)
    ends = torch.bincount(filters, minlength=len(flat)).cumsum(0)
    return Entries(
        flat[filters, channels, taps].contiguous(),
        (channels + group * flat.shape[1]).int(),
        taps.int(),
        ends.int(),
        len(filters) / max(1, flat.numel()),
    )


def sparse_conv(
    padded: Float[Tensor, "batch channels *space"],
    entries: Entries,
    geometry: Geometry,
) -> Float[Tensor, "batch filters *made"]:
    """The convolution of a padded input, without a bias, by the operator with the kernel.

    Args:
        padded: the input, in single precision and on the CPU, with what the convolution puts around it.
        entries: of its weight.
        geometry: of the convolution.

    Raises:
        ModuleNotFoundError: numba is not installed; ask `karui.numerics.kernels.serves` first.
    """
    return torch.ops.karui.sparse_conv(padded, *entries[:4], *map(list, geometry))


class _Runs(NamedTuple):
    """How a padded map is flattened, what of it makes the output, and where each tap begins.

    Fields:
        more: what is added in each dimension to make it divide by the stride.
        phases: of the stride.
        starts: of the taps, in the flattened map.
        lines: where the output's lines begin in what is summed.
        length: places that are summed.
        made: sizes of the output.
    """

    more: tuple[int, ...]
    phases: int
    starts: np.ndarray
    lines: np.ndarray
    length: int
    made: tuple[int, ...]


@lru_cache(maxsize=1024)
def _runs(space: tuple[int, ...], *geometry: tuple[int, ...]) -> _Runs:
    kernel, stride, dilation = geometry
    sizes = [-(-size // step) for size, step in zip(space, stride, strict=True)]
    more = [size * step - old for size, step, old in zip(sizes, stride, space, strict=True)]
    steps = np.array([math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))])
    plane, starts = math.prod(sizes), []
    for tap in np.ndindex(*kernel):
        phase, place = 0, 0
        for dim, at in enumerate(tap):
            whole, part = divmod(at * dilation[dim], stride[dim])
            phase, place = phase * stride[dim] + part, place + whole * steps[dim]
        starts.append(phase * plane + place)
    out = tuple(made(space, kernel, stride, dilation))
    lines = np.array([np.array((*line, 0)) @ steps for line in np.ndindex(*out[:-1])], dtype=np.int64)
    return _Runs(tuple(more), math.prod(stride), np.array(starts, np.int64), lines, int(lines[-1]) + out[-1], out)


def _on_the_cpu(  # noqa: PLR0917  (as the operator has them)
    padded: Tensor,
    values: Tensor,
    channels: Tensor,
    taps: Tensor,
    ends: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    runs = _runs(tuple(padded.shape[2:]), tuple(kernel), tuple(stride), tuple(dilation))
    out = torch.empty(len(padded), len(ends), *runs.made)
    flat = _by_phase(padded, stride, runs)
    arrays = [one.numpy() for one in (flat.detach(), values, channels, taps, ends)]
    by_line = out.numpy().reshape(len(out), len(ends), len(runs.lines), runs.made[-1])
    compiled()(*arrays, runs.starts, runs.lines, runs.length, by_line)
    return out


def _by_phase(padded: Tensor, stride: Sequence[int], runs: _Runs) -> Tensor:
    """The map sorted by the phase of the stride: `[batch, channels, phases * space / stride]`."""
    if runs.phases > 1:
        padded = functional.pad(padded, [number for more in reversed(runs.more) for number in (0, more)])
        for dim, step in enumerate(stride):
            padded = padded.unflatten(2 + 2 * dim, (-1, step))
        dims = range(len(stride))
        padded = padded.permute(0, 1, *(3 + 2 * dim for dim in dims), *(2 + 2 * dim for dim in dims))
    return padded.contiguous().flatten(2)


def _shape(  # noqa: PLR0917
    padded: Tensor,
    values: Tensor,
    channels: Tensor,
    taps: Tensor,
    ends: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    del values, channels, taps
    return padded.new_empty(len(padded), len(ends), *made(padded.shape[2:], kernel, stride, dilation))


_LIBRARY.impl("sparse_conv", _on_the_cpu, "CPU")
_LIBRARY.impl("sparse_conv", _shape, "Meta")


@cache
def compiled() -> Any:
    """The compiled loop."""
    import numba

    return numba.njit(nogil=True, error_model="numpy", fastmath=True)(_summed)


def _summed(  # noqa: PLR0917  (arrays of a compiled loop)
    flat: Any, values: Any, channels: Any, taps: Any, ends: Any, starts: Any, lines: Any, length: Any, out: Any
) -> None:
    width = out.shape[3]
    # Where nothing lies between the lines, what is summed is the output.
    gaps = length > len(lines) * width
    scratch = np.empty((len(ends) if gaps else 0, length), np.float32)
    # Without a sign: an index that could be negative is not vectorised.
    offsets = np.empty(len(values), np.uint64)
    for entry in range(len(values)):
        offsets[entry] = channels[entry] * flat.shape[2] + starts[taps[entry]]
    for sample in range(len(flat)):
        source = flat[sample].ravel()
        sums = scratch if gaps else out[sample].reshape((len(ends), length))
        for first in range(0, length, BLOCK):
            places, seen, entry = np.uint64(min(BLOCK, length - first)), source[first:], 0
            for row in range(len(ends)):
                into, end = sums[row, first : first + BLOCK], ends[row]
                into[:] = np.float32(0)
                while entry + 4 <= end:  # the output is read and written once for four reads of the input
                    i, j, k, m = offsets[entry], offsets[entry + 1], offsets[entry + 2], offsets[entry + 3]
                    a, b, c, d = values[entry], values[entry + 1], values[entry + 2], values[entry + 3]
                    for at in range(places):
                        into[at] += a * seen[i + at] + b * seen[j + at] + c * seen[k + at] + d * seen[m + at]
                    entry += 4
                while entry < end:
                    i, a = offsets[entry], values[entry]
                    for at in range(places):
                        into[at] += a * seen[i + at]
                    entry += 1
        if gaps:
            for row in range(len(ends)):
                for line in range(len(lines)):
                    out[sample, row, line] = sums[row, lines[line] : lines[line] + width]
