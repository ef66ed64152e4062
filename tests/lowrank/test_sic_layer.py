"""Networks of SIC layers (survey 20): the conversion of a network, and what the paper shows."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import nn

from karui.artifact import load, save
from karui.data import Splits
from karui.errors import SettingError
from karui.lowrank.sic_layer import SicLayers
from karui.measuring import count
from karui.model import Classification, Model
from karui.recipes import recipe_from_values
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

pytestmark = pytest.mark.paper(20)


def technique(**settings: Any) -> SicLayers:
    return SicLayers(**{"epochs": 0, **settings})


def stage(seed: int = 0, n: int = 32, k: int = 5, layers: int = 2) -> Model:
    """A 3x3 stem and a stage of k x k convolutions of n channels, pooled in the middle, for the 8x8 digits."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = [nn.Conv2d(1, n, 3, padding=1, bias=False), nn.BatchNorm2d(n), nn.ReLU()]
    for number in range(layers):
        parts += [nn.Conv2d(n, n, k, padding=k // 2, bias=False), nn.BatchNorm2d(n), nn.ReLU()]
        parts += [nn.MaxPool2d(2)] if number == layers // 2 - 1 else []
    net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n, 10))
    return Model(net.eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())


def trained(model: Model, digits: Splits, seed: int, epochs: int) -> float:
    training = Training(epochs=epochs, batch_size=64, optimizer=Adam(lr=1e-2), schedule=Cosine())
    bench = Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed)
    return 100 * bench.evaluate(bench.fit(model), "test").value


def test_every_kind_of_layer_is_replaced_or_refused_by_name() -> None:
    net = nn.Sequential(
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.Conv2d(32, 32, (3, 5), dilation=(2, 1), padding=(2, 2), groups=2, bias=False),
        nn.Conv2d(32, 32, 3, groups=32, padding=1),
        nn.Conv2d(32, 32, 1),
        nn.Conv2d(32, 32, 4),
        nn.Conv2d(32, 32, 3, padding="same", padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(32 * 5 * 5, 10),
    )
    model = Model(net, example=(torch.zeros(2, 16, 16, 16),))
    told = {line.split(":")[0]: line for line in technique().remarks(model)}
    assert {path for path, line in told.items() if "left as it is" not in line} == {"0", "1", "5"}
    assert "would not save parameters" in told["2"]
    assert "projection already" in told["3"]
    assert "kernel is even" in told["4"]
    assert "linear layer" in told["7"]
    light = technique().apply(model, Bench())
    assert light.module(*model.example).shape == (2, 10)
    assert count(light).macs == count(model).macs - sum(c.macs[0] - c.macs[1] for c in technique().choose(model))
    assert not light.module[0][0].residual  # pyright: ignore
    assert light.module[5][0].residual  # pyright: ignore
    for kind, size in ((nn.Conv1d, (9,)), (nn.Conv3d, (5, 5, 5))):
        other = Model(nn.Sequential(kind(16, 16, 5, padding=2)), example=(torch.zeros(2, 16, *size),))
        assert technique(bases=1).apply(other, Bench()).module(*other.example).shape == (2, 16, *size)


def test_the_seed_draws_the_weights_and_skip_and_share_leave_layers() -> None:
    one, two, other = (technique().apply(stage(), Bench(seed=seed)).module.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["3.0.depthwise.weight"], other["3.0.depthwise.weight"])
    assert float(one["3.1.depthwise.weight"].std()) == pytest.approx(1 / 5, rel=0.1)
    choices = {choice.path: choice for choice in technique(skip=("3",)).choose(stage())}
    assert choices["3"].reason == "named in skip"
    assert [choice.path for choice in technique(share=0.5).choose(stage()) if choice.replaced] == ["3"]


def test_by_name_in_a_recipe_saved_loaded_and_exported(tmp_path: Path) -> None:
    recipe = recipe_from_values({"step": [{"technique": "sic_layer", "epochs": 0}]})
    light = recipe.steps[0].apply(stage(), Bench())
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    again = load(tmp_path / "light", base=stage().module)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(again.module.eval()(x), light.module.eval()(x))


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"bases": 0}, "bases"), ({"share": -0.5}, "share"), ({"epochs": -1}, "epochs"), ({"skip": ("99",)}, "99")],
)
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings).apply(stage(), Bench())


@pytest.mark.effect
@pytest.mark.slow
def test_two_layers_for_one_convolution_come_within_a_point_at_a_quarter_of_the_work(digits: Splits) -> None:
    dense, light = [], []
    for seed in range(3):
        model = stage(seed)
        converted = technique().apply(model, Bench(seed=seed))
        assert count(model).macs > 4 * count(converted).macs
        dense.append(trained(model, digits, seed, epochs=6))
        light.append(trained(converted, digits, seed, epochs=6))
    assert mean(light) > mean(dense) - 1, (light, dense)


@pytest.mark.effect
@pytest.mark.slow
def test_deep_networks_need_the_residual_sums(digits: Splits) -> None:
    scores: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(3):
        for residual in (True, False):
            step = technique(residual=residual)
            model = step.apply(stage(seed, n=16, k=3, layers=8), Bench(seed=seed))
            scores[residual].append(trained(model, digits, seed, epochs=4))
    assert mean(scores[True]) > mean(scores[False]) + 2, scores
