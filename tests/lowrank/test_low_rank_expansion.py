"""Low-rank expansions (survey 13): two schemes, two objectives."""

from __future__ import annotations

from collections.abc import Callable
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
from karui.layers.factored import FactoredConv
from karui.layers.separable_bank import SeparableBank
from karui.lowrank._expansion import SCHEMES
from karui.lowrank._split import joined_kernels, split_kernels
from karui.lowrank.low_rank_expansion import LowRankExpansion
from karui.measuring import count
from karui.model import Classification, Model, resolve
from karui.model.responses import responses
from karui.numerics.separable import spread
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

pytestmark = pytest.mark.paper(13)


def technique(**settings: Any) -> LowRankExpansion:
    return LowRankExpansion(**{"objective": "filter", "images": 100, "iterations": 30, **settings})


def run(model: Model, x: Tensor) -> Tensor:
    model.module.eval()
    with torch.no_grad():
        return model.module(x)


def bench_of(x: Tensor) -> Bench:
    return Bench(train=TensorDataset(x, torch.zeros(len(x))))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


SETTINGS: Any = pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1}, {"stride": (2, 3), "padding": (0, 2), "bias": False}, {"dilation": 2, "groups": 2},
        {"padding": "same", "padding_mode": "reflect"}, {"padding": 1, "padding_mode": "circular", "groups": 2},
    ],
)  # fmt: skip


@SETTINGS
@pytest.mark.parametrize(("scheme", "rank"), [(1, 15), (2, 12)])
def test_at_its_full_rank_each_scheme_is_exact(scheme: int, rank: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, (3, 5), **settings)
    model = Model(conv, example=(torch.randn(2, 8, 13, 14),))
    (seen,) = technique(scheme=scheme, ranks=(("", rank),))._scan(model)[0]
    kind: Any = SCHEMES[scheme]()
    full = kind.full(seen)
    assert full == (15 if scheme == 1 else min(8 // conv.groups * 3, 8 // conv.groups * 5))
    layer = kind.expand(seen, full, alternating=False).build()
    x = torch.randn(3, 8, 13, 14)
    with torch.no_grad():
        assert relative(layer(x), conv(x)) < 1e-5


@SETTINGS
@pytest.mark.parametrize("scheme", [1, 2])
@pytest.mark.parametrize("objective", ["filter", "data"])
def test_a_layer_computes_its_dense_equivalent_and_costs_what_is_told(
    scheme: int, objective: str, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, (3, 5), **settings))
    x = torch.rand(60, 3, 11, 12)
    model, bench = Model(net, example=(x[:2],)), bench_of(x)
    step = technique(scheme=scheme, objective=objective, ranks=(("2", 3),))
    light = step.apply(model, bench)
    layer: Any = light.module[2]  # pyright: ignore
    assert isinstance(layer, SeparableBank if scheme == 1 else FactoredConv)
    given = torch.relu(net[0](x)).detach()
    with torch.no_grad():
        assert relative(layer.dense()(given), layer(given)) < 1e-5
    groups = settings.get("groups", 1)
    biased = settings.get("bias", True) or objective == "data"
    sizes = {1: 3 * (3 + 5) + 16 // groups * 3 * 32, 2: groups * 3 * (16 // groups * 3 + 32 // groups * 5)}
    (choice,) = [choice for choice in step.choose(model) if choice.replaced]
    assert choice.parameters[1] == sizes[scheme] + 32 * biased
    assert count(light).parameters == count(model).parameters - choice.parameters[0] + choice.parameters[1]
    assert count(light).macs == count(model).macs - choice.macs[0] + choice.macs[1]


def test_costs_at_one_position_follow_the_formulas() -> None:
    model = Model(nn.Conv2d(6, 10, 5, padding=2), example=(torch.zeros(1, 6, 8, 8),))
    (seen,) = technique(ranks=(("", 1),))._scan(model)[0]
    for scheme, shared, parameters, macs in (
        (1, True, 4 * 2 * 5 + 6 * 4 * 10, 4 * 6 * (2 * 5 + 10)),
        (1, False, 4 * 6 * 2 * 5 + 6 * 4 * 10, 4 * 6 * (2 * 5 + 10)),
        (2, True, 4 * 5 * (6 + 10), 4 * 5 * (6 + 10)),
    ):
        assert SCHEMES[scheme](shared=shared).cost(seen, 4) == (parameters, macs * 64)


def test_scheme_1_shares_separable_filters() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 32, 5))
    model = Model(net, example=(torch.rand(2, 3, 9, 9),))
    errors = {}
    for shared in (True, False):
        light = technique(scheme=1, ranks=(("1", 3),), shared=shared).apply(model, Bench())
        layer: Any = light.module[1]  # pyright: ignore
        assert [len(one) for one in layer.filters] == [1 if shared else 8] * 2
        kernel = layer.kernel().detach()
        assert torch.linalg.matrix_rank(kernel.flatten(0, 1).flatten(1), rtol=1e-4) == (3 if shared else 24)
        if shared:
            column, row = (one[0] for one in layer.filters)
            assert float(spread(torch.einsum("ma,mb->mab", column, row).detach()).max()) < 1e-6
        note: Any = light.lineage[-1]
        errors[shared] = note.settings["factored"][0]["error"]
        assert errors[shared] == pytest.approx(relative(kernel, net[1].weight.detach().double()), rel=1e-4)
    assert errors[False] < errors[True]


