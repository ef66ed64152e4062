"""What is said of a budget that was not met."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from karui.measuring import layer_times
from karui.model import Model
from karui.recipes.budget import explain
from karui.recipes.budget.explain import told
from karui.recipes.budget.front import Form, Point
from karui.recipes.budget.stages import Plan
from karui.recipes.budget.timing import Stopwatch
from karui.recipes.budget.visits import Visitor
from karui.recipes.keeping import quiet
from karui.technique import Bench


def form(told: str, size: float, lost: float) -> Form:
    return Form(name=told, told=told, time=0.9, bytes=size, lost=lost)


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
    assert "What stops it is the floor: point 1 in the form int8 (time 0.90 and bytes 0.20 of the dense model)" in text
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
