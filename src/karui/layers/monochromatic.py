"""Monochromatic convolution: each filter sees one of a few mixtures of the input's channels.

Denton, Zaremba, Bruna, LeCun, Fergus 2014, "Exploiting Linear Structure Within Convolutional Networks for Efficient
Evaluation", NIPS (survey 18), section 3.2.1 for first layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from karui.layers.factored import CONVOLUTIONS, conv_settings


class MonochromaticConv(nn.Module):
    """`mix` makes `colours` maps of the channels, and each filter convolves one of them.

    Even colours have as many filters each: then `filters` is one grouped convolution, its filters sorted by colour, and
    `order` tells the place of each output among them. Otherwise `order` tells the colour of each filter, whose map is
    gathered for a depthwise convolution.

    Settings:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, padding_mode: as those of a
            convolution in as many dimensions as `kernel_size` has.
        colours: mixtures of the channels.
        even: whether all have the same number of filters.

    Example:
        >>> layer = MonochromaticConv(3, 8, (3, 3), colours=2, even=True, padding=(1, 1))
        >>> layer(torch.zeros(1, 3, 5, 5)).shape, sum(p.numel() for p in layer.parameters())
        (torch.Size([1, 8, 5, 5]), 86)
    """

    order: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        *,
        colours: int,
        even: bool = False,
        bias: bool = True,
        **space: Any,
    ) -> None:
        super().__init__()
        conv: Any = CONVOLUTIONS[len(kernel_size)]
        self.colours, self.even = colours, even
        self.mix = conv(in_channels, colours, 1, bias=False)
        groups = colours if even else out_channels
        self.filters = conv(groups, out_channels, tuple(kernel_size), groups=groups, bias=bias, **space)
        start = torch.arange(out_channels)
        self.register_buffer("order", start if even else start % colours)

    def settings(self) -> dict[str, Any]:
        """What `MonochromaticConv(**settings)` rebuilds it from."""
        told = conv_settings(self.filters)
        del told["groups"]
        return {**told, "in_channels": self.mix.in_channels, "colours": self.colours, "even": self.even}

    def forward(self, input: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch filters *made"]:  # noqa: A002
        """Mix the channels, then filter."""
        dim = -1 - len(self.filters.kernel_size)
        maps = self.mix(input)
        if self.even:
            return self.filters(maps).index_select(dim, self.order)
        return self.filters(maps.index_select(dim, self.order))

    def labels(self) -> Int[Tensor, "filters"]:
        """The colour of each filter."""
        if not self.even:
            return self.order
        return self.order.div(len(self.order) // self.colours, rounding_mode="floor")

    def kernel(self) -> Float[Tensor, "filters channels *kernel"]:
        """The kernel of the one convolution that computes the same, in float64."""
        own = self.filters.weight.double()[:, 0]
        own = own[self.order] if self.even else own
        return mono_kernel(self.mix.weight.double().flatten(1), own, self.labels())

    def dense(self) -> nn.Module:
        """The one convolution that computes the same."""
        return as_dense(self.kernel(), self.filters, self.filters.bias, self.order if self.even else None)


def mono_kernel(
    colours: Float[Tensor, "colours channels"],
    filters: Float[Tensor, "filters *kernel"],
    labels: Int[Tensor, "filters"],
) -> Float[Tensor, "filters channels *kernel"]:
    """Each filter in its colour: `colours[labels[n], c] filters[n, i, j]`."""
    return torch.einsum("nc,n...->nc...", colours[labels], filters)


def monochromatic_conv(
    conv: Any,
    colours: Float[Tensor, "colours channels"],
    filters: Float[Tensor, "filters *kernel"],
    labels: Int[Tensor, "filters"],
    *,
    even: bool = False,
) -> MonochromaticConv:
    """The layer in place of `conv`, with its bias, type, place, mode and frozenness."""
    told = {**conv_settings(conv), "colours": len(colours), "even": even}
    del told["groups"]
    layer = MonochromaticConv(**told).to(conv.weight)
    order = labels.argsort(stable=True)
    sorting = order if even else torch.arange(len(labels))
    with torch.no_grad():
        layer.mix.weight.copy_(colours.reshape(layer.mix.weight.shape))
        layer.filters.weight.copy_(filters[sorting].unsqueeze(1))
        layer.order.copy_(order.argsort() if even else labels)
        if conv.bias is not None:
            layer.filters.bias.copy_(conv.bias[sorting.to(conv.bias.device)])
    return layer.requires_grad_(conv.weight.requires_grad).train(conv.training)


def as_dense(kernel: Tensor, like: Any, bias: Tensor | None, order: Tensor | None = None) -> nn.Module:
    """The convolution with this kernel, in space as `like` is, and the bias in another order if one is given."""
    told = {**conv_settings(like), "in_channels": kernel.shape[1], "out_channels": kernel.shape[0], "groups": 1}
    told = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    layer: Any = CONVOLUTIONS[kernel.ndim - 2](**{**told, "bias": bias is not None}).to(like.weight)
    with torch.no_grad():
        layer.weight.copy_(kernel)
        if bias is not None:
            layer.bias.copy_(bias if order is None else bias[order])
    return layer
