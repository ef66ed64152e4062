"""Layers whose weight is product-quantised: codebooks for slices of the inputs, and codes.

Wu, Leng, Wang, Hu, Cheng 2016, "Quantized Convolutional Neural Networks for Mobile Devices", CVPR (survey 19).

Paper -> here: `C_s`, `C_t` -> inputs, outputs, `C'_s` -> the size of a subspace, `M` -> subspaces, `K` -> codewords,
`D` -> books, `B` -> codes.
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
from karui.numerics.product_codes import ProductCode, code_bits, decoded
from karui.numerics.row_sums import row_sums

MOST_CODEWORDS = 256


class QuantizedLinear(nn.Module):
    """A linear layer `out[t] = sum_m books[m, codes[t, m]] . x_m + bias`, `x_m` the inputs of subspace `m`.

    The weight is looked up and multiplied (decoded), or (`lookup`) the products of all codewords with their inputs are
    tabled and looked up, by a kernel of its own where numba is installed. Both compute the same. Codebooks and bias
    learn; codes stay.

    Settings:
        in_features, out_features, bias: as those of `torch.nn.Linear`.
        subspaces: parts of equal size into which the inputs fall.
        codewords: of each subspace, up to 256.
        lookup: whether the forward pass goes by tables.

    Example:
        >>> layer = QuantizedLinear(16, 10, subspaces=4, codewords=8)
        >>> layer(torch.zeros(2, 16)).shape, layer.weight().shape
        (torch.Size([2, 10]), torch.Size([10, 16]))
    """

    codes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        subspaces: int,
        codewords: int,
        bias: bool = True,
        lookup: bool = False,
    ) -> None:
        super().__init__()
        _require_parts(in_features, subspaces, codewords)
        self.in_features, self.out_features, self.lookup = in_features, out_features, lookup
        size = in_features // subspaces
        self.books = nn.Parameter(torch.randn(subspaces, codewords, size) / math.sqrt(in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("codes", torch.zeros(out_features, subspaces, dtype=torch.uint8))

    def settings(self) -> dict[str, Any]:
        """What `QuantizedLinear(**settings)` rebuilds it from."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "subspaces": self.books.shape[0],
            "codewords": self.books.shape[1],
            "bias": self.bias is not None,
            "lookup": self.lookup,
        }

    def weight(self) -> Float[Tensor, "outputs inputs"]:
        """The decoded weight."""
        return decoded(self.books, self.codes.unsqueeze(2))[:, :, 0]

    def forward(self, input: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:  # noqa: A002
        """By the decoded weight, or by tables."""
        if not self.lookup:
            return functional.linear(input, self.weight(), self.bias)
        subspaces, _, size = self.books.shape
        tables = torch.bmm(self.books, input.reshape(-1, subspaces, size).permute(1, 2, 0))
        made = row_sums(tables, self.codes).T
        made = made if self.bias is None else made + self.bias
        return made.reshape(*input.shape[:-1], self.out_features)

    def dense(self) -> nn.Linear:
        """The linear layer that computes the same."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None).to(self.books)
        with torch.no_grad():
            layer.weight.copy_(self.weight())
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer

    def bits(self) -> dict[str, int]:
        """What storage takes: bits of codebooks, codes and bias."""
        return _bits(self.books, self.codes, self.bias)


class QuantizedConv(nn.Module):
    """A convolution of which every position of the kernel and every filter takes its vectors from the same codebooks.

    Decoded, it is a convolution; by tables (`lookup`) one of one position with all codewords, whose maps are looked up
    and summed for each output.

    Settings:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as those of a
            convolution in as many dimensions as `kernel_size` has.
        subspaces: parts of equal size into which the channels of each group fall.
        codewords: of each subspace, up to 256.
        lookup: whether the forward pass goes by tables.

    Example:
        >>> layer = QuantizedConv(8, 6, (3, 3), subspaces=2, codewords=16, padding=(1, 1), lookup=True)
        >>> layer(torch.zeros(2, 8, 5, 5)).shape, tuple(layer.codes.shape)
        (torch.Size([2, 6, 5, 5]), (6, 2, 9))
    """

    codes: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        *,
        subspaces: int,
        codewords: int,
        groups: int = 1,
        bias: bool = True,
        lookup: bool = False,
        **space: Any,
    ) -> None:
        super().__init__()
        channels = in_channels // groups
        _require_parts(channels, subspaces, codewords)
        convolution: Any = CONVOLUTIONS[len(kernel_size)]
        shape = convolution(
            in_channels, out_channels, tuple(kernel_size), groups=groups, bias=bias, device="meta", **space
        )
        self._told = conv_settings(shape)
        self._windows = Windows(self._told)
        self.kernel_size, self.stride, self.dilation = shape.kernel_size, shape.stride, shape.dilation
        self.groups, self.lookup = groups, lookup
        taps = math.prod(self.kernel_size)
        self.books = nn.Parameter(
            torch.randn(groups * subspaces, codewords, channels // subspaces) / math.sqrt(channels * taps)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.register_buffer("codes", torch.zeros(out_channels, subspaces, taps, dtype=torch.uint8))

    def settings(self) -> dict[str, Any]:
        """What `QuantizedConv(**settings)` rebuilds it from."""
        return {
            **self._told,
            "subspaces": self.codes.shape[1],
            "codewords": self.books.shape[1],
            "lookup": self.lookup,
        }

    def weight(self) -> Float[Tensor, "filters channels *kernel"]:
        """The decoded kernel."""
        books = self.books.unflatten(0, (self.groups, -1))
        codes = self.codes.unflatten(0, (self.groups, -1))
        blocks = [decoded(book, code) for book, code in zip(books, codes, strict=True)]
        return torch.cat(blocks).unflatten(2, self.kernel_size)

    def forward(self, input: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch filters *made"]:  # noqa: A002
        """By the decoded kernel, or by tables."""
        if self.lookup:
            return self._by_tables(input)
        padded, convolve = self._windows.padded(input), FUNCTIONS[len(self.kernel_size)]
        return convolve(padded, self.weight(), self.bias, self.stride, 0, self.dilation, self.groups)

    def _by_tables(self, given: Tensor) -> Tensor:
        """Products of each pixel with all codewords, then a sum of what the codes name, position by position.

        What lies around the input is zeros or copies of pixels, and so are its products: they are not computed again.
        """
        dims, (parts, codewords, size) = len(self.kernel_size), self.books.shape
        products = self.books.reshape(parts * codewords, size, *[1] * dims)
        tables = self._windows.padded(FUNCTIONS[dims](given, products, groups=parts))
        filters, subspaces, taps = self.codes.shape
        first = torch.arange(filters, device=self.codes.device) // (filters // self.groups) * subspaces
        part = first[:, None] + torch.arange(subspaces, device=self.codes.device)
        made: Any = 0
        for tap in range(taps):
            seen = tables[self._windows.at(tap, tables.shape[2:])]
            places = (part * codewords + self.codes[:, :, tap].long()).flatten()
            made = made + seen.index_select(1, places).unflatten(1, (filters, subspaces)).sum(2)
        return made if self.bias is None else made + self.bias.reshape(-1, *[1] * dims)

    def dense(self) -> nn.Module:
        """The convolution that computes the same; grouped as it is."""
        told: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in self._told.items()}
        layer: Any = CONVOLUTIONS[len(self.kernel_size)](**told).to(self.books)
        with torch.no_grad():
            layer.weight.copy_(self.weight())
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        return layer

    def bits(self) -> dict[str, int]:
        """What storage takes: bits of codebooks, codes and bias."""
        return _bits(self.books, self.codes, self.bias)


def quantized_layer(layer: Any, codes: Sequence[ProductCode], *, lookup: bool = False) -> Any:
    """The layer in place of a linear layer or a convolution, from the code of each of its groups.

    It takes the old layer's bias, type, place, mode and frozenness.
    """
    settings: dict[str, Any] = {"codewords": codes[0].books.shape[1], "subspaces": len(codes[0].books)}
    if isinstance(layer, nn.Linear):
        biased = layer.bias is not None
        new: Any = QuantizedLinear(layer.in_features, layer.out_features, bias=biased, lookup=lookup, **settings)
    else:
        new = QuantizedConv(**conv_settings(layer), lookup=lookup, **settings)
    new.to(layer.weight.device)
    new.books.data = new.books.data.to(layer.weight.dtype)
    with torch.no_grad():
        new.books.copy_(torch.cat([one.books for one in codes]))
        new.codes.copy_(torch.cat([one.codes for one in codes]).reshape(new.codes.shape))
        if layer.bias is not None:
            new.bias.data = layer.bias.detach().clone()
    return new.requires_grad_(layer.weight.requires_grad).train(layer.training)


def _require_parts(channels: int, subspaces: int, codewords: int) -> None:
    require(channels % subspaces == 0, f"{channels} inputs do not part into {subspaces} subspaces")
    require(1 <= codewords <= MOST_CODEWORDS, f"codewords is {codewords}; give 1 to {MOST_CODEWORDS}")


def _bits(books: Tensor, codes: Tensor, bias: Tensor | None) -> dict[str, int]:
    told = {"books": 8 * books.nbytes, "codes": code_bits(books.shape[1]) * codes.numel()}
    return {**told, "bias": 0 if bias is None else 8 * bias.nbytes}
