"""Unfoldings: a kernel as a matrix, and back.

Every low-rank method looks at the same kernel `[filters, channels, height, width]` through another matrix. One pair of
functions names them all by the dimensions that become rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from karui.errors import require


def unfold(tensor: Float[Tensor, "..."], rows: Sequence[int]) -> Float[Tensor, "rows columns"]:
    """The tensor as a matrix: the dimensions `rows` become its rows, the others its columns, each in their order.

    For a kernel `[filters, channels, height, width]`: `(0,)` gives filters x (channels height width), `(1,)` channels x
    (filters height width), `(1, 2)` (channels height) x (filters width), `(2, 3)` positions x (filters channels).

    Example:
        >>> import torch
        >>> unfold(torch.zeros(8, 3, 5, 5), (1, 2)).shape
        torch.Size([15, 40])
    """
    order = _order(tensor.ndim, rows)
    count = math.prod(tensor.shape[dim] for dim in rows)
    return tensor.permute(order).reshape(count, tensor.numel() // max(count, 1))


def fold(matrix: Float[Tensor, "rows columns"], rows: Sequence[int], shape: Sequence[int]) -> Float[Tensor, "..."]:
    """The tensor of `shape` whose unfolding by `rows` is `matrix`.

    Example:
        >>> import torch
        >>> kernel = torch.randn(8, 3, 5, 5)
        >>> torch.equal(fold(unfold(kernel, (1, 2)), (1, 2), kernel.shape), kernel)
        True
    """
    order = _order(len(shape), rows)
    inverse = [order.index(dim) for dim in range(len(shape))]
    return matrix.reshape([shape[dim] for dim in order]).permute(inverse)


def split_groups(
    weight: Float[Tensor, "filters channels *kernel"], groups: int
) -> Float[Tensor, "groups each channels *kernel"]:
    """The kernel of a grouped convolution, one block a group: a decomposition treats each as a kernel of its own."""
    return weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])


def _order(dims: int, rows: Sequence[int]) -> list[int]:
    known = len(set(rows)) == len(rows) and all(0 <= dim < dims for dim in rows)
    require(known, f"rows is {tuple(rows)}; give different dimensions of the {dims} of the tensor, counted from 0")
    return [*rows, *(dim for dim in range(dims) if dim not in rows)]
