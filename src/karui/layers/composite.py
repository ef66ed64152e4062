"""The composite convolution: groups of filters of different shapes side by side, with an initialisation of its own."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import SettingError, SurgeryError, require
from karui.layers.factored import CONVOLUTIONS, each_dimension


def composite_std(parts: Iterable[tuple[Sequence[int], int]], gain: float = 2.0) -> float:
    """Standard deviation of the weights of parallel filters that keeps the variance of the gradient.

    The gradient of the input is the sum over all groups, so that `sigma^2 sum_g(area_g filters_g) = gain`: one standard
    deviation for all of them, not one a group (Ioannou et al. 2016, in the form of the backward pass). One group alone
    gives He's rule by fan-out.

    Args:
        parts: (kernel size, number of filters) of each group.
        gain: 2 where a ReLU follows, which stops half of the gradient; 1 where the next layer is linear.

    Example:
        >>> round(composite_std([((1, 3), 32), ((3, 1), 32)]), 4) == round((2 / (3 * 64)) ** 0.5, 4)
        True
    """
    return math.sqrt(gain / sum(math.prod(kernel) * filters for kernel, filters in parts))


def init_composite(convs: Sequence[nn.Module], gain: float = 2.0) -> None:
    """Draw the weights of convolutions that lie side by side by the one rule of `composite_std`; biases are 0.

    Args:
        convs: the convolutions of one input whose outputs are concatenated or added; all in as many groups.
        gain: as for `composite_std`.

    Example:
        >>> init_composite([nn.Conv2d(8, 16, (1, 3)), nn.Conv2d(8, 16, (3, 1)), nn.Conv2d(8, 4, 3)])
    """
    layers: list[Any] = list(convs)
    parts = [(conv.kernel_size, conv.out_channels // conv.groups) for conv in layers]
    deviation = composite_std(parts, gain)
    for conv in layers:
        nn.init.normal_(conv.weight, std=deviation)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)


def apportion(total: int, shares: Sequence[float], multiple: int = 1) -> list[int]:
    """`total` in whole multiples of `multiple`, as near to the shares as that allows (largest remainder).

    Example:
        >>> apportion(10, [1, 1, 1]), apportion(16, [0.5, 0.25, 0.25], 4)
        ([4, 3, 3], [8, 4, 4])
    """
    units = total // multiple
    whole = [units * share / sum(shares) for share in shares]
    counts = [math.floor(value + 1e-9) for value in whole]
    order = sorted(range(len(shares)), key=lambda i: counts[i] - whole[i])
    for i in order[: units - sum(counts)]:
        counts[i] += 1
    return [count * multiple for count in counts]


class CompositeConv(nn.Module):
    """Groups of filters of different shapes on one input, maps concatenated, and perhaps mixed by a pointwise layer.

    All groups are centred on the same positions, that is on the middle tap of the largest kernel, so that the maps
    align; there is nothing between the filters and the pointwise layer, so that the whole is one convolution with the
    largest kernel (`dense()`). With filters along one dimension each, that kernel is a cross.

    Args:
        in_channels: channels of the input.
        parts: (kernel size, number of filters) of each group, as `[[[1, 3], 32], [[3, 1], 32]]`.
        join: outputs of the pointwise layer on top ("join"); None leaves it out.
        stride: of all groups alike, a number or one for each dimension.
        padding: of the largest kernel, as for `torch.nn.Conv2d`; None keeps the map's size at stride 1.
        dilation: of all groups alike.
        groups: of all groups alike, and of the join.
        bias: whether what comes last has a bias.
        padding_mode: as for `torch.nn.Conv2d`.

    Raises:
        SettingError: the groups of filters do not fit together.

    Example:
        >>> layer = CompositeConv(16, [[[1, 3], 8], [[3, 1], 8]], join=32)
        >>> layer(torch.zeros(1, 16, 9, 9)).shape
        torch.Size([1, 32, 9, 9])
    """

    def __init__(
        self,
        in_channels: int,
        parts: Sequence[tuple[Sequence[int], int]],
        *,
        join: int | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str | None = None,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__()
        shapes = [(tuple(kernel), int(filters)) for kernel, filters in parts]
        require(bool(shapes), "parts is empty; give the kernel size and the number of filters of each group")
        dimensions = len(shapes[0][0])
        for kernel, filters in shapes:
            told = (
                f"parts has {filters} filters of {'x'.join(map(str, kernel))}; give a multiple of the {groups} groups"
            )
            require(filters >= 1 and filters % groups == 0 and len(kernel) == dimensions, told, error=SettingError)
        self.kernel_size = tuple(max(kernel[axis] for kernel, _ in shapes) for axis in range(dimensions))
        self.stride, self.dilation = each_dimension(stride, dimensions), each_dimension(dilation, dimensions)
        self.groups, self.padding_mode = groups, padding_mode
        self.around = _around(padding, self.kernel_size, self.dilation, self.stride)
        sides = [self._sides(kernel) for kernel, _ in shapes]
        # What a convolution can pad by itself it does: that saves a copy of the map.
        plain = [all(left == right >= 0 for left, right in pairs) for pairs in sides]
        self.margins = [[] if own else _for_pad(pairs) for own, pairs in zip(plain, sides, strict=True)]
        convolution = CONVOLUTIONS[dimensions]
        common: dict[str, Any] = {"stride": self.stride, "dilation": self.dilation, "groups": groups}
        common["bias"] = bias and join is None
        self.convs = nn.ModuleList(
            convolution(in_channels, filters, kernel, padding=tuple(left for left, _ in pairs) if own else 0, **common)  # pyright: ignore[reportArgumentType]
            for (kernel, filters), own, pairs in zip(shapes, plain, sides, strict=True)
        )
        width = sum(filters for _, filters in shapes)
        self.join = None if join is None else convolution(width, join, 1, groups=groups, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights: `init_composite`, at gain 1 under a join (no ReLU is between), which itself has gain 2."""
        init_composite(list(self.convs), 2.0 if self.join is None else 1.0)
        if self.join is not None:
            init_composite([self.join])

    def settings(self) -> dict[str, Any]:
        """What `CompositeConv(**settings)` rebuilds it from."""
        first, last = self._filters()[0], self._last()[0]
        return {
            "in_channels": first.in_channels,
            "parts": [[list(conv.kernel_size), conv.out_channels] for conv in self._filters()],
            "join": None if self.join is None else last.out_channels,
            "stride": list(self.stride),
            "padding": [list(sides) for sides in self.around],
            "dilation": list(self.dilation),
            "groups": self.groups,
            "bias": last.bias is not None,
            "padding_mode": self.padding_mode,
        }

    def forward(self, x: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch filters *space2"]:
        """All filters, side by side, then the join."""
        if self.padding_mode != "zeros" and any(side for sides in self.around for side in sides):
            x = functional.pad(x, _for_pad(self.around), mode=self.padding_mode)
        maps = [
            conv(functional.pad(x, margins) if margins else x)
            for conv, margins in zip(self.convs, self.margins, strict=True)
        ]
        y = _concatenated(maps, self.groups)
        return y if self.join is None else self.join(y)

    def dense(self) -> nn.Module:
        """The one convolution that computes the same, for padding by zeros that is equal on both sides.

        Raises:
            SurgeryError: it pads in another way.
        """
        even = self.padding_mode == "zeros" and all(left == right for left, right in self.around)
        require(even, "a composite layer that pads unequally, or by copies, has no single layer", error=SurgeryError)
        whole = _concatenated([self._embedded(conv) for conv in self._filters()], self.groups, dim=0)
        last = self._last()[0]
        bias = None if last.bias is None else _concatenated([conv.bias for conv in self._last()], self.groups, dim=0)
        if self.join is not None:
            mixing = self.join.weight.detach().double().flatten(1).unflatten(0, (self.groups, -1))
            whole = torch.einsum("gnm,gm...->gn...", mixing, whole.unflatten(0, (self.groups, -1))).flatten(0, 1)
        layer: Any = CONVOLUTIONS[len(self.kernel_size)](
            self._filters()[0].in_channels,
            whole.shape[0],
            self.kernel_size,  # pyright: ignore[reportArgumentType]
            stride=self.stride,  # pyright: ignore[reportArgumentType]
            padding=tuple(left for left, _ in self.around),  # pyright: ignore[reportArgumentType]
            dilation=self.dilation,  # pyright: ignore[reportArgumentType]
            groups=self.groups,
            bias=bias is not None,
        ).to(last.weight)
        with torch.no_grad():
            layer.weight.copy_(whole)
            if bias is not None:
                layer.bias.copy_(bias)
        return layer

    def _filters(self) -> list[Any]:
        return list(self.convs)

    def _last(self) -> list[Any]:
        return self._filters() if self.join is None else [self.join]

    def _embedded(self, conv: Any) -> Float[Tensor, "filters channels *kernel"]:
        """The kernels of one group, with zeros around them, as large as the largest."""
        sides = [_split(full - own) for full, own in zip(self.kernel_size, conv.kernel_size, strict=True)]
        return functional.pad(conv.weight.detach().double(), _for_pad(sides))

    def _sides(self, kernel: Sequence[int]) -> list[tuple[int, int]]:
        """Padding (where negative: cropping) before and after each dimension of the input of one group."""
        sides = []
        for axis, own in enumerate(kernel):
            before, after = _split(self.kernel_size[axis] - own)
            left, right = self.around[axis] if self.padding_mode == "zeros" else (0, 0)
            sides.append((left - before * self.dilation[axis], right - after * self.dilation[axis]))
        return sides


def _concatenated(maps: Sequence[Tensor], groups: int, dim: int = 1) -> Tensor:
    """Along the channels, so that those of a group of a grouped convolution stay together."""
    if groups == 1 or len(maps) == 1:
        return torch.cat(list(maps), dim)
    return torch.cat([one.unflatten(dim, (groups, -1)) for one in maps], dim + 1).flatten(dim, dim + 1)


def _split(missing: int) -> tuple[int, int]:
    """Taps that a smaller kernel lacks before and after; an even kernel's middle is the earlier of its two."""
    return missing // 2, missing - missing // 2


def _around(
    padding: Any, kernel: Sequence[int], dilation: Sequence[int], stride: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Padding before and after each dimension."""
    if padding == "valid":
        padding = 0
    if padding is None or padding == "same":
        one = all(step == 1 for step in stride)
        require(padding is None or one, "padding 'same' is for stride 1; give a number", error=SettingError)
        return tuple(_split(step * (taps - 1)) for taps, step in zip(kernel, dilation, strict=True))
    sides = [padding] * len(kernel) if isinstance(padding, int) else padding
    return tuple((side, side) if isinstance(side, int) else (side[0], side[1]) for side in sides)


def _for_pad(sides: Sequence[Sequence[int]]) -> list[int]:
    """`functional.pad` counts from the last dimension."""
    return [side for pair in reversed(list(sides)) for side in pair]


def low_rank_parts(
    kernel: Sequence[int], filters: int, *, full: float = 0.0, point: float = 0.0, groups: int = 1
) -> list[tuple[tuple[int, ...], int]]:
    """(kernel size, number of filters) of a composite layer: filters along one dimension each, in equal shares.

    Args:
        kernel: the size of the convolution that it stands for.
        filters: how many in all.
        full: share of filters of the whole size.
        point: share of filters of one position.
        groups: every number is a multiple of this.

    Example:
        >>> low_rank_parts((3, 3), 32, full=0.25)
        [((1, 3), 12), ((3, 1), 12), ((3, 3), 8)]
    """
    axes = [axis for axis, taps in enumerate(kernel) if taps > 1]
    sizes = [tuple(taps if i == axis else 1 for i, taps in enumerate(kernel)) for axis in reversed(axes)]
    shares = [(1.0 - full - point) / max(1, len(axes))] * len(axes)
    sizes, shares = [*sizes, tuple(kernel), (1,) * len(kernel)], [*shares, full, point]
    kept = [(size, share) for size, share in zip(sizes, shares, strict=True) if share > 0]
    counts = apportion(filters, [share for _, share in kept], groups)
    return [(size, number) for (size, _), number in zip(kept, counts, strict=True) if number]
