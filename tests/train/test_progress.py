"""Progress: silent where nobody looks, and a remaining time that comes true."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch.utils.data import TensorDataset

from karui.model import Model
from karui.train import Training, fit
from karui.train.progress import Pace, bar, spoken


@given(st.floats(0.01, 10), st.integers(10, 1000))
def test_at_an_even_pace_the_remaining_time_comes_true(seconds: float, steps: int) -> None:
    pace = Pace(steps=steps)
    for done in range(steps + 1):
        left = pace.remaining(done, done * seconds)
        if left is None:
            assert done * seconds < 1.0 or done == 0
        else:
            assert left == pytest.approx((steps - done) * seconds, rel=1e-6, abs=1e-6)


def test_a_changed_pace_is_believed_after_half_a_minute() -> None:
    pace = Pace(steps=1000)
    now = 0.0
    for done in range(600):
        now += 0.1 if done < 300 else 1.0
        left = pace.remaining(done, now)
    assert left == pytest.approx(401, rel=0.01)


def test_steps_of_an_earlier_run_do_not_count_as_pace() -> None:
    pace = Pace(steps=100)
    pace.remaining(50, 0.0)
    assert pace.remaining(52, 2.0) == pytest.approx(48.0)


def test_times_are_told_as_people_do() -> None:
    told = [spoken(seconds) for seconds in (0.2, 59.9, 60, 3600)]
    assert told == [
        "1 s left",
        "1 min 0 s left",
        "1 min 0 s left",
        "1 h 0 min left",
    ]


def drawn(*, shown: bool, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with bar("train", 4, 2, shown=shown, console=console) as report:
        for step in range(4):
            report(step, step // 2, 0.5)
    return console.file.getvalue()


def test_a_bar_is_drawn_on_a_terminal_only_and_only_when_wanted() -> None:
    assert "epoch 2/2  loss 0.5000" in drawn(shown=True, terminal=True)
    assert drawn(shown=True, terminal=False) == ""
    assert drawn(shown=False, terminal=True) == ""


def test_fit_prints_nothing_unless_asked(capfd: pytest.CaptureFixture[str], small_cnn: Callable[..., Model]) -> None:
    data = TensorDataset(torch.zeros(8, 1, 8, 8), torch.arange(8))
    for progress in (False, True):
        fit(small_cnn(), data, training=Training(epochs=1), progress=progress)
    assert capfd.readouterr() == ("", "")
    fit(small_cnn(), data, training=Training(epochs=1, batch_size=4, devices=2, accelerator="cpu"))
    assert capfd.readouterr() == ("", "")
