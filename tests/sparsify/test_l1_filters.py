"""L1 filter pruning (62): the technique's own settings, and the paper's networks to the printed digit."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean, median
from time import process_time
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from karui.architectures.cifar_resnet import cifar_resnet
from karui.errors import NeedError, SettingError
from karui.measuring import count
from karui.measuring.inference import inference
from karui.model import Classification, Model, Note
from karui.sparsify import L1Filters
from karui.technique import Bench, Then
from karui.technique.pruning.criteria import L1, Largest, Uniform
from karui.technique.pruning.harness import compare_criteria
from karui.train import Training

pytestmark = pytest.mark.paper(62)

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class Vgg16(nn.Module):
    """The paper's VGG-16 for 32x32 pictures: 13 convolutions, a hidden layer of 512, ten classes; no bias counted."""

    def __init__(self) -> None:
        super().__init__()
        inputs, number = 3, 0
        for width, depth in STAGES:
            for _ in range(depth):
                number += 1
                self.add_module(f"conv{number}", nn.Conv2d(inputs, width, 3, padding=1, bias=False))
                inputs = width
        self.hidden, self.head = nn.Linear(512, 512, bias=False), nn.Linear(512, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        number = 0
        for _, depth in STAGES:
            for _ in range(depth):
                number += 1
                x = functional.relu(self.get_submodule(f"conv{number}")(x))
            x = functional.max_pool2d(x, 2)
        return self.head(functional.relu(self.hidden(x.flatten(1))))


def picture() -> tuple[Tensor]:
    return (torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),)


def cut(model: Model, **settings: Any) -> Model:
    return L1Filters(**{"epochs": 0, **settings}).apply(model, Bench())


def test_vgg16_a_has_the_parameters_and_macs_of_the_paper() -> None:
    torch.manual_seed(0)
    dense = Model(Vgg16(), example=picture())
    light = cut(dense, ratio=0.0, ratios={f"conv{number}": 0.5 for number in (1, *range(8, 14))})
    before, after = count(dense), count(light)
    assert (before.parameters, before.macs) == (14_977_728, 313_463_808)
    assert (after.parameters, after.macs) == (5_390_176, 206_279_680)
    assert 100 * (1 - after.parameters / before.parameters) == pytest.approx(64.01, abs=0.005)
    assert 100 * (1 - after.macs / before.macs) == pytest.approx(34.19, abs=0.005)


def resnet(depth: int) -> Model:
    return Model(cifar_resnet(depth), example=picture())


def stage_shares(depth: int, shares: tuple[float, float, float], skip: tuple[int, ...]) -> dict[str, float]:
    """The paper numbers the convolutions from 1 at the input: a block's first one is even. One share a stage."""
    per_stage = (depth - 2) // 6
    return {
        f"layer{stage + 1}.{block}.conv1": 0.0 if 2 * (stage * per_stage + block + 1) in skip else shares[stage]
        for stage in range(3)
        for block in range(per_stage)
    }


@pytest.mark.parametrize(("depth", "parameters", "macs"), [(56, 0.85e6, 1.255e8), (110, 1.72e6, 2.529e8)])
def test_the_residual_networks_are_those_of_the_paper(depth: int, parameters: float, macs: float) -> None:
    told = count(resnet(depth))
    assert told.parameters == pytest.approx(parameters, rel=0.01)
    assert told.macs == pytest.approx(macs, rel=0.01)


@pytest.mark.parametrize(
    ("depth", "shares", "skip", "saved", "within"),
    [
        pytest.param(56, (0.1, 0.1, 0.1), (16, 20, 38, 54), (10.4, 9.4), 1.6, id="56-A"),
        pytest.param(56, (0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54), (27.6, 13.7), 1.6, id="56-B"),
        pytest.param(110, (0.5, 0.0, 0.0), (36,), (15.9, 2.3), 0.1, id="110-A"),
        pytest.param(110, (0.5, 0.4, 0.3), (36, 38, 74), (38.6, 32.4), 1.6, id="110-B"),
    ],
)
def test_the_pruned_residual_networks_save_what_the_paper_prints(
    depth: int,
    shares: tuple[float, float, float],
    skip: tuple[int, ...],
    saved: tuple[float, float],
    within: float,
) -> None:
    macs, parameters = saved
    dense = resnet(depth)
    light = cut(dense, ratio=0.0, ratios=stage_shares(depth, shares, skip))
    before, after = count(dense), count(light)
    assert 100 * (1 - after.macs / before.macs) == pytest.approx(macs, abs=within)
    assert 100 * (1 - after.parameters / before.parameters) == pytest.approx(parameters, abs=within)


