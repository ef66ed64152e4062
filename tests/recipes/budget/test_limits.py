"""Budgets as people write them, and what is refused at once."""

from __future__ import annotations

import pytest

from karui.errors import UsageError
from karui.recipes.budget.limits import Budget, read_budget


def test_shares_and_absolute_amounts():
    budget = read_budget("time=2.5ms, bytes=0.3", max_drop=1.0)
    assert budget.against({"time": 5e-3, "bytes": 1000}) == {"time": 0.5, "bytes": 0.3}
    assert read_budget({"bytes": "200KB"}).against({"bytes": 100e3}) == {"bytes": 1.0}
    assert read_budget("").limits == read_budget(None).limits == ()


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("time=0", "time=0 is no share", "above 0 and below 1"),
        ("time=2", "time=2 is no share", "time=2.5ms"),
        ("time=1", "time=1 is no share", "below 1"),
        ("bytes=-1", "bytes=-1 is no share", "bytes=200KB"),
        ("time=-3ms", "leaves nothing", "time=0.5"),
        ("time=0.5km", "'time=0.5km' is no budget", "Units: s, ms"),
        ("bytes=5ms", "'bytes=5ms' is no budget", "Units: B, kB"),
        ("time", "'time=' is no budget", "time=0.5"),
        ("tme=0.5", "Budget 'tme' is not known", "time=0.5"),
        ("size=3", "Budget 'size' is not known", "bytes=0.3"),
        ("accuracy=0.9", "Budget 'accuracy' is not known", "time=0.5"),
        ("time=0.5,time=0.4", "gives time twice", "once"),
        ("time=nan", "no budget", "time=0.5"),
    ],
)
def test_impossible_budgets_are_refused_with_what_is_allowed(text: str, message: str, hint: str):
    with pytest.raises(UsageError) as refused:
        read_budget(text)
    assert message in refused.value.message
    assert hint in refused.value.hint


@pytest.mark.parametrize("floor", [-1, 101, float("nan")])
def test_impossible_floors_are_refused(floor: float):
    with pytest.raises(UsageError, match="from 0 to 100"):
        Budget(max_drop=floor)
