"""Networks with spatial bottlenecks (survey 20): the conversion of a network, and what the paper shows."""

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
from karui.lowrank.spatial_bottleneck import SpatialBottleneck
from karui.measuring import count
from karui.model import Classification, Model
from karui.recipes import recipe_from_values
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

pytestmark = pytest.mark.paper(20)


def technique(**settings: Any) -> SpatialBottleneck:
    return SpatialBottleneck(**{"epochs": 0, **settings})


def stage(seed: int = 0) -> Model:
    """A 3x3 stem and a stage of two 5x5 convolutions of 32 channels, pooled between them, for the 8x8 digits."""
    torch.manual_seed(seed)
    parts: list[nn.Module] = [nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    for _ in range(2):
        parts += [nn.Conv2d(32, 32, 5, padding=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    net = nn.Sequential(
        *parts[:6], nn.MaxPool2d(2), *parts[6:], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
    )
    return Model(net.eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())


def test_every_kind_of_layer_is_replaced_or_refused_by_name() -> None:
    net = nn.Sequential(
        nn.Conv2d(16, 16, 5, padding=2),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.Conv2d(16, 36, 3, padding=1),
        nn.Conv2d(36, 36, 3, groups=2, padding=1),
        nn.Conv2d(36, 36, 3, padding="same", dilation=2, bias=False),
        nn.Conv2d(36, 36, 1),
        nn.Flatten(),
        nn.Linear(36 * 49, 10),
    )
    model = Model(net, example=(torch.zeros(2, 16, 13, 13),))
    told = {line.split(":")[0]: line for line in technique().remarks(model)}
    assert {path for path, line in told.items() if "left as it is" not in line} == {"0", "4"}
    for path, reason in (("1", "size"), ("2", "width changes (16 to 36)"), ("3", "groups"), ("7", "no map")):
        assert reason in told[path]
    assert "would not save parameters" in told["5"]
    light = technique().apply(model, Bench())
    assert light.module(*model.example).shape == (2, 10)
    assert count(light).macs == count(model).macs - sum(c.macs[0] - c.macs[1] for c in technique().choose(model))
    changed: Any = technique(changing=True, bases=2).apply(model, Bench())
    assert [layer.residual for layer in changed.module[2]] == [False, True]
    for kind, size in ((nn.Conv1d, (9,)), (nn.Conv3d, (5, 5, 5))):
        other = Model(nn.Sequential(kind(16, 16, 5, padding=2)), example=(torch.zeros(2, 16, *size),))
        assert technique(stride=3).apply(other, Bench()).module(*other.example).shape == (2, 16, *size)


def test_by_name_in_a_recipe_saved_loaded_and_exported(tmp_path: Path) -> None:
    recipe = recipe_from_values({"step": [{"technique": "spatial_bottleneck", "stride": 3, "epochs": 0}]})
    light = recipe.steps[0].apply(stage(), Bench())
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    again = load(tmp_path / "light", base=stage().module)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(again.module.eval()(x), light.module.eval()(x))


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"bases": 0}, "bases"), ({"stride": 1}, "stride"), ({"share": -0.5}, "share"), ({"epochs": -1}, "epochs")],
)
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings)


@pytest.mark.effect
@pytest.mark.slow
def test_between_standard_layers_it_comes_within_one_and_a_half_points(digits: Splits) -> None:
    """In the place of one convolution of two, as the paper interleaves; in that of both nothing crosses the patches."""
    dense, light, both = [], [], []
    for seed in range(3):
        training = Training(epochs=8, batch_size=64, optimizer=Adam(lr=1e-2), schedule=Cosine())
        bench = Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed)
        models = stage(seed), technique(share=0.5).apply(stage(seed), bench), technique().apply(stage(seed), bench)
        for scores, model in zip((dense, light, both), models, strict=True):
            scores.append(100 * bench.evaluate(bench.fit(model), "test").value)
    assert mean(light) > mean(dense) - 1.5, (light, dense)
    assert mean(both) < mean(light), (both, light)
