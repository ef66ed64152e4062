"""MUNGE, RANDOM, NBE and ensemble selection, [36]: what must hold of pseudo data, and of the search for neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from karui.errors import SettingError
from karui.numerics import munge as module
from karui.numerics.ensemble_selection import minus_rmse, select_ensemble
from karui.numerics.munge import independent, munge
from karui.numerics.naive_bayes import naive_bayes

pytestmark = pytest.mark.paper(36)


def mixed(samples: int = 60, seed: int = 0) -> np.ndarray:
    """Two continuous columns that go together, and two nominal ones."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=samples)
    names = draw.integers(3, size=samples) * 10.0
    return np.stack([x, 100 * (x + 0.1 * draw.normal(size=samples)), names, (x > 0) * 7.0], 1)


def plainly(table: np.ndarray, swap: float, tightness: float, nominal: list[int], seed: int) -> np.ndarray:
    """One copy as algorithm 1 tells it: every distance anew for every row, attribute by attribute."""
    draw, made = np.random.default_rng(seed), table.copy()
    low, span = table.min(0), np.ptp(table, axis=0)
    for row in range(len(made)):
        apart = np.zeros(len(made))
        for column in range(table.shape[1]):
            values = made[:, column]
            if column in nominal:
                apart += values != values[row]
            elif span[column] > 0:
                apart += ((values - low[column]) / span[column] - (values[row] - low[column]) / span[column]) ** 2
        apart[row] = np.inf
        other = int(apart.argmin())
        exchanged, noise = draw.random(table.shape[1]) < swap, draw.standard_normal((2, table.shape[1]))
        for column in np.flatnonzero(exchanged):
            mine, theirs = made[row, column], made[other, column]
            deviation = 0.0 if column in nominal else abs(mine - theirs) / tightness
            made[row, column] = theirs + deviation * noise[0, column]
            made[other, column] = mine + deviation * noise[1, column]
    return made


@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0, 1), st.sampled_from([1, 7, 2_000_000]))
@settings(max_examples=40, deadline=None)
def test_it_is_the_algorithm_of_the_paper_whatever_the_block(seed: int, rows: int, swap: float, block: int) -> None:
    table = mixed(rows, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block * rows)
        made = munge(table, copies=1, swap=swap, tightness=3.0, nominal=[2, 3], seed=seed)
    np.testing.assert_allclose(made, plainly(table, swap, 3.0, [2, 3], seed), rtol=1e-12, atol=1e-12)


def test_size_seed_and_the_given_table() -> None:
    table = mixed()
    before = table.copy()
    made = munge(table, copies=3, swap=0.5, tightness=5.0, nominal=[2, 3], seed=4)
    assert made.shape == (180, 4)
    assert np.array_equal(table, before)
    assert np.array_equal(made, munge(table, copies=3, swap=0.5, tightness=5.0, nominal=[2, 3], seed=4))
    assert not np.array_equal(made, munge(table, copies=3, swap=0.5, tightness=5.0, nominal=[2, 3], seed=5))
    assert not np.array_equal(made[:60], made[60:120]), "each copy is another one"


def test_nothing_is_exchanged_at_probability_zero() -> None:
    table = mixed()
    assert np.array_equal(munge(table, copies=2, swap=0.0, tightness=5.0), np.tile(table, (2, 1)))


@pytest.mark.parametrize("neighbours", ["current", "original"])
def test_swaps_keep_every_value(neighbours: str) -> None:
    """Nominal columns always; with an infinite tightness the continuous ones too, bit for bit."""
    table = mixed()
    loose = munge(table, copies=1, swap=0.7, tightness=2.0, nominal=[2, 3], neighbours=neighbours)  # pyright: ignore
    tight = munge(table, copies=1, swap=0.7, tightness=np.inf, nominal=[2, 3], neighbours=neighbours)  # pyright: ignore
    assert not np.array_equal(tight, table)
    for column in range(4):
        assert np.array_equal(np.sort(tight[:, column]), np.sort(table[:, column]))
        assert np.array_equal(np.sort(loose[:, column]), np.sort(table[:, column])) == (column >= 2)


def test_a_tighter_exchange_stays_closer_to_the_values_exchanged() -> None:
    table = mixed(200)
    moved = [
        np.abs(np.sort(munge(table, copies=1, swap=1.0, tightness=s)[:, 0]) - np.sort(table[:, 0])).mean()
        for s in (1.0, 10.0, 100.0)
    ]
    assert moved[0] > 3 * moved[1] > 9 * moved[2] > 0


def test_the_neighbour_is_another_row_also_beside_its_double() -> None:
    """Two rows: each is the other's neighbour, so a full swap twice gives both back; a double is a neighbour at 0."""
    pair = np.array([[0.0, 1.0], [4.0, 9.0]])
    assert np.array_equal(munge(pair, copies=1, swap=1.0, tightness=np.inf), pair)
    double = np.array([[0.0, 0.0], [5.0, 5.0], [0.0, 0.0], [5.0, 5.0]])
    assert np.array_equal(munge(double, copies=4, swap=1.0, tightness=1.0), np.tile(double, (4, 1)))


