"""Where each position of a kernel lies over the input of a convolution, for layers that look maps up instead."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from karui.layers.factored import CONVOLUTIONS
from karui.numerics.columns import made, window


class Windows:
    """The geometry of a convolution.

    Settings:
        settings: of a convolution in as many dimensions as its `kernel_size` has.

    Example:
        >>> import torch
        >>> windows = Windows({"in_channels": 1, "out_channels": 1, "kernel_size": (3, 3), "padding": 1, "stride": 2})
        >>> padded = windows.padded(torch.zeros(1, 1, 5, 5))
        >>> [tuple(padded[windows.at(tap, padded.shape[2:])].shape) for tap in (0, 8)]
        [(1, 1, 3, 3), (1, 1, 3, 3)]
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        told: Any = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
        conv = CONVOLUTIONS[len(told["kernel_size"])](**{**told, "device": "meta"})
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        # Both sides of each dimension, last dimension first, as `pad` takes them; torch keeps them so for every mode.
        self.around = tuple(conv._reversed_padding_repeated_twice)  # noqa: SLF001

    @property
    def taps(self) -> int:
        """Positions of the kernel."""
        return math.prod(self.kernel_size)

    def padded(self, input: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels *wider"]:  # noqa: A002
        """The input with what the convolution puts around it."""
        return functional.pad(input, self.around, mode=self.mode) if any(self.around) else input

    def made(self, space: Sequence[int]) -> list[int]:
        """Sizes in space of the output, for a padded input of these sizes."""
        return made(space, self.kernel_size, self.stride, self.dilation)

    def at(self, tap: int, space: Sequence[int]) -> tuple[slice, ...]:
        """What one position of the kernel sees of a padded input, for all outputs; row by row, as kernels are flat."""
        return (slice(None), slice(None), *window(tap, space, self.kernel_size, self.stride, self.dilation))
