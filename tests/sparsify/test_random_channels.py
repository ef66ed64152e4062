"""Random channel pruning (69): the technique's own settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.errors import NeedError, SettingError
from karui.model import Classification, Model, Note
from karui.sparsify import L1Filters, RandomChannels
from karui.technique import Bench
from karui.technique.pruning.activations import ByActivations, entropy
from karui.technique.pruning.criteria import L1, Uniform
from karui.technique.pruning.harness import Trials, compare_criteria
from karui.train import Training

pytestmark = pytest.mark.paper(69)


def plain(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24 * 16, 4),
    )  # fmt: skip
    return Model(net, example=(torch.rand(2, 1, 8, 8),), task=Classification())


def widths(model: Model) -> list[int]:
    return [layer.weight.shape[0] for layer in model.module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def kept(dense: Model, light: Model) -> list[int]:
    """Numbers of the first layer's filters that are still there, told by their values."""
    before, after = (model.module.get_parameter("0.weight").flatten(1) for model in (dense, light))
    return [number for number, row in enumerate(before) if (after == row).all(1).any()]


@pytest.fixture
def bench() -> Bench:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(64, 1, 8, 8, generator=generator), torch.arange(64) % 4)
    return Bench(train=data, validation=data, test=data, training=Training(epochs=1, batch_size=32))


def cut(model: Model, seed: int = 0, **settings: Any) -> Model:
    return RandomChannels(**{"layer_epochs": 0, "epochs": 0, **settings}).apply(model, Bench(seed=seed))


def test_ratio_zero_is_the_identity(bench: Bench) -> None:
    dense = plain()
    assert RandomChannels(ratio=0.0).apply(dense, bench) is dense


def test_the_share_is_exact_in_every_layer_and_rounds_to_multiples() -> None:
    assert widths(cut(plain(), ratio=0.25)) == [12, 18, 4]
    assert widths(cut(plain(), ratio=0.5, multiple=8)) == [8, 16, 4]


def test_the_draw_is_fixed_by_seed_and_number_and_blind_to_weights() -> None:
    chosen = [kept(plain(), cut(plain(), seed, draw=draw)) for seed, draw in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]
    assert chosen[0] != chosen[3]
    assert kept(plain(7), cut(plain(7))) == chosen[0]


def test_stage_one_trains_after_each_layer_from_the_input_on_and_stage_two_fine_tunes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, seen = Bench.fit, []

    def watched(self: Bench, model: Model, **settings: Any) -> Model:
        seen.append((widths(model), settings["epochs"]))
        return fit(self, model, **settings)

    monkeypatch.setattr(Bench, "fit", watched)
    light = RandomChannels(ratio=0.5, layer_epochs=1, epochs=2).apply(plain(), bench)
    assert seen == [([8, 24, 4], 1), ([8, 12, 4], 1), ([8, 12, 4], 2)]
    logged = next(step.settings for step in light.lineage if isinstance(step, Note) and "order" in step.settings)
    assert (logged["order"], logged["epochs_each"]) == (["0", "2"], 1)


def test_its_networks_have_the_shape_of_the_criterion_it_controls() -> None:
    assert widths(cut(plain(), ratio=0.5)) == widths(L1Filters(ratio=0.5, epochs=0).apply(plain(), Bench()))


def test_only_the_classes_asked_for_are_trained(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def watched(self: Bench, model: Model, **settings: Any) -> Model:
        seen.update(int(self.train[number][1]) for number in range(len(self.train)))
        return model

    monkeypatch.setattr(Bench, "fit", watched)
    RandomChannels(classes=(0, 2), epochs=1).apply(plain(), bench)
    assert seen == {0, 2}


def test_needs_follow_the_settings() -> None:
    assert RandomChannels(layer_epochs=0, epochs=0).needs() == ()
    with pytest.raises(NeedError, match="random_channel_pruning"):
        RandomChannels().apply(plain(), Bench())


def test_remarks_tell_what_would_be_cut() -> None:
    assert "2: 24 units, cut 6 (25 %)" in RandomChannels(ratio=0.25).remarks(plain())


@pytest.mark.parametrize("name", ["draw", "layer_epochs", "epochs"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match=name):
        RandomChannels(**{name: -1})


def recovers(told: Trials, ratio: float) -> bool:
    """The paper's finding: criteria differ before fine-tuning, and after it chance is as good as the best of them."""
    return told.spread(ratio, "before") >= 0.10 and abs(told.gap(ratio, "after")) <= 0.02


@pytest.mark.effect
def test_after_equal_fine_tuning_chance_is_as_good_as_the_best_criterion(
    digits_networks: dict[int, Model], digits_bench: Bench
) -> None:
    """Three draws and two seeds of the section's five and three, which the benchmark has."""
    models = {seed: digits_networks[seed] for seed in (0, 1)}
    criteria = {"random": [Uniform(draw) for draw in range(3)], "l1": [L1], "entropy": [ByActivations(entropy)]}
    told = compare_criteria(models, digits_bench, criteria, (0.25, 0.5), epochs=8)
    assert all(recovers(told, ratio) for ratio in (0.25, 0.5)), told.summary()
    untrained = compare_criteria(models, digits_bench, criteria, (0.5,), epochs=0)
    assert not recovers(untrained, 0.5), "a harness that skips fine-tuning must not show the finding"
