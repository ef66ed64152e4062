"""Low-rank output layers (survey 23): what must hold, and what the paper shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.artifact import load, save
from karui.data import Splits
from karui.errors import NeedError, SettingError
from karui.layers.factored import FactoredConv, FactoredLinear
from karui.lowrank.low_rank_output import LowRankOutput
from karui.lowrank.svd_restructuring import SvdRestructuring
from karui.measuring import count
from karui.model import Classification, Model, replace_layers
from karui.technique import Bench
from karui.train import Adam, Cosine, Influence, Moment, Training

pytestmark = pytest.mark.paper(23)


def technique(**settings: Any) -> LowRankOutput:
    return LowRankOutput(**{"epochs": 0, **settings})


def classifier(inputs: int = 20, hidden: int = 32, classes: int = 60) -> Model:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    return Model(net.eval(), example=(torch.zeros(2, inputs),), task=Classification())


def run(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module.eval()(x)


def test_parameters_are_the_formula_and_the_paper_s_layer() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in FactoredLinear(1024, 128, 2220, bias=False).parameters()) == 415_232
        assert nn.Linear(1024, 2220).weight.numel() == 2_273_280
    model = classifier()
    light = technique(rank=7).apply(model, Bench())
    assert model.parameters - light.parameters == 32 * 60 - 7 * (32 + 60)
    told = technique(rank=7).remarks(model)
    assert "2: rank 7 of 32, 1,980 -> 704 parameters" in told[0]
    assert told[1] == f"the whole network: {model.parameters:,} -> {light.parameters:,} parameters"
    assert count(model).macs - count(light).macs == 32 * 60 - 7 * (32 + 60)
    (choice,) = technique(ratio=0.25).choose(model)
    assert choice.ranks == (8,)


def test_a_rank_is_taken_if_and_only_if_it_saves() -> None:
    model, bound = classifier(), 32 * 60 / (32 + 60)
    for rank in range(1, 33):
        (choice,) = technique(rank=rank).choose(model)
        assert choice.replaced == (rank < bound), rank
    left = technique(rank=21).apply(model, Bench())
    assert left.parameters == model.parameters
    assert "would not save" in technique(rank=21).remarks(model)[0]


def test_logits_are_affine_in_the_hidden_state_with_one_bias_on_the_last_factor() -> None:
    light = technique(rank=6).apply(classifier(), Bench())
    head: Any = light.module[2]  # pyright: ignore[reportIndexIssue]
    assert [type(part) for part in head] == [nn.Linear, nn.Linear]
    assert head[0].bias is None
    assert head[1].bias is not None
    a, b = torch.randn(5, 32), torch.randn(5, 32)
    torch.testing.assert_close(head(0.3 * a + 0.7 * b), 0.3 * head(a) + 0.7 * head(b), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.dense()(a), head(a), rtol=1e-4, atol=1e-5)


def test_gradients_of_the_factors_are_the_chain_rule_of_the_dense_layer() -> None:
    torch.manual_seed(1)
    head, x, target = FactoredLinear(16, 4, 30), torch.randn(8, 16), torch.randint(0, 30, (8,))
    nn.functional.cross_entropy(head(x), target).backward()
    dense = head.dense()
    nn.functional.cross_entropy(dense(x), target).backward()
    first, last = (part.weight for part in head)  # pyright: ignore
    whole: Any = dense.weight.grad
    torch.testing.assert_close(last.grad, whole @ first.T)
    torch.testing.assert_close(first.grad, last.T @ whole)


def test_at_full_rank_any_dense_layer_can_be_written_so() -> None:
    torch.manual_seed(0)
    dense, head = nn.Linear(12, 40), FactoredLinear(12, 12, 40)
    left, values, right = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    with torch.no_grad():
        head[0].weight.copy_(right)  # pyright: ignore
        head[1].weight.copy_(left * values)  # pyright: ignore
        head[1].bias.copy_(dense.bias)  # pyright: ignore
    x = torch.randn(9, 12)
    torch.testing.assert_close(head(x), dense(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [4, 32])
def test_logits_spread_at_the_start_as_those_of_a_dense_layer_do(rank: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 64)
    with torch.no_grad():
        dense = torch.stack([nn.Linear(64, 500)(x) for _ in range(10)]).std()
        drawn = torch.stack([FactoredLinear(64, rank, 500)(x) for _ in range(10)]).std()
    assert float(drawn / dense) == pytest.approx(1, rel=0.1)


class RankOfTheOutput(Influence):
    """Notes the rank of the effective output weight after every step."""

    def __init__(self) -> None:
        self.ranks: list[int] = []

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        del moment
        head: Any = module.get_submodule("2")
        self.ranks.append(int(torch.linalg.matrix_rank(head.dense().weight.double(), rtol=1e-6)))


def test_the_effective_weight_never_exceeds_the_rank_while_it_trains() -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(128, 20), torch.randint(0, 60, (128,)))
    bench = Bench(train=data, training=Training(epochs=2, batch_size=16, optimizer=Adam(lr=1e-2)))
    watcher = RankOfTheOutput()
    bench.fit(technique(rank=5).apply(classifier(), bench), influence=watcher)
    assert len(watcher.ranks) == 16
    assert max(watcher.ranks) == 5


def test_starts_are_told_apart() -> None:
    model, bench = classifier(), Bench(seed=3)
    before = model.module.state_dict()
    scratch, output, svd = (
        technique(rank=5, start=start).apply(model, bench).module.state_dict() for start in ("scratch", "output", "svd")
    )
    assert not torch.equal(scratch["0.weight"], before["0.weight"])
    for state in (output, svd):
        assert torch.equal(state["0.weight"], before["0.weight"])
    restructured = SvdRestructuring(ranks=(("2", 5),), skip=("0",), epochs=0).apply(model, bench).module.state_dict()
    for name in ("2.0.weight", "2.1.weight"):
        assert torch.equal(svd[name], restructured[name])
        assert not torch.equal(output[name], svd[name])
    again = technique(rank=5, start="output").apply(model, bench).module.state_dict()
    assert all(torch.equal(output[name], again[name]) for name in output)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 12)
        self.head = nn.Linear(12, 50)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x))


def test_what_cannot_be_factored_is_refused_by_name() -> None:
    tied = Model(Tied(), example=(torch.zeros(1, 3, dtype=torch.long),))
    assert "its weight is shared with words.weight" in technique(rank=2).remarks(tied)[0]
    assert technique(rank=2).apply(tied, Bench()).parameters == tied.parameters
    with pytest.raises(SettingError, match="shared with words"):
        technique(rank=2, layer="head").apply(tied, Bench())
    spatial = Model(nn.Conv2d(8, 40, 3), example=(torch.zeros(1, 8, 9, 9),))
    assert "sees space" in technique(rank=2).remarks(spatial)[0]
    with pytest.raises(SettingError, match="2 groups"):
        technique(rank=2, layer="0").choose(
            Model(nn.Sequential(nn.Conv2d(8, 40, 1, groups=2)), example=(torch.zeros(1, 8, 9, 9),))
        )
    inner = nn.Sequential(nn.Linear(16, 400), nn.ReLU(), nn.Unflatten(1, (40, 10)), nn.Conv1d(40, 3, 3))
    assert "does not give the model's output" in technique(rank=2).remarks(Model(inner, (torch.zeros(1, 16),)))[0]


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_map_of_scores_from_a_pointwise_convolution_is_factored(dims: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    net = nn.Sequential(conv(3, 16, 3, padding=1), nn.ReLU(), conv(16, 50, 1, stride=2, bias=dims != 2))
    model = Model(net.eval(), example=(torch.randn(2, 3, *[6] * dims),))
    light = technique(rank=4, start="svd").apply(model, Bench())
    head: Any = light.module[2]  # pyright: ignore[reportIndexIssue]
    assert isinstance(head, FactoredConv)
    hidden = torch.relu(net[0](model.example[0]))
    torch.testing.assert_close(head.dense()(hidden), head(hidden), rtol=1e-4, atol=1e-5)
    (choice,) = technique(rank=4).choose(model)
    assert choice.macs[1] == count(light).macs - count(Model(net[:2], example=model.example)).macs
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    again = load(tmp_path / "light", base=net)
    torch.testing.assert_close(run(again, model.example[0]), run(light, model.example[0]))


def test_training_without_data_is_refused_first(small_cnn: Callable[..., Model]) -> None:
    with pytest.raises(NeedError, match="low_rank_output"):
        LowRankOutput(rank=2).apply(small_cnn(), Bench())


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"ratio": 0.0}, "ratio"), ({"rank": 0}, "rank"), ({"epochs": -1}, "epochs"), ({"start": "svdd"}, "start")],
)
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings)


def triples(data: Any, number: int, seed: int) -> TensorDataset:
    """Three digits side by side, and their number from 0 to 999: a thousand targets that have much in common."""
    pictures = torch.stack([data[i][0].flatten() for i in range(len(data))])
    labels = torch.tensor([int(data[i][1]) for i in range(len(data))])
    drawn = torch.randint(0, len(labels), (number, 3), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(pictures[drawn].flatten(1), (labels[drawn] * torch.tensor([100, 10, 1])).sum(1))


@pytest.mark.effect
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_quarter_of_the_width_as_rank_is_as_good_and_factoring_a_hidden_layer_is_not_better(
    digits: Splits, seed: int
) -> None:
    train, test = triples(digits.train, 15_000, 0), triples(digits.test, 3_000, 1)
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1000))
    model = Model(net.eval(), example=(torch.zeros(1, 192),), task=Classification())
    training = Training(epochs=15, batch_size=128, optimizer=Adam(lr=4e-3), schedule=Cosine())
    bench = Bench(train=train, test=test, training=training, seed=seed)

    def accuracy(trained: Model) -> float:
        return 100 * bench.evaluate(trained, "test").value

    light = {rank: LowRankOutput(rank=rank, epochs=15).apply(model, bench) for rank in (2, 64, 165)}
    hidden = replace_layers(model, {"2": FactoredLinear(256, 32, 256)})
    assert light[64].parameters < 0.7 * model.parameters
    assert abs(hidden.parameters - light[165].parameters) < 0.01 * model.parameters
    dense = accuracy(bench.fit(model))
    scores = {rank: accuracy(trained) for rank, trained in light.items()}
    assert scores[64] > dense - 1, (dense, scores)
    assert scores[2] < dense - 20, (dense, scores)
    assert accuracy(bench.fit(hidden)) < scores[165] + 0.5, (dense, scores)
