"""A convolution as a mixture of separable filters: each input channel is filtered along each dimension, then all mixed.

The form of survey 13 (scheme 1) and 14. The separable filters may be the same for every input channel, and are then
stored once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from karui.layers.factored import CONVOLUTIONS, FUNCTIONS, conv_settings
from karui.layers.spatial import padding_of


class SeparableBank(nn.Module):
    """Filters `W[n, c] = sum_m mix[n, c, m] a_m b_m^T`, with as many `a_m`, `b_m`, ... as space has dimensions.

    Every input channel gives `rank` maps, by one depthwise convolution for each dimension of space; a pointwise
    convolution mixes all maps. Nothing stands between them, so it is one affine map, and `dense()` says which.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: of the
            convolution that it stands for, as `torch.nn.Conv2d` takes them; as many dimensions as `kernel_size` has.
        rank: separable filters of each input channel.
        shared: whether they are the same for every input channel.

    Example:
        >>> layer = SeparableBank(8, 16, (3, 3), rank=2, padding=(1, 1))
        >>> layer(torch.zeros(1, 8, 5, 5)).shape, [tuple(one.shape) for one in layer.filters]
        (torch.Size([1, 16, 5, 5]), [(1, 2, 3), (1, 2, 3)])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        *,
        rank: int,
        shared: bool = True,
        stride: Sequence[int] = (),
        padding: Sequence[int] | str = (),
        dilation: Sequence[int] = (),
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        self.kernel_size = tuple(kernel_size)
        dims = len(self.kernel_size)
        self.stride, self.dilation = tuple(stride) or (1,) * dims, tuple(dilation) or (1,) * dims
        self.padding = padding if isinstance(padding, str) else tuple(padding) or (0,) * dims
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.rank, self.shared, self.padding_mode = rank, shared, padding_mode
        sets = 1 if shared else in_channels
        self.filters = nn.ParameterList(torch.randn(sets, rank, taps) / math.sqrt(taps) for taps in self.kernel_size)
        self.mix = CONVOLUTIONS[dims](in_channels * rank, out_channels, 1, groups=groups, bias=bias)

    def settings(self) -> dict[str, Any]:
        """What `SeparableBank(**settings)` rebuilds it from."""
        told = conv_settings(self._conv(bias=False, device="meta"))
        return {**told, "bias": self.mix.bias is not None, "rank": self.rank, "shared": self.shared}

    def forward(self, input: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch filters *made"]:  # noqa: A002
        """Filter along each dimension of space in turn, then mix."""
        maps = input
        for dim, weight in enumerate(self.filters):
            maps = self._along(maps, weight, dim)
        return self.mix(maps)

    def _along(self, maps: Tensor, filters: Tensor, dim: int) -> Tensor:
        """Filter each map along one dimension; the first turn makes `rank` maps of each channel."""
        dims = len(self.kernel_size)
        shape, stride, dilation, padding = ([1] * dims, [1] * dims, [1] * dims, [0] * dims)
        shape[dim], stride[dim], dilation[dim] = self.kernel_size[dim], self.stride[dim], self.dilation[dim]
        before, after = self._pads(dim)
        if self.padding_mode == "zeros" and before == after:
            padding[dim] = before
        elif before or after:
            around = [0] * (2 * (dims - 1 - dim)) + [before, after] + [0] * (2 * dim)
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            maps = functional.pad(maps, around, mode=mode)
        weight = filters.expand(self.in_channels, -1, -1).reshape(-1, 1, *shape)
        settings: dict[str, Any] = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation)}
        return FUNCTIONS[dims](maps, weight, groups=maps.shape[1], **settings)

    def _pads(self, dim: int) -> tuple[int, int]:
        """Before and after, along one dimension; "same" puts an odd one after, as torch does."""
        if not isinstance(self.padding, str):
            return self.padding[dim], self.padding[dim]
        total = self.dilation[dim] * (self.kernel_size[dim] - 1) if self.padding == "same" else 0
        return total // 2, total - total // 2

    def kernel(self) -> Float[Tensor, "filters channels *kernel"]:
        """The kernel of the one convolution that computes the same, in float64."""
        basis = outer([one.double() for one in self.filters])
        channels = self.in_channels // self.groups
        mix = self.mix.weight.double().reshape(self.groups, -1, channels, self.rank)
        if self.shared:
            return torch.einsum("gncm,m...->gnc...", mix, basis[0]).flatten(0, 1)
        return torch.einsum("gncm,gcm...->gnc...", mix, basis.unflatten(0, (self.groups, channels))).flatten(0, 1)

    def dense(self) -> nn.Module:
        """The one convolution that computes the same."""
        weight = self.mix.weight
        layer: Any = self._conv(bias=self.mix.bias is not None, device=weight.device).to(weight)
        with torch.no_grad():
            layer.weight.copy_(self.kernel())
            if self.mix.bias is not None:
                layer.bias.copy_(self.mix.bias)
        return layer

    def _conv(self, *, bias: bool, device: torch.device | str) -> Any:
        """A convolution of the same settings."""
        return CONVOLUTIONS[len(self.kernel_size)](
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # pyright: ignore[reportArgumentType]
            stride=self.stride,  # pyright: ignore[reportArgumentType]
            padding=self.padding,  # pyright: ignore[reportArgumentType]
            dilation=self.dilation,  # pyright: ignore[reportArgumentType]
            groups=self.groups,
            bias=bias,
            padding_mode=self.padding_mode,  # pyright: ignore[reportArgumentType]  (one of torch's, or it refuses)
            device=device,
        )


def outer(factors: Sequence[Float[Tensor, "sets rank taps"]]) -> Float[Tensor, "sets rank *kernel"]:
    """The product filters of one vector for each dimension of space."""
    made = factors[0]
    for factor in factors[1:]:
        made = made.unsqueeze(-1) * factor.reshape(*factor.shape[:2], *[1] * (made.ndim - 2), -1)
    return made


def separable_bank(
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d,
    factors: Sequence[Float[Tensor, "sets rank taps"]],
    mix: Float[Tensor, "filters channels rank"],
    bias: Float[Tensor, "filters"] | None = None,
) -> SeparableBank:
    """The mixture of separable filters in place of `conv`: one set of filters for all its channels, or one for each.

    It takes the type, place, mode and frozenness of `conv`, and its bias where no other is given.
    """
    bias = conv.bias if bias is None else bias
    told = {**conv_settings(conv), "padding": padding_of(conv), "bias": bias is not None}
    layer = SeparableBank(**told, rank=factors[0].shape[1], shared=len(factors[0]) == 1).to(conv.weight)
    with torch.no_grad():
        for into, factor in zip(layer.filters, factors, strict=True):
            into.copy_(factor)
        layer.mix.weight.copy_(mix.reshape(layer.mix.weight.shape))
        if layer.mix.bias is not None and bias is not None:
            layer.mix.bias.copy_(bias)
    return layer.requires_grad_(conv.weight.requires_grad).train(conv.training)
