"""The choice equals brute force, also where a layer's cost depends on two places, under two limits at once."""

from __future__ import annotations

import itertools
import os
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import milp

from karui.recipes.budget import choice
from karui.recipes.budget.choice import ALIKE, Problem, Table, cheapest, choose, farthest, frugal

AMOUNT = st.integers(-20, 20).map(float)
HARM = st.integers(0, 50).map(float)


def square(rows: int, columns: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(AMOUNT, min_size=rows * columns, max_size=rows * columns).map(
        lambda values: np.array(values).reshape(rows, columns)
    )


@st.composite
def problems(draw: Any) -> Problem:
    """Two layers with three settings each, tied by a shared cost; a cell may be impossible."""
    harms = {place: [0.0, draw(HARM), draw(HARM)] for place in ("one", "two")}
    shared = {quantity: draw(square(3, 3)) for quantity in ("time", "bytes")}
    if draw(st.booleans()):
        cell = (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
        shared["time"][cell] = np.inf
    own = {"time": draw(square(1, 3))[0]}
    limits = {"time": draw(AMOUNT), "bytes": draw(AMOUNT)}
    return Problem(harms=harms, tables=[Table(("one", "two"), shared), Table(("two",), own)], limits=limits)


def brute(problem: Problem) -> tuple[float, dict[str, int]] | None:
    found = None
    for cells in itertools.product(*(range(len(harms)) for harms in problem.harms.values())):
        chosen = dict(zip(problem.harms, cells, strict=True))
        fits = all(problem.total(chosen, quantity) <= limit + 1e-9 for quantity, limit in problem.limits.items())
        if fits and (found is None or problem.harm(chosen) < found[0]):
            found = (problem.harm(chosen), chosen)
    return found


def presolved() -> Problem:
    """A problem whose best choice the solver's presolve loses."""
    time = np.array([[-1.0, -1.0, 0.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    size = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, -1.0], [-1.0, 0.0, 0.0]])
    shared = Table(("one", "two"), {"time": time, "bytes": size})
    own = Table(("two",), {"time": np.array([13.0, 1.0, 12.0])})
    harms = {"one": [0.0, 0.0, 0.0], "two": [0.0, 0.0, 1.0]}
    return Problem(harms=harms, tables=[shared, own], limits={"time": 11.0, "bytes": 0.0})


def overshadowed() -> Problem:
    """A problem with a harm that has to be, beside which the solver does not see another that need not."""
    shared = Table(
        ("one", "two"),
        {
            "time": np.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
            "bytes": np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        },
    )
    own = Table(("two",), {"time": np.array([0.0, 1.0, 0.0])})
    harms = {"one": [0.0, 2.0, 20.0], "two": [0.0, 0.0, 1.0]}
    return Problem(harms=harms, tables=[shared, own], limits={"time": 0.0, "bytes": 0.0})


@settings(max_examples=150, deadline=None)
@example(overshadowed(), 1e6)
@example(presolved(), 1.0)
@given(problems(), st.sampled_from([1.0, 1e6]))
def test_the_choice_equals_brute_force(problem: Problem, scale: float):
    """Also where some candidate's harm is beyond all measure."""
    problem = replace(problem, harms={place: [0.0, told[1], scale * told[2]] for place, told in problem.harms.items()})
    best, chosen = brute(problem), choose(problem)
    if best is None:
        assert chosen is None
    else:
        assert chosen is not None
        assert problem.harm(chosen) == pytest.approx(best[0])
        assert all(problem.total(chosen, q) <= limit + 1e-6 for q, limit in problem.limits.items())


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from([1.0, 1e6]))
def test_of_choices_that_harm_alike_the_smallest_is_taken(problem: Problem, scale: float):
    """Held against brute force, also where some candidate's harm is beyond all measure."""
    harms = {place: [0.0, told[1], scale * told[2]] for place, told in problem.harms.items()}
    problem = replace(problem, harms=harms, limits={"time": problem.limits["time"]})
    best, chosen = brute(problem), frugal(problem, "bytes")
    if best is None:
        assert chosen is None
        return
    assert chosen is not None
    every = (dict(zip(harms, cells, strict=True)) for cells in itertools.product(range(3), range(3)))
    most = (1 + ALIKE) * best[0]
    alike = [c for c in every if problem.harm(c) <= most + 1e-9 and problem.total(c, "time") <= problem.limits["time"]]
    assert problem.harm(chosen) <= most * (1 + 1e-6)
    assert problem.total(chosen, "time") <= problem.limits["time"] + 1e-6
    assert problem.total(chosen, "bytes") == pytest.approx(min(problem.total(c, "bytes") for c in alike))


@settings(max_examples=50, deadline=None)
@given(problems())
def test_the_cheapest_is_the_end_of_the_menu(problem: Problem):
    free = Problem(harms=problem.harms, tables=problem.tables)
    least = min(
        free.total(dict(zip(free.harms, cells, strict=True)), "time") for cells in itertools.product(range(3), range(3))
    )
    assert free.total(cheapest(problem, "time"), "time") == pytest.approx(least)


def test_seconds_and_bytes_of_real_sizes_are_kept_apart():
    """Microseconds beside hundreds of kilobytes: neither drowns in the solver's tolerances."""
    time = Table(("a",), {"time": np.array([0.0, -3e-6, -5e-6])})
    size = Table(("a",), {"bytes": np.array([0.0, -2e5, -1e5])})
    problem = Problem(harms={"a": [0, 1, 2]}, tables=[time, size], limits={"time": -4e-6, "bytes": -5e4})
    assert choose(problem) == {"a": 2}
    assert choose(Problem(harms={"a": [0, 1, 2]}, tables=[time, size], limits={"time": -6e-6})) is None


def of_bytes(*amounts: float, limit: float) -> Problem:
    """One place, whose second setting saves far more than the first and does more harm."""
    table = Table(("a",), {"bytes": np.array([0.0, *amounts])})
    return Problem(harms={"a": [0, 0.1, 0.5]}, tables=[table], limits={"bytes": limit})


def test_a_limit_is_kept_to_the_byte():
    """A millionth of a setting that saves a megabyte is a byte, and as good as nothing to the solver."""
    assert choose(of_bytes(-1004.0, -1_200_000.0, limit=-1005.0)) == {"a": 2}
    assert choose(of_bytes(-1004.0, -1_200_000.0, limit=-1004.0)) == {"a": 1}, "what it takes exactly is enough"
    assert choose(of_bytes(-1004.0, -1_200_000.0, limit=-1_200_001.0)) is None


def test_a_limit_is_kept_where_there_is_no_end_of_settings_to_forbid(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(choice, "CUTS", 0)
    assert choose(of_bytes(-1004.0, -1_200_000.0, limit=-1005.0)) == {"a": 2}


@st.composite
def real_sizes(draw: Any) -> Problem:
    """Two or three places with three settings: bytes up to ten million, microseconds to milliseconds, harms with ties.

    Limits are what some choice takes, or a byte or a millionth less.
    """
    places: list[str] = ["one", "two", "three"][: draw(st.integers(2, 3))]
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels = np.array([0.0, *10 ** random.uniform(-4, 1, 3)])
    harms = {place: [0.0, *random.choice(levels, 2).tolist()] for place in places}
    tables = []
    for pair in [(place,) for place in places] + list(itertools.combinations(places, 2)):
        shape = (3,) * len(pair)
        sizes = np.round(10 ** random.uniform(0, 7, shape) * random.choice([-1.0, -1.0, 1.0], shape))
        seconds = 10 ** random.uniform(-6, -2, shape) * random.choice([-1.0, -1.0, 1.0], shape)
        sizes[(0,) * len(pair)] = seconds[(0,) * len(pair)] = 0.0
        if len(pair) > 1 and random.random() < 0.3:
            sizes[1, 2] = seconds[1, 2] = np.inf
        tables.append(Table(pair, {"time": seconds, "bytes": sizes}))
    free = Problem(harms=harms, tables=tables)
    every = [dict(zip(places, cells, strict=True)) for cells in itertools.product(range(3), repeat=len(places))]
    some = [c for c in every if np.isfinite(free.total(c, "time"))]
    taken = some[random.integers(len(some))]
    limits = {"bytes": free.total(taken, "bytes") - draw(st.sampled_from([0.0, 1.0, 2.0]))}
    if draw(st.booleans()):
        limits["time"] = free.total(taken, "time") * (1 - draw(st.sampled_from([0.0, 1e-6])))
    return replace(free, limits=limits)


def kept(problem: Problem, chosen: dict[str, int]) -> bool:
    """Whether the limits are kept, but for the arithmetic."""
    return all(problem.total(chosen, q) <= limit + 1e-9 * abs(limit) for q, limit in problem.limits.items())


@settings(max_examples=100, deadline=None)
@given(real_sizes())
def test_the_choice_equals_brute_force_at_real_sizes(problem: Problem):
    cells = itertools.product(*(range(len(told)) for told in problem.harms.values()))
    fit = [c for c in (dict(zip(problem.harms, cell, strict=True)) for cell in cells) if kept(problem, c)]
    chosen = choose(problem)
    if not fit:
        assert chosen is None
        return
    assert chosen is not None
    assert kept(problem, chosen)
    assert problem.harm(chosen) == pytest.approx(min(map(problem.harm, fit)))
    spared = frugal(problem, "time")
    assert spared is not None
    assert kept(problem, spared)


def test_what_the_solver_prints_stays_out_of_the_output(capfd: pytest.CaptureFixture[str], monkeypatch: Any):
    def chatty(*given: Any, **named: Any) -> Any:
        os.write(1, b"remark of the solver")
        return milp(*given, **named)

    monkeypatch.setattr(choice, "milp", chatty)
    time = Table(("a",), {"time": np.array([0.0, -1.0])})
    assert choose(Problem(harms={"a": [0, 1]}, tables=[time], limits={"time": -1.0})) == {"a": 1}
    sys.stdout.write("after\n")
    assert capfd.readouterr().out == "after\n"


def test_nothing_to_choose_from():
    assert choose(Problem(harms={}, tables=[])) == {}
    assert choose(Problem(harms={}, tables=[], limits={"time": -1.0})) is None


def test_the_end_of_the_menu_is_tried_where_a_limit_is_out_of_reach():
    """Its harm is no reason to stay above the limit by more than must be."""
    problem = of_bytes(-79.0, -80.15, limit=-80.2)
    assert choose(problem) is None
    assert farthest(problem) == ({"a": 2}, {"bytes": -80.15})
    table = Table(("a",), {"bytes": np.array([0.0, -5.0, -9.0]), "time": np.array([0.0, -9.0, 5.0])})
    both = Problem(harms={"a": [0, 1, 2]}, tables=[table], limits={"bytes": -10.0, "time": -20.0})
    chosen, ends = farthest(both)
    assert chosen == {"a": 1}, "no choice is at both ends"
    assert ends == {"bytes": -9.0, "time": -9.0}
