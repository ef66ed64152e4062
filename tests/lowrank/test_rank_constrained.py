"""Rank-constrained topology (survey 27): which layer it takes, and what the paper shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karui.artifact import load, save
from karui.data import Splits
from karui.errors import NeedError, SettingError
from karui.layers.factored import FactoredLinear
from karui.layers.rank_constrained import RankConstrained
from karui.lowrank.rank_constrained import RankConstrainedTopology
from karui.model import Classification, Model, replace_layers
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

pytestmark = pytest.mark.paper(27)


def technique(**settings: Any) -> RankConstrainedTopology:
    return RankConstrainedTopology(**{"epochs": 0, **settings})


def spotter(units: int = 96, seed: int = 0) -> Model:
    """Rows of the 8x8 digits as frames, one wide first layer, and a head."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, units), nn.ReLU(), nn.Linear(units, 10))
    return Model(net.eval(), example=(torch.rand(2, 1, 8, 8),), task=Classification())


def run(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module.eval()(x)


def layer_of(model: Model, path: str = "1") -> Any:
    return model.module.get_submodule(path)


def test_the_first_layer_is_constrained_and_no_other() -> None:
    model = spotter()
    light = technique(rank=2).apply(model, Bench())
    assert isinstance(layer_of(light), RankConstrained)
    assert type(layer_of(light, "3")) is nn.Linear
    assert model.parameters - light.parameters == 96 * 64 - 96 * 2 * 16
    assert technique(rank=2).remarks(model)[0].startswith("1: filters of rank 2 over 8 frames of 8, 6,240 -> 3,168 ")


def test_full_rank_from_the_trained_layer_is_exact_where_it_is_taken() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(2 * 3 * 40, 20))
    with torch.no_grad():  # two channels of three frames: filters of rank 2 over frames
        low = torch.einsum("mrt,mrcf->mctf", torch.randn(20, 2, 3), torch.randn(20, 2, 2, 40))
        net[1].weight.copy_(low.flatten(1))
    model = Model(net.eval(), example=(torch.randn(4, 2, 3, 40),))
    light = technique(rank=2, start="svd").apply(model, Bench())
    assert isinstance(layer_of(light), RankConstrained)
    torch.testing.assert_close(run(light, model.example[0]), run(model, model.example[0]), rtol=1e-4, atol=1e-4)


def test_frames_may_be_given_where_no_map_was_flattened() -> None:
    net = nn.Sequential(nn.Linear(98 * 4, 32), nn.ReLU(), nn.Linear(32, 5))
    model = Model(net.eval(), example=(torch.zeros(1, 98 * 4),))
    assert "0: its input is no flattened map" in technique().remarks(model)[0]
    assert technique().apply(model, Bench()).parameters == model.parameters
    light = technique(frames=98).apply(model, Bench())
    assert layer_of(light, "0").settings()["frames"] == 98
    assert "not 97 frames" in technique(frames=97).remarks(model)[0]


def test_what_cannot_be_constrained_is_refused_by_name(small_cnn: Callable[..., Model]) -> None:
    with pytest.raises(SettingError, match="Conv2d has no filter over one whole patch"):
        technique(layer="conv1").choose(small_cnn())
    sequence = Model(nn.Sequential(nn.Linear(12, 9)), example=(torch.zeros(2, 7, 12),))
    assert "applied at 7 positions" in technique(frames=3).remarks(sequence)[0]
    assert "would not save parameters" in technique(rank=8).remarks(spotter())[0]
    none = Model(nn.Conv2d(1, 4, 3), example=(torch.zeros(1, 1, 8, 8),))
    assert "no linear layer" in technique().remarks(none)[0]


@pytest.mark.parametrize("shape", [(64,), (3, 1, 64)])
def test_a_patch_may_come_without_a_batch_or_as_a_sequence_of_one(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(nn.Linear(64, 32).eval(), example=(torch.randn(shape),))
    light = technique(frames=8, start="svd").apply(model, Bench())
    assert light.parameters < model.parameters
    assert run(light, model.example[0]).shape == (*shape[:-1], 32)
    if len(shape) > 1:
        saved = save(light, tmp_path / "light")
        assert saved.verification is not None
        assert saved.verification.ok


def test_starts_are_told_apart() -> None:
    model, bench = spotter(), Bench(seed=2)
    before = model.module.state_dict()
    scratch, layer, svd = (
        technique(start=start).apply(model, bench).module.state_dict() for start in ("scratch", "layer", "svd")
    )
    assert not torch.equal(scratch["3.weight"], before["3.weight"])
    assert torch.equal(layer["3.weight"], before["3.weight"])
    assert torch.equal(svd["1.over_time.bias"], before["1.bias"])
    assert not torch.equal(layer["1.project.weight"], svd["1.project.weight"])


def test_saved_exported_and_loaded_it_computes_the_same(tmp_path: Path) -> None:
    model = spotter()
    light = technique(start="svd").apply(model, Bench())
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    again = load(tmp_path / "light", base=model.module)
    torch.testing.assert_close(run(again, model.example[0]), run(light, model.example[0]))


def test_training_without_data_is_refused_first() -> None:
    with pytest.raises(NeedError, match="rank_constrained"):
        RankConstrainedTopology().apply(spotter(), Bench())


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"rank": 0}, "rank"), ({"frames": 0}, "frames"), ({"epochs": -1}, "epochs"), ({"start": "svdd"}, "start")],
)
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings)


@pytest.mark.effect
@pytest.mark.slow
def test_it_beats_a_bottleneck_of_as_many_parameters_and_nears_the_full_layer(digits: Splits) -> None:
    """Three seeds; the bottleneck is the layer's matrix in two factors, with no fewer parameters."""
    scores: dict[str, list[float]] = {"full": [], "bottleneck": [], "rank 1": [], "rank 2": []}
    for seed in range(3):
        model = spotter(seed=seed)
        training = Training(epochs=30, batch_size=32, optimizer=Adam(lr=3e-3), schedule=Cosine())
        bench = Bench(train=digits.train, test=digits.test, training=training, seed=seed)
        narrow = replace_layers(model, {"1": FactoredLinear(64, 10, 96)})
        one, two = (technique(rank=rank, epochs=30).apply(model, bench) for rank in (1, 2))
        assert one.parameters <= min(narrow.parameters, 0.4 * model.parameters)
        found = {"full": bench.fit(model), "bottleneck": bench.fit(narrow), "rank 1": one, "rank 2": two}
        for name, trained in found.items():
            scores[name].append(100 * bench.evaluate(trained, "test").value)
    assert mean(scores["rank 1"]) > mean(scores["bottleneck"]) + 0.3, scores
    assert mean(scores["rank 1"]) > mean(scores["full"]) - 0.7, scores
    assert mean(scores["rank 2"]) > mean(scores["rank 1"]) - 0.3, scores
