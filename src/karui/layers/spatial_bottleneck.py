"""The spatial bottleneck: shrink the map, project at low resolution, grow it again, and add the input."""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from karui.layers.factored import CONVOLUTIONS, NORMS

_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


class BottleneckConv(nn.Module):
    """`relu(x + U(norm(P(D(x)))))`: D and U are depthwise, of kernel and stride k, down and up; P projects in between.

    Patches do not overlap. At a position of the full map that costs n + n^2 / k^2 + n multiply-adds. Where k does not
    divide a side of the map, zeros are added after its end, and what grows beyond it again is cut off.

    Args:
        in_channels: n, of the input.
        out_channels: of the output.
        stride: k.
        dimensions: of space.
        residual: whether the input is added, where the channels are as many.
        norm: batch normalisation after the projection.
        activation: the ReLU at the end.

    Example:
        >>> import torch
        >>> BottleneckConv(16, 16, 2)(torch.zeros(1, 16, 7, 9)).shape
        torch.Size([1, 16, 7, 9])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 2,
        *,
        dimensions: int = 2,
        residual: bool = True,
        norm: bool = True,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.dimensions, self.residual = dimensions, residual and in_channels == out_channels
        convolution = CONVOLUTIONS[dimensions]
        self.down: Any = convolution(in_channels, in_channels, stride, stride=stride, groups=in_channels, bias=False)
        self.projection: Any = convolution(in_channels, out_channels, 1, bias=not norm)
        self.norm = NORMS[dimensions](out_channels) if norm else None
        self.up: Any = _TRANSPOSED[dimensions](
            out_channels, out_channels, stride, stride=stride, groups=out_channels, bias=False
        )
        self.activation = nn.ReLU() if activation else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each factor by its fan-in; one weight of `up` meets each output, so that they have variance one."""
        nn.init.normal_(self.down.weight, std=self.down.weight[0].numel() ** -0.5)
        nn.init.normal_(self.projection.weight, std=math.sqrt(1.0 / self.projection.weight[0].numel()))
        nn.init.normal_(self.up.weight)
        if self.projection.bias is not None:
            nn.init.zeros_(self.projection.bias)

    def settings(self) -> dict[str, Any]:
        """What `BottleneckConv(**settings)` rebuilds it from."""
        return {
            "in_channels": self.projection.in_channels,
            "out_channels": self.projection.out_channels,
            "stride": self.down.stride[0],
            "dimensions": self.dimensions,
            "residual": self.residual,
            "norm": self.norm is not None,
            "activation": self.activation is not None,
        }

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch filters *space"]:
        """Down, across, up, and back to the size of `x`."""
        sizes, k = x.shape[2:], self.down.stride[0]
        missing = [-size % k for size in sizes]
        y = functional.pad(x, [side for after in reversed(missing) for side in (0, after)]) if any(missing) else x
        y = self.projection(self.down(y))
        y = self.up(y if self.norm is None else self.norm(y))
        for axis, size in enumerate(sizes):
            if missing[axis]:
                y = y.narrow(2 + axis, 0, size)
        y = x + y if self.residual else y
        return y if self.activation is None else self.activation(y)
