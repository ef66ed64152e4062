"""The single intra-channel convolution (SIC): a depthwise filter, a pointwise projection, and the input added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from karui.layers.factored import CONVOLUTIONS, NORMS
from karui.layers.topological import TopologicalPointwise


def keeps_size(conv: Any) -> bool:
    """Whether a convolution gives a map of the size that it is given."""
    if any(step != 1 for step in conv.stride):
        return False
    if isinstance(conv.padding, str):
        return conv.padding == "same" or all(taps == 1 for taps in conv.kernel_size)
    sizes = zip(conv.kernel_size, conv.dilation, conv.padding, strict=True)
    return all(step * (taps - 1) == 2 * side for taps, step, side in sizes)


class SicConv(nn.Module):
    """`relu(x + norm(P(D(x))))`: D filters each channel by itself, P projects across channels; nothing is between them.

    Where the channels or the size of the map change there is no `x` to add. The projection is dense, or topological
    where a lattice is given. Against k^2 n^2 of a dense convolution it does k^2 n + n^2 multiply-adds at a position.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: of the depthwise filters, one number for each dimension of space.
        stride: of the depthwise filters.
        padding: of the depthwise filters; None keeps the size of the map (odd kernels).
        dilation: of the depthwise filters.
        groups: of the projection.
        padding_mode: as for `torch.nn.Conv2d`.
        lattice: torus on which the projection is local; () for a dense projection.
        window: sides of the box that an output sees there.
        residual: whether the input is added, where it can be.
        norm: batch normalisation after the projection, before the sum.
        activation: the ReLU at the end.

    Example:
        >>> import torch
        >>> layer = SicConv(16, 16, (3, 3), norm=False)
        >>> x = torch.randn(1, 16, 5, 5)
        >>> _ = nn.init.zeros_(layer.projection.weight)
        >>> torch.equal(layer(x), x.relu())
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        *,
        stride: Sequence[int] | int = 1,
        padding: Sequence[int] | str | None = None,
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
        padding_mode: Any = "zeros",
        lattice: Sequence[int] = (),
        window: Sequence[int] = (),
        residual: bool = True,
        norm: bool = True,
        activation: bool = True,
    ) -> None:
        super().__init__()
        kernel = tuple(kernel_size)
        dimensions = len(kernel)
        spread = (dilation,) * dimensions if isinstance(dilation, int) else tuple(dilation)
        same = tuple(step * (taps - 1) // 2 for taps, step in zip(kernel, spread, strict=True))
        self.depthwise: Any = CONVOLUTIONS[dimensions](
            in_channels,
            in_channels,
            kernel,  # pyright: ignore[reportArgumentType]
            stride=stride if isinstance(stride, int) else tuple(stride),  # pyright: ignore[reportArgumentType]
            padding=same if padding is None else padding if isinstance(padding, str) else tuple(padding),  # pyright: ignore[reportArgumentType]
            dilation=spread,  # pyright: ignore[reportArgumentType]
            groups=in_channels,
            bias=False,
            padding_mode=padding_mode,
        )
        self.projection: Any = (
            TopologicalPointwise(lattice, window, dimensions=dimensions, bias=not norm)
            if lattice
            else CONVOLUTIONS[dimensions](in_channels, out_channels, 1, groups=groups, bias=not norm)
        )
        self.norm = NORMS[dimensions](out_channels) if norm else None
        self.activation = nn.ReLU() if activation else None
        self.residual = residual and in_channels == out_channels and keeps_size(self.depthwise)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Depthwise and projection by their own fan-in, so that their product keeps the variance."""
        nn.init.normal_(self.depthwise.weight, std=self.depthwise.weight[0].numel() ** -0.5)
        if isinstance(self.projection, TopologicalPointwise):
            self.projection.reset_parameters()
            return
        nn.init.normal_(self.projection.weight, std=math.sqrt(1.0 / self.projection.weight[0].numel()))
        if self.projection.bias is not None:
            nn.init.zeros_(self.projection.bias)

    def settings(self) -> dict[str, Any]:
        """What `SicConv(**settings)` rebuilds it from."""
        local = isinstance(self.projection, TopologicalPointwise)
        depthwise = self.depthwise
        return {
            "in_channels": depthwise.in_channels,
            "out_channels": self.projection.channels if local else self.projection.out_channels,
            "kernel_size": list(depthwise.kernel_size),
            "stride": list(depthwise.stride),
            "padding": depthwise.padding if isinstance(depthwise.padding, str) else list(depthwise.padding),
            "dilation": list(depthwise.dilation),
            "groups": 1 if local else self.projection.groups,
            "padding_mode": depthwise.padding_mode,
            "lattice": list(self.projection.lattice) if local else [],
            "window": list(self.projection.window) if local else [],
            "residual": self.residual,
            "norm": self.norm is not None,
            "activation": self.activation is not None,
        }

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch filters *space2"]:
        """Filter, project, normalise, add, and cut off below zero."""
        y = self.projection(self.depthwise(x))
        y = y if self.norm is None else self.norm(y)
        y = x + y if self.residual else y
        return y if self.activation is None else self.activation(y)


def sic_chain(conv: Any, bases: int, **settings: Any) -> nn.Sequential:
    """`bases` SIC layers in sequence in the place of a convolution, whose stride and padding the first one takes.

    Each has intra-channel filters and a residual sum of its own. The last has no ReLU, since the network has one there.
    """
    first = {
        "stride": conv.stride,
        "padding": conv.padding,
        "dilation": conv.dilation,
        "padding_mode": conv.padding_mode,
        "groups": conv.groups,
    }
    rest = {"dilation": conv.dilation, "padding_mode": conv.padding_mode, "groups": conv.groups}
    layers = []
    for number in range(bases):
        inputs = conv.out_channels if number else conv.in_channels
        own = {**(rest if number else first), **settings, "activation": number < bases - 1}
        layers.append(SicConv(inputs, conv.out_channels, conv.kernel_size, **own))
    return nn.Sequential(*layers)


def odd(conv: Any) -> bool:
    """Whether a kernel has a middle, so that equal padding on both sides can keep the size of the map."""
    return all(step * (taps - 1) % 2 == 0 for taps, step in zip(conv.kernel_size, conv.dilation, strict=True))
