"""Group-sparse layers: whole columns of the filter matrix are gone, for all filters alike, and are not computed.

Lebedev, Lempitsky 2016, "Fast ConvNets Using Group-wise Brain Damage", CVPR (survey 26). A convolution is the product
of its filter matrix `[filters, channels * taps]` with the matrix of patches. Where a column is zero for all filters,
that row of patches is not gathered: the product has fewer terms, and stays dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import require
from karui.layers.factored import CONVOLUTIONS, FUNCTIONS, conv_settings
from karui.layers.windows import Windows
from karui.numerics.columns import Geometry, patch_rows
from karui.numerics.unfold import split_groups


class GroupSparseConv(nn.Module):
    """A convolution by the columns of its filter matrix that are left: gather their rows of patches, and multiply.

    A column is a pair of an input channel and a position of the kernel, the same for all filters of a group.

    Settings:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as those of a
            convolution in as many dimensions as `kernel_size` has.
        live: for each group of the convolution, the number of channels left at each position of the kernel.

    Example:
        >>> layer = GroupSparseConv(8, 6, (3, 1), live=[[4, 8, 0]])
        >>> layer(torch.zeros(2, 8, 5, 5)).shape, tuple(layer.weight.shape)
        (torch.Size([2, 6, 3, 5]), (6, 12))
    """

    channels: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        *,
        live: Sequence[Sequence[int]],
        groups: int = 1,
        bias: bool = True,
        **space: Any,
    ) -> None:
        super().__init__()
        conv: Any = CONVOLUTIONS[len(kernel_size)]
        shape = conv(in_channels, out_channels, tuple(kernel_size), groups=groups, bias=bias, device="meta", **space)
        self._told, self.groups = conv_settings(shape), groups
        self._windows = Windows(self._told)
        self.live = tuple(tuple(counts) for counts in live)
        self._sizes = [sum(counts) for counts in self.live]
        each, taps = in_channels // groups, self._windows.taps
        within = all(len(counts) == taps and max(counts) <= each and sum(counts) for counts in self.live)
        told = f"live is {self.live}; give numbers up to {each} for {taps} positions, not all 0, in {groups} groups"
        require(within and len(self.live) == groups, told)
        # The columns of all groups side by side: the filters of a group have their own stretch of them.
        self.weight = nn.Parameter(torch.empty(out_channels // groups, sum(self._sizes)))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        first = [torch.arange(count) + group * each for group, counts in enumerate(self.live) for count in counts]
        self.register_buffer("channels", torch.cat(first).int())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights drawn as those of a convolution of torch that has as many terms in a sum."""
        bound = 1 / math.sqrt(max(self._sizes))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def settings(self) -> dict[str, Any]:
        """What `GroupSparseConv(**settings)` rebuilds it from."""
        return {**self._told, "live": [list(counts) for counts in self.live]}

    def forward(self, input: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch filters *made"]:  # noqa: A002
        """The product of what is left of the filter matrix and of the patch matrix, group by group.

        The product is asked for as a convolution of one position, which engines compute faster than a product.
        """
        windows, dims = self._windows, input.ndim - 2
        padded, geometry = windows.padded(input), Geometry(windows.kernel_size, windows.stride, windows.dilation)
        products = []
        for weight, channels, bias, counts in zip(*self._by_group(), self.live, strict=True):
            patches = patch_rows(padded, channels, counts, geometry)
            products.append(FUNCTIONS[dims](patches, weight.reshape(*weight.shape, *[1] * dims), bias))
        return products[0] if self.groups == 1 else torch.cat(products, 1)

    def _by_group(self) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]]:
        if self.groups == 1:  # nothing to part, and three calls of `split` take 15 µs
            return (self.weight,), (self.channels,), (self.bias,)
        biases = self.bias.split(len(self.weight)) if self.bias is not None else [None] * self.groups
        return self.weight.split(self._sizes, 1), self.channels.split(self._sizes), biases

    def kernel(self) -> Float[Tensor, "filters channels *kernel"]:
        """The kernel of the convolution (grouped as it is) that computes the same."""
        each, taps = self._told["in_channels"] // self.groups, self._windows.taps
        blocks = []
        for weight, channels, _, counts in zip(*self._by_group(), self.live, strict=True):
            tap = torch.arange(taps, device=channels.device).repeat_interleave(torch.tensor(counts).to(channels))
            block = weight.new_zeros(len(weight), each, taps)
            block[:, channels.long() % each, tap] = weight
            blocks.append(block)
        return torch.cat(blocks).unflatten(2, self._windows.kernel_size)

    def dense(self) -> nn.Module:
        """The one convolution that computes the same."""
        told: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in self._told.items()}
        layer: Any = CONVOLUTIONS[len(told["kernel_size"])](**told).to(self.weight)
        return _filled(layer, self.kernel(), self.bias)


