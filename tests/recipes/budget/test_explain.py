"""What is said of a budget that was not met."""

from __future__ import annotations

import torch
from torch import nn

from karui.model import Model
from karui.recipes.budget.explain import told
from karui.recipes.budget.front import Form, Point
from karui.recipes.budget.stages import Plan


def form(told: str, size: float, lost: float) -> Form:
    return Form(name=told, told=told, time=0.9, bytes=size, lost=lost)


def test_a_form_in_8_bits_that_breaks_the_floor_is_what_stops_it():
    """The point itself keeps the floor, in a form that is too heavy; the menu has more, and is not to blame."""
    dense = Point(number=0, forms=(form("fp32", 1.0, 0.0), form("int8", 0.3, 0.0)), best=1)
    light = Point(number=1, forms=(form("fp32", 0.6, 0.1), form("int8", 0.2, 0.4)), best=0)
    plan = Plan(goal={"bytes": 0.12}, stated=True, max_drop=0.15, epochs=4)
    model = Model(nn.Linear(8, 2), example=(torch.zeros(1, 8),))
    text = told(dense, plan, [dense, light], model, {})
    assert "bytes 0.30 instead of 0.12" in text
    assert "What stops it is the floor: point 1 in the form int8 (time 0.90 and bytes 0.20 of the dense model)" in text
    assert "loses 0.40 where 0.15 is allowed" in text
