"""Compression-aware training (survey 28): what must hold, and what the paper shows."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.artifact import load, save
from karui.data import Splits
from karui.errors import NeedError, SettingError
from karui.layers.factored import FactoredConv, FactoredLinear
from karui.lowrank._proximal import CompressionAware, rank_of, state_of
from karui.lowrank.compression_aware_training import CompressionAwareTraining
from karui.measuring import count
from karui.model import Classification, Model
from karui.numerics.proximal import shrink, shrink_rows, shrink_singular_values
from karui.technique import Bench
from karui.technique.pruning.dead_units import without_dead_units
from karui.train import SGD, Adam, Cosine, Influence, Moment, Together, Training

pytestmark = pytest.mark.paper(28)


def technique(**settings: Any) -> CompressionAwareTraining:
    return CompressionAwareTraining(**{"epochs": 0, **settings})


class FourConvolutions(nn.Module):
    """16, 32, 48 and 48 filters of 3x3 with batch normalisation, on the 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 48, 48)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        for depth, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = torch.relu(norm(conv(x)))
            x = nn.functional.max_pool2d(x, 2) if depth == 1 else x
        return self.head(x.mean((2, 3)))


def network(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(FourConvolutions().eval(), example=(torch.rand(2, 1, 8, 8),), task=Classification())


def run(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module.eval()(x)


def nuclear(z: Tensor) -> Tensor:
    return torch.linalg.svdvals(z).sum(-1)


def test_the_step_shrinks_singular_values_by_exactly_the_threshold_and_is_the_minimiser() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 14, dtype=torch.float64)
    values = torch.linalg.svdvals(x)
    for t in (0.5, float(values[4]) + 1e-6, 3.0):
        z = shrink_singular_values(x, t)
        torch.testing.assert_close(torch.linalg.svdvals(z), (values - t).clamp(min=0), atol=1e-10, rtol=1e-10)
        assert rank_of(torch.linalg.svdvals(z)) == int((values > t).sum())
        best = 0.5 * (x - z).square().sum() + t * nuclear(z)
        for scale in (1e-3, 1e-1, 1.0):
            moved = z + scale * torch.randn(40, 9, 14, dtype=torch.float64)
            assert (0.5 * (x - moved).square().sum((1, 2)) + t * nuclear(moved) >= best - 1e-9).all()
    torch.testing.assert_close(shrink_singular_values(x, 0.0), x)
    assert shrink_singular_values(x, float(values[0]) + 1e-9).abs().max() < 1e-10


def test_the_steps_are_firmly_nonexpansive() -> None:
    torch.manual_seed(1)
    for prox in (
        lambda z: shrink_singular_values(z, 0.7),
        lambda z: shrink_rows(z, 0.7),
        lambda z: shrink_rows(shrink(z, 0.2), 0.7),
    ):
        for _ in range(20):
            x, y = torch.randn(2, 6, 10, dtype=torch.float64)
            apart = prox(x) - prox(y)
            assert apart.square().sum() <= (apart * (x - y)).sum() + 1e-9


def test_units_shorten_in_closed_form_and_the_sparse_form_shrinks_weights_first() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3)
    influence = CompressionAware(layers={}, tau=0.0, lam=0.3)
    rows = weight.flatten(1).double()
    expected = rows * (1 - 0.3 * 6 / rows.norm(dim=1, keepdim=True)).clamp(min=0)
    torch.testing.assert_close(influence.shrunk(weight, 1, 1.0, units=True).flatten(1), expected.float())
    mixed = CompressionAware(layers={}, tau=0.0, lam=0.3, l1_share=0.4).shrunk(weight, 1, 1.0, units=True)
    soft = rows.sign() * (rows.abs() - 0.12).clamp(min=0)
    expected = soft * (1 - 0.18 * 6 / soft.norm(dim=1, keepdim=True)).clamp(min=0)
    torch.testing.assert_close(mixed.flatten(1), expected.float())
    torch.testing.assert_close(influence.shrunk(weight, 1, 1.0, units=False), weight)


def test_low_rank_comes_before_units_and_groups_are_shrunk_one_by_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 3, 3)
    both = CompressionAware(layers={}, tau=0.5, lam=0.1).shrunk(weight, 2, 0.5, units=True)
    for group in range(2):
        part = weight[4 * group : 4 * group + 4].flatten(1).double()
        expected = shrink_rows(shrink_singular_values(part, 0.25), 0.05 * 9**0.5)
        torch.testing.assert_close(both[4 * group : 4 * group + 4].flatten(1), expected.float())


class RanksAfterEachStep(Influence):
    """Notes the rank of the second convolution after each step, behind the proximal one."""

    def __init__(self) -> None:
        self.ranks: list[int] = []

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        del moment
        self.ranks.append(state_of(module.get_submodule("convs.1"))[0])


