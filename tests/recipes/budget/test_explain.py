"""What is said of a budget that was not met."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from karui.measuring import LayerTimes, layer_times
from karui.measuring.layers import LayerTime
from karui.model import Model
from karui.recipes.budget import explain
from karui.recipes.budget.aims import Reach
from karui.recipes.budget.explain import deployed, told
from karui.recipes.budget.front import Form, Point
from karui.recipes.budget.stages import Plan
from karui.recipes.budget.timing import Stopwatch
from karui.recipes.budget.visits import Visitor
from karui.recipes.keeping import quiet
from karui.technique import Bench


def form(told: str, size: float, lost: float) -> Form:
    return Form(name=told, told=told, time=0.9 if told == "fp32" else 0.7, bytes=size, lost=lost)


def visitor(model: Model, points: list[Point], watch: Stopwatch | None = None) -> Visitor:
    return Visitor(
        dense=model, bench=Bench(), out=Path(), watch=watch or Stopwatch(), mark="", int8=True, max_drop=None,
        find_rate=False, wanted=("time",), tell=quiet, points=points,
    )  # fmt: skip


def test_a_form_in_8_bits_that_breaks_the_floor_is_what_stops_it():
    """The point itself keeps the floor, in a form that is too heavy; the menu has more, and is not to blame."""
    dense = Point(number=0, forms=(form("fp32", 1.0, 0.0), form("int8", 0.3, 0.0)), best=1)
    light = Point(number=1, forms=(form("fp32", 0.6, 0.1), form("int8", 0.2, 0.4)), best=0)
    plan = Plan(goal={"bytes": 0.12}, stated=True, max_drop=0.15, epochs=4)
    model = Model(nn.Linear(8, 2), example=(torch.zeros(1, 8),))
    text = told(dense, plan, visitor(model, [dense, light]), model)
    assert "bytes 0.30 instead of 0.12" in text
    assert "What stops it is the floor: point 1 in the form int8 (time 0.70 and bytes 0.20 of the dense model)" in text
    assert "loses 0.40 where 0.15 is allowed" in text


def test_the_heaviest_layers_are_timed_as_the_budget_is(monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, Any]] = []

    def watched(model: Model, **how: Any):
        asked.append(how)
        return layer_times(model, **how)

    monkeypatch.setattr(explain, "layer_times", watched)
    only = Point(number=0, forms=(form("fp32", 1.0, 0.0),))
    plan = Plan(goal={"time": 0.1}, stated=True, max_drop=None, epochs=0)
    model = Model(nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 2)), example=(torch.zeros(1, 8),))
    text = told(only, plan, visitor(model, [only], Stopwatch(batch=5, threads=2)), model)
    assert "Most of the time that is left lies in" in text
    assert [(how["batch"], how["threads"]) for how in asked] == [(5, 2)]


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        (0.0, "Most of the time that is left lies in 0 (75%), 1 (25%)."),
        (1.0, "lies in 0 (60%), 1 (20%). 20% belongs to no layer, but to what the engine adds."),
        (6.0, "60% of the time that is left belongs to no layer, but to what the engine adds."),
    ],
)
def test_the_heaviest_layers_are_shares_of_all_the_time(rest: float, expected: str, monkeypatch: pytest.MonkeyPatch):
    """What belongs to no layer is told, and not shared out among those that are known."""
    rows = tuple(LayerTime(path=path, kind="Linear", seconds=seconds) for path, seconds in (("0", 3.0), ("1", 1.0)))
    times = LayerTimes(engine="onnxruntime", batch=1, threads=1, layers=rows, rest=rest)
    monkeypatch.setattr(explain, "layer_times", lambda *_, **__: times)
    assert expected in explain._heaviest(MODEL, ["time"], Stopwatch())


PLAN = Plan(goal={"time": 0.6}, stated=True, max_drop=3.0, epochs=5)
MODEL = Model(nn.Linear(8, 2), example=(torch.zeros(1, 8),))


def point(number: int, parent: int, time: float, lost: float, *, error: float = 0.0, **made: Any) -> Point:
    form = Form(name="", told="fp32", time=time, bytes=time, lost=lost, error=error)
    return Point(number=number, parent=parent, forms=(form,), **made)


DENSE = point(0, 0, 1.0, 0.0)
CUT = {"chosen": {"a layer": "narrower"}, "target": {"time": 0.6}}


def said(result: Point, points: list[Point], reach: list[Reach] | None = None, plan: Plan = PLAN) -> str:
    maker = visitor(MODEL, points)
    maker.reach = reach or []
    return told(result, plan, maker, MODEL)


@pytest.fixture(autouse=True)
def untimed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are timed in the test of that alone."""
    if "heaviest" not in request.node.name:
        monkeypatch.setattr(explain, "_heaviest", lambda *_: "")


def test_a_network_that_was_trained_on_is_not_quoted_as_it_was_before():
    """Nor is the end of a menu that belongs to another parent, or to another target."""
    first = point(1, 0, 0.64, 12.0, **CUT)
    result = point(3, 1, 0.64, 1.0)
    stale = Reach(parent=0, target={"time": 0.78}, shares={"time": 0.63})
    text = said(result, [DENSE, first, result], [stale])
    assert "12.00" not in text
    assert "What stops it" not in text
    assert "Nothing lighter than point 3 was made" in text


