"""Monochromatic convolutions (survey 18), and the metrics of that paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from karui.artifact import load, save
from karui.data import Splits
from karui.errors import NeedError, SettingError
from karui.layers.monochromatic import MonochromaticConv
from karui.lowrank._above import up_to
from karui.lowrank._metrics import gradient_strength, metric_of
from karui.lowrank._scan import scan
from karui.lowrank.monochromatic import Monochromatic, monochrome
from karui.measuring import count
from karui.model import Classification, Model, resolve
from karui.technique import Bench
from karui.train import Adam, Cosine, Training

pytestmark = pytest.mark.paper(18)


def technique(**settings: Any) -> Monochromatic:
    return Monochromatic(**{"restarts": 5, "images": 40, **settings})


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def bench_of(x: Tensor) -> Bench:
    return Bench(train=TensorDataset(x, torch.zeros(len(x), dtype=torch.long)))


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("metric", ["l2", "datacov"])
@pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1}, {"stride": 2, "padding": 1, "bias": False}, {"dilation": 2},
        {"padding": "same", "padding_mode": "reflect"},
    ],
)  # fmt: skip
def test_a_layer_computes_its_dense_equivalent_and_costs_what_is_told(
    kind: Any, even: bool, metric: str, settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    x = torch.rand(12, 5, *[7] * dims)
    conv = kind(5, 18, 3, **settings)
    model = Model(nn.Sequential(conv), example=(x[:2],))
    step = technique(colours=6, even=even, metric=metric)
    light = step.apply(model, bench_of(x))
    layer: Any = light.module[0]  # pyright: ignore
    assert isinstance(layer, MonochromaticConv)
    with torch.no_grad():
        assert relative(layer.dense()(x), layer(x)) < 1e-5
    (choice,) = step.choose(model)
    assert choice.parameters[1] == 5 * 6 + 18 * 3**dims + 18 * settings.get("bias", True)
    assert light.parameters == choice.parameters[1]
    assert count(light).macs == choice.macs[1]
    note: Any = light.lineage[-1]
    (entry,) = note.settings["factored"]
    assert entry["error"] == pytest.approx(relative(layer.kernel().detach(), conv.weight.detach().double()), rel=1e-4)
    if even:
        assert torch.bincount(layer.labels()).tolist() == [3] * 6


def test_with_a_colour_for_each_filter_it_is_the_best_rank_one_form_of_each() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(8, 3, 25).double()
    left, values, right = torch.linalg.svd(kernel, full_matrices=False)
    best = values[:, :1, None] * left[:, :, :1] * right[:, :1]
    for refit in (True, False):
        colours, filters, labels = monochrome(kernel, 8, refit=refit)
        torch.testing.assert_close(torch.einsum("nc,nt->nct", colours[labels], filters), best)


def test_planted_colours_are_found_also_where_signs_differ() -> None:
    torch.manual_seed(0)
    planted = torch.randn(4, 3).double()
    labels = torch.arange(24) % 4
    kernel = torch.einsum(
        "nc,nt->nct", planted[labels] * torch.tensor([1.0, -1.0]).repeat(12)[:, None], torch.randn(24, 9)
    )
    colours, filters, found = monochrome(kernel, 4, restarts=20)
    torch.testing.assert_close(torch.einsum("nc,nt->nct", colours[found], filters), kernel)


def test_more_colours_and_the_second_fit_lower_the_error() -> None:
    torch.manual_seed(0)
    kernel = torch.randn(32, 3, 25).double()

    def error(colours: int, refit: bool) -> float:
        mean, filters, labels = monochrome(kernel, colours, refit=refit, restarts=20)
        return relative(torch.einsum("nc,nt->nct", mean[labels], filters), kernel)

    errors = [error(colours, True) for colours in (2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert all(error(colours, True) <= error(colours, False) for colours in (2, 4, 8))


@pytest.mark.parametrize("metric", ["maha", "datacov"])
def test_each_metric_is_best_in_its_own_norm(metric: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 16, 4))
    x = torch.rand(40, 3, 8, 8) * torch.tensor([1.0, 3.0, 0.2])[:, None, None]
    model, bench = Model(net, example=(x[:2],)), bench_of(x)
    kernels = {}
    for name in ("l2", metric):
        light = technique(colours=4, metric=name).apply(model, bench)
        layer: Any = light.module[0]  # pyright: ignore
        kernels[name] = layer.kernel().detach()
    (seen,) = [one for one in scan(model, lambda _: "")[0] if one.path == "0"]
    norm: Any = metric_of(metric, model, seen, bench, images=40, positions=20)
    wanted = net[0].weight.detach().double()
    own, plain = (float(norm(wanted - kernels[name])) for name in (metric, "l2"))
    assert own < 0.98 * plain
    assert relative(kernels["l2"], wanted) < relative(kernels[metric], wanted)


def test_gradients_are_towards_the_most_probable_wrong_class() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    x = torch.rand(6, 3, 4, 4)
    model, bench = Model(net, example=(x[:2],)), bench_of(x)
    seen = scan(model, lambda _: "")[0][0]
    found = gradient_strength(model, seen, bench, 100)
    (inputs,) = [torch.cat(parts) for parts in zip(*bench.calibration(100), strict=True)]
    squares = []
    for one in inputs:
        scores = net(one[None])
        wrong = scores.argsort(1, descending=True)[:, 1]
        gradient = torch.autograd.grad(functional.cross_entropy(scores, wrong), net[0].weight)[0]
        squares.append(gradient.double().square())
    torch.testing.assert_close(found, torch.stack(squares).mean(0).sqrt())
    with pytest.raises(SettingError, match="class scores"):
        technique(colours=3, metric="maha").apply(Model(nn.Sequential(nn.Conv2d(3, 8, 3)), example=(x,)), bench)


class Tinted(nn.Module):
    """A first layer of 32 filters on colour pictures, and two more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 5, padding=2)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(torch.relu(self.norm1(self.conv1(x))), 2)
        return self.head(torch.relu(self.norm2(self.conv2(x))).amax((2, 3)))


