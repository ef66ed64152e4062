"""Additive models: bins, trees on bins, FAST, purification, and what the boosting recovers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karui.errors import SettingError
from karui.numerics.additive import Boosting, binned, edges_of, fit_additive, tree_on_bins
from karui.numerics.additive_pairs import cross_cut, fast_pairs, purified

pytestmark = pytest.mark.paper(40)


def drawn(samples: int = 1500, inputs: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (samples, inputs)).astype(np.float32)


def explained(told: np.ndarray, wanted: np.ndarray) -> float:
    return float(1 - ((told - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum())


@given(st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=60), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_bins_hold_data_each_and_no_value_is_torn(values: list[float], bins: int) -> None:
    column = np.array(values, dtype=np.float32)
    edges = edges_of(column, bins)
    assert len(edges) < bins
    assert np.all(np.diff(edges) > 0)
    assert len(np.unique(binned(column, edges))) == len(edges) + 1, "no bin is empty"


def test_the_tree_is_the_best_one() -> None:
    """Against every cut, and for three leaves against the best cut after the best cut."""
    rng = np.random.default_rng(1)
    sums, weights = rng.normal(size=(12, 3)) * 4, rng.integers(1, 5, (12, 3)).astype(float)
    told = tree_on_bins(sums, weights, 2, 1.0)
    for column in range(3):
        s, w = sums[:, column], weights[:, column]
        cuts = [(s[:k].sum() ** 2 / w[:k].sum() + s[k:].sum() ** 2 / w[k:].sum(), k) for k in range(1, 12)]
        k = max(cuts)[1]
        expected = np.where(np.arange(12) < k, s[:k].sum() / w[:k].sum(), s[k:].sum() / w[k:].sum())
        np.testing.assert_allclose(told[:, column], expected)
    for leaves in (2, 3, 4):
        assert all(len(np.unique(column)) == leaves for column in tree_on_bins(sums, weights, leaves, 1.0).T)
    assert not tree_on_bins(sums, weights, 3, 1e9).any(), "no leaf may be lighter than allowed"


def test_a_2x2_cut_is_the_best_one() -> None:
    rng = np.random.default_rng(2)
    sums, weights = rng.normal(size=(4, 5, 2)), rng.integers(1, 4, (4, 5, 2)).astype(float)
    value, gain = cross_cut(sums, weights, 1.0)
    for column in range(2):
        best = -1.0
        for a in range(1, 4):
            for b in range(1, 5):
                quarters = [(slice(0, a), slice(0, b)), (slice(0, a), slice(b, 5)), (slice(a, 4), slice(0, b)),
                            (slice(a, 4), slice(b, 5))]  # fmt: skip
                best = max(best, sum(sums[(*q, column)].sum() ** 2 / weights[(*q, column)].sum() for q in quarters))
        assert gain[column] == pytest.approx(best)
        assert (value[..., column] * sums[..., column]).sum() == pytest.approx(best)


def test_an_additive_teacher_is_recovered_without_pairs() -> None:
    x, unseen = drawn(), drawn(seed=9)
    for column in (x, unseen):
        column[:, 3] = np.sign(column[:, 3])  # as a one-hot input
    wanted = [np.stack([np.sin(3 * v[:, 0]) + v[:, 1] ** 2 + v[:, 3], np.exp(v[:, 2])], axis=1) for v in (x, unseen)]
    shapes = fit_additive(x, wanted[0], Boosting(bags=2))
    assert explained(shapes.predict(unseen), wanted[1]) > 0.99
    assert len(shapes.mains[3]) == 2
    rising = shapes.mains[2][:, 1]
    assert np.corrcoef(rising, np.arange(len(rising)))[0, 1] > 0.95
    assert shapes.importance()[:, 1].argmax() == 2


def test_a_product_is_found_by_fast_and_recovered_with_one_pair() -> None:
    x, unseen = drawn(10000), drawn(1000, seed=9)
    wanted = [(0.5 * v[:, :1] + 2 * v[:, 1:2] * v[:, 2:3]).astype(np.float64) for v in (x, unseen)]
    few = Boosting(bags=1, bins=24)
    alone = fit_additive(x, wanted[0], few)
    assert explained(alone.predict(unseen), wanted[1]) < 0.4
    places = [binned(column, edges) for column, edges in zip(x.T, alone.edges, strict=True)]
    ranked = fast_pairs(wanted[0] - alone.predict(x), places, [len(e) + 1 for e in alone.edges])
    assert ranked[0] == (1, 2)
    assert len(ranked) == 10
    paired = fit_additive(x, wanted[0], replace(few, pairs=1))
    assert paired.pairs == ((1, 2),)
    assert explained(paired.predict(unseen), wanted[1]) > 0.98


def test_tables_are_centred_and_pairs_have_no_margins() -> None:
    x = drawn(600)
    x[:, 1] = 0.7 * x[:, 0] + 0.3 * x[:, 1]  # inputs that go together
    y = (x[:, 0] * x[:, 1] + x[:, 2] + 2)[:, None]
    shapes = fit_additive(x, y, Boosting(bags=3, rounds=40, pairs=2))
    for main, weights in zip(shapes.mains, shapes.weights, strict=True):
        np.testing.assert_allclose((weights[:, None] * main).sum(0) / 600, 0, atol=1e-12)
    for (i, j), table in zip(shapes.pairs, shapes.tables, strict=True):
        counts = np.zeros(table.shape[:2])
        np.add.at(counts, (binned(x[:, i], shapes.coarse[i]), binned(x[:, j], shapes.coarse[j])), 1)
        for axis in (0, 1):
            np.testing.assert_allclose((counts[:, :, None] * table).sum(axis), 0, atol=1e-8)
    assert all(band.shape == main.shape for band, main in zip(shapes.bands, shapes.mains, strict=True))


def test_purifying_leaves_the_sum_as_it_is() -> None:
    rng = np.random.default_rng(3)
    table, weights = rng.normal(size=(4, 6, 2)), rng.integers(0, 5, (4, 6)).astype(float)
    pure, first, second = purified(table, weights)
    np.testing.assert_allclose(pure + first[:, None] + second[None], table)
    np.testing.assert_allclose((weights[:, :, None] * pure).sum(0), 0, atol=1e-10)
    np.testing.assert_allclose((weights[:, :, None] * pure).sum(1), 0, atol=1e-10)


def test_tidying_moves_what_belongs_elsewhere_and_changes_no_prediction() -> None:
    """The boosted scores of the training data, before any table was centred, are what the tables add up to."""
    from karui.numerics import additive

    x = drawn(300)
    y = (x[:, 0] * x[:, 1] + x[:, 2])[:, None].astype(np.float64)
    kept = []
    tidied = additive._tidied

    def spy(fit: additive._Fit, *rest: object) -> object:
        kept.append(fit)
        return tidied(fit, *rest)  # pyright: ignore

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(additive, "_tidied", spy)
        shapes = fit_additive(x, y, Boosting(bags=3, rounds=30, pairs=2))
    grown = kept[0].scores.reshape(300, 3, 1).mean(1)
    np.testing.assert_allclose(shapes.predict(x), grown, atol=1e-9)


def test_bands_shrink_with_the_root_of_the_bags_for_pure_noise() -> None:
    x = drawn(300, 1)
    y = np.random.default_rng(5).normal(size=(300, 1))
    few, many = (fit_additive(x, y, Boosting(bags=bags, rounds=30, bins=16)).bands[0].mean() for bags in (16, 256))
    assert few / many == pytest.approx(4.0, rel=0.2)
    repeated = np.stack(
        [fit_additive(x, y, Boosting(bags=16, rounds=30, bins=16), seed).mains[0] for seed in range(20)]
    )
    assert repeated.std(0, ddof=1).mean() == pytest.approx(few, rel=0.25), "the band is the error over bags"


def test_log_loss_learns_probabilities() -> None:
    x = drawn(3000, 2)
    p = 1 / (1 + np.exp(-(3 * x[:, :1] - 2 * x[:, 1:] ** 2)))
    one = fit_additive(x, p, Boosting(bags=1, loss="log"))
    told = 1 / (1 + np.exp(-one.predict(x)))
    assert np.abs(told - p).mean() < 0.02
    three = np.stack([np.exp(2 * x[:, 0]), np.exp(x[:, 1]), np.ones(len(x))], axis=1)
    three /= three.sum(1, keepdims=True)
    scores = fit_additive(x, three, Boosting(bags=1, loss="log")).predict(x)
    told = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert np.abs(told - three).mean() < 0.02


def test_every_input_has_its_turn_in_each_round() -> None:
    """Two equal inputs share what they explain; greedy boosting would give all of it to the first."""
    x = drawn(400, 1)
    shapes = fit_additive(np.repeat(x, 2, axis=1), x.astype(np.float64), Boosting(bags=1, rounds=60))
    first, second = shapes.importance()[:, 0]
    assert 0.5 < first / second < 2


@pytest.mark.parametrize("setting", ["rounds", "rate", "leaves", "bins", "pairs", "pair_bins", "bags", "loss"])
def test_settings_out_of_range_are_told(setting: str) -> None:
    with pytest.raises(SettingError, match=f"{setting} is"):
        Boosting(**{setting: "none" if setting == "loss" else -1})
