"""`karui compress --budget` as people type it: exit codes, what is refused, JSON alone, killed and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from karui.cli.app import run

COMPRESS = ["compress", "net.py:net", "--data", "digits", "--out", "light"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A timing cache of the tests' own."""
    monkeypatch.setenv("KARUI_CACHE", str(tmp_path_factory.getbasetemp() / "timings"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "time=0"], "above 0 and below 1"),
        (["--budget", "time=2"], "time=2.5ms"),
        (["--budget", "bytes=-1"], "bytes=200KB"),
        (["--budget", "speed=2"], "'speed' is not known"),
        (["--budget", "time=0.5", "--max-drop", "101"], "from 0 to 100"),
        (["--budget", "time=0.5", "--threads", "100000"], "a time with more says nothing"),
        (["--budget", "time=0.5", "--seed", "-1"], "Give a whole number from 0"),
        (["--budget", "time=0.5", "--seed", str(2**63)], "Give a whole number from 0"),
        (["--budget", "time=0.5", "--recipe", "recipe.toml"], "a recipe or a budget"),
        (["--minutes", "0"], "above 0"),
        (["--minutes", "1", "--epochs", "2"], "both given"),
    ],
)
def test_bad_budgets_are_refused_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
):
    assert run([*COMPRESS, *options]) == 2
    told = capsys.readouterr().err
    assert words in " ".join(told.split())
    assert not (folder / "light").exists()


WIDE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).double()


def data():
    x = torch.randn(40, 1, 8, 8, dtype=torch.float64)
    return TensorDataset(x[:30], torch.arange(30) % 2), TensorDataset(x[30:], torch.arange(10) % 2)
"""


def test_a_model_in_64_bits_is_refused_at_once_and_the_plan_says_so(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "wide.py").write_text(WIDE)
    wide = ["wide.py:net", "--data", "wide.py:data"]
    assert run(["compress", *wide, "--out", "light", "--budget", "time=0.7", "--epochs", "1"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert "float64" in error
    assert "Give model.float(), and data as float32." in hint
    assert not (folder / "light").exists()
    assert run(["plan", *wide]) == 0
    assert "its weights are float64: a budget" in capsys.readouterr().out


@pytest.mark.slow
def test_a_budget_that_cannot_be_met_is_exit_code_1_with_a_paragraph(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert run([*COMPRESS, "--budget", "time=0.01", "--epochs", "0", "--no-int8", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)["budget"]
    assert not told["met"]
    assert "The budget is not met" in told["explanation"]
    assert "lies in" in told["explanation"]
    assert {form["precision"] for form in told["forms"]} == {"fp32"}
    page = (folder / "light" / "report.html").read_text(encoding="utf-8")
    assert "The points visited" in page
    assert (folder / "light" / "model.onnx").is_file()


PARTS = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.model import CustomTask


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.one, self.two = nn.Linear(128, 3), nn.Linear(128, 2)

    def forward(self, x):
        x = self.trunk(x)
        return self.one(x), self.two(x)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(20, 64), nn.Linear(64, 256), nn.Linear(256, 4)

    def forward(self, tokens):
        return self.head(torch.relu(self.mix(self.embed(tokens)))).transpose(1, 2)


def regressor():
    return nn.Sequential(nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 3))


def loss(outputs, targets):
    return scores(outputs, targets).mean()


def scores(outputs, targets):
    return (torch.cat(outputs, 1) - targets).square().mean(1)


task = CustomTask(loss=loss, scores=scores, metric="error", higher_is_better=False)


def halves(*tensors):
    return TensorDataset(*(t[:300] for t in tensors)), TensorDataset(*(t[300:] for t in tensors))


def numbers(width):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 16, generator=draw)
    return halves(x, torch.sin(x @ torch.randn(16, width, generator=draw)))


def five():
    return numbers(5)


def three():
    return numbers(3)


def sentences():
    tokens = torch.randint(20, (400, 6), generator=torch.Generator().manual_seed(0))
    return halves(tokens, tokens % 4)


def padded():
    tokens = torch.randint(20, (400, 6), generator=torch.Generator().manual_seed(0))
    tags = (tokens % 4).masked_fill(torch.arange(6) >= torch.arange(400)[:, None] % 5 + 2, -100)
    tags[::10] = -100
    return halves(tokens, tags)


def holes():
    (x, y), (more, others) = (part.tensors for part in numbers(3))
    x, y = torch.cat([x, more]), torch.cat([y, others])
    y[::4, 1] = -torch.inf
    y[::10] = -torch.inf
    return halves(x, y)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("short_menu")
@pytest.mark.parametrize(
    ("model", "task", "data", "metric"),
    [
        ("Two", "own.parts:task", "five", "error"),
        ("regressor", "regression", "three", "squared error"),
        ("Tagger", "classification", "sentences", "accuracy"),
        ("regressor", "regression", "holes", "squared error"),
        ("Tagger", "classification", "padded", "accuracy"),
    ],
)
def test_other_tasks_with_data_from_a_package(  # noqa: PLR0917  (the case)
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, model: str, task: str, data: str, metric: str
):
    (folder / "own").mkdir()
    (folder / "own" / "__init__.py").touch()
    (folder / "own" / "parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(folder)
    for name in ("own", "own.parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    named = ["compress", f"own.parts:{model}", "--task", task, "--data", f"own.parts:{data}", "--out", "light"]
    assert run([*named, "--budget", "bytes=0.5", "--max-drop", "95", "--epochs", "1", "--no-int8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    point = next(p for p in told["budget"]["points"] if p["number"] == told["budget"]["point"])
    form = point["forms"][point["best"]]
    assert form["bytes"] <= 0.51
    assert form["score"]["metric"] == told["light"]["score"]["metric"] == metric
    assert form["score"]["higher_is_better"] is (metric == "accuracy")
    # Of the 100 samples to test with, ten have no label in the last two cases.
    assert told["light"]["score"]["count"] == (90 if data in ("holes", "padded") else 100)
    assert (folder / "light" / "model.onnx").is_file()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="kill -9 is of POSIX systems")
def test_killed_with_9_and_resumed(folder: Path):
    """It is killed when the first point is done; the second process repeats none of it."""
    command = [sys.executable, "-m", "karui", *COMPRESS, "--budget", "bytes=0.45", "--epochs", "1", "--no-int8"]
    point, end, log = folder / "light" / "points" / "01" / "point.json", time.monotonic() + 300, folder / "first.log"
    with log.open("w") as out:
        first = subprocess.Popen(command, cwd=folder, stderr=out, stdout=out)
        while not point.is_file() and first.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert point.is_file(), log.read_text()
    written = point.stat().st_mtime_ns
    second = subprocess.run([*command, "--resume"], cwd=folder, capture_output=True, text=True, check=False)
    assert second.returncode in (0, 1), second.stderr
    assert (folder / "light" / "run.json").is_file(), second.stderr
    assert "point 1: finished before, not repeated" in second.stderr
    assert point.stat().st_mtime_ns == written
    assert json.loads((folder / "light" / "run.json").read_text())["budget"]["points"]