def test_scheme_2_by_filters_is_the_closed_form_and_alternation_reaches_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 24, 3))
    model = Model(net, example=(torch.rand(2, 3, 9, 9),))
    weight = net[1].weight.detach()
    layers: list[Any] = [
        technique(ranks=(("1", 8),), solver=solver).apply(model, Bench()).module[1]  # pyright: ignore
        for solver in ("closed", "alternating")
    ]
    best = joined_kernels(*split_kernels(weight[None].double(), 8))[0]
    closed, found = (relative(layer.dense().weight.detach(), weight) for layer in layers)
    assert closed == pytest.approx(relative(best, weight.double()), rel=1e-5)
    assert closed * (1 - 1e-6) <= found <= 1.01 * closed


def test_three_dimensions_are_split_once_or_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(2, 8, 1), nn.Conv3d(8, 16, 3, padding=1), nn.ReLU())
    x = torch.rand(20, 2, 6, 5, 7)
    model = Model(net, example=(x[:1],))
    light = technique(objective="data").apply(model, bench_of(x))
    assert [stage.kernel_size for stage in light.module[1]] == [(3, 1, 1), (1, 3, 3)]  # pyright: ignore
    assert count(light).macs < 0.6 * count(model).macs
    assert any("scheme 1 is for two dimensions" in told for told in technique(scheme=1).remarks(model))


def test_each_refusal_has_its_reason() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 8, 2), nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, (1, 3)), nn.Flatten(2), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.LazyLinear(10),
    )  # fmt: skip
    x = torch.rand(2, 3, 8, 8)
    net(x)
    choices = {choice.path: choice for choice in technique().choose(Model(net, example=(x,)))}
    told = {path: choice.reason for path, choice in choices.items()}
    assert "first convolution is left alone" in told["0"]
    assert "rank 1 falls short of a speed-up of 2.0" in choices["1"].remark
    assert choices["1"].ranks == (1,)
    assert "ConvTranspose2d" in told["2"]
    for path in ("3", "4", "6"):
        assert "no two dimensions of space" in told[path]
    assert "no space to split" in told["8"]


def test_responses_are_fitted_no_worse_than_by_the_kernel(small_cnn: Callable[..., Model]) -> None:
    model = small_cnn(widths=(16, 24, 24))
    x = torch.rand(300, 1, 8, 8)
    for scheme in (1, 2):
        kernel = technique(scheme=scheme, speedup=2.0).apply(model, Bench())
        start = technique(scheme=scheme, objective="data", iterations=0, joint=False, speedup=2.0)
        fitted = technique(scheme=scheme, objective="data", iterations=100, joint=False, speedup=2.0)
        for path in ("conv2", "conv3"):
            a, b, c = (
                response_error(model, one, path, x)
                for one in (kernel, start.apply(model, bench_of(x)), fitted.apply(model, bench_of(x)))
            )
            assert c < b < a


def test_joint_layers_are_fitted_on_what_the_split_ones_give(small_cnn: Callable[..., Model]) -> None:
    model, x = small_cnn(widths=(16, 24, 24)), torch.rand(200, 1, 8, 8)
    a, b = (
        technique(objective="data", joint=way).apply(model, bench_of(x)).module.state_dict() for way in (False, True)
    )
    assert all(torch.equal(value, b[name]) for name, value in a.items() if "conv2" in name)
    assert not torch.allclose(a["conv3.1.weight"], b["conv3.1.weight"])


