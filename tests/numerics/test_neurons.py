"""One-neuron descriptors, and the selection by energy."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.stats import f_oneway

from karui.numerics.neurons import anova_f, energy, free_energy, likeness, mean_field, one_neuron_auc, sweep

pytestmark = pytest.mark.paper(32)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_area_is_that_of_all_pairs_and_needs_no_scale() -> None:
    values = torch.randint(0, 6, (40, 5), generator=draw(0)).double()
    positive = torch.rand(40, 3, generator=draw(1)) < 0.4
    area = one_neuron_auc(values, positive)
    for neuron, attribute in itertools.product(range(5), range(3)):
        yes, no = values[positive[:, attribute], neuron], values[~positive[:, attribute], neuron]
        by_hand = float(((yes[:, None] > no).double() + 0.5 * (yes[:, None] == no).double()).mean())
        assert float(area[neuron, attribute]) == pytest.approx(max(by_hand, 1 - by_hand))
    assert torch.equal(one_neuron_auc(values * 7 + 3, positive), area)
    torch.testing.assert_close(one_neuron_auc(-values, positive), area, msg="inhibition counts as much")
    nobody = torch.zeros(40, 1, dtype=torch.bool)
    assert one_neuron_auc(values, nobody).tolist() == [[0.5]] * 5


def test_the_analysis_of_variance_is_that_of_scipy() -> None:
    values, classes = torch.randn(30, 4, generator=draw(0)), torch.arange(30) % 3
    values[:, 1] += classes
    wanted = [f_oneway(*(values[classes == c, i].numpy() for c in range(3))).statistic for i in range(4)]
    torch.testing.assert_close(anova_f(values, classes), torch.tensor(wanted).double(), rtol=1e-5, atol=1e-6)
    assert anova_f(torch.ones(6, 1), torch.arange(6) % 2).item() == 0


def random_problem(neurons: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    descriptors = torch.rand(neurons, 3, generator=draw(seed), dtype=torch.float64)
    return torch.randn(neurons, generator=draw(seed + 1), dtype=torch.float64) * 0.3, likeness(descriptors, 0.3)


def test_without_pairs_it_keeps_just_the_neurons_of_negative_cost() -> None:
    cost, alike = random_problem(20, 0)
    assert torch.equal(mean_field(cost, alike, 0.0) > 0.5, cost < 0)


@pytest.mark.parametrize("seed", range(6))
def test_two_identical_neurons_are_never_both_kept_at_a_large_weight(seed: int) -> None:
    descriptors = torch.rand(8, 3, generator=draw(seed), dtype=torch.float64)
    twins = torch.cat([descriptors, descriptors])
    cost = -torch.rand(8, generator=draw(seed + 9), dtype=torch.float64).repeat(2)
    kept = mean_field(cost, likeness(twins, 0.05), 20.0) > 0.5
    assert not bool((kept[:8] & kept[8:]).any())
    assert int(kept.sum()) >= 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.01])
def test_no_update_raises_the_free_energy(seed: int, temperature: float) -> None:
    cost, alike = random_problem(15, seed)
    q = torch.rand(15, generator=draw(seed + 5), dtype=torch.float64)
    before = free_energy(q, cost, alike, 0.5, temperature)
    for _ in range(10):
        q = sweep(q, cost, alike, 0.5, temperature)
        after = free_energy(q, cost, alike, 0.5, temperature)
        assert after <= before + 1e-9
        before = after


def test_the_energy_found_is_near_the_least_of_all_sets() -> None:
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=10))).double()
    for seed in range(12):
        cost, alike = random_problem(10, seed)
        least = float(energy(sets, cost, alike, 0.2).min())
        found = float(energy((mean_field(cost, alike, 0.2) > 0.5).double(), cost, alike, 0.2))
        assert found <= least + 0.05 * abs(least), (seed, found, least)
