"""Training settings: to a recipe and back, what decays, how the learning rate moves, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from karui.data import Compose, HorizontalFlip, RandomCrop
from karui.errors import SettingError
from karui.recipes.values import build
from karui.train import SGD, Adam, AdamW, Constant, Cosine, Steps, Training
from karui.train.training import parameter_groups

OPTIMIZERS = st.one_of(
    st.builds(SGD, lr=st.floats(1e-5, 10), momentum=st.floats(0, 0.99), nesterov=st.booleans()),
    st.builds(Adam, lr=st.floats(1e-5, 10), betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99))),
    st.builds(AdamW, weight_decay=st.floats(0, 1)),
)
SCHEDULES = st.one_of(
    st.just(Constant()),
    st.builds(Cosine, warmup=st.floats(0, 0.99)),
    st.builds(Steps, gamma=st.floats(0.01, 2)),
    st.just(Steps(milestones=())),
)
AUGMENTS = st.sampled_from([None, RandomCrop(2), Compose((RandomCrop(4), HorizontalFlip(0.25)))])


@given(
    st.builds(
        Training, epochs=st.integers(0, 300), optimizer=OPTIMIZERS, schedule=SCHEDULES, augment=AUGMENTS,
        clip_norm=st.none() | st.floats(0.1, 10), decay_all=st.booleans(), channels_last=st.booleans(),
        precision=st.sampled_from(["32-true", "bf16-mixed"]), devices=st.integers(1, 8),
    )
)  # fmt: skip
def test_settings_go_through_json_and_come_back(training: Training) -> None:
    assert build(Training, json.loads(json.dumps(training.to_json())), "training") == training


def own(batch: Tensor, generator: torch.Generator) -> Tensor:
    return batch


def test_a_function_of_the_users_own_is_told_by_its_name() -> None:
    assert Training(augment=own).to_json()["augment"].endswith("test_training:own")
    assert Training(augment=nn.Identity()).to_json()["augment"] == "torch.nn.modules.linear:Identity"


@given(SCHEDULES, st.integers(1, 500))
def test_every_schedule_begins_above_nothing_and_stays_finite(schedule: Any, steps: int) -> None:
    factors = [schedule.factor(step, steps) for step in range(steps)]
    assert factors[0] > 0
    assert all(0 <= factor < math.inf for factor in factors)
    assert not isinstance(schedule, Cosine) or max(factors) <= 1


def test_cosine_rises_then_falls() -> None:
    factors = [Cosine(warmup=0.1).factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert factors[55] == pytest.approx(0.5)
    assert factors[-1] < 0.001


def test_steps_fall_at_their_shares() -> None:
    schedule = Steps(milestones=(0.5, 0.75), gamma=0.1)
    assert [schedule.factor(step, 8) for step in (0, 3, 4, 5, 6, 7)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_only_weights_of_ordinary_layers_decay() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1), nn.Linear(8, 2))
    nn.utils.parametrizations.weight_norm(net[2])
    parameters = list(net.parameters())
    decayed, spared = parameter_groups(net, parameters, 0.1, decay_all=False)
    names = {id(p): name for name, p in net.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {
        "2.parametrizations.weight.original0",
        "2.parametrizations.weight.original1",
        "3.weight",
    }
    (everything,) = parameter_groups(net, parameters, 0.1, decay_all=True)
    assert len(everything["params"]) == len(parameters) == len(decayed["params"]) + len(spared["params"])


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (SGD(), torch.optim.SGD),
        (Adam(), torch.optim.Adam),
        (AdamW(), torch.optim.AdamW),
        (SGD(momentum=0.0), torch.optim.SGD),
    ],
)
def test_optimizers_are_made_as_set(settings: Any, kind: type) -> None:
    (group,) = settings.make([{"params": [nn.Parameter(torch.zeros(2))]}]).param_groups
    assert isinstance(settings.make([{"params": [nn.Parameter(torch.zeros(2))]}]), kind)
    assert (group["lr"], group["weight_decay"]) == (settings.lr, settings.weight_decay)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Training(epochs=-1), "epochs is -1"),
        (lambda: Training(batch_size=0), "batch_size is 0"),
        (lambda: Training(devices=0), "devices is 0"),
        (lambda: Training(clip_norm=0.0), "clip_norm is 0.0"),
        (lambda: Training(checkpoint_seconds=-1), "checkpoint_seconds is -1"),
        (lambda: Training(precision="bf16"), "precision 'bf16' is not known. Did you mean bf16-mixed"),
        (lambda: Training(strategy="dpp"), "strategy 'dpp' is not known. Did you mean ddp"),
        (lambda: SGD(lr=0), "lr is 0"),
        (lambda: SGD(momentum=1.0), "momentum is 1.0"),
        (lambda: AdamW(weight_decay=-1), "weight_decay is -1"),
        (lambda: Adam(betas=(0.9, 1.0)), "betas is (0.9, 1.0)"),
        (lambda: Cosine(warmup=1), "warmup is 1"),
        (lambda: Steps(milestones=(0.8, 0.5)), "milestones is (0.8, 0.5)"),
        (lambda: Steps(milestones=(30.0,)), "milestones is (30.0,)"),
        (lambda: Steps(gamma=0), "gamma is 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(SettingError) as caught:
        make()
    assert words in str(caught.value)
