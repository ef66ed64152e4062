"""Layers that hold their weight as codes of k bits, and take inputs on a grid of few levels.

Zhuang, Shen, Tan, Liu and Reid 2018 (survey 38), with the quantisers of `karui.numerics.straight_through`. What such a
layer computes is a sum of products of whole numbers (`codes` and the codes of the inputs), times one scale. There is no
kernel for that here: the codes are widened, and the product is one of 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import require
from karui.layers.factored import CONVOLUTIONS, FUNCTIONS, conv_settings
from karui.layers.windows import Windows
from karui.numerics.bit_planes import pack_planes, plane_bytes, unpack_planes
from karui.numerics.straight_through import MOST_BITS, REAL, InputGrid, WeightGrid, input_codes, levels, require_bits


class _LowBit(nn.Module):
    """What layers with a weight of k bits have in common: the planes of its codes, scales, and the inputs' grid."""

    planes: Tensor
    scale: Tensor
    reach: Tensor

    def __init__(self, shape: Sequence[int], weight_bits: int, input_bits: int, signed: bool, bias: bool) -> None:
        super().__init__()
        require(1 <= weight_bits <= MOST_BITS, f"weight_bits is {weight_bits}; give 1 to {MOST_BITS}")
        require_bits(input_bits=input_bits)
        self.shape, self.weight_bits, self.input_bits, self.signed = tuple(shape), weight_bits, input_bits, signed
        planes = torch.zeros(weight_bits, plane_bytes(math.prod(shape)), dtype=torch.uint8)
        self.register_buffer("planes", planes)
        self.register_buffer("scale", torch.ones(1))
        if input_bits < REAL:
            self.register_buffer("reach", torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None

    def grids(self) -> dict[str, Any]:
        """The settings of the two grids."""
        return {"weight_bits": self.weight_bits, "input_bits": self.input_bits, "signed": self.signed}

    def codes(self) -> Float[Tensor, "*shape"]:
        """The weight as odd whole numbers from -(2^k - 1) to 2^k - 1."""
        codes = unpack_planes(self.planes, math.prod(self.shape), self.scale.dtype)
        return (2 * codes - levels(self.weight_bits)).reshape(self.shape)

    def weight(self) -> Float[Tensor, "*shape"]:
        """The weight as real numbers."""
        return self.codes() * (self.scale / levels(self.weight_bits))

    def prepared(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is to be multiplied: the inputs as whole numbers (or as they are), and the weight in their unit.

        Scales go with the weight, which engines compute once, rather than with each output.
        """
        if self.input_bits >= REAL:
            return x, self.weight()
        whole = input_codes(x, self.input_bits, self.reach, self.signed)
        return whole, self.weight() * (self.reach / levels(self.input_bits))

    def hold(self, latent: Tensor, weight: WeightGrid, inputs: InputGrid, bias: Tensor | None) -> None:
        """Take up the codes of a latent weight, and both grids' scales."""
        self.to(device=latent.device)
        for buffer in (self.scale, *((self.reach,) if self.input_bits < REAL else ())):
            buffer.data = buffer.data.to(latent.dtype)
        with torch.no_grad():
            self.planes.copy_(pack_planes(weight.codes(latent), weight.bits))
            self.scale.fill_(weight.scale)
            if self.input_bits < REAL:
                self.reach.fill_(inputs.reach)
        if self.bias is not None and bias is not None:
            self.bias.data = bias.detach().clone()

    def bits(self) -> dict[str, int]:
        """What storage takes: bits of weight, scales and bias."""
        scales = 32 * (1 + (self.input_bits < REAL))
        weight = self.weight_bits * math.prod(self.shape)
        return {"weight": weight, "scales": scales, "bias": 0 if self.bias is None else 32 * self.bias.numel()}


class LowBitLinear(_LowBit):
    """A linear layer whose weight has k bits, and whose inputs may have few.

    Settings:
        in_features, out_features, bias: as those of `torch.nn.Linear`.
        weight_bits: 1 to 16.
        input_bits: 1 to 16; 32 takes inputs as they are.
        signed: whether inputs are also negative.

    Example:
        >>> layer = LowBitLinear(16, 10, weight_bits=2, input_bits=2)
        >>> layer(torch.zeros(3, 16)).shape, tuple(layer.planes.shape)
        (torch.Size([3, 10]), (2, 20))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight_bits: int,
        input_bits: int = REAL,
        signed: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__((out_features, in_features), weight_bits, input_bits, signed, bias)
        self.in_features, self.out_features = in_features, out_features

    def settings(self) -> dict[str, Any]:
        """What `LowBitLinear(**settings)` rebuilds it from."""
        told = {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}
        return {**told, **self.grids()}

    def forward(self, input: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:  # noqa: A002
        """On the grids of inputs and weight."""
        whole, weight = self.prepared(input)
        return functional.linear(whole, weight, self.bias)

    def dense(self) -> nn.Linear:
        """The linear layer of the same weight; it takes inputs as they are."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None).to(self.scale)
        return _filled(layer, self)


class LowBitConv(_LowBit):
    """A convolution whose weight has k bits, and whose inputs may have few.

    Settings:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as those of a
            convolution in as many dimensions as `kernel_size` has.
        weight_bits, input_bits, signed: as those of `LowBitLinear`.

    Example:
        >>> layer = LowBitConv(8, 6, (3, 3), weight_bits=4, input_bits=4, padding=(1, 1))
        >>> layer(torch.zeros(2, 8, 5, 5)).shape, layer.bits()["weight"]
        (torch.Size([2, 6, 5, 5]), 1728)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        *,
        weight_bits: int,
        input_bits: int = REAL,
        signed: bool = False,
        groups: int = 1,
        bias: bool = True,
        **space: Any,
    ) -> None:
        convolution: Any = CONVOLUTIONS[len(kernel_size)]
        shape = convolution(
            in_channels, out_channels, tuple(kernel_size), groups=groups, bias=bias, device="meta", **space
        )
        super().__init__(shape.weight.shape, weight_bits, input_bits, signed, bias)
        self._told = conv_settings(shape)
        # Zeros around are whole numbers, too, and the engine's own padding is the fastest.
        self._windows = None if shape.padding_mode == "zeros" else Windows(self._told)
        padding = 0 if self._windows else shape.padding
        self._space = (shape.stride, padding, shape.dilation, groups)

    def settings(self) -> dict[str, Any]:
        """What `LowBitConv(**settings)` rebuilds it from."""
        return {**self._told, **self.grids()}

    def forward(self, input: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch filters *made"]:  # noqa: A002
        """On the grids of inputs and weight."""
        whole, weight = self.prepared(input)
        padded = self._windows.padded(whole) if self._windows else whole
        return FUNCTIONS[len(self.shape) - 2](padded, weight, self.bias, *self._space)

    def dense(self) -> nn.Module:
        """The convolution of the same weight; it takes inputs as they are."""
        told: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in self._told.items()}
        layer: Any = CONVOLUTIONS[len(self.shape) - 2](**told).to(self.scale)
        return _filled(layer, self)


def _filled(layer: Any, held: _LowBit) -> Any:
    with torch.no_grad():
        layer.weight.copy_(held.weight())
        if held.bias is not None:
            layer.bias.copy_(held.bias)
    return layer


def low_bit_layer(layer: Any, weight: WeightGrid, inputs: InputGrid) -> Any:
    """The layer that stores what a linear layer or a convolution computes with its latent weight on these grids.

    It takes the old layer's bias, type, place, mode and frozenness.

    Example:
        >>> low_bit_layer(nn.Linear(4, 2), WeightGrid(2), InputGrid(4)).settings()["input_bits"]
        4
    """
    grids: dict[str, Any] = {"weight_bits": weight.bits, "input_bits": inputs.bits, "signed": inputs.signed}
    if isinstance(layer, nn.Linear):
        told = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
        new: Any = LowBitLinear(**told, **grids)
    else:
        new = LowBitConv(**conv_settings(layer), **grids)
    new.hold(layer.weight, weight, inputs, layer.bias)
    return new.requires_grad_(layer.weight.requires_grad).train(layer.training)