@pytest.mark.parametrize("optimizer", [Adam(lr=2e-3), SGD(lr=0.02, momentum=0.9, weight_decay=1e-4)])
def test_ranks_are_told_after_proximal_steps_and_end_exact(digits: Splits, optimizer: Any) -> None:
    training = Training(epochs=3, batch_size=64, optimizer=optimizer)
    bench = Bench(train=digits.train, training=training)
    model = network()
    steps, watcher = technique(tau=0.3, warmup=1).influence(model, bench), RanksAfterEachStep()
    trained = bench.fit(model, influence=Together(steps, watcher))
    epoch = len(watcher.ranks) // 3
    second = list(steps.layers).index("convs.1")
    assert len(steps.history) == 3
    assert [row[second][0] for row in steps.history] == watcher.ranks[epoch - 1 :: epoch]
    assert watcher.ranks[epoch - 1] == 32  # the warm-up leaves all ranks
    assert watcher.ranks[-1] < 32
    assert state_of(trained.module.get_submodule("convs.1"))[0] == watcher.ranks[-1]
    assert "ranks_and_units" not in trained.module.state_dict()


def test_frequent_steps_take_their_part_of_an_epoch(digits: Splits) -> None:
    """With a rate of nothing, the sum of all steps is one epoch's threshold, however often they are."""
    model = network()
    bench = Bench(train=digits.train, training=Training(epochs=1, batch_size=64, optimizer=SGD(lr=1e-30)))
    before = torch.linalg.svdvals(model.module.get_submodule("convs.2").weight.detach().flatten(1).double())
    for every in (None, 1, 4):
        steps = technique(tau=0.05, warmup=0, every=every).influence(model, bench)
        weight: Any = bench.fit(model, influence=steps).module.get_submodule("convs.2").weight
        after = torch.linalg.svdvals(weight.detach().flatten(1).double())
        torch.testing.assert_close(after, (before - 0.05).clamp(min=0), atol=1e-5, rtol=1e-5)


def test_layers_that_do_not_learn_are_not_shrunk(digits: Splits) -> None:
    model = network()
    frozen: Any = model.module.get_submodule("convs.2")
    frozen.weight.requires_grad_(False)
    bench = Bench(train=digits.train, training=Training(epochs=1, batch_size=64))
    steps = technique(tau=0.5, lam=0.01, warmup=0).influence(model, bench)
    trained: Any = bench.fit(model, influence=steps).module
    assert "convs.2" not in steps.layers
    assert torch.equal(trained.get_submodule("convs.2").weight, frozen.weight)
    assert state_of(trained.get_submodule("convs.1"))[0] < 32


