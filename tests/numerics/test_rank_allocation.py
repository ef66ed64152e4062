"""Greedy ranks (survey 16, section 3.4): within the budget, by the smallest loss for its cost at each move."""

from __future__ import annotations

import itertools

import pytest
import torch

from karui.errors import SettingError
from karui.numerics.rank_allocation import Spectrum, greedy_ranks, product_of_energies

pytestmark = pytest.mark.paper(16)


def spectra(seed: int = 0, layers: int = 3, size: int = 8) -> list[Spectrum]:
    torch.manual_seed(seed)
    made = []
    for _ in range(layers):
        energies = torch.rand(size).pow(float(1 + 5 * torch.rand(()))).sort(descending=True).values
        unit = float(torch.randint(2, 9, ()))
        made.append(Spectrum(energies, unit, unit * size))
    return made


def cost(found: list[Spectrum], ranks: tuple[int, ...]) -> float:
    return sum(one.cost(rank) for one, rank in zip(found, ranks, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_budgets_hold_and_each_move_takes_the_smallest_loss_for_its_cost(seed: int) -> None:
    found = spectra(seed)
    whole = cost(found, (8, 8, 8))
    path = [greedy_ranks(found, whole * share / 400) for share in range(400, 70, -1)]
    moves = [ranks for ranks, _ in itertools.groupby(path)]
    assert moves[0] == (8, 8, 8)
    for before, after in itertools.pairwise(moves):
        (place,) = [place for place in range(3) if before[place] != after[place]]
        assert before[place] - after[place] == 1
        losses = {}
        for layer, rank in enumerate(before):
            energies = found[layer].energies.double()
            if rank > 1:
                losses[layer] = float(energies[rank - 1] / energies[:rank].sum()) / found[layer].unit
        assert place == min(losses, key=lambda layer: losses[layer])
    for share, ranks in zip(range(400, 70, -1), path, strict=True):
        assert cost(found, ranks) <= whole * share / 400 * (1 + 1e-9)


def test_equal_layers_get_equal_ranks() -> None:
    one = spectra(3)[0]
    ranks = greedy_ranks([one] * 4, cost([one] * 4, (8,) * 4) * 0.47)
    assert max(ranks) - min(ranks) <= 1


def test_the_product_is_near_the_best_of_all_ranks() -> None:
    found = spectra(1)
    budget = 0.5 * cost(found, (8, 8, 8))
    ranks = greedy_ranks(found, budget)
    all_of_them = itertools.product(range(1, 9), repeat=3)
    best = max(product_of_energies(found, other) for other in all_of_them if cost(found, other) <= budget)
    assert product_of_energies(found, ranks) >= 0.95 * best


def test_a_layer_never_costs_more_than_it_does_as_it_is() -> None:
    one = Spectrum(torch.ones(8), 2.0, 10.0)
    assert [one.cost(rank) for rank in (8, 5, 4)] == [10.0, 10.0, 8.0]
    assert greedy_ranks([one], 10.0) == (8,)


def test_what_cannot_be_met_is_told() -> None:
    with pytest.raises(SettingError, match="rank 1 everywhere costs"):
        greedy_ranks(spectra(), 1.0)