def tinted(data: Any, seed: int) -> TensorDataset:
    """Digits in one random colour on another."""
    generator = torch.Generator().manual_seed(seed)
    gray = torch.stack([data[i][0] for i in range(len(data))])
    labels = torch.tensor([int(data[i][1]) for i in range(len(data))])
    ink, paper = (torch.rand(len(gray), 3, 1, 1, generator=generator) for _ in range(2))
    return TensorDataset(gray * ink + (1 - gray) * paper, labels)


def test_training_above_leaves_what_is_below() -> None:
    torch.manual_seed(0)
    x, y = torch.rand(40, 3, 8, 8), torch.arange(40) % 10
    model = Model(Tinted(), example=(x[:2],), task=Classification())
    bench = Bench(train=TensorDataset(x, y), training=Training(epochs=1, batch_size=8, optimizer=Adam(lr=1e-2)))
    bare, tuned = (technique(colours=4, epochs=epochs).apply(model, bench) for epochs in (0, 1))
    before, after = bare.module.state_dict(), tuned.module.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert not {name for name in moved if name.startswith("conv1")}
    assert {"norm1.weight", "conv2.weight", "norm2.running_mean", "head.bias"} <= moved
    assert up_to(bare, "conv2") == ("conv1.mix", "conv1.filters", "norm1", "conv2")


def test_each_refusal_has_its_reason() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, padding=2), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 1, 1),
        nn.Conv2d(1, 8, 3), nn.ConvTranspose2d(8, 8, 2), nn.Flatten(), nn.LazyLinear(10),
    )  # fmt: skip
    x = torch.rand(2, 3, 12, 12)
    net(x)
    model = Model(net, example=(x,))
    choices = {choice.path: choice for choice in technique(colours=4).choose(model)}
    assert choices["0"].replaced
    for path, reason in (
        ("1", "grouped"), ("2", "not the first"), ("4", "one channel"), ("5", "ConvTranspose2d"), ("7", "linear"),
    ):  # fmt: skip
        assert reason in choices[path].reason
    (uneven,) = [c for c in technique(colours=3, even=True).choose(model) if c.path == "0"]
    assert "even colours" in uneven.reason
    (many,) = technique(colours=300).choose(Model(nn.Conv2d(2, 8, 1), example=(x[:, :2],)))
    assert "would not save" in many.reason
    with pytest.raises(SettingError, match="conv9"):
        technique(ranks=(("conv9", 2),)).apply(model, Bench())
    with pytest.raises(NeedError, match="calibration"):
        technique(metric="datacov").apply(model, Bench())


@pytest.mark.parametrize("even", [False, True])
def test_saved_and_loaded_it_is_as_small_and_equal(even: bool, tmp_path: Path) -> None:
    origin = resolve(f"{Path(__file__).parents[1] / 'law_network.py'}:network")
    module = origin.replay(None, ())
    assert module is not None
    model = Model(module.eval(), example=(torch.rand(2, 1, 8, 8),), task=Classification(), lineage=(origin,))
    light = technique(ranks=(("first", 6),), even=even).apply(model, Bench())
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "light").module.eval()(x), light.module.eval()(x))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"colours": -1}, "colours"), ({"ranks": (("a", 0),)}, "ranks"), ({"metric": "l1"}, "metric"),
        ({"images": 0}, "images"), ({"positions": 0}, "positions"), ({"restarts": 0}, "restarts"),
        ({"iterations": -1}, "iterations"), ({"epochs": -1}, "epochs"), ({"learning_rate": 0.0}, "learning_rate"),
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings)


@pytest.mark.effect
@pytest.mark.slow
def test_six_colours_keep_accuracy_after_training_above(digits: Splits) -> None:
    scores: dict[str, list[float]] = {"dense": [], "light": []}
    for seed in range(3):
        training = Training(epochs=6, batch_size=32, optimizer=Adam(lr=3e-3), schedule=Cosine())
        train, test = tinted(digits.train, seed), tinted(digits.test, seed + 100)
        bench = Bench(train=train, test=test, training=training, seed=seed)
        torch.manual_seed(seed)
        dense = bench.fit(Model(Tinted(), example=(torch.rand(2, 3, 8, 8),), task=Classification()))
        light = Monochromatic(colours=6, epochs=2, learning_rate=1e-3, restarts=20).apply(dense, bench)
        scores["dense"].append(100 * bench.evaluate(dense, "test").value)
        scores["light"].append(100 * bench.evaluate(light, "test").value)
    drop = sum(scores["dense"]) / 3 - sum(scores["light"]) / 3
    assert drop <= 1, scores
