"""SVD restructuring (survey 11): what must hold, and what the paper shows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karui.architectures.perceptron import perceptron
from karui.data import Splits
from karui.errors import NeedError, SettingError
from karui.layers.factored import FactoredConv, FactoredLinear
from karui.lowrank._common import fine_tune
from karui.lowrank.svd_restructuring import SvdRestructuring
from karui.measuring import count
from karui.model import Classification, Model, Note, edit_from_json, edit_to_json
from karui.numerics.svd import truncated_svd
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

pytestmark = pytest.mark.paper(11)


def three_hidden(width: int = 256) -> nn.Sequential:
    """On the 8x8 digits."""
    return perceptron((64, width, width, width, 10))


@pytest.fixture
def mlp() -> Model:
    torch.manual_seed(0)
    return Model(three_hidden(48), example=(torch.rand(2, 1, 8, 8),), task=Classification())


def run(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(x)


def technique(**settings: Any) -> SvdRestructuring:
    return SvdRestructuring(**{"epochs": 0, **settings})


def full_rank_but_saving(rows: int, columns: int, rank: int) -> nn.Linear:
    """A linear layer of exactly that rank, so that the restructured one can be exact and smaller."""
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, rank) @ torch.randn(rank, columns) / rank**0.5)
    return layer


def test_the_rank_of_the_weight_reproduces_the_output() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(full_rank_but_saving(40, 30, 6), nn.ReLU(), full_rank_but_saving(20, 40, 5))
    model = Model(net, example=(torch.randn(4, 30),))
    x = torch.randn(50, 30)
    for settings in ({"energy": 0.999999}, {"rank": 6}, {"rank": 6, "balanced": True}):
        light = technique(**settings).apply(model, Bench())
        assert isinstance(light.module[0], FactoredLinear)  # pyright: ignore[reportIndexIssue]
        assert float((run(light, x) - run(model, x)).norm() / run(model, x).norm()) < 1e-5


def test_error_of_each_weight_is_its_discarded_spectrum(mlp: Model) -> None:
    light = technique(rank=7).apply(mlp, Bench())
    for path in ("1", "3", "5", "7"):
        layer: Any = light.module.get_submodule(path)
        if isinstance(layer, FactoredLinear):
            old: Any = mlp.module.get_submodule(path)
            weight = old.weight.detach().double()
            difference = weight - layer.dense().weight.detach().double()
            spectrum = torch.linalg.svdvals(weight)
            assert float(difference.square().sum()) == pytest.approx(float(spectrum[7:].square().sum()), rel=1e-4)
            assert float(torch.linalg.matrix_norm(difference, 2)) == pytest.approx(float(spectrum[7]), rel=1e-4)


def test_parameters_bias_and_linearity(mlp: Model) -> None:
    light = technique(rank=5).apply(mlp, Bench())
    layer: Any = light.module.get_submodule("3")
    assert sum(p.numel() for p in layer.parameters()) == 5 * (48 + 48) + 48
    assert [type(part) for part in layer] == [nn.Linear, nn.Linear]
    assert layer[0].bias is None
    assert torch.equal(layer[1].bias, mlp.module.get_submodule("3").bias)
    x, y, a = torch.randn(6, 48), torch.randn(6, 48), 0.3
    with torch.no_grad():
        torch.testing.assert_close(layer(a * x + (1 - a) * y), a * layer(x) + (1 - a) * layer(y), rtol=1e-5, atol=1e-5)


def test_layers_that_would_grow_are_left_and_reported(mlp: Model) -> None:
    light = technique(rank=9).apply(mlp, Bench())
    head: Any = light.module.get_submodule("7")
    assert type(head) is nn.Linear
    note: Any = light.lineage[-1]
    assert isinstance(note, Note)
    left = {entry["layer"]: entry["reason"] for entry in note.settings["left"]}
    assert "would not save parameters (490 -> 532)" in left["7"]
    factored = {entry["layer"]: entry for entry in note.settings["factored"]}
    assert factored["3"]["ranks"] == [9]
    assert factored["3"]["parameters"] == [48 * 48 + 48, 9 * 96 + 48]
    assert 0 < factored["3"]["error"] < 1
    assert note.settings["parameters"] == [mlp.parameters, light.parameters]
    assert edit_from_json(edit_to_json(note)) == note


def test_remarks_say_what_apply_does(mlp: Model) -> None:
    step = technique(energy=0.5)
    told = "\n".join(step.remarks(mlp))
    assert "3: rank" in told
    note: Any = step.apply(mlp, Bench()).lineage[-1]
    assert all(f"{entry['layer']}: rank {entry['ranks'][0]}" in told for entry in note.settings["factored"])


def test_multiply_adds_fall_as_told(mlp: Model) -> None:
    step = technique(energy=0.5)
    light = step.apply(mlp, Bench())
    saved = sum(before - after for choice in step.choose(mlp) for before, after in [choice.macs])
    assert count(mlp).macs - count(light).macs == saved > 0


@pytest.mark.parametrize("squared", [False, True])
def test_energy_is_kept_and_no_rank_is_wasted(mlp: Model, squared: bool) -> None:
    share = 0.7 if squared else 0.5
    for choice in technique(energy=share, squared=squared).choose(mlp):
        if choice.replaced:
            weight: Any = mlp.module.get_submodule(choice.path)
            spectrum = torch.linalg.svdvals(weight.weight.detach().double()) ** (2 if squared else 1)
            held = spectrum.cumsum(0) / spectrum.sum()
            assert held[choice.ranks[0] - 1] >= share
            assert choice.ranks[0] == 1 or held[choice.ranks[0] - 2] < share


def test_an_error_a_share_or_variational_bayes_choose_ranks(mlp: Model) -> None:
    weights: dict[str, Any] = {path: mlp.module.get_submodule(path).weight for path in ("1", "3", "5")}  # pyright: ignore
    note: Any = technique(error=0.8).apply(mlp, Bench()).lineage[-1]
    told = {entry["layer"]: entry for entry in note.settings["factored"]}
    assert set(told) == {"1", "3", "5", "7"} - {entry["layer"] for entry in note.settings["left"]}
    for path in set(told) & set(weights):
        assert told[path]["error"] <= 0.8 < truncated_svd(weights[path].detach(), told[path]["ranks"][0] - 1).error
    for choice in technique(share=0.3).choose(mlp):
        if choice.replaced:
            rows, columns = mlp.module.get_submodule(choice.path).weight.shape  # pyright: ignore
            assert choice.ranks[0] * (rows + columns) <= 0.3 * rows * columns < (choice.ranks[0] + 1) * (rows + columns)
            assert choice.macs[1] <= 0.3 * choice.macs[0]
    with torch.no_grad():
        weights["3"].copy_(torch.randn(48, 4) @ torch.randn(4, 48) + 0.3 * torch.randn(48, 48))
    (found,) = [choice for choice in technique(vbmf=True).choose(mlp) if choice.path == "3"]
    assert found.ranks == (4,)


@pytest.mark.parametrize("budget", [0.2, 0.35, 0.6, 1.0])
def test_budget_is_met_and_used(mlp: Model, budget: float) -> None:
    light = technique(budget=budget).apply(mlp, Bench())
    assert light.parameters <= budget * mlp.parameters
    if budget < 1:
        assert light.parameters > (budget - 0.05) * mlp.parameters


def test_budget_out_of_reach_is_told(mlp: Model) -> None:
    with pytest.raises(SettingError, match="rank 1 everywhere still keeps"):
        technique(budget=0.01).apply(mlp, Bench())


def test_ranks_of_single_layers_go_first(mlp: Model) -> None:
    choices = {c.path: c for c in technique(rank=4, ranks=(("3", 11),)).choose(mlp)}
    assert choices["3"].ranks == (11,)
    assert choices["1"].ranks == (4,)
    with pytest.raises(SettingError, match="'9'"):
        technique(ranks=(("9", 4),)).apply(mlp, Bench())
    assert technique(ranks={"3": 11}) == technique(ranks=(("3", 11),))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize(("groups", "stride", "padding"), [(1, 1, 0), (2, 2, 1), (4, 1, 1)])
def test_pointwise_convolutions_group_by_group(kind: Any, groups: int, stride: int, padding: int) -> None:
    torch.manual_seed(2)
    conv = kind(16, 32, 1, groups=groups, stride=stride, padding=padding, padding_mode="zeros")
    with torch.no_grad():
        for rows in conv.weight.split(32 // groups):
            flat = rows.flatten(1)
            rows.copy_((flat[:, :2] @ torch.randn(2, flat.shape[1])).reshape(rows.shape))
    dims = conv.weight.ndim - 2
    model = Model(nn.Sequential(conv), example=(torch.randn(2, 16, *[5] * dims),))
    light = technique(rank=2).apply(model, Bench())
    layer: Any = light.module.get_submodule("0")
    assert isinstance(layer, FactoredConv)
    assert sum(p.numel() for p in layer.parameters()) == groups * 2 * (16 // groups + 32 // groups) + 32
    torch.testing.assert_close(run(light, model.example[0]), run(model, model.example[0]), rtol=1e-4, atol=1e-4)
    kept = technique(rank=2, pointwise=False).apply(model, Bench())
    assert type(kept.module.get_submodule("0")) is kind


def test_convolutions_that_see_space_are_refused_by_name(small_cnn: Callable[..., Model]) -> None:
    told = "\n".join(technique(rank=2).remarks(small_cnn()))
    assert "conv2: left as it is: Conv2d with kernel 3 x 3 sees space" in told


def test_the_given_model_stays_and_both_factors_learn(mlp: Model, digits: Splits) -> None:
    before = copy.deepcopy(mlp.module.state_dict())
    bench = Bench(train=digits.train, validation=digits.validation, training=Training(optimizer=Adam(lr=1e-3)))
    start = technique(rank=5).apply(mlp, bench)
    tuned = technique(rank=5, epochs=1, learning_rate=1e-3).apply(mlp, bench)
    assert all(torch.equal(value, before[name]) for name, value in mlp.module.state_dict().items())
    for name in ("3.0.weight", "3.1.weight", "3.1.bias"):
        assert not torch.equal(start.module.state_dict()[name], tuned.module.state_dict()[name])


def test_fine_tuning_without_data_or_task_is_refused_first(mlp: Model, digits: Splits) -> None:
    with pytest.raises(NeedError, match="training data"):
        technique(epochs=1).apply(mlp, Bench())
    with pytest.raises(NeedError, match="task"):
        technique(epochs=1).apply(replace(mlp, task=None), Bench(train=digits.train, validation=digits.validation))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"energy": 0.0}, "energy"), ({"energy": 1.1}, "energy"), ({"rank": 0}, "rank"), ({"budget": 0.0}, "budget"),
        ({"rank": 3, "budget": 0.5}, "rank and budget"), ({"ranks": (("a", 0),)}, "ranks"), ({"epochs": -1}, "epochs"),
        ({"learning_rate": 0.0}, "learning_rate"), ({"error": 0.0}, "error"), ({"share": 1.0}, "share"),
        ({"error": 0.3, "vbmf": True}, "error and vbmf"),
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings)


def judged(model: Model, bench: Bench) -> float:
    return 100 * bench.evaluate(model, "test").value


def with_random_factors(model: Model, seed: int) -> Model:
    """The same factored shape, with the factors drawn anew."""
    fresh = model.copy()
    torch.manual_seed(seed)
    for layer in fresh.module.modules():
        if isinstance(layer, FactoredLinear):
            for part in layer:
                part.reset_parameters()  # pyright: ignore
    return fresh


@pytest.mark.effect
@pytest.mark.slow
def test_four_fifths_go_without_loss_and_fine_tuning_mends_heavier_cuts(digits: Splits) -> None:
    dense, light, bare, heavy, random = [], [], [], [], []
    for seed in range(3):
        training = Training(epochs=30, batch_size=32, optimizer=Adam(lr=1e-3), schedule=Cosine())
        bench = Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed)
        torch.manual_seed(seed)
        model = bench.fit(Model(three_hidden(), example=(torch.rand(2, 1, 8, 8),), task=Classification()))
        tuned = technique(budget=0.2, epochs=3).apply(model, bench)
        assert tuned.parameters <= 0.2 * model.parameters
        start = technique(budget=0.1).apply(model, bench)
        dense.append(judged(model, bench))
        light.append(judged(tuned, bench))
        bare.append(judged(start, bench))
        heavy.append(judged(technique(budget=0.1, epochs=3).apply(model, bench), bench))
        # The random factors get a choice of rates, the higher ones made for a training from nothing.
        rates = (1e-3, 3e-3, 1e-2)
        again = with_random_factors(start, seed)
        random.append(max(judged(fine_tune(again, bench, 3, rate, "random"), bench) for rate in rates))
    dense_mean, light_mean, bare_mean, heavy_mean, random_mean = map(mean, (dense, light, bare, heavy, random))
    assert light_mean >= dense_mean - 0.7, (dense, light)
    assert heavy_mean - bare_mean >= 3, (bare, heavy)
    assert heavy_mean - random_mean >= 5, (heavy, random)