@pytest.mark.parametrize("shared", [True, False])
def test_scheme_1_saved_and_loaded_is_as_small_and_equal(shared: bool, tmp_path: Path) -> None:
    origin = resolve(f"{Path(__file__).parents[1] / 'law_network.py'}:network")
    module = origin.replay(None, ())
    assert module is not None
    model = Model(module.eval(), example=(torch.rand(2, 1, 8, 8),), task=Classification(), lineage=(origin,))
    light = technique(scheme=1, speedup=2.0, shared=shared).apply(model, Bench())
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    assert saved.weights_bytes < 4 * light.parameters + 20_000
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(run(load(tmp_path / "light"), x), run(light, x))


def test_needs_are_those_of_the_objective(small_cnn: Callable[..., Model]) -> None:
    assert technique().apply(small_cnn(), Bench()).parameters < small_cnn().parameters
    with pytest.raises(NeedError, match="calibration"):
        technique(objective="data").apply(small_cnn(), Bench())
    with pytest.raises(SettingError, match="conv9"):
        technique(ranks=(("conv9", 2),)).apply(small_cnn(), Bench())


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"scheme": 3}, "scheme"), ({"speedup": 0.9}, "speedup"), ({"ranks": (("conv1", 0),)}, "ranks"),
        ({"objective": "labels"}, "objective"), ({"solver": "none"}, "solver"), ({"images": 0}, "images"),
        ({"positions": 0}, "positions"), ({"iterations": -1}, "iterations"), ({"epochs": -1}, "epochs"),
        ({"learning_rate": 0.0}, "learning_rate"),
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings)


class Plain(nn.Module):
    """16, 32, 48 and 48 filters of 3x3 on the 8x8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise((1, 16, 32, 48, 48)))
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        for depth, conv in enumerate(self.convs):
            x = torch.relu(conv(x))
            x = nn.functional.max_pool2d(x, 2) if depth == 1 else x
        return self.head(x.mean((2, 3)))


def response_error(model: Model, light: Model, path: str, x: Tensor, *, own: bool = False) -> float:
    """Relative error of a layer's responses: on the original's inputs, or (`own`) on those of the light network."""
    (one,) = responses(model.module, light.module, path, [(x,)])
    (there,) = responses(model.module, model.module, path, [(x,)])
    with torch.no_grad():
        made = one.made if own else light.module.get_submodule(path)(there.given)
    return relative(made, one.wanted)


@pytest.mark.effect
@pytest.mark.slow
def test_data_reconstruction_halves_the_error_and_joint_is_best(digits: Splits) -> None:
    paths = ("convs.1", "convs.2", "convs.3")
    scores: dict[str, list[float]] = {name: [] for name in ("dense", "filter", "data", "joint", "twice")}
    last: dict[str, list[float]] = {name: [] for name in ("data", "joint")}
    x = torch.stack([digits.test[i][0] for i in range(len(digits.test))])
    for seed in range(3):
        training = Training(epochs=12, batch_size=32, optimizer=Adam(lr=4e-3), schedule=Cosine())
        bench = Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed)
        torch.manual_seed(seed)
        model = bench.fit(Model(Plain(), example=(torch.rand(2, 1, 8, 8),), task=Classification()))
        settings: Any = {"speedup": 3.0, "images": 300, "iterations": 100}
        lights = {
            "dense": model,
            "filter": LowRankExpansion(objective="filter", **settings).apply(model, bench),
            "data": LowRankExpansion(joint=False, **settings).apply(model, bench),
            "joint": LowRankExpansion(**settings).apply(model, bench),
            "twice": LowRankExpansion(speedup=2.0, images=300, iterations=100).apply(model, bench),
        }
        for path in paths:
            errors = [response_error(model, lights[name], path, x) for name in ("filter", "data")]
            assert errors[1] <= 0.5 * errors[0], (path, errors)
        for name, found in last.items():
            found.append(response_error(model, lights[name], paths[-1], x, own=True))
        for name, light in lights.items():
            scores[name].append(100 * bench.evaluate(light, "test").value)
    assert all(joint <= data for joint, data in zip(last["joint"], last["data"], strict=True)), last
    assert mean(scores["filter"]) < mean(scores["data"]) <= mean(scores["joint"]) + 0.2, scores
    assert mean(scores["twice"]) >= mean(scores["dense"]) - 0.5, scores