def test_the_end_of_a_networks_own_menu_is_what_stops_it():
    first = point(1, 0, 0.64, 2.0, **CUT)
    result = point(2, 1, 0.64, 1.0)
    own = Reach(parent=1, target={"time": 0.6}, shares={"time": 0.63})
    text = said(result, [DENSE, first, result], [own])
    assert "What stops it is the menu: with everything that can be done from point 1" in text
    assert "time 0.63 would be left" in text
    raced = replace(own, shares={"time": 0.66})
    assert "time 0.64 would be left" in said(result, [DENSE, first, result], [raced]), "no more than it has"
    inside = replace(own, shares={"time": 0.605})
    assert "the menu" not in said(result, [DENSE, first, result], [inside]), "that would be near enough"


def test_limits_that_no_choice_keeps_together_are_told():
    plan = replace(PLAN, goal={"time": 0.6, "bytes": 0.5})
    result = point(1, 0, 0.64, 1.0, **CUT)
    text = said(
        result, [DENSE, result], [Reach(parent=1, target=dict(plan.goal), shares={"time": 0.5, "bytes": 0.4})], plan
    )
    assert "time 0.50 and bytes 0.40 would be left, each by itself, and no choice leaves all at once" in text


def test_a_step_that_got_nowhere_at_the_end_of_the_menu_is_told_by_its_parent():
    result = point(1, 0, 0.99, 0.0, **CUT)
    to = Reach(parent=0, target={"time": 0.6}, shares={"time": 0.98})
    assert "everything that can be done from point 0" in said(result, [DENSE, result], [to])
    far = point(1, 0, 0.7, 0.0, **CUT)
    assert "What stops it" not in said(far, [DENSE, far], [to]), "from there the menu was never asked"


def test_where_floor_and_menu_both_end_both_are_told():
    broken = point(1, 0, 0.64, 12.0, **CUT)
    to = Reach(parent=0, target={"time": 0.6}, shares={"time": 0.64})
    text = said(DENSE, [DENSE, broken], [to])
    assert "What stops it is the floor: point 1" in text
    assert "Allow more" in text
    assert "That alone may not be enough: with everything that can be done from point 0" in text
    assert "That alone" not in said(DENSE, [DENSE, point(1, 0, 0.6, 12.0, **CUT)], [to]), "it is light enough"


def test_a_broken_point_that_is_heavier_than_the_result_stops_nothing():
    result = point(2, 0, 0.64, 1.0, **CUT)
    assert "floor" not in said(result, [DENSE, point(1, 0, 0.8, 5.0, **CUT), result])


def test_what_the_clock_cannot_decide_is_not_met_and_said():
    result = point(1, 0, 0.64, 1.0, error=0.028, **CUT)
    text = said(result, [DENSE, result])
    assert "is not met" in text
    assert "The clock is sure of that time to 0.06 only" in text
    sure = point(1, 0, 0.64, 1.0, error=0.001, **CUT)
    assert "The clock" not in said(sure, [DENSE, sure])


def test_a_budget_that_is_met_by_the_dense_network_or_within_the_tolerance_says_so():
    above = point(1, 0, 0.606, 1.0, **CUT)
    assert "is met" in said(above, [DENSE, above])
    assert "less than the clock can tell" in said(above, [DENSE, above])
    absolute = replace(PLAN, goal={"time": 1.3})
    assert said(DENSE, [DENSE], plan=absolute).startswith("The dense model already meets the budget (time 1.3")


def test_the_knee_is_explained_by_the_points_that_there_are():
    plan = Plan(goal={"time": 0.2}, stated=False, max_drop=None, epochs=1)
    light = point(1, 0, 0.5, 1.0, **CUT)
    assert "No other point was visited" in said(DENSE, [DENSE], plan=plan)
    assert "Lighter points lose more for each step." in said(DENSE, [DENSE, light], plan=plan)
    assert "Lighter" not in said(light, [DENSE, light], plan=plan)
    assert "Heavier ones gain little." in said(light, [DENSE, light], plan=plan)
    again = point(1, 0, 0.52, 1.0, **CUT)
    assert "Lighter" not in said(again, [DENSE, light], plan=plan), "that is the point itself, as it was timed before"
    trained = point(2, 1, 0.52, 0.8)
    assert "Lighter" not in said(trained, [DENSE, light, trained], plan=plan), "that is its network before training"


def test_the_file_to_deploy_and_the_network_in_fp32_are_told_apart():
    ratio = {"value": 1.55, "low": 1.4, "high": 1.7}
    plain = {"precision": "fp32", "engine": "onnxruntime", "ratio": ratio, "bytes": 9, "test": None, "chosen": False}
    narrow = {**plain, "precision": "int8", "chosen": True}
    text = deployed([plain, narrow], 100)
    assert "model.onnx is the form in int8 for onnxruntime: 1.55x" in text
    assert "not about that file, but about the same network in fp32" in text
    assert deployed([{**plain, "chosen": True}, narrow], 100) == ""
