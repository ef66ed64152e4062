"""Selections keep exact counts and nest."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from karui.numerics.selection import keep_above, keep_largest, keep_largest_overall, rearranged, threshold


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(0, 50), st.booleans())
def test_exactly_the_count_and_never_a_larger_one_dropped(seed: int, size: int, count: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(size, generator=generator)
    scores = scores.round() if ties else scores
    alive = torch.rand(size, generator=generator) < 0.7
    kept = keep_largest(scores, alive, count)
    assert int(kept.sum()) == min(count, int(alive.sum()))
    assert not (kept & ~alive).any()
    dropped = alive & ~kept
    if kept.any() and dropped.any():
        assert scores[kept].min() >= scores[dropped].max()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 60))
def test_overall_ranking_spares_every_layer(seed: int, sizes: list[int], count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.rand(size, generator=generator) * 10**i for i, size in enumerate(sizes)}
    alive = {name: ones(*score.shape) for name, score in scores.items()}
    kept = keep_largest_overall(scores, alive, count)
    assert all(mask.any() for mask in kept.values())
    assert sum(int(mask.sum()) for mask in kept.values()) == min(max(count, len(sizes)), sum(sizes))
    for name, mask in kept.items():
        assert mask[scores[name].argmax()]


def test_overall_ranking_is_that_of_all_entries_where_no_layer_is_empty() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(5, 4, generator=generator), "b": torch.rand(3, generator=generator)}
    kept = keep_largest_overall(scores, {name: ones(*score.shape) for name, score in scores.items()}, 10)
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    limit = flat.sort(descending=True).values[9]
    assert all(torch.equal(kept[name], scores[name] >= limit) for name in scores)


@pytest.mark.paper(63)
def test_threshold_is_quality_times_deviation_of_survivors_only() -> None:
    weight = torch.randn(30, 20, generator=torch.Generator().manual_seed(0))
    alive = weight.abs() > 0.5
    pruned = weight.masked_fill(~alive, 0.0)
    assert threshold(weight, ones(30, 20), 0.7) == pytest.approx(0.7 * float(weight.std()))
    assert threshold(pruned, alive, 0.7) == pytest.approx(0.7 * float(weight[alive].std()))
    assert threshold(pruned, alive, 0.7) > threshold(pruned, ones(30, 20), 0.7)
    assert torch.equal(keep_above(weight, ones(30, 20), 0.7), weight.abs() >= 0.7 * weight.std())
    assert threshold(weight[:1, :1], ones(1, 1), 0.7) == 0.0


@pytest.mark.paper(63)
def test_threshold_is_monotone_and_masks_nest() -> None:
    weight = torch.randn(500, generator=torch.Generator().manual_seed(0))
    masks = [keep_above(weight, ones(500), q) for q in (0.0, 0.3, 0.6, 1.2, 2.4)]
    assert masks[0].all()
    for wider, narrower in itertools.pairwise(masks):
        assert not (narrower & ~wider).any()
        assert narrower.sum() < wider.sum()


@pytest.mark.paper(66)
def test_rearranged_keeps_the_count_and_moves_places() -> None:
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[:5] = True
    moved = rearranged(mask, torch.Generator().manual_seed(1))
    assert moved.shape == mask.shape
    assert int(moved.sum()) == int(mask.sum())
    assert not torch.equal(moved, mask)
    assert torch.equal(moved, rearranged(mask, torch.Generator().manual_seed(1)))
