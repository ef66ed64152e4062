"""Biclustered convolution: input channels and filters in groups of equal size, a low-rank kernel for each pair.

Denton, Zaremba, Bruna, LeCun, Fergus 2014, "Exploiting Linear Structure Within Convolutional Networks for Efficient
Evaluation", NIPS (survey 18), section 3.2.2. Not a grouped convolution: every group of filters sees every group of
channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from karui.errors import require
from karui.layers.factored import CONVOLUTIONS, conv_settings
from karui.layers.monochromatic import as_dense


class BiclusteredConv(nn.Module):
    """For each pair of a group of channels and a group of filters: down to a few maps, over space, up to the filters.

    Three convolutions do it for all pairs at once: `narrow`, grouped by channels; `core`, the only one that sees
    space; `widen`, grouped by filters, which also sums over the groups of channels. With one rank the core is
    depthwise: the pair's kernel is a sum of outer products. With two it is dense from the first to the second.
    Channels are gathered into their groups before, and outputs put into their order behind.

    Settings:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode: as those of a
            convolution in as many dimensions as `kernel_size` has.
        in_groups, out_groups: groups of equal size.
        ranks: of each pair: the number of outer products, or maps before and behind a dense core.

    Example:
        >>> layer = BiclusteredConv(8, 12, (3, 3), in_groups=2, out_groups=3, ranks=(2,), padding=(1, 1))
        >>> layer(torch.zeros(1, 8, 5, 5)).shape, [tuple(part.weight.shape) for part in layer.children()]
        (torch.Size([1, 12, 5, 5]), [(12, 4, 1, 1), (12, 1, 3, 3), (12, 4, 1, 1)])
    """

    inputs: Tensor
    outputs: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        *,
        in_groups: int,
        out_groups: int,
        ranks: Sequence[int],
        bias: bool = True,
        **space: Any,
    ) -> None:
        super().__init__()
        even = in_channels % in_groups == 0 and out_channels % out_groups == 0
        told = f"{in_channels} channels and {out_channels} filters do not part into {in_groups} and {out_groups} groups"
        require(even and len(ranks) in (1, 2), told)
        conv: Any = CONVOLUTIONS[len(kernel_size)]
        self.in_groups, self.out_groups, self.ranks = in_groups, out_groups, tuple(ranks)
        pairs = in_groups * out_groups
        before, behind = pairs * self.ranks[0], pairs * self.ranks[-1]
        groups = before if len(self.ranks) == 1 else pairs
        self.narrow = conv(in_channels, before, 1, groups=in_groups, bias=False)
        self.core = conv(before, behind, tuple(kernel_size), groups=groups, bias=False, **space)
        self.widen = conv(behind, out_channels, 1, groups=out_groups, bias=bias)
        self.register_buffer("inputs", torch.arange(in_channels))
        self.register_buffer("outputs", torch.arange(out_channels))

    def settings(self) -> dict[str, Any]:
        """What `BiclusteredConv(**settings)` rebuilds it from."""
        told = conv_settings(self.core)
        del told["groups"]
        return {
            **told,
            "in_channels": self.narrow.in_channels,
            "out_channels": self.widen.out_channels,
            "in_groups": self.in_groups,
            "out_groups": self.out_groups,
            "ranks": list(self.ranks),
            "bias": self.widen.bias is not None,
        }

    def forward(self, input: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch filters *made"]:  # noqa: A002
        """Gather, narrow, filter, change from the groups of channels to those of filters, widen, put in order."""
        given = input.index_select(1, self.inputs) if self.in_groups > 1 else input
        maps = self.core(self.narrow(given))
        shuffled = maps.unflatten(1, (self.in_groups, self.out_groups, self.ranks[-1])).transpose(1, 2).flatten(1, 3)
        made = self.widen(shuffled)
        return made.index_select(1, self.outputs) if self.out_groups > 1 else made

    def factors(self) -> list[Tensor]:
        """The three weights by pair, in float64, as `pairs_kernel` takes them."""
        pairs = (self.in_groups, self.out_groups)
        inner = self.ranks if len(self.ranks) == 1 else self.ranks[::-1]
        return [
            self.narrow.weight.double().reshape(*pairs, self.ranks[0], -1),
            self.core.weight.double().reshape(*pairs, *inner, -1),
            self.widen.weight.double().reshape(self.out_groups, -1, self.in_groups, self.ranks[-1]),
        ]

    def kernel(self) -> Float[Tensor, "filters channels *kernel"]:
        """The kernel of the one convolution that computes the same, in float64."""
        made = pairs_kernel(*self.factors())[self.outputs][:, self.inputs.argsort()]
        return made.unflatten(2, self.core.kernel_size)

    def dense(self) -> nn.Module:
        """The one convolution that computes the same."""
        return as_dense(self.kernel(), self.core, self.widen.bias, self.outputs)


def pairs_kernel(
    narrow: Float[Tensor, "in_groups out_groups rank_in channels"],
    core: Float[Tensor, "in_groups out_groups *ranks taps"],
    widen: Float[Tensor, "out_groups filters in_groups rank_out"],
) -> Float[Tensor, "all_filters all_channels taps"]:
    """The kernel over sorted filters and channels; a pair's core is `[rank, taps]` or `[rank_out, rank_in, taps]`."""
    if core.ndim == 4:
        made = torch.einsum("hngk,ghkt,ghkc->hngct", widen, core, narrow)
    else:
        made = torch.einsum("hngl,ghlkt,ghkc->hngct", widen, core, narrow)
    return made.flatten(2, 3).flatten(0, 1)


def biclustered_conv(
    conv: Any,
    rows: Int[Tensor, "filters"],
    columns: Int[Tensor, "channels"],
    factors: Sequence[Tensor],
) -> BiclusteredConv:
    """The layer in place of `conv`, with its bias, type, place, mode and frozenness.

    Args:
        conv: the convolution; not a grouped one.
        rows: its filters, sorted by group.
        columns: its channels, sorted by group.
        factors: as `pairs_kernel` takes them.
    """
    narrow, core, _ = factors
    ranks = core.shape[2:3] if core.ndim == 4 else (core.shape[3], core.shape[2])
    told = {**conv_settings(conv), "in_groups": narrow.shape[0], "out_groups": narrow.shape[1], "ranks": tuple(ranks)}
    del told["groups"]
    layer = BiclusteredConv(**told).to(conv.weight)
    with torch.no_grad():
        for part, weight in zip((layer.narrow, layer.core, layer.widen), factors, strict=True):
            part.weight.copy_(weight.reshape(part.weight.shape))
        layer.inputs.copy_(columns)
        layer.outputs.copy_(rows.argsort())
        if conv.bias is not None:
            layer.widen.bias.copy_(conv.bias[rows.to(conv.bias.device)])
    return layer.requires_grad_(conv.weight.requires_grad).train(conv.training)
