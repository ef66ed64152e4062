"""The depthwise-separable convolution, with the choices in which its papers differ."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


class Separable2d(nn.Sequential):
    """A depthwise convolution, which filters each channel by itself, then a pointwise one (1x1), which mixes them.

    MobileNet (survey 4) puts batch normalisation and a ReLU after each of the two; Xception (survey 1) neither between
    them. Against a dense k x k convolution to N channels it does 1/N + 1/k^2 of the multiply-accumulates.

    Args:
        inputs: input channels.
        outputs: output channels.
        kernel: side of the depthwise filters, or (height, width).
        stride: of the depthwise convolution.
        padding: of the depthwise convolution; None keeps the map's size at stride 1.
        dilation: of the depthwise convolution.
        bias: whether the pointwise convolution has a bias.
        inner: batch normalisation and ReLU between the two convolutions.
        norm: batch normalisation after the pointwise convolution.
        activation: a ReLU at the end.

    Example:
        >>> import torch
        >>> Separable2d(8, 16, stride=2)(torch.zeros(1, 8, 6, 6)).shape
        torch.Size([1, 16, 3, 3])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 3,
        *,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] = 1,
        bias: bool = False,
        inner: bool = True,
        norm: bool = True,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self._settings = {
            "inputs": inputs,
            "outputs": outputs,
            "kernel": kernel,
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "bias": bias,
            "inner": inner,
            "norm": norm,
            "activation": activation,
        }
        pad = _same(kernel, dilation) if padding is None else padding
        self.depthwise = nn.Conv2d(
            inputs, inputs, kernel, stride=stride, padding=pad, dilation=dilation, groups=inputs, bias=False
        )
        if inner:
            self.inner_norm = nn.BatchNorm2d(inputs)
            self.inner_activation = nn.ReLU()
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=bias)
        if norm:
            self.norm = nn.BatchNorm2d(outputs)
        if activation:
            self.activation = nn.ReLU()

    def forward(self, input: Float[Tensor, "batch inputs h w"]) -> Float[Tensor, "batch outputs h2 w2"]:  # noqa: A002
        """Filter each channel, then mix them."""
        return super().forward(input)

    def settings(self) -> dict[str, Any]:
        """What a lineage needs to build the layer again."""
        return {
            **self._settings,
            "inputs": self.depthwise.in_channels,
            "outputs": self.pointwise.out_channels,
        }


def _same(kernel: int | tuple[int, int], dilation: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
    down, across = (dilation, dilation) if isinstance(dilation, int) else dilation
    return down * (height - 1) // 2, across * (width - 1) // 2
