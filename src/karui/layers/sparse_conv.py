"""Convolutions of torch that leave out zeros where they can: for weights most of which are zero.

They are torch's in everything else: parameters, settings, gradients, export. In evaluation mode, without gradients and
in single precision on the CPU they take the kernel of `karui.numerics.sparse_conv`, if numba is installed and few
enough entries are left; everywhere else, and in exported files, zeros are multiplied.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.layers.factored import conv_settings
from karui.layers.windows import Windows
from karui.numerics.columns import Geometry
from karui.numerics.kernels import serves
from karui.numerics.sparse_conv import Entries, entries_of, sparse_conv

KERNEL_SHARE = 0.3
"""Share of entries that are not zero up to which the kernel is taken; at 0.35 it has gained 1.2 times at most."""


class _LeavesOutZeros(nn.modules.conv._ConvNd):  # noqa: SLF001
    """What the three classes share; their other base is the convolution of torch."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._known: tuple[np.ndarray, Entries, Windows] | None = None

    def forward(self: Any, input: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch filters *made"]:  # noqa: A002
        """The convolution."""
        weight = self.weight
        traced = self.training or torch.compiler.is_compiling()
        if traced or input.ndim != weight.ndim or not serves(input, weight):
            return super().forward(input)
        entries, windows = self._found(weight)
        if entries.share > KERNEL_SHARE:
            return super().forward(input)
        geometry = Geometry(windows.kernel_size, windows.stride, windows.dilation)
        made = sparse_conv(windows.padded(input), entries, geometry)
        return made if self.bias is None else made.add_(self.bias.detach().reshape(-1, *[1] * (made.ndim - 2)))

    def _found(self: Any, weight: Tensor) -> tuple[Entries, Windows]:
        """What is left of the weight; found anew when the weight has changed.

        Its values are compared, since torch counts no change that is made through `weight.data`; by numpy, which is
        five times as fast at that.
        """
        values = weight.detach().numpy()
        if self._known is None or not np.array_equal(self._known[0], values):
            self._known = values.copy(), entries_of(weight, self.groups), Windows(conv_settings(self))
        return self._known[1:]


class SparseConv1d(_LeavesOutZeros, nn.Conv1d):
    """`torch.nn.Conv1d` that leaves out zeros where it can."""


class SparseConv2d(_LeavesOutZeros, nn.Conv2d):
    """`torch.nn.Conv2d` that leaves out zeros where it can.

    Example:
        >>> layer = SparseConv2d(4, 8, 3).eval()
        >>> with torch.no_grad():
        ...     layer.weight[:, 1:] = 0
        ...     layer(torch.zeros(1, 4, 5, 5)).shape
        torch.Size([1, 8, 3, 3])
    """


class SparseConv3d(_LeavesOutZeros, nn.Conv3d):
    """`torch.nn.Conv3d` that leaves out zeros where it can."""


SPARSE_CONVOLUTIONS: dict[int, Any] = {1: SparseConv1d, 2: SparseConv2d, 3: SparseConv3d}
"""By dimensions of space."""
