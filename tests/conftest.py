"""What all tests share: data, a small network, one thread, and `--paper N`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from torch import nn

from karui.data import Splits, load_data
from karui.model import Classification, Model
from karui.recipes.budget import menu

# How long an example takes says what else the machine does, not whether the test is right.
hypothesis.settings.register_profile("karui", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("karui")
torch.set_num_threads(1)  # results then do not depend on the number of cores, and parallel test runs do not fight


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--paper",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="run only what shows paper N of the survey (may be given several times)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = set(config.getoption("--paper"))
    if not wanted:
        return
    shown = [item for item in items if wanted & {n for mark in item.iter_markers("paper") for n in mark.args}]
    config.hook.pytest_deselected(items=[item for item in items if item not in shown])
    items[:] = shown


@pytest.fixture(scope="session")
def digits() -> Splits:
    """The built-in digits: 1,080 to train, 120 to validate, 597 to test."""
    return load_data("digits")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and pretrained weights; the test is skipped where it is absent."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("KARUI_DATA", beside))
    if not (folder / "README.md").is_file():
        pytest.skip(f"no real data at {folder}; set KARUI_DATA to its folder")
    return folder


@pytest.fixture
def short_menu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the techniques that a budget may choose from two, one that cuts and one that replaces: others take longer."""
    kept = [entry for entry in menu.techniques() if entry.slug in {"l1_filter_pruning", "svd_restructuring"}]
    monkeypatch.setattr(menu, "techniques", lambda: kept)


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with batch normalisation on 8x8 gray pictures, pooled once between them and at the end."""

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 32), classes: int = 10) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = nn.Conv2d(1, first, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(second)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(third)
        self.linear = nn.Linear(third, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = nn.functional.max_pool2d(x, 2)
        x = torch.relu(self.bn3(self.conv3(x)))
        return self.linear(x.amax((2, 3)))


@pytest.fixture
def small_cnn() -> Callable[..., Model]:
    """`small_cnn(widths=(16, 32, 32), seed=0)`: an untrained CNN for the digits, in evaluation mode, as a Model."""

    def make(widths: tuple[int, int, int] = (16, 32, 32), classes: int = 10, seed: int = 0) -> Model:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = SmallCNN(widths, classes).eval()
        return Model(net, example=(torch.zeros(1, 1, 8, 8),), task=Classification())

    return make
