"""What watches a training does not change it, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from karui.data import Splits
from karui.errors import NeedError
from karui.model import Model
from karui.train import Adam, Constant, Training, fit
from karui.train.watching import Snapshot, ValidationLosses, mean_loss

SHORT = Training(epochs=2, batch_size=120, optimizer=Adam(lr=1e-2), schedule=Constant())  # 9 steps an epoch


def test_watching_changes_nothing_and_goes_with_the_training(
    digits: Splits, small_cnn: Callable[..., Model], tmp_path: Path
) -> None:
    model = small_cnn((4, 4, 4))
    plain = fit(model, digits.train, training=SHORT).module.state_dict()
    for _ in range(2):  # the second run finds the first one's end in its checkpoint
        watch = ValidationLosses(data=digits.validation, task=model.task, points=4)
        trained = fit(model, digits.train, training=SHORT, influence=watch, checkpoints=tmp_path)
        assert trained.module.state_dict().keys() == plain.keys()
        assert all(torch.equal(trained.module.state_dict()[name], value) for name, value in plain.items())
        assert watch.steps == [4, 9, 14, 18]
        assert watch.losses[-1] == pytest.approx(mean_loss(trained.module, digits.validation, model.task))
        assert watch.best_step == watch.steps[watch.losses.index(min(watch.losses))]


def test_a_snapshot_is_the_state_after_its_step(
    digits: Splits, small_cnn: Callable[..., Model], tmp_path: Path
) -> None:
    model = small_cnn((4, 4, 4))
    one_epoch = fit(model, digits.train, training=replace(SHORT, epochs=1))
    for step, wanted in ((0, model), (9, one_epoch)):
        for _ in range(2):
            snapshot = Snapshot(step)
            trained = fit(model, digits.train, training=SHORT, influence=snapshot, checkpoints=tmp_path)
            assert snapshot.state.keys() == model.module.state_dict().keys() == trained.module.state_dict().keys()
            for name, value in wanted.module.state_dict().items():
                assert torch.equal(snapshot.state[name], value), name


def test_a_loss_needs_a_task(digits: Splits, small_cnn: Callable[..., Model]) -> None:
    with pytest.raises(NeedError, match="no task"):
        mean_loss(small_cnn().module, digits.validation, None)
