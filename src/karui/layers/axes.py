"""Convolutions as a sum of outer products: pointwise, one depthwise layer for each dimension of space, pointwise.

The form of CP decompositions (survey 17). Each component is one map, which every dimension of space filters on its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from karui.layers.factored import FactoredConv, adopt
from karui.layers.spatial import along


def axis_stages(conv: Any, rank: int, *, merged: bool = False) -> list[dict[str, Any]]:
    """The settings of the chain's convolutions at this rank, first to last.

    Each dimension of space in which the kernel is longer than 1 gets a depthwise stage with the stride, padding and
    dilation along it; the first of them also takes those of the dimensions in which it is not. A group with a single
    input channel needs no pointwise stage before.

    Args:
        conv: the convolution that the chain stands for; its kernel sees space.
        rank: components of each group.
        merged: whether inputs and outputs are one mode: every input channel is filtered by components of its own, and
            only the last stage mixes channels.
    """
    groups, channels = conv.groups, conv.in_channels // conv.groups
    long = [dim for dim, taps in enumerate(conv.kernel_size) if taps > 1]
    rest = [dim for dim in range(len(conv.kernel_size)) if dim not in long[1:]]
    alone = merged or channels == 1
    maps = (conv.in_channels if alone else groups) * rank
    stages: list[dict[str, Any]] = []
    if not alone:
        stages.append({"in_channels": conv.in_channels, "out_channels": maps, "kernel_size": 1, "groups": groups})
    for number, seen in enumerate([rest, *([dim] for dim in long[1:])]):
        given = conv.in_channels if alone and number == 0 else maps
        stages.append({**along(conv, seen), "in_channels": given, "out_channels": maps, "groups": given})
    stages.append({"in_channels": maps, "out_channels": conv.out_channels, "kernel_size": 1, "groups": groups})
    return [{**stage, "bias": False} for stage in stages[:-1]] + [{**stages[-1], "bias": conv.bias is not None}]


def factor_axes(
    conv: Any,
    filters: Float[Tensor, "groups each rank"],
    channels: Float[Tensor, "groups channels rank"],
    axes: Sequence[Float[Tensor, "groups taps rank"]],
) -> FactoredConv:
    """The chain whose kernel is `sum_r filters[n, r] channels[c, r] axes[0][i, r] axes[1][j, r] ...`, group by group.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> conv = nn.Conv2d(8, 6, 3, stride=2, padding=1)
        >>> chain = factor_axes(conv, *(torch.ones(1, size, 4) for size in (6, 8)), [torch.ones(1, 3, 4)] * 2)
        >>> [tuple(stage.weight.shape) for stage in chain]
        [(4, 8, 1, 1), (4, 1, 3, 1), (4, 1, 1, 3), (6, 4, 1, 1)]
    """
    groups, _, rank = filters.shape
    ones = [1] * len(axes)
    maps = groups * rank
    alone = channels.shape[1] == 1
    spatial = _spatial(axes, channels.transpose(1, 2).reshape(maps) if alone else None)
    first = [] if alone else [channels.transpose(1, 2).reshape(maps, -1, *ones)]
    last = filters.flatten(0, 1).reshape(conv.out_channels, rank, *ones)
    stages = axis_stages(conv, rank)
    return adopt(FactoredConv(stages, dimensions=len(axes)), conv, [*first, *spatial, last], conv.bias)


def factor_axes_merged(
    conv: Any, filters: Float[Tensor, "groups each channels rank"], axes: Sequence[Float[Tensor, "groups taps rank"]]
) -> FactoredConv:
    """The chain whose kernel is `sum_r filters[n, c, r] axes[0][i, r] axes[1][j, r] ...`, group by group.

    The components start alike in all input channels of a group, and are free to part in training.
    """
    channels, rank = filters.shape[2:]
    wide = [axis.unsqueeze(1).expand(-1, channels, -1, -1).flatten(0, 1) for axis in axes]
    last = filters.reshape(conv.out_channels, channels * rank, *[1] * len(axes))
    stages = axis_stages(conv, rank, merged=True)
    return adopt(FactoredConv(stages, dimensions=len(axes)), conv, [*_spatial(wide, None), last], conv.bias)


def _spatial(axes: Sequence[Float[Tensor, "groups taps rank"]], scale: Tensor | None) -> list[Tensor]:
    """A depthwise weight for each dimension longer than 1; factors of the others, and `scale`, go to the first."""
    flat = [axis.transpose(1, 2).flatten(0, 1) for axis in axes]
    long = [dim for dim, axis in enumerate(flat) if axis.shape[1] > 1]
    weights = []
    for number, dim in enumerate(long):
        weight = flat[dim]
        if number == 0:
            for other in set(range(len(axes))) - set(long):
                weight = weight * flat[other]
            weight = weight if scale is None else weight * scale.unsqueeze(1)
        sizes = [-1 if place == dim else 1 for place in range(len(axes))]
        weights.append(weight.reshape(len(weight), 1, *sizes))
    return weights


def chain_cost(stages: Sequence[dict[str, Any]], *maps: Sequence[int]) -> tuple[int, int]:
    """(parameters without bias, multiply-adds of one sample) of a chain of convolutions on maps of these sizes.

    Example:
        >>> chain_cost([{"in_channels": 4, "out_channels": 2, "kernel_size": [3, 1], "padding": [1, 0]}], (8, 5))
        (24, 960)
    """
    sizes, parameters, macs = list(maps), 0, 0
    for stage in stages:
        sizes = [_made(stage, size) for size in sizes]
        taps = _spread(stage.get("kernel_size", 1), len(sizes[0]))
        held = stage["in_channels"] // stage.get("groups", 1) * stage["out_channels"] * math.prod(taps)
        parameters, macs = parameters + held, macs + held * sum(map(math.prod, sizes))
    return parameters, macs


def _made(stage: dict[str, Any], size: Sequence[int]) -> Sequence[int]:
    """Size of what a convolution makes of a map of that size."""
    padding = stage.get("padding", 0)
    if padding == "same":
        return size
    pads = _spread(0 if padding == "valid" else padding, len(size))
    taps, stride, dilation = (_spread(stage.get(key, 1), len(size)) for key in ("kernel_size", "stride", "dilation"))
    return [
        (length + 2 * pad - step * (tap - 1) - 1) // move + 1
        for length, pad, step, tap, move in zip(size, pads, dilation, taps, stride, strict=True)
    ]


def _spread(value: Any, dimensions: int) -> list[int]:
    return [value] * dimensions if isinstance(value, int) else list(value)
