"""Lookup layers: a small dictionary of channel vectors, and for each filter and position sparse mixtures of them.

Bagherinezhad, Rastegari, Farhadi 2017, "LCNN: Lookup-based Convolutional Neural Network", CVPR (survey 29).

Paper -> here: `D` -> dictionary, `k` -> size, `P` -> the weight of `mixture`, `S = X * D` -> the dictionary's maps,
`I`, `C` -> index, coefficient of a `Table`, `s` -> lookups.

A sparse mixture leaves out its zeros where the kernel of `karui.layers.sparse_conv` serves; in exported files zeros are
multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from karui.errors import require
from karui.layers.factored import CONVOLUTIONS, NORMS, conv_settings
from karui.layers.sparse_conv import SPARSE_CONVOLUTIONS
from karui.layers.windows import Windows


@dataclass(frozen=True)
class Table:
    """What a filter looks up at each position of the kernel: numbers of dictionary maps, and what to weigh them with.

    Filled up to the longest list with coefficients of zero.
    """

    index: Int[Tensor, "filters taps lookups"]
    coefficient: Float[Tensor, "filters taps lookups"]

    @property
    def lookups(self) -> int:
        """Length of the longest list."""
        return self.index.shape[2]


def table_of(mixture: Float[Tensor, "filters size taps"]) -> Table:
    """The entries of a sparse mixture that are not zero.

    Example:
        >>> table = table_of(torch.tensor([[[0.0], [2.0], [0.0]], [[1.0], [0.0], [3.0]]]))
        >>> table.index[:, 0].tolist(), table.coefficient[:, 0].tolist()
        ([[1, 0], [0, 2]], [[2.0, 0.0], [1.0, 3.0]])
    """
    flat = mixture.transpose(1, 2)
    live = flat != 0
    most = max(1, int(live.sum(2).max()))
    order = live.long().argsort(dim=2, descending=True, stable=True)[:, :, :most]
    kept = live.gather(2, order)
    return Table(order.masked_fill(~kept, 0), flat.gather(2, order))


class LookupConv(nn.Module):
    """A pointwise convolution with the dictionary, and a convolution with the sparse mixture behind it.

    Settings:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode: as those of a
            convolution in as many dimensions as `kernel_size` has.
        size: vectors in the dictionary of each group.
        norm: whether batch normalisation follows, in the layer; there is then no bias.

    Example:
        >>> layer = LookupConv(16, 32, (3, 3), size=8, padding=(1, 1), norm=True)
        >>> layer(torch.zeros(2, 16, 5, 5)).shape, layer.dictionary.weight.shape, layer.mixture.weight.shape
        (torch.Size([2, 32, 5, 5]), torch.Size([8, 16, 1, 1]), torch.Size([32, 8, 3, 3]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        *,
        size: int,
        groups: int = 1,
        bias: bool = True,
        norm: bool = False,
        **space: Any,
    ) -> None:
        super().__init__()
        dims = len(kernel_size)
        conv: Any = CONVOLUTIONS[dims]
        self.size = size
        self.dictionary = conv(in_channels, groups * size, 1, groups=groups, bias=False)
        self.mixture = SPARSE_CONVOLUTIONS[dims](
            groups * size, out_channels, tuple(kernel_size), groups=groups, bias=bias and not norm, **space
        )
        self.norm = NORMS[dims](out_channels) if norm else None

    def settings(self) -> dict[str, Any]:
        """What `LookupConv(**settings)` rebuilds it from."""
        told = {**conv_settings(self.mixture), "in_channels": self.dictionary.in_channels}
        return {**told, "size": self.size, "norm": self.norm is not None}

    def forward(self, input: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch filters *made"]:  # noqa: A002
        """Meet the dictionary, then mix."""
        made = self.mixture(self.dictionary(input))
        return made if self.norm is None else self.norm(made)

    def table(self) -> Table:
        """The mixture as lists of lookups."""
        return table_of(self.mixture.weight.detach().flatten(2))

    def by_table(self, input: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch filters *made"]:  # noqa: A002
        """The same by gathering what the table names, for every position of the kernel."""
        table, windows = self.table(), Windows(conv_settings(self.mixture))
        maps = windows.padded(self.dictionary(input))
        filters, taps, lookups = table.index.shape
        first = torch.arange(filters, device=maps.device) // (filters // self.mixture.groups) * self.size
        made: Any = 0
        ones = [1] * (input.ndim - 2)
        for tap in range(taps):
            places = (table.index[:, tap] + first[:, None]).flatten()
            seen = maps[windows.at(tap, maps.shape[2:])].index_select(1, places).unflatten(1, (filters, lookups))
            made = made + (seen * table.coefficient[:, tap].reshape(filters, lookups, *ones)).sum(2)
        if self.mixture.bias is not None:
            made = made + self.mixture.bias.reshape(-1, *ones)
        return made if self.norm is None else self.norm(made)

    def kernel(self) -> Float[Tensor, "filters channels *kernel"]:
        """The kernel of the convolution (grouped as it is) that computes the same before normalisation, in float64."""
        groups = self.mixture.groups
        mixture = self.mixture.weight.double().unflatten(0, (groups, -1))
        words = self.dictionary.weight.double().flatten(1).unflatten(0, (groups, -1))
        return torch.einsum("gnk...,gkc->gnc...", mixture, words).flatten(0, 1)


class LookupLinear(nn.Module):
    """A linear layer to the dictionary's products, and a linear layer with the sparse mixture behind it.

    Settings:
        in_features, out_features, bias: as those of `torch.nn.Linear`.
        size: vectors in the dictionary.
        norm: whether batch normalisation follows, in the layer; then without a bias, and inputs are `[batch, inputs]`.

    Example:
        >>> LookupLinear(64, 10, size=8)(torch.zeros(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, in_features: int, out_features: int, *, size: int, bias: bool = True, norm: bool = False
    ) -> None:
        super().__init__()
        self.size = size
        self.dictionary = nn.Linear(in_features, size, bias=False)
        self.mixture = nn.Linear(size, out_features, bias=bias and not norm)
        self.norm = nn.BatchNorm1d(out_features) if norm else None

    def settings(self) -> dict[str, Any]:
        """What `LookupLinear(**settings)` rebuilds it from."""
        return {
            "in_features": self.dictionary.in_features,
            "out_features": self.mixture.out_features,
            "size": self.size,
            "bias": self.mixture.bias is not None,
            "norm": self.norm is not None,
        }

    def forward(self, input: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:  # noqa: A002
        """Meet the dictionary, then mix."""
        made = self.mixture(self.dictionary(input))
        return made if self.norm is None else self.norm(made)

    def table(self) -> Table:
        """The mixture as lists of lookups."""
        return table_of(self.mixture.weight.detach().unsqueeze(2))

    def by_table(self, input: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:  # noqa: A002
        """The same by gathering what the table names."""
        table = self.table()
        seen = self.dictionary(input)[..., table.index[:, 0]]
        made = (seen * table.coefficient[:, 0]).sum(-1)
        if self.mixture.bias is not None:
            made = made + self.mixture.bias
        return made if self.norm is None else self.norm(made)

    def kernel(self) -> Float[Tensor, "outputs inputs"]:
        """The weight of the linear layer that computes the same before normalisation, in float64."""
        return self.mixture.weight.double() @ self.dictionary.weight.double()


def lookup_layers(module: nn.Module) -> dict[str, LookupConv | LookupLinear]:
    """The lookup layers of a network, by path."""
    return {path: part for path, part in module.named_modules() if isinstance(part, LookupConv | LookupLinear)}


def threshold(layer: LookupConv | LookupLinear) -> float:
    """The size at which an entry of the mixture counts as zero: `0.01 / sqrt(d^2 k)` (the authors' code)."""
    taps = layer.mixture.weight[0, 0].numel()
    return 0.01 / (taps * layer.size) ** 0.5


def freeze_dictionaries(module: nn.Module) -> None:
    """Hold the dictionaries, in place, so that only mixtures learn: a few numbers for a few examples (section 3.3)."""
    for layer in lookup_layers(module).values():
        layer.dictionary.weight.requires_grad_(False)


def transfer_dictionaries(source: nn.Module, target: nn.Module) -> tuple[str, ...]:
    """Copy dictionaries into another network, in place, where paths and shapes agree; their paths (section 3.4).

    Raises:
        SettingError: there is none that both have.
    """
    known, moved = lookup_layers(source), []
    for path, layer in lookup_layers(target).items():
        other = known.get(path)
        if other is not None and other.dictionary.weight.shape == layer.dictionary.weight.shape:
            with torch.no_grad():
                layer.dictionary.weight.copy_(other.dictionary.weight)
            moved.append(path)
    require(bool(moved), "the two networks have no lookup layer of the same path and dictionary")
    return tuple(moved)
