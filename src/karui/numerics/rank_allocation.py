"""Ranks for many layers at once under one budget: the product of the kept energies, by greedy removal."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from karui.errors import require


@dataclass(frozen=True)
class Spectrum:
    """One layer: the energy of each direction, falling, and what a direction costs.

    Settings:
        energies: eigenvalues of the covariance of its responses.
        unit: cost of one direction, in the unit of the budget.
        dense: cost of the layer as it is, which it never exceeds.
    """

    energies: Float[Tensor, "directions"]
    unit: float
    dense: float

    def cost(self, rank: int) -> float:
        """Of the layer at this rank; at ranks that would not save, it is left as it is."""
        return min(self.dense, rank * self.unit)


def greedy_ranks(spectra: Sequence[Spectrum], budget: float) -> tuple[int, ...]:
    """The ranks that keep the product of the layers' energies large at a total cost within the budget.

    All start at their full rank. Each move takes the last direction of the layer in which its share of the energy
    that is kept, divided by what the direction costs, is smallest (survey 16, section 3.4), until the budget holds.

    Raises:
        SettingError: rank 1 everywhere costs more.

    Example:
        >>> flat, steep = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([9.0, 0.1, 0.1])
        >>> greedy_ranks([Spectrum(flat, 1, 3), Spectrum(steep, 1, 3)], budget=4)
        (3, 1)
    """
    ranks = [len(spectrum.energies) for spectrum in spectra]
    least = sum(spectrum.cost(1) for spectrum in spectra)
    require(least <= budget, f"the budget is {budget:,.0f}, and rank 1 everywhere costs {least:,.0f}")
    held = [spectrum.energies.double().clamp(min=0).cumsum(0).tolist() for spectrum in spectra]
    total = sum(spectrum.cost(rank) for spectrum, rank in zip(spectra, ranks, strict=True))

    worth = _worth(spectra, held)
    queue = [(worth(place, rank), place) for place, rank in enumerate(ranks) if rank > 1]
    heapq.heapify(queue)
    # Rounding in the running total must not take one direction more than an exact sum would.
    while total > budget * (1 + 1e-12):
        _, place = heapq.heappop(queue)
        spectrum = spectra[place]
        total += spectrum.cost(ranks[place] - 1) - spectrum.cost(ranks[place])
        ranks[place] -= 1
        if ranks[place] > 1:
            heapq.heappush(queue, (worth(place, ranks[place]), place))
    return tuple(ranks)


def _worth(spectra: Sequence[Spectrum], held: Sequence[Sequence[float]]) -> Callable[[int, int], float]:
    """The relative loss of energy, for each unit of cost, when a layer of this rank gives up its last direction."""

    def worth(place: int, rank: int) -> float:
        kept, rest = held[place][rank - 1], held[place][rank - 2]
        return (kept - rest) / max(kept, 1e-300) / spectra[place].unit

    return worth


def product_of_energies(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> float:
    """The share of the largest possible product of energies that these ranks keep."""
    shares = [
        spectrum.energies[:rank].sum() / spectrum.energies.sum() for spectrum, rank in zip(spectra, ranks, strict=True)
    ]
    return float(torch.stack(shares).double().prod())