def low(conv: Any, rank: int) -> None:
    """Give a layer that rank, group by group."""
    with torch.no_grad():
        groups = getattr(conv, "groups", 1)
        rows = conv.weight.reshape(groups, len(conv.weight) // groups, -1)
        left, right = torch.randn(groups, rows.shape[1], rank), torch.randn(groups, rank, rows.shape[2])
        conv.weight.copy_((left @ right / rank).reshape(conv.weight.shape))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(30, 24), (30,)),
        (nn.Conv1d(12, 16, 5, stride=2, padding=2, bias=False), (12, 17)),
        (nn.Conv2d(12, 16, (3, 5), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (12, 11, 13)),
        (nn.Conv2d(12, 24, 3, groups=2, padding="same"), (12, 7, 7)),
        (nn.Conv3d(8, 16, 3, padding=1), (8, 4, 5, 6)),
    ],
    ids=["linear", "conv1d", "strided, dilated", "grouped", "conv3d"],
)
def test_at_full_energy_the_factored_layer_is_the_trained_one(layer: Any, shape: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    low(layer, 3)
    model = Model(layer.eval(), example=(torch.randn(2, *shape),))
    light = technique().apply(model, Bench())
    assert isinstance(light.module, FactoredConv | FactoredLinear)
    torch.testing.assert_close(run(light, model.example[0]), run(model, model.example[0]), rtol=1e-4, atol=1e-5)
    groups = getattr(layer, "groups", 1)
    bias = len(layer.weight) if layer.bias is not None else 0
    assert light.parameters == groups * 3 * (layer.weight[0].numel() + len(layer.weight) // groups) + bias
    (choice,) = technique().choose(model)
    assert choice.macs == (count(model).macs, count(light).macs)
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    again = load(tmp_path / "light", base=layer)
    torch.testing.assert_close(run(again, model.example[0]), run(light, model.example[0]))


def test_energy_and_share_choose_ranks_and_what_does_not_save_is_left() -> None:
    model = network()
    assert all("would not save" in choice.reason for choice in technique().choose(model))
    chosen = {choice.path: choice for choice in technique(share=0.25).choose(model)}
    assert chosen["convs.2"].ranks == (int(0.25 * 48 * 288 / (48 + 288)),)
    values = torch.linalg.svdvals(model.module.get_submodule("convs.2").weight.detach().flatten(1).double()).square()
    (held,) = (c for c in technique(energy=0.5).choose(model) if c.path == "convs.2")
    kept = [float(values[: held.ranks[0] - less].sum() / values.sum()) for less in (1, 0)]
    assert kept[0] < 0.5 <= kept[1]
    depthwise = Model(nn.Conv2d(8, 8, 3, groups=8), example=(torch.zeros(1, 8, 5, 5),))
    assert "rank 1" in technique(share=0.5).remarks(depthwise)[0]


def test_cutting_dead_units_leaves_the_outputs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight[:5] = 0
        net[2].weight[3:9] = 0
    model = Model(net.eval(), example=(torch.rand(2, 1, 9, 9),), task=Classification())
    light = without_dead_units(model)
    assert [light.module.get_submodule(path).weight.shape[0] for path in ("0", "2")] == [7, 10]  # pyright: ignore
    x = torch.rand(20, 1, 9, 9)
    torch.testing.assert_close(run(light, x), run(model, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.module.get_submodule("2").weight[3:9], torch.zeros(6, 12, 3, 3))  # pyright: ignore


class Branching(nn.Module):
    """A path that depends on the values, so that there is no one graph to find units in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 12, 3), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x)).mean((2, 3))
        return self.head(y if float(y.sum()) > 0 else -y)


def test_a_network_that_cannot_be_captured_keeps_its_dead_units_and_says_so() -> None:
    torch.manual_seed(0)
    net = Branching().eval()
    with torch.no_grad():
        net.conv.weight[:5] = 0
    model = Model(net, example=(torch.rand(2, 1, 9, 9),), task=Classification())
    light = technique(lam=0.1, share=0.3).apply(model, Bench())
    assert any("dead units stay" in step.describe() for step in light.lineage)
    assert light.module.get_submodule("conv").stages[1].out_channels == 12  # pyright: ignore


def test_training_without_data_is_refused_first() -> None:
    with pytest.raises(NeedError, match="compression_aware_training"):
        CompressionAwareTraining().apply(network(), Bench())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"tau": -0.1}, "tau"), ({"lam": -1.0}, "lam"), ({"l1_share": 1.2}, "l1_share"), ({"every": 0}, "every"),
        ({"warmup": -1}, "warmup"), ({"ramp": 0}, "ramp"), ({"energy": 0.0}, "energy"), ({"share": 1.0}, "share"),
        ({"epochs": -1}, "epochs"), ({"tuning": -1}, "tuning"), ({"learning_rate": 0.0}, "learning_rate"),
        ({"epochs": 2, "warmup": 2}, "no proximal step"), ({"learning_rate": float("inf")}, "learning_rate"),
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings)


def test_a_training_that_was_killed_goes_on_with_its_record_of_ranks(tmp_path: Path) -> None:
    x, y = torch.rand(64, 1, 8, 8), torch.arange(64) % 10
    training = Training(epochs=4, batch_size=16, optimizer=Adam(lr=1e-2), checkpoint_seconds=0.0)
    bench = Bench(train=TensorDataset(x, y), training=training, checkpoints=tmp_path)
    step = technique(tau=0.2, warmup=1)
    steps = step.influence(network(), bench)
    whole = replace(bench, checkpoints=None).fit(network(), influence=steps)

    class Killed(Influence):
        def constraints(self, module: nn.Module, moment: Moment) -> None:
            del module
            if moment.step == 9 and not done:
                done.append(True)
                raise KeyboardInterrupt

    done: list[bool] = []
    again = step.influence(network(), bench)
    both = Together(again, Killed())
    with pytest.raises(KeyboardInterrupt):
        bench.fit(network(), influence=both)
    resumed = bench.fit(network(), influence=both)
    assert len(again.history) == 4
    assert again.history == steps.history
    for a, b in zip(whole.module.parameters(), resumed.module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.effect
@pytest.mark.slow
def test_ranks_fall_with_the_pressure_and_factoring_at_them_loses_nothing(digits: Splits) -> None:
    """Three seeds. Against the paper, the SVD of the ordinary network at these ranks is as good before fine-tuning."""
    skip = ("convs.0", "head")
    scores: dict[str, list[float]] = {"dense": [], "whole": [], "factored": []}
    ranks: dict[float, list[int]] = {0.05: [], 0.08: []}
    for seed in range(3):
        training = Training(epochs=14, batch_size=32, optimizer=Adam(lr=1e-2), schedule=Cosine())
        bench = Bench(train=digits.train, test=digits.test, training=training, seed=seed)
        model = network(seed)
        dense = bench.fit(model)
        weight: Any = dense.module.get_submodule("convs.2").weight
        assert rank_of(torch.linalg.svdvals(weight.detach().flatten(1))) == 48  # no zeros without the steps
        trained = dense
        for tau, found in ranks.items():
            steps = technique(tau=tau, skip=skip).influence(model, bench)
            trained = bench.fit(model, influence=steps)
            found.append(sum(rank for rank, _ in steps.history[-1]))
        light = technique(skip=skip).compress(trained)
        assert light.parameters < 0.7 * model.parameters
        for name, one in (("dense", dense), ("whole", trained), ("factored", light)):
            scores[name].append(100 * bench.evaluate(one, "test").value)
    assert all(more > less for more, less in zip(ranks[0.05], ranks[0.08], strict=True)), ranks
    assert scores["factored"] == pytest.approx(scores["whole"], abs=0.2), scores
    assert mean(scores["whole"]) >= mean(scores["dense"]) - 1.2, (scores, ranks)