def plain() -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24 * 16, 12), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip
    return Model(net, example=(torch.rand(2, 1, 8, 8),), task=Classification())


def widths(model: Model) -> list[int]:
    return [layer.weight.shape[0] for layer in model.module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


@pytest.fixture
def bench() -> Bench:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(64, 1, 8, 8, generator=generator), torch.arange(64) % 4)
    return Bench(train=data, validation=data, test=data, training=Training(epochs=1, batch_size=32))


def test_one_filter_costs_its_weights_and_what_reads_it() -> None:
    dense = plain()
    light = cut(dense, ratio=0.0, ratios={"0": 1 / 16})
    # C_in k^2 + k^2 C_out,next
    assert dense.parameters - light.parameters == 1 * 9 + 9 * 24


def test_the_smallest_filters_go_and_the_others_keep_their_values() -> None:
    dense = plain()
    light = cut(dense, ratio=0.5)
    weight = dense.module.get_parameter("0.weight")
    keep = weight.abs().sum((1, 2, 3)).topk(8).indices.sort().values
    assert torch.equal(light.module.get_parameter("0.weight"), weight[keep])
    assert widths(light) == [8, 12, 6, 4]


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"ratio": 0.3}, [11, 17, 8, 4]),
        ({"ratio": 0.3, "multiple": 8}, [16, 24, 8, 4]),
        ({"ratio": 0.5, "multiple": 8}, [8, 16, 8, 4]),
        ({"ratio": 0.5, "skip": ("2",)}, [8, 24, 6, 4]),
        ({"ratio": 0.5, "linear": False}, [8, 12, 12, 4]),
        ({"ratio": 0.25, "ratios": {"2": 0.75, "6": 0.0}}, [12, 6, 12, 4]),
        ({"ratio": 0.5, "greedy": True}, [8, 12, 6, 4]),
        ({"ratio": 0.5, "iterative": True}, [8, 12, 6, 4]),
    ],
    ids=str,
)
def test_settings_say_how_much_of_each_layer_goes(settings: dict[str, Any], want: list[int]) -> None:
    assert widths(cut(plain(), **settings)) == want


def test_iterative_retrains_after_each_layer_and_one_shot_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, seen = Bench.fit, []

    def watched(self: Bench, model: Model, **settings: Any) -> Model:
        seen.append((widths(model), settings["epochs"]))
        return fit(self, model, **settings)

    monkeypatch.setattr(Bench, "fit", watched)
    L1Filters(ratio=0.5, epochs=1).apply(plain(), bench)
    assert seen == [([8, 12, 6, 4], 1)]
    seen.clear()
    L1Filters(ratio=0.5, epochs=1, iterative=True).apply(plain(), bench)
    assert seen == [([8, 24, 12, 4], 1), ([8, 12, 12, 4], 1), ([8, 12, 6, 4], 1)]


def test_a_sensitivity_plan_cuts_what_is_bearable_and_is_told(bench: Bench) -> None:
    dense = bench.fit(plain(), epochs=2)
    light = L1Filters(ratio=0.5, max_drop=1.0, epochs=0).apply(dense, bench)
    assert widths(light) == [8, 12, 6, 4]
    note = next(step for step in light.lineage if isinstance(step, Note) and "scan" in step.settings)
    assert note.settings["ratios"] == {"0": 0.5, "2": 0.5, "6": 0.5}
    kept = L1Filters(ratio=0.5, ratios={"2": 0.25}, max_drop=1.0, epochs=0).apply(dense, bench)
    assert widths(kept) == [8, 18, 6, 4]


