"""Kernels split over space in two: the closed form, and what the two convolutions cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from karui.lowrank._scan import Seen, groups_of
from karui.numerics.svd import truncated_svd
from karui.numerics.unfold import fold, unfold

_ROWS = (1, 2)


def split_kernels(
    kernels: Float[Tensor, "groups filters channels tall *wide"], rank: int
) -> tuple[Float[Tensor, "groups rank channels tall"], Float[Tensor, "groups filters rank *wide"]]:
    """The best `sum_k vertical[k, c, i] horizontal[n, k, j]` for each group's kernel, in the Frobenius norm.

    Along (channels, tall) against (filters, wide) the kernel is a matrix, and the sum its factorisation of that rank:
    the truncated SVD is the global optimum (Tai et al. 2016, survey 22). Singular values go to both factors alike.
    """
    filters, channels, tall = kernels.shape[1:4]
    wide = kernels.shape[4:]
    vertical, horizontal = [], []
    for kernel in kernels:
        left, right = truncated_svd(unfold(kernel, _ROWS), rank).factors(balanced=True)
        vertical.append(left.T.reshape(rank, channels, tall))
        horizontal.append(right.reshape(rank, filters, *wide).transpose(0, 1))
    return torch.stack(vertical), torch.stack(horizontal)


def joined_kernels(
    vertical: Float[Tensor, "groups rank channels tall"], horizontal: Float[Tensor, "groups filters rank *wide"]
) -> Float[Tensor, "groups filters channels tall *wide"]:
    """The kernels that two such factors stand for."""
    rank = vertical.shape[1]
    matrices = vertical.flatten(2).transpose(1, 2) @ horizontal.transpose(1, 2).reshape(len(vertical), rank, -1)
    shape = (horizontal.shape[1], *vertical.shape[2:], *horizontal.shape[3:])
    return torch.stack([fold(matrix, _ROWS, shape) for matrix in matrices])


def split_full(channels: int, filters: int, kernel: Sequence[int]) -> int:
    """The rank at which the split is exact; 0 for a kernel that has no two dimensions of space to part."""
    if len(kernel) < 2 or kernel[0] == 1 or math.prod(kernel[1:]) == 1:
        return 0
    return min(channels * kernel[0], filters * math.prod(kernel[1:]))


def split_rank(channels: int, filters: int, kernel: Sequence[int], share: float) -> int:
    """The largest rank whose factors hold at most `share` of the kernel's numbers, at least 1."""
    unit = channels * kernel[0] + filters * math.prod(kernel[1:])
    room = math.floor(share * filters * channels * math.prod(kernel) / unit + 1e-9)
    return min(max(1, room), split_full(channels, filters, kernel))


def split_cost(one: Seen, rank: int, filters: int) -> tuple[int, int]:
    """(parameters, multiply-adds) of the two convolutions, to `filters` maps in each group.

    The vertical one moves along the first dimension of space only: it sees the input's other positions, strided or not.
    """
    channels, kernel = one.layer.weight.shape[1], one.layer.kernel_size
    tall, wide = groups_of(one) * rank * channels * kernel[0], groups_of(one) * rank * filters * math.prod(kernel[1:])
    return tall + wide, tall * one.between(1) + wide * one.outputs
