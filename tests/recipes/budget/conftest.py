"""A timing cache of the tests' own, and a short training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from karui.measuring.hollow import Hollow
from karui.recipes.budget import timing
from karui.recipes.budget.blocks import HEAVY
from karui.recipes.budget.recorder import ROUNDS, Network, Rounds, Timed
from karui.train import SGD, Training


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tests of this session keep their timings; never the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "timings"
    monkeypatch.setenv("KARUI_CACHE", str(folder))
    return folder


@pytest.fixture
def steady(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, in 8 bits too, take a time by the length of their file, and heavy operators in a network all the same,
    kept in a cache of its own: every machine has the same menu."""
    monkeypatch.setenv("KARUI_CACHE", str(tmp_path / "steady"))

    def by_bytes(blocks: Mapping[str, Timed], threads: int) -> dict[str, Rounds]:
        del threads
        return {name: Rounds(np.full(ROUNDS, 1e-6 + 1e-9 * len(block.data()))) for name, block in blocks.items()}

    def by_kind(file: Timed, threads: int) -> Network:
        del threads
        nodes = Hollow(file.data()).proto.graph.node
        seconds = {node.name: np.full(ROUNDS, 1e-5 if node.op_type in HEAVY else 1e-7) for node in nodes}
        return Network(seconds, np.zeros(ROUNDS))

    monkeypatch.setattr(timing, "profiled", by_bytes)
    monkeypatch.setattr(timing, "network", by_kind)


@pytest.fixture(scope="session")
def training() -> Training:
    """Short, and fit for the small networks here."""
    return Training(epochs=3, batch_size=32, optimizer=SGD(lr=0.05))
