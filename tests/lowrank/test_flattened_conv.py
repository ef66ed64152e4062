"""Flattened networks (survey 15): the conversion of a network, and what the paper shows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import nn

from karui.artifact import load, save
from karui.data import Splits
from karui.errors import SettingError
from karui.layers.flattened import FlattenedConv
from karui.lowrank.flattened_conv import Flattened
from karui.measuring import count
from karui.model import Classification, Model
from karui.recipes import recipe_from_values
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

pytestmark = pytest.mark.paper(15)


def technique(**settings: Any) -> Flattened:
    return Flattened(**{"epochs": 0, **settings})


def three(seed: int = 0, widths: tuple[int, ...] = (16, 32, 48)) -> Model:
    """Three 5x5 convolutions with pooling between them, and a linear layer, for the 8x8 digits."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for depth, (inputs, outputs) in enumerate(pairwise((1, *widths))):
        layers += [nn.Conv2d(inputs, outputs, 5, padding=2), nn.ReLU(), *([nn.MaxPool2d(2)] if depth < 2 else [])]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * widths[-1], 10))
    return Model(net.eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())


def weights_of_convolutions(model: Model) -> int:
    return sum(layer.parameters for layer in count(model).layers if layer.kind == "Conv2d")


def test_every_kind_of_layer_is_replaced_or_refused_by_name() -> None:
    net = nn.Sequential(
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.Conv2d(32, 32, (3, 5), dilation=(2, 1), padding=(2, 2), groups=2, bias=False),
        nn.Conv2d(32, 32, 3, groups=32, padding=1),
        nn.Conv2d(32, 32, 1),
        nn.Conv2d(32, 32, 4, padding="same", padding_mode="circular"),
        nn.Conv2d(32, 32, 4),
        nn.Flatten(),
        nn.Linear(32 * 5 * 5, 10),
    )
    model = Model(net, example=(torch.zeros(2, 16, 16, 16),))
    step = technique()
    told = step.remarks(model)
    two = 32 * (16 + 10) + 96 + 32 * (32 + 10) + 96
    assert told[0] == f"0: 2 sets of flat filters, {16 * 32 * 25 + 32:,} -> {two:,} parameters"
    assert {line.split(":")[0] for line in told if "left as it is" not in line} == {"0", "1", "5"}
    reasons = {line.split(":")[0]: line for line in told if "left as it is" in line}
    assert "would not save parameters" in reasons["2"]
    assert "single position" in reasons["3"]
    assert "pads by 'circular'" in reasons["4"]
    assert "linear layer" in reasons["7"]
    light = step.apply(model, Bench())
    assert light.module(*model.example).shape == (2, 10)
    assert count(light).macs == count(model).macs - sum(c.macs[0] - c.macs[1] for c in step.choose(model))
    for kind, size in ((nn.Conv1d, (9,)), (nn.Conv3d, (5, 5, 5))):
        other = Model(nn.Sequential(kind(16, 16, 5, padding=2)), example=(torch.zeros(2, 16, *size),))
        assert technique(stages=1).apply(other, Bench()).module(*other.example).shape == (2, 16, *size)


def test_the_first_layer_on_raw_pixels_is_left_where_it_would_grow() -> None:
    told = {line.split(":")[0]: line for line in technique().remarks(three())}
    assert "2 sets of flat filters would not save parameters" in told["0"]
    assert all("left as it is" not in told[path] for path in ("3", "6"))


def test_weights_are_drawn_by_the_seed_at_the_gain_of_a_relu() -> None:
    one, two, other = (technique().apply(three(), Bench(seed=seed)).module.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["3.0.0.weight"], other["3.0.0.weight"])
    assert not torch.equal(one["0.weight"], three().module.state_dict()["0.weight"])
    assert float(one["6.0.0.weight"].std()) == pytest.approx((2 / 32) ** 0.5, rel=0.1)
    assert float(one["6.1.0.weight"].std()) == pytest.approx((1 / 48) ** 0.5, rel=0.1)
    torch.testing.assert_close(one["6.0.1.weight"].flatten(1).norm(dim=1), torch.ones(48))


def test_without_drawing_it_starts_from_the_trained_filters() -> None:
    source = FlattenedConv(16, 32, (5, 5), stages=1)
    model = three()
    conv: Any = model.module[3]  # pyright: ignore
    with torch.no_grad():
        conv.weight.copy_(source.kernel())
    light = technique(draw=False, skip=("6",)).apply(model, Bench())
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(light.module(x), model.module(x), rtol=1e-4, atol=1e-5)
    told = {line.split(":")[0]: line for line in technique(draw=False).remarks(model)}
    assert "error of the start 0.00" in told["3"]
    assert "error of the start 0.00" not in told["6"]


def test_by_name_in_a_recipe_saved_loaded_and_exported(tmp_path: Path) -> None:
    recipe = recipe_from_values({"step": [{"technique": "flattened_conv", "epochs": 0}]})
    light = recipe.steps[0].apply(three(), Bench())
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    again = load(tmp_path / "light", base=three().module)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(again.module.eval()(x), light.module.eval()(x))


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"stages": 0}, "stages"), ({"share": -0.5}, "share"), ({"epochs": -1}, "epochs"), ({"skip": ("99",)}, "99")],
)
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings).apply(three(), Bench())


@pytest.mark.effect
@pytest.mark.slow
def test_two_sets_come_within_a_point_of_the_dense_network_at_a_fifth_of_its_weights(digits: Splits) -> None:
    """One set is no better on the average; that it is clearly worse on colour pictures is for the benchmark."""
    steps = {"dense": None, "two": technique(), "one": technique(stages=1)}
    scores: dict[str, list[float]] = {name: [] for name in steps}
    for seed in range(3):
        training = Training(epochs=12, batch_size=64, optimizer=Adam(lr=1e-2), schedule=Cosine())
        bench = Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed)
        for name, step in steps.items():
            model = three(seed) if step is None else step.apply(three(seed), bench)
            if name == "two":
                assert weights_of_convolutions(three()) > 5 * weights_of_convolutions(model)
            scores[name].append(100 * bench.evaluate(bench.fit(model), "test").value)
    assert mean(scores["two"]) > mean(scores["dense"]) - 1, scores
    assert mean(scores["one"]) < mean(scores["two"]) + 0.5, scores
