"""A timing cache of the tests' own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from karui.recipes.budget import timing
from karui.recipes.budget.cache import Measured
from karui.recipes.budget.recorder import Timed


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tests of this session keep their timings; never the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "timings"
    monkeypatch.setenv("KARUI_CACHE", str(folder))
    return folder


@pytest.fixture
def steady(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, in 8 bits too, take a time by the length of their file, kept in a cache of its own: every machine has the
    same menu."""
    monkeypatch.setenv("KARUI_CACHE", str(tmp_path / "steady"))

    def by_bytes(blocks: Mapping[str, Timed], threads: int) -> dict[str, Measured]:
        del threads
        return {name: Measured(1e-6 + 1e-9 * len(block.data())) for name, block in blocks.items()}

    monkeypatch.setattr(timing, "profiled", by_bytes)
