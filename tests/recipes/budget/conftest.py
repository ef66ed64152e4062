"""A timing cache of the tests' own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tests of this session keep their timings; never the user's cache."""
    folder = tmp_path_factory.getbasetemp() / "timings"
    monkeypatch.setenv("KARUI_CACHE", str(folder))
    return folder
