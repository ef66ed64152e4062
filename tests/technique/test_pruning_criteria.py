"""Criteria without data: norms and chance."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import pytest
import torch
from scipy import stats
from torch import nn

from karui.model import Model, coupled_groups
from karui.technique import Bench
from karui.technique.pruning.criteria import L1, ByWeights, Largest, Uniform, l2_norm
from karui.technique.pruning.selection import weakest


def network(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )
    return Model(net, example=(torch.rand(1, 1, 8, 8),))


@pytest.mark.paper(62)
def test_the_score_is_the_sum_of_absolute_weights() -> None:
    model = network()
    scores = L1(model, coupled_groups(model).groups, Bench())
    for name in ("0", "3"):
        torch.testing.assert_close(scores[name], model.module.get_parameter(f"{name}.weight").abs().sum((1, 2, 3)))


@pytest.mark.paper(62)
def test_the_score_ignores_a_filters_sign_and_follows_a_permutation() -> None:
    model = network()
    groups = coupled_groups(model).groups
    before = L1(model, groups, Bench())["3"]
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    weight = model.module.get_parameter("3.weight")
    with torch.no_grad():
        weight[::2] *= -1
        weight.copy_(weight[order])
    torch.testing.assert_close(L1(model, groups, Bench())["3"], before[order])


@pytest.mark.paper(62)
def test_the_largest_go_first_in_the_control() -> None:
    model = network()
    groups = coupled_groups(model).groups
    scores, control = L1(model, groups, Bench())["3"], Largest(L1)(model, groups, Bench())["3"]
    assert set(weakest(control, 3).tolist()) == set(scores.topk(3).indices.tolist())


def test_l2_is_a_criterion_by_the_same_door() -> None:
    model = network()
    scores = ByWeights(l2_norm)(model, coupled_groups(model).groups, Bench())["0"]
    torch.testing.assert_close(scores, model.module.get_parameter("0.weight").flatten(1).norm(dim=1))


@pytest.mark.paper(69)
def test_chance_is_uniform_over_subsets_of_exact_size() -> None:
    model = network()
    group = coupled_groups(model).groups[0]
    drawn = Counter(
        tuple(weakest(Uniform(draw)(model, [group], Bench())[group.name], 2).tolist()) for draw in range(3000)
    )
    subsets = list(combinations(range(group.size), 2))
    assert set(drawn) == set(subsets)
    assert stats.chisquare([drawn[subset] for subset in subsets]).pvalue > 0.001


@pytest.mark.paper(69)
def test_chance_is_fixed_by_seed_and_draw_and_blind_to_weights() -> None:
    one, other = network(0), network(1)
    groups = coupled_groups(one).groups
    draw = Uniform(2)(one, groups, Bench(seed=5))
    again = Uniform(2)(other, groups, Bench(seed=5))
    assert all(torch.equal(draw[name], again[name]) for name in draw)
    assert not torch.equal(draw["0"], Uniform(3)(one, groups, Bench(seed=5))["0"])
    assert not torch.equal(draw["0"], Uniform(2)(one, groups, Bench(seed=6))["0"])
