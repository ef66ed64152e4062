"""Augmentation: every picture is a window of the padded one; the generator decides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from karui.data import Compose, HorizontalFlip, RandomCrop
from karui.errors import SettingError


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))


@given(SHAPES, st.integers(0, 3), st.integers(0, 99))
def test_a_crop_is_a_window_of_the_padded_picture(shape: tuple[int, int, int, int], padding: int, seed: int) -> None:
    pictures, _, height, width = shape
    batch = torch.rand(shape, generator=drawn(0))
    cropped = RandomCrop(padding)(batch, drawn(seed))
    padded = functional.pad(batch, [padding] * 4)
    for number in range(pictures):
        windows = [
            padded[number, :, row : row + height, column : column + width]
            for row in range(2 * padding + 1)
            for column in range(2 * padding + 1)
        ]
        assert any(torch.equal(cropped[number], window) for window in windows)


def test_all_shifts_occur() -> None:
    batch = torch.zeros(400, 1, 3, 3)
    batch[:, :, 1, 1] = 1
    positions = RandomCrop(1)(batch, drawn(0)).flatten(1).argmax(1)
    assert positions.unique().tolist() == list(range(9))


@given(st.integers(0, 99))
def test_a_flip_mirrors_some_and_leaves_the_others(seed: int) -> None:
    batch = torch.rand(64, 2, 3, 4, generator=drawn(1))
    flipped = HorizontalFlip(0.5)(batch, drawn(seed))
    mirrored = (flipped == batch.flip(-1)).flatten(1).all(1)
    same = (flipped == batch).flatten(1).all(1)
    assert bool((mirrored ^ same).all())
    assert 8 < mirrored.sum() < 56
    assert torch.equal(HorizontalFlip(0.0)(batch, drawn(seed)), batch)


def test_the_same_generator_draws_the_same_and_the_input_stays() -> None:
    batch = torch.rand(8, 1, 8, 8, generator=drawn(2))
    before = batch.clone()
    both = Compose((RandomCrop(2), HorizontalFlip()))
    assert torch.equal(both(batch, drawn(3)), both(batch, drawn(3)))
    assert not torch.equal(both(batch, drawn(3)), both(batch, drawn(4)))
    assert torch.equal(batch, before)
    assert torch.equal(both(batch, drawn(3)), HorizontalFlip()(*_after_crop(batch)))


def _after_crop(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Generator]:
    generator = drawn(3)
    return RandomCrop(2)(batch, generator), generator


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(SettingError, match="padding is -1"):
        RandomCrop(-1)
    with pytest.raises(SettingError, match="share is 2"):
        HorizontalFlip(2)