def test_names_count_by_being_equal_and_numbers_by_their_share_of_the_range() -> None:
    """The row of another name is one apart, however close the numbers of the names; ranges do not count."""
    table = np.array([[1.0, 0.0], [2.0, 0.0], [1.0, 0.9e6], [9.0, 1e6]])
    as_names = munge(table, copies=1, swap=1.0, tightness=np.inf, nominal=[0], neighbours="original")
    as_numbers = munge(table, copies=1, swap=1.0, tightness=np.inf, neighbours="original")
    search = module._Search(module._Code(table, np.array([False, True]))(table))
    assert search.all().tolist() == [2, 0, 0, 2]
    assert module._Search(module._Code(table, np.array([True, True]))(table)).all().tolist() == [1, 0, 0, 2]
    assert not np.array_equal(as_names, as_numbers)


def test_means_stay_and_correlations_too_which_independent_draws_destroy() -> None:
    table = mixed(300)[:, :2]
    made = munge(table, copies=20, swap=0.3, tightness=2.0, seed=1)
    apart = independent(table, rows=6000, seed=1)
    error = table.std(0) / np.sqrt(len(table))
    assert np.all(np.abs(made.mean(0) - table.mean(0)) < 0.2 * error), "in expectation, over many draws"
    before, munged, drawn = (np.corrcoef(rows.T)[0, 1] for rows in (table, made, apart))
    assert before > 0.99
    assert abs(munged - before) < 0.02
    assert abs(drawn) < 0.1


def test_independent_draws_have_the_marginals() -> None:
    table = mixed(50)
    drawn = independent(table, rows=20_000, seed=2)
    for column in range(4):
        values, counts = np.unique(table[:, column], return_counts=True)
        found, times = np.unique(drawn[:, column], return_counts=True)
        assert np.array_equal(values, found)
        np.testing.assert_allclose(times / 20_000, counts / 50, atol=0.015)
    assert np.array_equal(drawn, independent(table, rows=20_000, seed=2))


def test_the_fast_option_looks_for_neighbours_once() -> None:
    table = mixed(80)
    fast = munge(table, copies=2, swap=0.5, tightness=5.0, nominal=[2, 3], neighbours="original")
    assert fast.shape == (160, 4)
    assert not np.array_equal(fast, munge(table, copies=2, swap=0.5, tightness=5.0, nominal=[2, 3]))


def test_naive_bayes_finds_clusters_of_both_kinds_of_columns() -> None:
    draw = np.random.default_rng(0)
    cluster = draw.integers(2, size=400)
    table = np.stack([5.0 * cluster + draw.normal(size=400), 3.0 * cluster, draw.integers(2, size=400)], 1)
    mixture = naive_bayes(table, nominal=[1, 2], seed=0)
    assert 2 <= len(mixture.weights) <= 8
    two = naive_bayes(table, nominal=[1, 2], clusters=2, seed=0)
    np.testing.assert_allclose(np.sort(two.means[:, 0]), [0.0, 5.0], atol=0.4)
    np.testing.assert_allclose(two.weights.sum(), 1.0)
    drawn = two.draw(5000, seed=1)
    assert np.array_equal(np.unique(drawn[:, 1]), [0.0, 3.0])
    assert np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1] > 0.85, "the clusters tie the columns"
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 2])[0, 1]) < 0.1
    one = naive_bayes(table, nominal=[1, 2], clusters=1).draw(5000)
    assert abs(np.corrcoef(one[:, 0], one[:, 1])[0, 1]) < 0.1
    assert (
        two.log_likelihood(table).mean() > naive_bayes(table, nominal=[1, 2], clusters=1).log_likelihood(table).mean()
    )


def test_a_constant_column_breaks_nothing() -> None:
    table = np.concatenate([mixed(40), np.ones((40, 1))], 1)
    assert np.all(munge(table, copies=2, swap=0.9, tightness=1.0)[:, 4] == 1)
    assert np.allclose(naive_bayes(table, nominal=[2, 3]).draw(50)[:, 4], 1)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"copies": -1}, "copies"),
        ({"swap": 1.5}, "swap"),
        ({"tightness": 0.0}, "tightness"),
        ({"nominal": [4]}, "column"),
    ],
)
def test_wrong_settings_are_told(wrong: dict[str, object], word: str) -> None:
    good: dict[str, object] = {"copies": 1, "swap": 0.5, "tightness": 1.0}
    with pytest.raises(SettingError, match=word):
        munge(mixed(), **{**good, **wrong})  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingError, match="not finite"):
        munge(np.full((3, 2), np.nan), copies=1, swap=0.5, tightness=1.0)
    with pytest.raises(SettingError, match="no two rows"):
        munge(np.zeros((1, 2)), copies=1, swap=0.5, tightness=1.0)


def test_ensemble_selection_takes_what_helps_and_is_never_worse_than_the_best_model() -> None:
    draw = np.random.default_rng(3)
    targets = draw.integers(3, size=300)
    truth = np.eye(3)[targets]
    library = np.stack([0.6 * truth + 0.4 * draw.dirichlet(np.ones(3), size=300) for _ in range(4)] + [1 - truth])
    counts = select_ensemble(library, targets, rounds=20)
    assert counts[-1] == 0, "what harms stays out"
    assert np.count_nonzero(counts) >= 2
    mean = np.tensordot(counts / counts.sum(), library, 1)
    assert minus_rmse(mean, targets) >= max(minus_rmse(one, targets) for one in library)
    numbers = np.stack([np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]])])
    assert select_ensemble(numbers, np.array([2.0, 3.0]), rounds=6).tolist() == [1, 1], "two errors cancel"
    with pytest.raises(SettingError, match="rounds"):
        select_ensemble(library, targets, rounds=0)
