"""The flattened convolution: a pointwise layer and filters along one dimension for each channel, in cascaded sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.errors import SettingError, require
from karui.layers.factored import CONVOLUTIONS, each_dimension
from karui.numerics.rank_one import outer, rank_one

_PADDED = {1: nn.ConstantPad1d, 2: nn.ConstantPad2d, 3: nn.ConstantPad3d}


class FlattenedConv(nn.Sequential):
    """Sets of convolutions in one dimension each: across channels (lateral), down (vertical), along (horizontal).

    In a set, each filter is an outer product of a vector over channels, one over rows and one over columns (`kernel`).
    Every convolution has a bias, and there is no non-linearity, so that the whole is one affine map. The first set has
    the stride and the padding; the others keep the size of the map. Works in one and three dimensions of space too.

    Args:
        in_channels: channels of the input.
        out_channels: filters F of every set.
        kernel_size: of the convolution that it stands for.
        stages: how many sets follow one another.
        stride: of the first set.
        padding: of the first set, as for `torch.nn.Conv2d`; None keeps the map's size at stride 1.
        dilation: of every set.
        groups: of the lateral convolutions.
        padding_mode: as for `torch.nn.Conv2d`.
        gain: variance of the outputs at the start over the mean square of the inputs; 2 makes up for a ReLU before.

    Raises:
        SettingError: a number is out of range, or the padding does not go with the kernel.

    Example:
        >>> layer = FlattenedConv(16, 32, (5, 5), stages=1)
        >>> layer(torch.zeros(1, 16, 9, 9)).shape
        torch.Size([1, 32, 9, 9])
        >>> sum(p.numel() for p in layer.parameters()) == 32 * (16 + 5 + 5) + 3 * 32
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        *,
        stages: int = 2,
        stride: Sequence[int] | int = 1,
        padding: Sequence[int] | int | str | None = None,
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        gain: float = 1.0,
    ) -> None:
        kernel = tuple(kernel_size)
        require(stages >= 1, f"stages is {stages}; give 1 or more sets", error=SettingError)
        steps, spread = (each_dimension(value, len(kernel)) for value in (stride, dilation))
        even = any(step * (taps - 1) % 2 for taps, step in zip(kernel, spread, strict=True))
        copies = padding_mode != "zeros" and even and (stages > 1 or padding in (None, "same"))
        strided = padding == "same" and any(step != 1 for step in steps)
        require(not strided, "padding 'same' is for stride 1; give a number", error=SettingError)
        require(not copies, f"padding_mode is '{padding_mode}' with an even kernel; give 'zeros'", error=SettingError)
        keep = [None] * len(kernel)
        first = keep if padding is None or padding == "same" else _padding(padding, len(kernel))
        self._settings = {
            "kernel_size": list(kernel),
            "stages": stages,
            "stride": list(steps),
            "padding": None if first is keep else list(first),
            "dilation": list(spread),
            "groups": groups,
            "padding_mode": padding_mode,
            "gain": gain,
        }
        common: dict[str, Any] = {"dilation": spread, "groups": groups, "padding_mode": padding_mode}
        sets = [_set(in_channels, out_channels, kernel, stride=steps, padding=first, **common)]
        ones = (1,) * len(kernel)
        sets += [
            _set(out_channels, out_channels, kernel, stride=ones, padding=keep, **common) for _ in range(stages - 1)
        ]
        super().__init__(*sets)
        self.gain = gain
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each factor by its own fan-in (channels, rows, columns), so that a chain of them keeps the variance.

        The usual rule, a third of that for each factor, would take it to 1/3^6 in two sets. Vectors along rows and
        columns have length one: of their few taps a draw alone would leave some channels many times louder than others.
        """
        for number, part in enumerate(self._sets()):
            for conv in part:
                nn.init.zeros_(conv.bias)
                nn.init.normal_(conv.weight)
                with torch.no_grad():
                    if conv is part[0]:
                        conv.weight.mul_(math.sqrt((self.gain if number == 0 else 1.0) / conv.weight[0].numel()))
                    else:
                        conv.weight.div_(conv.weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (conv.weight.ndim - 1)))

    def settings(self) -> dict[str, Any]:
        """What `FlattenedConv(**settings)` rebuilds it from."""
        lateral = self._sets()[0][0]
        return {"in_channels": lateral.in_channels, "out_channels": lateral.out_channels, **self._settings}

    def kernel(self, stage: int = 0) -> Float[Tensor, "filters channels *kernel"]:
        """The dense kernel of one set: for each filter the outer product of its vectors, in float64."""
        vectors = [conv.weight.detach().double().flatten(1) for conv in self._sets()[stage]]
        made = outer(torch.ones_like(vectors[0][:, 0]), vectors)
        return made.reshape(*made.shape[:2], *self._settings["kernel_size"])

    @torch.no_grad()
    def fit(self, kernel: Float[Tensor, "filters channels *kernel"], bias: Tensor | None = None) -> float:
        """Start from a trained kernel: the first set gets the nearest filter of rank one for each, the others copy.

        Returns:
            The relative Frobenius error.
        """
        first, *others = self._sets()
        lines = kernel.double().reshape(*kernel.shape[:2], *(taps for taps in kernel.shape[2:] if taps > 1))
        scale, vectors = rank_one(lines)
        # The lateral weights carry the scale: vectors of length one along the others keep the variance.
        for conv, vector in zip(first, [scale[:, None] * vectors[0], *vectors[1:]], strict=True):
            conv.weight.copy_(vector.reshape(conv.weight.shape))
        for part in others:
            _copy_maps(part)
        for conv in (conv for part in (first, *others) for conv in part):
            conv.bias.zero_()
        if bias is not None:
            first[-1].bias.copy_(bias)
        return float((outer(scale, vectors) - lines).norm() / lines.norm().clamp(min=1e-300))

    def _sets(self) -> list[list[Any]]:
        """The convolutions of each set, the lateral one first."""
        kinds = tuple(CONVOLUTIONS.values())
        return [[layer for layer in part.children() if isinstance(layer, kinds)] for part in self.children()]


def _set(
    inputs: int,
    outputs: int,
    kernel: tuple[int, ...],
    *,
    stride: Sequence[int],
    padding: Sequence[int | None],
    dilation: Sequence[int],
    groups: int,
    padding_mode: Any,
) -> nn.Sequential:
    """Lateral, vertical, horizontal. A dimension along which the kernel does not extend is the lateral one's."""
    convolution, dimensions = CONVOLUTIONS[len(kernel)], range(len(kernel))

    def alone(values: Sequence[Any], axes: Sequence[int], other: int) -> Any:
        return tuple(values[axis] if axis in axes else other for axis in dimensions)

    lines = [axis for axis in dimensions if kernel[axis] > 1]
    flat = [axis for axis in dimensions if kernel[axis] == 1]
    pads = [0 if side is None else side for side in padding]
    lateral = convolution(
        inputs,
        outputs,
        1,
        stride=alone(stride, flat, 1),
        padding=alone(pads, flat, 0),
        groups=groups,
        padding_mode=padding_mode,
    )
    layers: list[nn.Module] = [lateral]
    for axis in lines:
        missing = dilation[axis] * (kernel[axis] - 1)
        if padding[axis] is None and missing % 2:
            # An even kernel wants one more after than before. Constant padding counts from the last dimension.
            sides = [(missing // 2, missing - missing // 2) if other == axis else (0, 0) for other in dimensions]
            layers.append(_PADDED[len(kernel)](tuple(side for pair in reversed(sides) for side in pair), 0.0))
            pads[axis] = 0
        elif padding[axis] is None:
            pads[axis] = missing // 2
        line = convolution(
            outputs,
            outputs,
            alone(kernel, [axis], 1),
            stride=alone(stride, [axis], 1),
            padding=alone(pads, [axis], 0),
            dilation=alone(dilation, [axis], 1),
            groups=outputs,
            padding_mode=padding_mode,
        )
        layers.append(line)
    return nn.Sequential(*layers)


def _copy_maps(part: Sequence[Any]) -> None:
    """Weights with which a set gives what it is given: each filter takes its own channel, at the middle tap."""
    lateral, *lines = part
    each = lateral.weight.shape[1]
    lateral.weight.zero_()
    lateral.weight.flatten(1)[torch.arange(lateral.out_channels), torch.arange(lateral.out_channels) % each] = 1.0
    for line in lines:
        taps = line.weight.flatten(1)
        taps.zero_()
        taps[:, (taps.shape[1] - 1) // 2] = 1.0


def _padding(padding: int | Sequence[int] | str, dimensions: int) -> tuple[int, ...]:
    return each_dimension(0 if isinstance(padding, str) else padding, dimensions)