def test_without_retraining_and_scan_nothing_is_needed() -> None:
    assert L1Filters(epochs=0).needs() == ()
    assert L1Filters(ratio=0.0).needs() == ()
    assert set(L1Filters().needs()) == {"labels", "training"}
    with pytest.raises(NeedError, match="l1_filter_pruning"):
        L1Filters(max_drop=0.02, epochs=0).apply(plain(), Bench())
    assert widths(Then(L1Filters(ratio=0.5, epochs=0)).apply(plain(), Bench())) == [8, 12, 6, 4]


def test_remarks_tell_what_would_be_cut_without_cutting() -> None:
    told = L1Filters(ratio=0.5, skip=("2",)).remarks(plain())
    assert "0: 16 units, cut 8 (50 %)" in told
    assert any(line.startswith("2: 24 units, left whole: skipped") for line in told)
    assert any("8" in line and "locked" in line for line in told)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"ratio": 1.0}, "ratio"),
        ({"epochs": -1}, "epochs"),
        ({"max_drop": -0.1}, "max_drop"),
        ({"multiple": 0}, "multiple"),
        ({"greedy": True, "iterative": True}, "greedy"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingError, match=word):
        L1Filters(**settings)


class Pooled(nn.Module):
    """A branch that is computed and not used, as a pooler's often is."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pooler, self.over, self.head = (nn.Linear(n, m) for n, m in ((4, 8), (8, 6), (6, 3), (8, 2)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.body(x))
        self.over(torch.tanh(self.pooler(x)))
        return self.head(x)


@pytest.mark.parametrize("iterative", [False, True])
def test_what_cannot_be_proved_stays_whole_and_the_rest_is_cut(iterative: bool) -> None:
    model = Model(Pooled().eval(), example=(torch.randn(2, 4),))
    light = L1Filters(ratio=0.5, epochs=0, iterative=iterative).apply(model, Bench())
    assert light.module.get_submodule("body").out_features == 4
    assert light.module.get_submodule("pooler").out_features == 6
    (note,) = [edit for edit in light.lineage if isinstance(edit, Note) and "left_whole" in edit.settings]
    assert "pooler" in note.settings["left_whole"]
    assert "left whole" in note.text


def test_a_layer_that_is_not_there_is_refused_with_the_closest() -> None:
    with pytest.raises(SettingError, match=r"ratios: layer '22'"):
        cut(plain(), ratios={"22": 0.5})


@pytest.mark.effect
def test_small_filters_cost_less_than_large_ones_and_than_chance(
    digits_networks: dict[int, Model], digits_bench: Bench
) -> None:
    told = compare_criteria(
        digits_networks,
        digits_bench,
        {"l1": [L1], "largest": [Largest(L1)], "random": [Uniform(0), Uniform(1)]},
        (0.5, 0.75),
        epochs=2,
    )

    def ahead(of: str, ratio: float) -> float:
        return told.mean("l1", ratio, "after") - told.mean(of, ratio, "after")

    assert ahead("largest", 0.5) >= 0.03
    assert ahead("largest", 0.75) >= 0.20
    assert ahead("random", 0.75) >= 0.03


@pytest.mark.effect
def test_half_of_the_filters_of_wide_layers_take_well_under_the_time() -> None:
    """A batch of 256, layers of 64 filters, processor time in turns; the benchmark has it in ONNX Runtime, too."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    dense = Model(net, example=(torch.rand(2, 1, 12, 12),))
    light, x, took = cut(dense, ratio=0.5), torch.rand(256, 1, 12, 12), ([], [])
    with inference(dense.module) as whole, inference(light.module) as thin:
        for _ in range(7):
            for module, seconds in zip((whole, thin), took, strict=True):
                before = process_time()
                module(x)
                seconds.append(process_time() - before)
    assert median(took[0]) >= 1.5 * median(took[1]), took


@pytest.mark.effect
def test_half_of_the_filters_cost_little_after_retraining(
    digits_networks: dict[int, Model], digits_bench: Bench
) -> None:
    losses = []
    for seed, model in digits_networks.items():
        bench = replace(digits_bench, seed=seed)
        light = L1Filters(ratio=0.5, epochs=12).apply(model, bench)
        assert count(light).macs < 0.4 * count(model).macs
        losses.append(bench.evaluate(model, "test").value - bench.evaluate(light, "test").value)
    assert fmean(losses) <= 0.03
