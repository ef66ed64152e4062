"""A finished run in the folder of another: kept unless its replacement was asked for, and then gone for good."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import karui
from karui.artifact import load
from karui.errors import UsageError
from karui.model import Model, Regression
from karui.recipes.budget import visits
from karui.technique import Bench

ASKED: dict[str, Any] = {"budget": "bytes=0.7", "epochs": 0, "int8": False}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "light"  # beside it lie the timings


class Killed(BaseException):
    """Stands for kill -9: nothing catches it."""


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 4)).eval()
    return Model(net, example=(torch.zeros(2, 16),), task=Regression())


@pytest.fixture(scope="module")
def bench(model: Model) -> Bench:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        data = TensorDataset(x, model.module(x))
    return Bench(train=data, validation=data, test=data)


def killed(model: Model, bench: Bench, out: Path, **asked: Any) -> None:
    """A run that ends, as by a signal, when the first point is about to be made."""

    def dying(*given: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visits.Visitor, "_lightened", dying)
        with pytest.raises(Killed):
            karui.compress(model, bench, out=out, **asked)


def whole(out: Path, record: dict[str, Any], model: Model) -> bool:
    """Whether all that the record tells of is there."""
    points = [load(out / point["folder"], base=model) for point in record["budget"]["points"]]
    return len(points) > 1 and all((out / name).is_file() for name in record["files"])


@pytest.mark.usefixtures("steady", "short_menu")
def test_a_finished_run_is_replaced_only_where_that_was_asked_for(model: Model, bench: Bench, out: Path):
    karui.compress(model, bench, out=out, **ASKED)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="holds a finished run, which would be lost") as refused:
        karui.compress(model, bench, out=out, **ASKED)
    assert "--overwrite" in refused.value.hint
    with pytest.raises(UsageError, match="both given"):
        karui.compress(model, bench, out=out, resume=True, overwrite=True, **ASKED)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    lines: list[str] = []
    done = karui.compress(model, bench, out=out, overwrite=True, tell=lines.append, **ASKED)
    assert any(line.startswith("point 1: aiming") for line in lines)
    assert whole(out, done.record, model)


@pytest.mark.usefixtures("steady", "short_menu")
@pytest.mark.parametrize("other", [ASKED, {**ASKED, "budget": "bytes=0.6"}], ids=["the same", "another"])
def test_a_run_that_is_being_replaced_does_not_pass_for_finished(
    model: Model, bench: Bench, out: Path, other: dict[str, Any]
):
    """Its points are gone from the first moment on, and with them the record that tells of them."""
    karui.compress(model, bench, out=out, **ASKED)
    (out / "report.html").touch()
    killed(model, bench, out, overwrite=True, **other)
    assert sorted(path.name for path in out.iterdir()) == ["points"]
    done = karui.compress(model, bench, out=out, resume=True, **other)
    assert whole(out, done.record, model)


@pytest.mark.usefixtures("steady", "short_menu")
def test_a_finished_run_whose_points_are_gone_is_made_anew(model: Model, bench: Bench, out: Path):
    karui.compress(model, bench, out=out, **ASKED)
    shutil.rmtree(out / "points" / "01")
    lines: list[str] = []
    done = karui.compress(model, bench, out=out, resume=True, tell=lines.append, **ASKED)
    assert "this run was finished before, and points/01/model.json of it is gone: made anew" in lines
    assert "point 0: finished before, not repeated" in lines
    assert whole(out, done.record, model)
