"""Tucker-2 with VBMF ranks (survey 12): what must hold, and what the paper shows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karui.data import Splits
from karui.errors import NeedError, SettingError
from karui.layers.factored import FactoredConv, FactoredLinear, FullMapLinear
from karui.lowrank.tucker2 import Tucker2
from karui.measuring import count
from karui.model import Classification, Model
from karui.numerics.evbmf import evbmf
from karui.numerics.unfold import unfold
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

pytestmark = pytest.mark.paper(12)


def technique(**settings: Any) -> Tucker2:
    return Tucker2(**{"epochs": 0, **settings})


def run(model: Model, x: Tensor) -> Tensor:
    model.module.eval()
    with torch.no_grad():
        return model.module(x)


def planted(conv: Any, rank_out: int, rank_in: int, noise: float = 0.0) -> Any:
    """Give a convolution's kernel those ranks in every group, and noise."""
    with torch.no_grad():
        for rows in conv.weight.split(conv.out_channels // conv.groups):
            core = torch.randn(rank_out, rank_in, *rows.shape[2:])
            outer, inner = torch.randn(rows.shape[0], rank_out), torch.randn(rows.shape[1], rank_in)
            rows.copy_(torch.einsum("qp...,nq,cp->nc...", core, outer, inner) + noise * torch.randn(rows.shape))
    return conv


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1}, {"stride": 2, "padding": 1, "bias": False}, {"dilation": 2, "groups": 2},
        {"padding": "same", "padding_mode": "reflect"}, {"padding": 1, "padding_mode": "circular", "groups": 4},
    ],
)  # fmt: skip
def test_the_ranks_of_the_kernel_reproduce_the_output(kind: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    convs = [planted(kind(16, 16, 3, **settings), 2, 2) for _ in range(2)]
    x = torch.randn(2, 16, *[11] * (convs[0].weight.ndim - 2))
    model = Model(nn.Sequential(*convs), example=(x,))
    light = technique(ranks=(("0", 2, 2), ("1", 2, 2))).apply(model, Bench())
    for path in ("0", "1"):
        chain: Any = light.module.get_submodule(path)
        assert isinstance(chain, FactoredConv)
        assert [type(stage) for stage in chain] == [kind] * 3
        assert [stage.bias is not None for stage in chain] == [False, False, settings.get("bias", True)]
        assert chain[0].stride == chain[2].stride == (1,) * (x.ndim - 2)
        assert chain[1].stride == convs[0].stride
    assert float((run(light, x) - run(model, x)).norm() / run(model, x).norm()) < 1e-5


def test_full_ranks_change_nothing(small_cnn: Callable[..., Model]) -> None:
    model = small_cnn()
    same = technique(ratio=1.0).apply(model, Bench())
    assert not [step for step in same.lineage if step.kind == "replace"]
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(run(same, x), run(model, x))


def test_parameters_and_multiply_adds_follow_the_formulas() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 32, 3, stride=2, padding=1))
    model = Model(net, example=(torch.randn(1, 16, 12, 12),))
    step = technique(ranks=(("0", 5, 6), ("1", 7, 9)))
    light = step.apply(model, Bench())
    per_layer = {choice.path: choice for choice in step.choose(model)}
    assert per_layer["1"].parameters[1] == 24 * 7 + 9 * 7 * 9 + 32 * 9 + 32
    # The first factor works at the input's resolution, twice that of the output in each dimension.
    assert per_layer["1"].macs[1] == 24 * 7 * 12 * 12 + 9 * 7 * 9 * 6 * 6 + 32 * 9 * 6 * 6
    assert light.parameters == sum(choice.parameters[1] for choice in per_layer.values())
    assert count(light).macs == sum(choice.macs[1] for choice in per_layer.values())
    assert count(model).macs == sum(choice.macs[0] for choice in per_layer.values())


def test_ranks_are_those_of_variational_bayes_and_the_first_convolution_keeps_its_inputs() -> None:
    torch.manual_seed(0)
    convs = [planted(nn.Conv2d(c, n, 3), q, p, 0.4) for c, n, q, p in ((8, 32, 4, 3), (32, 48, 6, 5), (48, 48, 9, 7))]
    model = Model(nn.Sequential(*convs), example=(torch.randn(1, 8, 10, 10),))
    choices = technique().choose(model)
    assert [choice.ranks for choice in choices] == [(8, 4), (5, 6), (7, 9)]
    for conv, choice in zip(convs[1:], choices[1:], strict=True):
        kernel = conv.weight.detach()
        assert choice.ranks == (evbmf(unfold(kernel, (1,))).rank, evbmf(unfold(kernel, (0,))).rank)
    first: Any = technique().apply(model, Bench()).module.get_submodule("0")
    assert [stage.kernel_size for stage in first] == [(3, 3), (1, 1)]


