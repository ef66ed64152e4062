"""Biclusters of a kernel: filters and channels in groups of equal size, and a low-rank form of each pair of groups.

Denton et al. 2014 (survey 18), section 3.2.2. The factors are those of `karui.layers.biclustered.pairs_kernel`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from karui.numerics.clusters import kmeans
from karui.numerics.cp_als import greedy_batch
from karui.numerics.cp_fit import cp
from karui.numerics.svd import truncated_svd


@dataclass(frozen=True)
class Grid:
    """Which filters and which channels go together.

    Settings:
        rows: filters, a line for each of their groups.
        columns: channels, a line for each of their groups.
    """

    rows: Int[Tensor, "out_groups filters"]
    columns: Int[Tensor, "in_groups channels"]

    def blocks(self, kernel: Float[Tensor, "filters channels taps"]) -> Float[Tensor, "in_groups out_groups n c taps"]:
        """The kernel of each pair of groups."""
        return kernel[self.rows][:, :, self.columns].permute(2, 0, 1, 3, 4)

    def sorted(self, kernel: Float[Tensor, "filters channels taps"]) -> Float[Tensor, "filters channels taps"]:
        """The kernel with filters and channels sorted by group."""
        return kernel[self.rows.flatten()][:, self.columns.flatten()]


def grid_of(
    kernel: Float[Tensor, "filters channels taps"],
    in_groups: int,
    out_groups: int,
    *,
    restarts: int = 10,
    seed: int = 0,
) -> Grid:
    """Filters that are alike, and channels that are used alike, in groups of equal size.

    Example:
        >>> kernel = torch.tensor([1.0, 5.0, 1.1, 5.2]).reshape(4, 1, 1)
        >>> sorted(grid_of(kernel, 1, 2).rows.tolist())
        [[0, 2], [1, 3]]
    """
    rows = kmeans(kernel.flatten(1), out_groups, even=True, restarts=restarts, seed=seed)
    columns = kmeans(kernel.transpose(0, 1).flatten(1), in_groups, even=True, restarts=restarts, seed=seed)
    return Grid(rows.order().reshape(out_groups, -1), columns.order().reshape(in_groups, -1))


def outer_products(
    blocks: Float[Tensor, "in_groups out_groups n c taps"], terms: int, *, solver: str = "greedy", sweeps: int = 64
) -> list[Tensor]:
    """Each block as a sum of `terms` outer products: by greedy deflation (the paper) or in turns ("als")."""
    flat = blocks.double().flatten(0, 1)
    if solver == "greedy":
        found = greedy_batch(flat, terms, sweeps=sweeps)
    else:
        found = [cp(block, terms, solver="als", sweeps=sweeps, ridge=1e-6) for block in flat]
    filters, channels, taps = (torch.stack([one.factors[mode] for one in found]) for mode in range(3))
    pairs = blocks.shape[:2]
    return [
        channels.mT.unflatten(0, pairs),
        taps.mT.unflatten(0, pairs),
        filters.unflatten(0, pairs).permute(1, 2, 0, 3),
    ]


def two_svds(blocks: Float[Tensor, "in_groups out_groups n c taps"], rank_in: int, rank_out: int) -> list[Tensor]:
    """Each block by an SVD cut to `rank_out` directions of filters, then one of the rest cut to `rank_in`."""
    count, channels, taps = blocks.shape[2:]
    narrow, core, widen = [], [], []
    for block in blocks.double().flatten(0, 1):
        left, right = truncated_svd(block.reshape(count, channels * taps), rank_out).factors()
        rest = right.reshape(rank_out, channels, taps).transpose(0, 1).reshape(channels, rank_out * taps)
        inner, outer = truncated_svd(rest, rank_in).factors()
        narrow.append(inner.T)
        core.append(outer.reshape(rank_in, rank_out, taps).transpose(0, 1))
        widen.append(left)
    pairs = blocks.shape[:2]
    told = [torch.stack(parts).unflatten(0, pairs) for parts in (narrow, core, widen)]
    return [told[0], told[1], told[2].permute(1, 2, 0, 3)]
