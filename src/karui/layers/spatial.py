"""Convolutions split over space: a factor that sees one dimension of it over all channels, then one that sees the rest.

The joint form of "Speeding up Convolutional Neural Networks with Low Rank Expansions" (survey 13, scheme 2), whose
closed form is that of survey 22.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from karui.layers.factored import FactoredConv, adopt, conv_settings


def split_stages(conv: Any, rank: int, width: int, *, dim: int = 0) -> list[dict[str, Any]]:
    """The settings of the two convolutions at `rank` maps between them and `width` maps after, in each group.

    The first sees dimension `dim` of space, the second the others. Neither has a bias.
    """
    others = [other for other in range(len(conv.kernel_size)) if other != dim]
    between, after = conv.groups * rank, conv.groups * width
    return [
        {**along(conv, [dim]), "in_channels": conv.in_channels, "out_channels": between},
        {**along(conv, others), "in_channels": between, "out_channels": after},
    ]


def split_space(
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    vertical: Float[Tensor, "groups rank channels tall"],
    horizontal: Float[Tensor, "groups each rank *wide"],
    *,
    dim: int = 0,
    outer: Float[Tensor, "groups filters each"] | None = None,
    bias: Float[Tensor, "filters"] | None = None,
) -> FactoredConv:
    """The chain of a convolution that sees one dimension of space, one that sees the others, and `outer`.

    Its kernel is `sum_k vertical[k, c, i] horizontal[n, k, j]`, mixed by the pointwise `outer` if it is given, group by
    group. Each factor takes stride, padding and dilation along what it sees.

    Args:
        conv: the convolution that it stands for.
        vertical: filters over all channels of a group, along dimension `dim` of space.
        horizontal: filters over the vertical maps, along the other dimensions; in one dimension there are none.
        dim: the dimension that is seen first, the paper's being 0, the rows.
        outer: pointwise filters over the horizontal maps.
        bias: of the last layer; None keeps that of `conv`.

    Example:
        >>> import torch
        >>> conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        >>> chain = split_space(conv, torch.ones(1, 2, 4, 3), torch.ones(1, 6, 2, 3))
        >>> chain(torch.zeros(1, 4, 8, 8)).shape
        torch.Size([1, 6, 4, 4])
    """
    groups, rank = vertical.shape[:2]
    width, dims = horizontal.shape[1], len(conv.kernel_size)
    stages = split_stages(conv, rank, width, dim=dim)
    tall = [-1 if place == dim else 1 for place in range(dims)]
    weights = [
        vertical.flatten(0, 1).reshape(groups * rank, vertical.shape[2], *tall),
        horizontal.flatten(0, 1).unsqueeze(2 + dim),
    ]
    if outer is not None:
        last = {"in_channels": groups * width, "out_channels": conv.out_channels, "kernel_size": 1, "groups": groups}
        stages.append({**last, "bias": False})
        weights.append(outer.flatten(0, 1).reshape(conv.out_channels, width, *[1] * dims))
    bias = conv.bias if bias is None else bias
    stages[-1]["bias"] = bias is not None
    return adopt(FactoredConv(stages, dimensions=dims), conv, weights, bias)


def along(conv: Any, seen: list[int]) -> dict[str, Any]:
    """The settings of a convolution of which a factor sees only some dimensions of space; without a bias."""
    told = {**conv_settings(conv), "bias": False}
    padding = padding_of(conv)
    for key, blank in (("kernel_size", 1), ("stride", 1), ("dilation", 1)):
        told[key] = [value if dim in seen else blank for dim, value in enumerate(told[key])]
    told["padding"] = (
        padding if isinstance(padding, str) else [amount if dim in seen else 0 for dim, amount in enumerate(padding)]
    )
    return told


def padding_of(conv: Any) -> list[int] | str:
    """Padding at each side; "same" in numbers where both sides get as much, else as it is."""
    if conv.padding == "valid":
        return [0] * len(conv.kernel_size)
    if conv.padding != "same":
        return list(conv.padding)
    totals = [step * (taps - 1) for step, taps in zip(conv.dilation, conv.kernel_size, strict=True)]
    return "same" if any(total % 2 for total in totals) else [total // 2 for total in totals]
