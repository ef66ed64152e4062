"""Garbage collection while a network is cut."""

import gc
import weakref

import pytest
import torch
from torch import nn

from karui.model import Model, coupled_groups, remove_units
from karui.model.collecting import newest_alone


class Knot:
    """An object that only a cycle keeps."""

    def __init__(self) -> None:
        self.itself = self


def test_what_was_there_is_left_aside_and_what_is_made_is_collected() -> None:
    gc.collect()
    old = Knot()
    held = weakref.ref(old)
    with newest_alone():
        del old
        new = weakref.ref(Knot())
        gc.collect()
        assert new() is None
        assert held() is not None  # older than the block, so not looked at yet
    gc.collect()
    assert held() is None


def test_a_failure_ends_it_and_a_block_within_it_does_not() -> None:
    with pytest.raises(ZeroDivisionError), newest_alone():
        raise ZeroDivisionError
    assert gc.get_freeze_count() == 0
    with newest_alone():
        with newest_alone():
            pass
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_what_somebody_froze_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    try:
        with newest_alone():
            pass
        assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()


def test_a_cut_does_not_look_through_all_that_was_imported() -> None:
    model = Model(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), example=(torch.zeros(1, 4),))
    seen: list[int] = []

    def watch(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            seen.append(len(gc.get_objects()))

    class Collects(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gc.collect()
            return x

    model.module.add_module("3", Collects())
    everything = len(gc.get_objects())
    gc.callbacks.append(watch)
    try:
        remove_units(model, {"0": torch.tensor([1])}, analysis=coupled_groups(model))
    finally:
        gc.callbacks.remove(watch)
    assert seen
    assert max(seen) < everything / 4
