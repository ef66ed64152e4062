"""Low-rank filters from scratch (survey 21): the conversion of a network, and what the paper shows."""

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
from karui.errors import NeedError, SettingError
from karui.layers.composite import CompositeConv, low_rank_parts
from karui.lowrank.low_rank_filters import LowRankFilters
from karui.measuring import count
from karui.model import Classification, Model
from karui.recipes import recipe_from_values
from karui.technique import Bench
from karui.train import SGD, Adam, Cosine, Training

pytestmark = pytest.mark.paper(21)


def technique(**settings: Any) -> LowRankFilters:
    return LowRankFilters(**{"epochs": 0, **settings})


def vgg(seed: int = 0, widths: tuple[int, ...] = (24, 24, 32, 32, 48, 48)) -> Model:
    """Six 3x3 convolutions with batch normalisation, pooled twice, and global max pooling, for the 8x8 digits."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for depth, (inputs, outputs) in enumerate(pairwise((1, *widths))):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if depth in (1, 3) else []
    net = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    return Model(net.eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())


def test_every_kind_of_layer_is_replaced_or_refused_by_name() -> None:
    net = nn.Sequential(
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Conv2d(16, 16, (3, 5), dilation=(2, 1), padding=(2, 2), groups=2, bias=False),
        nn.Conv2d(16, 16, 3, groups=16, padding=1),
        nn.Conv2d(16, 16, 1),
        nn.Conv2d(16, 16, (1, 5), padding=(0, 2)),
        nn.Conv2d(16, 8, 3, padding="same", padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 10),
    )
    model = Model(net, example=(torch.zeros(2, 8, 16, 16),))
    step = technique(join=False)
    told = step.remarks(model)
    assert told[0] == "0: filters 8 of 1x3 + 8 of 3x1, 1,168 -> 400 parameters"
    assert {line.split(":")[0] for line in told if "left as it is" not in line} == {"0", "1", "5"}
    reasons = {line.split(":")[0]: line for line in told if "left as it is" in line}
    assert "1 filter a group cannot be split" in reasons["2"]
    assert all("fewer than two dimensions" in reasons[path] for path in ("3", "4"))
    assert "linear layer" in reasons["7"]
    light = step.apply(model, Bench())
    assert light.module(*model.example).shape == (2, 10)
    assert count(light).macs == count(model).macs - sum(c.macs[0] - c.macs[1] for c in step.choose(model))
    one = Model(nn.Sequential(nn.Conv1d(4, 8, 3)), example=(torch.zeros(1, 4, 9),))
    assert "fewer than two dimensions" in step.remarks(one)[0]
    three = Model(nn.Sequential(nn.Conv3d(8, 9, 3, padding=1)), example=(torch.zeros(1, 8, 5, 5, 5),))
    assert "3 of 1x1x3 + 3 of 1x3x1 + 3 of 3x1x1" in step.remarks(three)[0]


def test_a_join_that_saves_nothing_is_told() -> None:
    model = Model(nn.Sequential(nn.Conv2d(2, 32, 3)), example=(torch.zeros(1, 2, 8, 8),))
    assert "joined would not save parameters" in technique().remarks(model)[0]
    same = technique(epochs=1).apply
    with pytest.raises(NeedError):
        same(model, Bench())
    assert technique().apply(model, Bench()).module is model.module


def test_twice_the_filters_and_shares_are_those_asked_for() -> None:
    light: Any = technique(filters=2.0, point=0.5).apply(vgg(), Bench()).module
    layer: Any = light[10]
    assert isinstance(layer, CompositeConv)
    assert [conv.out_channels for conv in layer._filters()] == [16, 16, 32]
    assert layer.join is not None
    assert layer.join.out_channels == 32


def test_shares_that_leave_a_direction_without_filters_are_refused_in_the_plan() -> None:
    for settings, outputs in (({"point": 0.9}, 4), ({"point": 0.6}, 3), ({"full": 0.5}, 2)):
        model = Model(nn.Conv2d(16, outputs, 3, padding=1), example=(torch.zeros(2, 16, 8, 8),))
        assert "cannot be split between 2 directions" in technique(**settings).remarks(model)[0]
        assert technique(**settings).apply(model, Bench()).parameters == model.parameters


def test_share_takes_those_that_do_most_work_and_skip_leaves() -> None:
    choices = {choice.path: choice for choice in technique(share=0.4).choose(vgg())}
    taken = [path for path, choice in choices.items() if choice.replaced]
    work = {layer.path: layer.macs for layer in count(vgg()).layers if layer.kind == "Conv2d"}
    assert len(taken) == 2
    left = [path for path, choice in choices.items() if "less work" in choice.reason]
    assert min(work[path] for path in taken) >= max(work[path] for path in left)
    assert "named in skip" in technique(skip=(taken[0],)).remarks(vgg())[-2]


def test_the_whole_network_is_drawn_anew_by_the_seed_and_the_composite_rule_has_the_last_word() -> None:
    model = vgg()
    one, two, other = (technique().apply(model, Bench(seed=seed)).module.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["22.weight"], model.module.state_dict()["22.weight"])
    assert not torch.equal(one["3.join.weight"], other["3.join.weight"])
    wide = Model(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)), example=(torch.zeros(1, 64, 4, 4),))
    layer: Any = technique(full=0.25).apply(wide, Bench()).module[0]  # pyright: ignore
    told = (1 / (3 * 48 + 9 * 16)) ** 0.5
    for conv in layer.convs:
        assert float(conv.weight.detach().std()) == pytest.approx(told, rel=0.03)


def test_other_layers_keep_their_weights_without_drawing() -> None:
    model = vgg()
    light = technique(draw=False).apply(model, Bench())
    last = len(list(model.module)) - 1  # pyright: ignore
    assert torch.equal(light.module[last].weight, model.module[last].weight)  # pyright: ignore


def test_by_name_in_a_recipe_saved_loaded_and_exported(tmp_path: Path) -> None:
    recipe = recipe_from_values({"step": [{"technique": "low_rank_filters", "full": 0.25, "epochs": 0}]})
    light = recipe.steps[0].apply(vgg(), Bench())
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    again = load(tmp_path / "light", base=vgg().module)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(again.module.eval()(x), light.module.eval()(x))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"filters": 0.0}, "filters"), ({"join": False, "filters": 2.0}, "filters"), ({"full": 1.0}, "full"),
        ({"point": -0.1}, "point"), ({"full": 0.6, "point": 0.5}, "full and point"), ({"share": 1.5}, "share"),
        ({"epochs": -1}, "epochs"), ({"skip": ("conv9",)}, "conv9"),
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings).apply(vgg(), Bench())


@pytest.mark.effect
@pytest.mark.slow
def test_joined_filters_match_the_dense_network_at_less_than_sixty_percent_of_its_work(digits: Splits) -> None:
    """That full filters beat none is for the benchmark: on the digits all three are within a few pictures."""
    steps = {"dense": None, "joined": technique(), "with full": technique(full=0.25)}
    scores: dict[str, list[float]] = {name: [] for name in steps}
    for seed in range(3):
        training = Training(epochs=6, batch_size=64, optimizer=Adam(lr=1e-2), schedule=Cosine())
        bench = Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed)
        for name, step in steps.items():
            model = vgg(seed) if step is None else step.apply(vgg(seed), bench)
            if name == "joined":
                assert count(model).macs < 0.6 * count(vgg()).macs
            scores[name].append(100 * bench.evaluate(bench.fit(model), "test").value)
    assert mean(scores["joined"]) > mean(scores["dense"]) - 0.7, scores
    assert mean(scores["with full"]) > mean(scores["joined"]) - 0.7, scores


def deep(alone: bool, seed: int) -> Model:
    """Ten composite layers without normalisation, drawn by their own rule, or by He's for each group alone."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for depth in range(10):
        layer = CompositeConv(16 if depth else 1, low_rank_parts((3, 3), 16, full=0.25))
        for conv in layer.convs if alone else []:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # pyright: ignore
        layers += [layer, nn.ReLU(), *([nn.MaxPool2d(2)] if depth in (2, 5) else [])]
    net = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return Model(net.eval(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())


@pytest.mark.effect
@pytest.mark.slow
def test_the_composite_rule_trains_deep_networks_where_hes_for_each_group_does_not(digits: Splits) -> None:
    def trained(alone: bool, seed: int) -> float:
        training = Training(epochs=6, batch_size=32, optimizer=SGD(lr=0.02, weight_decay=0.0), schedule=Cosine())
        bench = Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed)
        return 100 * bench.evaluate(bench.fit(deep(alone, seed)), "test").value

    own, alone = ([trained(rule, seed) for seed in range(3)] for rule in (False, True))
    assert mean(own) > 80, own
    assert mean(own) > mean(alone) + 5, (own, alone)