class GroupSparseLinear(nn.Module):
    """A linear layer that reads some of its inputs.

    Settings:
        in_features, out_features, bias: as those of `torch.nn.Linear`.
        live: number of inputs that are read.

    Example:
        >>> layer = GroupSparseLinear(64, 10, live=16)
        >>> layer(torch.zeros(2, 64)).shape, tuple(layer.weight.shape)
        (torch.Size([2, 10]), (10, 16))
    """

    channels: Tensor

    def __init__(self, in_features: int, out_features: int, *, live: int, bias: bool = True) -> None:
        super().__init__()
        require(1 <= live <= in_features, f"live is {live}; give a number in [1, {in_features}]")
        self.in_features, self.live = in_features, live
        plain = nn.Linear(live, out_features, bias=bias)
        self.weight, self.bias = plain.weight, plain.bias
        self.register_buffer("channels", torch.arange(live).int())

    def settings(self) -> dict[str, Any]:
        """What `GroupSparseLinear(**settings)` rebuilds it from."""
        told = {"in_features": self.in_features, "out_features": self.weight.shape[0], "live": self.live}
        return {**told, "bias": self.bias is not None}

    def forward(self, input: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:  # noqa: A002
        """Gather, and multiply."""
        return functional.linear(input.index_select(-1, self.channels), self.weight, self.bias)

    def dense(self) -> nn.Linear:
        """The one linear layer that computes the same."""
        weight = self.weight.new_zeros(self.weight.shape[0], self.in_features)
        weight[:, self.channels.long()] = self.weight
        layer = nn.Linear(self.in_features, len(weight), bias=self.bias is not None).to(self.weight)
        return _filled(layer, weight, self.bias)


def group_sparse_layer(layer: Any, alive: Bool[Tensor, "groups columns"]) -> Any:
    """The layer in place of a linear layer or a convolution, with the columns of each group that are alive.

    It takes the old layer's bias, type, place, mode and frozenness. Of a group without any the first column stays, as
    zeros: a product needs a term.
    """
    matrices = split_groups(layer.weight.detach(), len(alive)).flatten(2) * alive[:, None]
    kept, biased = alive.clone(), layer.bias is not None
    kept[~alive.any(1), 0] = True
    if isinstance(layer, nn.Linear):
        live = int(kept.sum())
        new: Any = GroupSparseLinear(layer.in_features, layer.out_features, live=live, bias=biased)
        places, weight = kept[0].nonzero().flatten(), matrices[0][:, kept[0]]
    else:
        taps = layer.weight[0, 0].numel()
        by_tap = kept.unflatten(1, (-1, taps)).transpose(1, 2)
        new = GroupSparseConv(**conv_settings(layer), live=by_tap.sum(2).tolist())
        group, _, channel = by_tap.nonzero(as_tuple=True)
        places = group * by_tap.shape[2] + channel
        ordered = matrices.unflatten(2, (-1, taps)).transpose(2, 3)
        weight = torch.cat([block[:, mask] for block, mask in zip(ordered, by_tap, strict=True)], 1)
    new.to(layer.weight)
    with torch.no_grad():
        new.weight.copy_(weight)
        new.channels.copy_(places)
        if biased:
            new.bias.copy_(layer.bias)
    return new.requires_grad_(layer.weight.requires_grad).train(layer.training)


def _filled(layer: Any, weight: Tensor, bias: Tensor | None) -> Any:
    with torch.no_grad():
        layer.weight.copy_(weight.reshape(layer.weight.shape))
        if bias is not None:
            layer.bias.copy_(bias)
    return layer