def test_a_kernel_of_noise_is_told_and_left_or_taken_to_the_rank_that_is_asked_for() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 3))
    model = Model(net, example=(torch.randn(1, 3, 8, 8),))
    for told in technique().remarks(model):
        assert "left as it is: variational Bayes finds nothing but noise" in told
    first, second = technique(noise_rank=1).remarks(model)
    assert "rank 3 x 1 of 3 x 24" in first
    assert "rank 1 x 1 of 24 x 24" in second
    assert "noise in its inputs, taken at rank 1; variational Bayes finds nothing but noise in its outputs" in second
    assert technique(noise_rank=1).apply(model, Bench()).parameters < model.parameters


def test_a_mode_of_noise_stays_whole_while_the_other_is_cut() -> None:
    """Filters that are one direction plus noise; along its inputs the kernel is too long to tell them from noise."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 64, 3)
    with torch.no_grad():
        conv.weight.copy_(
            torch.einsum("n,cij->ncij", torch.randn(64), torch.randn(8, 3, 3)) + 3 * torch.randn(64, 8, 3, 3)
        )
    net = nn.Sequential(nn.Conv2d(4, 8, 1), conv)
    model = Model(net, example=(torch.randn(1, 4, 8, 8),))
    ranks = [evbmf(unfold(conv.weight.detach(), (mode,))).rank for mode in (1, 0)]
    assert ranks == [0, 1]
    (choice,) = [choice for choice in technique().choose(model) if choice.path == "1"]
    assert choice.ranks == (8, 1)
    assert "nothing but noise in its inputs, taken at rank 8" in choice.remark
    assert [stage.kernel_size for stage in technique().apply(model, Bench()).module[1]] == [(3, 3), (1, 1)]  # pyright: ignore


class FlatHead(nn.Module):
    """Convolution, flattened map, two linear layers: AlexNet's order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 12, 3, padding=1)
        self.fc1 = nn.Linear(12 * 4 * 4, 40)
        self.fc2 = nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.conv(x)), 2).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


def test_linear_layer_on_a_map_is_a_convolution_and_later_ones_get_an_svd() -> None:
    torch.manual_seed(0)
    net = FlatHead()
    as_map = planted(nn.Conv2d(12, 40, 4), 5, 3, 1e-3)
    with torch.no_grad():
        net.fc1.weight.copy_(as_map.weight.flatten(1))
        net.fc2.weight.copy_(torch.randn(40, 6) @ torch.randn(6, 40) + 1e-3 * torch.randn(40, 40))
    model = Model(net, example=(torch.rand(2, 2, 8, 8),))
    light = technique(skip=("conv",)).apply(model, Bench())
    fc1: Any = light.module.get_submodule("fc1")
    fc2: Any = light.module.get_submodule("fc2")
    assert isinstance(fc1, FullMapLinear)
    assert [stage.kernel_size for stage in fc1.chain.stages] == [(1, 1), (4, 4), (1, 1)]
    assert fc1.chain.stages[1].weight.shape == (5, 3, 4, 4)
    assert isinstance(fc2, FactoredLinear)
    assert fc2.rank == 6
    x = torch.rand(5, 2, 8, 8)
    assert float((run(light, x) - run(model, x)).norm() / run(model, x).norm()) < 1e-2
    assert count(light).macs == sum(choice.macs[1] or 0 for choice in technique(skip=("conv",)).choose(model)) + (
        12 * 2 * 9 * 64
    )
    kept = technique(skip=("conv",), fully_connected=False).apply(model, Bench())
    assert type(kept.module.get_submodule("fc1")) is nn.Linear


def test_pointwise_convolutions_are_left_unless_asked_for() -> None:
    torch.manual_seed(0)
    conv = planted(nn.Conv2d(24, 32, 1, stride=2), 3, 3, 0.05)
    model = Model(nn.Sequential(conv), example=(torch.randn(1, 24, 8, 8),))
    (told,) = technique().remarks(model)
    assert "pointwise" in told
    light = technique(pointwise=True).apply(model, Bench())
    chain: Any = light.module.get_submodule("0")
    assert [tuple(stage.weight.shape[:2]) for stage in chain] == [(3, 24), (32, 3)]
    x = model.example[0]
    assert float((run(light, x) - run(model, x)).norm() / run(model, x).norm()) < 0.2


def test_depthwise_and_transposed_convolutions_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 8, 3))
    told = technique(ratio=0.5).remarks(Model(net, example=(torch.randn(1, 8, 8, 8),)))
    assert any(line.startswith("0: left as it is") for line in told)
    assert any("1: left as it is: ConvTranspose2d" in line for line in told)


