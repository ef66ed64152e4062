"""A kernel split over space by alternation: conjugate gradients on one factor, then on the other (survey 13)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from karui.numerics.unfold import unfold


def alternating_split(
    kernels: Float[Tensor, "groups filters channels tall *wide"], rank: int, *, sweeps: int = 60, steps: int = 10
) -> tuple[Float[Tensor, "groups rank channels tall"], Float[Tensor, "groups filters rank *wide"]]:
    """`sum_k vertical[k, c, i] horizontal[n, k, j]` for each kernel, from seeded random factors.

    Each factor is a least-squares problem while the other stands; `steps` steps of conjugate gradients bring it
    nearer to its solution.
    """
    filters, channels, tall = kernels.shape[1:4]
    wide = kernels.shape[4:]
    generator = torch.Generator().manual_seed(0)
    vertical, horizontal = [], []
    for kernel in kernels.double():
        matrix = unfold(kernel, (1, 2))
        left = torch.randn(len(matrix), rank, generator=generator, dtype=torch.float64)
        right = torch.zeros(rank, matrix.shape[1], dtype=torch.float64)
        for _ in range(sweeps):
            right = _conjugate_gradients(left.T @ left, left.T @ matrix, right, steps)
            left = _conjugate_gradients(right @ right.T, right @ matrix.T, left.T, steps).T
        vertical.append(left.T.reshape(rank, channels, tall))
        horizontal.append(right.reshape(rank, filters, *wide).transpose(0, 1))
    return torch.stack(vertical), torch.stack(horizontal)


def _conjugate_gradients(
    gram: Float[Tensor, "rank rank"], wanted: Float[Tensor, "rank columns"], start: Tensor, steps: int
) -> Float[Tensor, "rank columns"]:
    """A few steps towards `gram x = wanted`, all columns as one problem."""
    x, rest = start, wanted - gram @ start
    direction, size = rest, float(rest.square().sum())
    least = 1e-24 * max(float(wanted.square().sum()), 1e-300)
    for _ in range(steps):
        if size <= least:
            break
        turned = gram @ direction
        step = size / float((direction * turned).sum())
        x, rest = x + step * direction, rest - step * turned
        size, before = float(rest.square().sum()), size
        direction = rest + size / before * direction
    return x
