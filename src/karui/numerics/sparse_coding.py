"""Convolutional sparse coding: filters such that few places of few of them make up a picture.

`min sum_i ||x_i - sum_j s_j * m_ij||^2 / 2 + sparsity sum |m_ij| + flatness sum_j ||s_j||_*` (survey 14). With
`flatness` 0 it learns a bank of free filters; with more, separable ones from the start.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from karui.errors import require
from karui.numerics.proximal import shrink, shrink_singular_values

_CONVOLUTIONS = {2: functional.conv2d, 3: functional.conv3d}


def learn_filters(
    pictures: Float[Tensor, "pictures *space"],
    count: int,
    taps: tuple[int, ...],
    *,
    sparsity: float = 0.3,
    flatness: float = 0.0,
    rounds: int = 60,
    steps: int = 15,
    seed: int = 0,
) -> Float[Tensor, "filters *taps"]:
    """Filters of length 1 by turns: sparse maps by iterative shrinkage, then a step on the filters.

    Args:
        pictures: of one channel, in two or three dimensions.
        count: how many filters.
        taps: their size.
        sparsity: weight of the maps' absolute values, as share of the pictures' standard deviation.
        flatness: how much the singular values of a filter of length 1 fall at each step; it grows to this over the
            rounds.
        rounds: turns, each on a random eighth of the pictures.
        steps: of iterative shrinkage in each turn.
        seed: of the first filters and of the draws.

    Example:
        >>> learn_filters(torch.rand(16, 12, 12), 4, (3, 3), rounds=3).shape
        torch.Size([4, 3, 3])
    """
    require(len(taps) in _CONVOLUTIONS, f"taps is {taps}; give the size of a filter in two or three dimensions")
    pictures = pictures.float()  # torch convolves numbers of twice the length many times slower
    pictures = (pictures - pictures.mean()) / pictures.std().clamp(min=1e-12)
    generator = torch.Generator().manual_seed(seed)
    filters = _unit(torch.randn(count, *taps, generator=generator))
    batch = max(1, len(pictures) // 8)
    for turn in range(rounds):
        chosen = pictures[torch.randperm(len(pictures), generator=generator)[:batch]].unsqueeze(1)
        maps = sparse_maps(chosen, filters, sparsity, steps)
        rest = _joined(maps, filters) - chosen
        moved = filters - _gradient(maps, rest, filters) / _curvature(maps)
        if flatness:
            threshold = flatness * (turn + 1) / rounds
            for dim in range(1 if len(taps) == 2 else len(taps)):
                unfolded = moved.movedim(1 + dim, 1)
                shrunk = shrink_singular_values(unfolded.flatten(2), threshold).reshape(unfolded.shape)
                moved = shrunk.movedim(1, 1 + dim)
        alive = moved.flatten(1).norm(dim=1) > 1e-9
        filters = torch.where(alive.reshape(-1, *[1] * len(taps)), _unit(moved), filters)
    return filters.double()


def sparse_maps(
    pictures: Float[Tensor, "pictures 1 *space"], filters: Float[Tensor, "filters *taps"], sparsity: float, steps: int
) -> Float[Tensor, "pictures filters *space"]:
    """Maps of few places for given filters, by iterative shrinkage from zero."""
    maps = torch.zeros(len(pictures), len(filters), *pictures.shape[2:], dtype=pictures.dtype)
    step = 1 / _largest_response(filters, pictures.shape[2:])
    for _ in range(steps):
        maps = shrink(maps - step * _correlated(_joined(maps, filters) - pictures, filters), step * sparsity)
    return maps


def _joined(maps: Tensor, filters: Tensor) -> Float[Tensor, "pictures 1 *space"]:
    """The sum of all maps, each convolved with its filter, at the pictures' size."""
    return _CONVOLUTIONS[filters.ndim - 1](_padded(maps, filters), filters.unsqueeze(0))


def _correlated(rest: Tensor, filters: Tensor) -> Float[Tensor, "pictures filters *space"]:
    """The adjoint of `_joined` for the maps."""
    flipped = filters.flip(list(range(1, filters.ndim)))
    return _CONVOLUTIONS[filters.ndim - 1](_padded(rest, filters, adjoint=True), flipped.unsqueeze(1))


def _gradient(maps: Tensor, rest: Tensor, filters: Tensor) -> Tensor:
    """Of half the squared error, for the filters: each map against the residual, at every shift."""
    turned = _padded(maps, filters).transpose(0, 1)
    return _CONVOLUTIONS[filters.ndim - 1](turned, rest.transpose(0, 1)).squeeze(1)


def _curvature(maps: Tensor) -> Tensor:
    """A bound for each filter: its map's energy, with all that its map overlaps."""
    flat = maps.transpose(0, 1).flatten(1)
    total = flat.norm(dim=1) * flat.norm(dim=1).sum()
    return total.clamp(min=1e-9).reshape(-1, *[1] * (maps.ndim - 2))


def _largest_response(filters: Tensor, space: torch.Size) -> float:
    """The largest sum over the filters of squared amplitudes at one frequency: the step's bound."""
    sizes = [max(64 if len(space) == 2 else 24, *space)] * len(space)
    spectra = torch.fft.fftn(filters, s=sizes, dim=list(range(1, filters.ndim)))
    return float(spectra.abs().square().sum(0).max())


def _padded(maps: Tensor, filters: Tensor, *, adjoint: bool = False) -> Tensor:
    """Zeros around, so that sizes stay; of even filters the other side gets more in the adjoint."""
    around: list[int] = []
    for taps in reversed(filters.shape[1:]):
        before, after = (taps - 1) // 2, taps - 1 - (taps - 1) // 2
        around += [after, before] if adjoint else [before, after]
    return functional.pad(maps, around)


def _unit(filters: Tensor) -> Tensor:
    length = filters.flatten(1).norm(dim=1).clamp(min=1e-12)
    return filters / length.reshape(-1, *[1] * (filters.ndim - 1))