def test_errors_are_told_and_refinement_does_not_raise_them(small_cnn: Callable[..., Model]) -> None:
    model = small_cnn(widths=(16, 24, 24))

    def errors(sweeps: int) -> list[float]:
        note: Any = technique(ratio=0.4, sweeps=sweeps).apply(model, Bench()).lineage[-1]
        return [entry["error"] for entry in note.settings["factored"]]

    start, refined = errors(0), errors(20)
    assert len(start) > 1
    assert all(0 < a <= b for a, b in zip(refined, start, strict=True))
    assert refined != start


def test_the_error_told_is_that_of_the_dense_equivalent(small_cnn: Callable[..., Model]) -> None:
    model = small_cnn(widths=(16, 24, 24))
    light = technique(ratio=0.4).apply(model, Bench())
    note: Any = light.lineage[-1]
    for entry in note.settings["factored"]:
        old, new = (m.module.get_submodule(entry["layer"]) for m in (model, light))
        kernel, dense = old.weight.detach(), new.dense().weight.detach()  # pyright: ignore
        assert entry["error"] == pytest.approx(float((kernel - dense).norm() / kernel.norm()), rel=1e-4)


def test_the_given_model_stays_and_all_factors_learn(small_cnn: Callable[..., Model], digits: Splits) -> None:
    model = small_cnn()
    before = copy.deepcopy(model.module.state_dict())
    bench = Bench(train=digits.train, validation=digits.validation, training=Training(optimizer=Adam(lr=1e-3)))
    start = technique(ratio=0.4).apply(model, bench).module.state_dict()
    tuned = technique(ratio=0.4, epochs=1, learning_rate=1e-3).apply(model, bench).module.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert start.keys() == tuned.keys()
    for name in ("conv2.0.weight", "conv2.1.weight", "conv2.2.weight"):
        assert not torch.equal(start[name], tuned[name])


def test_fine_tuning_without_data_is_refused_first(small_cnn: Callable[..., Model]) -> None:
    with pytest.raises(NeedError, match="training data"):
        technique(epochs=1).apply(small_cnn(), Bench())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"ratio": 0.0}, "ratio"), ({"ratio": 1.5}, "ratio"), ({"ranks": (("conv1", 0, 2),)}, "ranks"),
        ({"noise_rank": -1}, "noise_rank"), ({"sweeps": -1}, "sweeps"),
        ({"epochs": -1}, "epochs"), ({"learning_rate": -1.0}, "learning_rate"),
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings)


def test_ranks_of_layers_that_are_not_there_are_told(small_cnn: Callable[..., Model]) -> None:
    with pytest.raises(SettingError, match="conv9"):
        technique(ranks=(("conv9", 2, 2),)).apply(small_cnn(), Bench())


class FourConvolutions(nn.Module):
    """16, 32, 48 and 48 filters of 3x3, with batch normalisation, on the 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 48, 48)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        for depth, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = torch.relu(norm(conv(x)))
            if depth == 1:
                x = nn.functional.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


def kept(model: Model, step: Tucker2) -> int:
    return model.parameters - sum(c.parameters[0] - c.parameters[1] for c in step.choose(model) if c.replaced)


def uniform_ratio(model: Model, parameters: int) -> float:
    """The share of full rank, the same for all layers, that gives about as many parameters."""
    return min((step / 100 for step in range(10, 60)), key=lambda r: abs(kept(model, technique(ratio=r)) - parameters))


@pytest.mark.effect
@pytest.mark.slow
def test_ranks_are_far_below_full_and_fine_tuning_brings_the_accuracy_back(digits: Splits) -> None:
    dense, bare, light, uniform = [], [], [], []
    for seed in range(3):
        training = Training(epochs=12, batch_size=32, optimizer=Adam(lr=2e-2), schedule=Cosine())
        bench = Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed)
        torch.manual_seed(seed)
        model = bench.fit(Model(FourConvolutions(), example=(torch.rand(2, 1, 8, 8),), task=Classification()))
        start = technique().apply(model, bench)
        choices = {choice.path: choice for choice in technique().choose(model)}
        for path in ("convs.2", "convs.3"):
            assert all(rank <= 0.5 * full for rank, full in zip(choices[path].ranks, choices[path].full, strict=True))
        assert start.parameters < 0.25 * model.parameters
        ratio = uniform_ratio(model, start.parameters)
        assert kept(model, technique(ratio=ratio)) == pytest.approx(start.parameters, rel=0.05)
        for scores, one in (
            (dense, model),
            (bare, start),
            (light, technique(epochs=5, learning_rate=1e-2).apply(model, bench)),
            (uniform, technique(ratio=ratio, epochs=5, learning_rate=1e-2).apply(model, bench)),
        ):
            scores.append(100 * bench.evaluate(one, "test").value)
    assert mean(bare) < mean(dense) - 10, (dense, bare)
    assert mean(light) >= mean(dense) - 1, (dense, light)
    assert mean(uniform) <= mean(light), (light, uniform)
