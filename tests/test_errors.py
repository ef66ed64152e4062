"""Errors say what was asked and what to do."""

from __future__ import annotations

import pytest

from karui.errors import KaruiError, SettingError, UsageError, did_you_mean, require


def test_an_error_carries_its_remedy() -> None:
    error = KaruiError("ratio is 2.", "Give a share.")
    assert (error.message, error.hint, str(error)) == ("ratio is 2.", "Give a share.", "ratio is 2. Give a share.")


def test_require_is_silent_when_the_condition_holds() -> None:
    require(True, "never said")
    with pytest.raises(SettingError, match="said"):
        require(False, "said")


def test_an_unknown_word_is_answered_by_the_closest_one() -> None:
    with pytest.raises(UsageError, match="Did you mean l1_filter_pruning"):
        did_you_mean("l1_filter_prunning", ["l1_filter_pruning", "tucker2"], "Technique")
    with pytest.raises(UsageError, match="Known: tucker2"):
        did_you_mean("zzz", ["tucker2"], "Technique")


def test_every_name_at_the_front_door_opens() -> None:
    import karui

    for name in dir(karui):
        assert getattr(karui, name) is not None or name.startswith("__"), name
