"""What candidates do together decides between two ways of adding up what they do alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.model import Model, Regression
from karui.recipes.budget import visits
from karui.recipes.budget.choice import Problem, Table, choose
from karui.recipes.budget.recover import distance
from karui.recipes.budget.timing import Stopwatch
from karui.recipes.budget.together import best_power, harm_together
from karui.recipes.keeping import quiet
from karui.technique import Bench
from karui.train import Training

FEW, MANY = {"a": 1, "b": 0, "c": 0}, {"a": 0, "b": 1, "c": 1}
"""One large change, chosen by the roots of harms, and two small ones, chosen by the harms."""


def problem(least: float = -2.0, large: float = 5.0) -> Problem:
    saved = {"a": 2.0, "b": 1.0, "c": 1.0}
    tables = [Table((place,), {"time": np.array([0.0, -time])}) for place, time in saved.items()]
    return Problem(harms={"a": [0, large], "b": [0, 2], "c": [0, 2]}, tables=tables, limits={"time": least})


@pytest.mark.parametrize(
    ("few", "many", "power"),
    [(1.0, 3.0, 0.5), (3.0, 1.0, 1.0), (None, 3.0, 1.0), (3.0, None, 0.5), (None, None, 1.0), (1.0, 1.0, 1.0)],
)
def test_what_is_nearer_as_a_whole_is_chosen(few: float | None, many: float | None, power: float):
    """What is refused is none of them."""
    seen: list[Mapping[str, int]] = []

    def harm(chosen: Mapping[str, int]) -> float | None:
        seen.append(chosen)
        return few if chosen == FEW else many

    assert best_power(problem, choose, harm) == power
    assert seen == [MANY, FEW]


def test_one_choice_by_both_is_carried_out_once():
    seen: list[Mapping[str, int]] = []
    assert best_power(lambda: problem(large=1.0), choose, seen.append) == 1.0
    assert seen == [FEW]


def test_where_there_is_no_choice_nothing_is_carried_out():
    def refuse(_: Mapping[str, int]) -> float:
        raise AssertionError

    assert best_power(lambda: problem(least=-9.0), choose, refuse) == 1.0


def nets(*between: nn.Module) -> tuple[Model, Model, Bench]:
    """A network, the same with a first layer of ten times the size, and inputs to see."""
    torch.manual_seed(0)
    first, last = nn.Linear(16, 32), nn.Linear(32, 4)
    dense = Model(nn.Sequential(first, *between, last).eval(), example=(torch.zeros(2, 16),), task=Regression())
    data = TensorDataset(torch.randn(512, 16), torch.zeros(512, 4))
    bench = Bench(train=data, validation=data, test=data)
    light = dense.copy()
    with torch.no_grad():
        light.module.get_submodule("0").get_parameter("weight").mul_(10)
    return dense, light, bench


def test_normalisations_are_seen_anew_in_place():
    dense, light, bench = nets(nn.BatchNorm1d(32, affine=False))
    before = distance(light, dense, bench)
    found = harm_together(light, dense, bench)
    assert found < 0.1 * before
    assert found == pytest.approx(distance(light, dense, bench))


def test_a_network_without_them_is_as_far_as_it_is():
    dense, light, bench = nets(nn.ReLU())
    assert harm_together(light, dense, bench) == distance(light, dense, bench) > 0


@pytest.mark.usefixtures("steady")
def test_a_visit_goes_by_the_power_that_was_found(tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch):
    """The choice is made by it, and what is asked of a choice is what it does as a whole."""
    dense, _, bench = nets(nn.ReLU())
    whole: list[float | None] = []
    powers: list[float] = []
    raised = Problem.raised

    def best(
        given: Callable[[], Problem], choice: Callable[..., dict[str, int]], harm: Callable[..., float | None]
    ) -> float:
        whole.append(harm(choice(given())))
        return 0.5

    def spied(given: Problem, power: float) -> Problem:
        powers.append(power)
        return raised(given, power)

    monkeypatch.setattr(visits, "best_power", best)
    monkeypatch.setattr(Problem, "raised", spied)
    visitor = visits.Visitor(
        dense=dense, bench=replace(bench, training=training), out=tmp_path, watch=Stopwatch(), mark="", int8=False,
        max_drop=None, wanted=("bytes",), find_rate=False, tell=quiet,
    )  # fmt: skip
    point = visitor.lighten(visitor.start(), {"bytes": 0.7}, 0)
    assert point is not None
    assert set(powers) == {0.5}
    assert whole == [distance(visitor.model_of(point), dense, bench)]


def test_what_is_refused_makes_room_for_the_next_by_the_same_power():
    """Without b, which fails, the harms choose c and d: they do less than a, which the roots choose."""
    saved = {"a": 2.0, "b": 1.0, "c": 1.0, "d": 1.0}
    tables = [Table((place,), {"time": np.array([0.0, -time])}) for place, time in saved.items()]
    harms = {"a": [0, 7], "b": [0, 2], "c": [0, 2], "d": [0, 2.5]}
    failed: list[Table] = []

    def now() -> Problem:
        return Problem(harms=harms, tables=[*tables, *failed], limits={"time": -2})

    def harm(chosen: Mapping[str, int]) -> float | None:
        if chosen["b"]:
            failed.append(Table(("b",), {"time": np.array([0.0, np.inf])}))
            return None
        return 5.0 if chosen["a"] else 1.0

    assert best_power(now, choose, harm) == 1.0
    assert len(failed) == 1


@pytest.mark.usefixtures("steady")
def test_what_was_refused_is_known_to_a_run_that_goes_on(tmp_path: Path, training: Training):
    dense, _, bench = nets(nn.ReLU())

    def visitor() -> visits.Visitor:
        return visits.Visitor(
            dense=dense, bench=replace(bench, training=training), out=tmp_path, watch=Stopwatch(), mark="", int8=False,
            max_drop=None, wanted=("bytes",), find_rate=False, tell=quiet,
        )  # fmt: skip

    first = visitor()
    start = first.start()
    menu = first._menu_of(start)
    place = next(iter(menu.offers))
    menu.failed.add(place)
    first.lighten(start, {"bytes": 0.7}, 0)
    again = visitor()
    start = again.start()
    assert again.lighten(start, {"bytes": 0.7}, 0) == first.points[1]
    assert again._menu_of(start).failed == {place}
