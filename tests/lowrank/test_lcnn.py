"""Lookup-based networks (survey 29)."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from karui.artifact import load, save
from karui.data import Splits
from karui.errors import SettingError
from karui.layers.lookup import (
    LookupConv,
    LookupLinear,
    freeze_dictionaries,
    lookup_layers,
    table_of,
    threshold,
    transfer_dictionaries,
)
from karui.lowrank.lcnn import Lcnn, LookupSparsity, multiplications
from karui.measuring import count
from karui.model import Classification, Model, replace_layers, resolve
from karui.technique import Bench
from karui.train import SGD, Cosine, Paced, Training
from karui.train.influence import Moment

pytestmark = pytest.mark.paper(29)

SETTINGS: Any = pytest.mark.parametrize(
    "settings",
    [
        {"padding": 1}, {"stride": 2, "padding": 1, "bias": False}, {"dilation": 2, "groups": 2},
        {"padding": "same", "padding_mode": "reflect"}, {"padding": 1, "padding_mode": "circular", "groups": 4},
    ],
)  # fmt: skip


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def sparse(layer: Any, share: float) -> None:
    """Set all but a share of the mixture to zero, at random."""
    weight = layer.mixture.weight
    with torch.no_grad():
        weight.mul_((torch.rand_like(weight) < share).to(weight))


@SETTINGS
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_two_convolutions_the_dense_kernel_and_the_table_agree(kind: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    x = torch.randn(3, 8, *[7] * dims)
    layer = LookupConv(8, 12, (3,) * dims, size=5, **settings)
    sparse(layer, 0.2)
    dense = kind(8, 12, 3, **settings)
    with torch.no_grad():
        dense.weight.copy_(layer.kernel())
        if dense.bias is not None:
            dense.bias.copy_(layer.mixture.bias)
        assert relative(layer(x), dense(x)) < 1e-5
        assert relative(layer.by_table(x), dense(x)) < 1e-5
    live = torch.count_nonzero(layer.mixture.weight.flatten(2), 1)
    assert layer.table().lookups == int(live.max())


def test_a_linear_layer_agrees_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, 20)
    layer = LookupLinear(20, 12, size=8)
    sparse(layer, 0.3)
    with torch.no_grad():
        wanted = x @ layer.kernel().float().T + layer.mixture.bias
        assert relative(layer(x), wanted) < 1e-5
        assert relative(layer.by_table(x), wanted) < 1e-5


def test_a_dictionary_of_unit_vectors_is_the_dense_convolution() -> None:
    torch.manual_seed(0)
    conv, layer = nn.Conv2d(6, 10, 3), LookupConv(6, 10, (3, 3), size=6)
    with torch.no_grad():
        layer.dictionary.weight.copy_(torch.eye(6).reshape(6, 6, 1, 1))
        layer.mixture.weight.copy_(conv.weight)
        assert conv.bias is not None
        layer.mixture.bias.copy_(conv.bias)
        x = torch.randn(2, 6, 7, 7)
        torch.testing.assert_close(layer(x), conv(x))


def test_multiplications_are_those_of_the_formula_with_what_lives() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 10))
    model = Model(net, example=(torch.zeros(2, 16, 8, 8),))
    light = Lcnn(size=6, sizes=(("3", 20),), epochs=0, norm=False).apply(model, Bench())
    for layer in lookup_layers(light.module).values():
        sparse(layer, 0.25)
    conv, linear = light.module[0], light.module[3]  # pyright: ignore
    done = multiplications(light)
    assert done["0"] == 6 * 16 * 64 + int(torch.count_nonzero(conv.mixture.weight)) * 16
    assert done["3"] == 20 * 384 + int(torch.count_nonzero(linear.mixture.weight))


def test_threshold_and_penalty_follow_the_formulas() -> None:
    torch.manual_seed(0)
    layer = LookupConv(8, 12, (3, 3), size=16)
    assert threshold(layer) == pytest.approx(0.01 / (9 * 16) ** 0.5)
    moment = Moment(module=nn.Sequential(layer), inputs=(), targets=None, outputs=None)
    loss = LookupSparsity(0.3).objective(torch.zeros(()), moment)
    expected = 0.3 * 0.01 / 12 * layer.mixture.weight.abs().sum()
    torch.testing.assert_close(loss, expected)


def test_what_is_small_becomes_zero_and_stays_so() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(LookupConv(3, 8, (3, 3), size=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 2))
    layer: Any = net[0]
    edge = threshold(layer)
    with torch.no_grad():
        layer.mixture.weight[0, 0, 0] = torch.tensor([edge, -edge, 2 * edge])
    influence = LookupSparsity(20.0)
    influence.attach(net)
    assert layer.mixture.weight[0, 0, 0].tolist() == [0, 0, pytest.approx(2 * edge)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    dead, counts = layer.mixture.weight == 0, []
    for step in range(30):
        x, y = torch.randn(8, 3, 5, 5), torch.randint(2, (8,))
        optimizer.zero_grad()
        outputs = net(x)
        moment = Moment(module=net, inputs=(x,), targets=y, outputs=outputs, step=step)
        loss = influence.objective(nn.functional.cross_entropy(outputs, y), moment)
        loss.backward()
        assert not layer.mixture.weight.grad[dead].any()
        optimizer.step()
        with torch.no_grad():
            influence.constraints(net, moment)
        now = layer.mixture.weight == 0
        assert bool(now[dead].all())
        assert not (layer.mixture.weight[~now].abs() <= edge).any()
        dead = now
        counts.append(int((~now).sum()))
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]
    names = set(influence.finish(net).state_dict())
    assert names == {"0.dictionary.weight", "0.mixture.weight", "0.mixture.bias", "3.weight", "3.bias"}


def test_tables_hold_what_lives() -> None:
    torch.manual_seed(0)
    mixture = torch.randn(7, 9, 4) * (torch.rand(7, 9, 4) < 0.3)
    table = table_of(mixture)
    made = torch.zeros(7, 4, 9).scatter_add_(2, table.index, table.coefficient).transpose(1, 2)
    torch.testing.assert_close(made, mixture)
    assert table_of(torch.zeros(2, 3, 1)).lookups == 1


def small(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 48, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    return Model(net, example=(torch.zeros(2, 1, 8, 8),), task=Classification())


def bench_of(digits: Splits, epochs: int, seed: int = 0) -> Bench:
    training = Training(epochs=epochs, batch_size=32, optimizer=SGD(lr=0.05, momentum=0.9), schedule=Cosine())
    return Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed)


def test_a_frozen_dictionary_is_left_to_the_bit_and_one_can_be_taken_over(digits: Splits) -> None:
    bench = bench_of(digits, 1)
    source = Lcnn(size=12, epochs=0).apply(small(), bench)
    target = Lcnn(size=12, epochs=0).apply(small(), bench_of(digits, 1, seed=1))
    assert transfer_dictionaries(source.module, target.module) == ("0", "2", "5")
    freeze_dictionaries(target.module)
    before = {name: value.clone() for name, value in target.module.state_dict().items()}
    after = bench.fit(target, influence=LookupSparsity(1.0)).module.state_dict()
    for path in ("0", "2", "5"):
        assert torch.equal(after[f"{path}.dictionary.weight"], before[f"{path}.dictionary.weight"])
        assert not torch.equal(after[f"{path}.mixture.weight"], before[f"{path}.mixture.weight"])
    with pytest.raises(SettingError, match="no lookup layer"):
        transfer_dictionaries(small().module, target.module)


def test_normalisation_goes_where_there_is_none_and_each_refusal_has_its_reason() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 3, groups=2),
        nn.ConvTranspose2d(16, 8, 2), nn.Flatten(), nn.LazyLinear(32), nn.Linear(32, 10),
    )  # fmt: skip
    x = torch.rand(2, 3, 12, 12)
    net(x)
    model = Model(net.eval(), example=(x,))
    choices = {c.path: c for c in Lcnn(size=5).choose(model)}
    assert choices["0"].ranks == (3,)
    assert "depthwise" in choices["2"].reason
    assert choices["3"].ranks == (4,)
    assert "ConvTranspose2d" in choices["4"].reason
    assert "output layer" in choices["7"].reason
    light = Lcnn(size=5, epochs=0).apply(model, Bench())
    layers = lookup_layers(light.module)
    assert {path: layer.norm is not None for path, layer in layers.items()} == {"0": False, "3": True, "6": True}
    saved = sum(a - b for c in choices.values() for a, b in [c.parameters])
    assert count(light).parameters == count(model).parameters - saved  # with the normalisation that is added
    with pytest.raises(SettingError, match="conv9"):
        Lcnn(sizes=(("conv9", 2),)).choose(model)


def test_the_output_layer_alone_is_left_also_where_it_is_a_convolution() -> None:
    maps = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 10, 1))
    told = Lcnn(size=4, epochs=0).remarks(Model(maps, example=(torch.zeros(1, 8, 6, 6),)))
    assert "dictionary of 4" in told[0]
    assert "output layer" in told[1]
    coder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    told = Lcnn(linear_size=4, epochs=0).remarks(Model(coder, example=(torch.zeros(1, 64),)))
    assert "dictionary of 4" in told[0]
    assert "output layer" in told[1]


def test_saved_it_holds_what_lives_and_loads_and_exports_equal(digits: Splits, tmp_path: Path) -> None:
    origin = resolve(f"{Path(__file__).parents[1] / 'law_network.py'}:network")
    module = origin.replay(None, ())
    assert module is not None
    model = Model(module.eval(), example=(torch.rand(2, 1, 8, 8),), task=Classification(), lineage=(origin,))
    light = Lcnn(size=12, linear_size=32, strength=5.0, epochs=2).apply(model, bench_of(digits, 2))
    weight = dict(light.module.named_parameters())["second.mixture.weight"]
    assert 0 < torch.count_nonzero(weight) < 0.9 * weight.numel()
    saved = save(light, tmp_path / "light")
    assert saved.verification is not None
    assert saved.verification.ok
    (stored,) = [one for one in saved.tensors if one.name == "second.mixture.weight"]
    assert stored.bytes < 5 * int(torch.count_nonzero(weight)) + 200  # a value of 4 bytes, an index of less than one
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "light").module.eval()(x), light.module.eval()(x))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"size": 0}, "size"), ({"linear_size": 0}, "linear_size"), ({"sizes": (("a", 0),)}, "sizes"),
        ({"strength": -1.0}, "strength"), ({"share": 1.5}, "share"), ({"epochs": -1}, "epochs"),
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        Lcnn(**settings)


def normalised(model: Model) -> Model:
    """The dense network with batch normalisation where lookup layers have it."""
    layers = [
        nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels)) if isinstance(layer, nn.Conv2d) else layer
        for layer in model.module.children()
    ]
    return Model(nn.Sequential(*layers), example=model.example, task=model.task)


def live(model: Model) -> float:
    layers = lookup_layers(model.module).values()
    held = sum(int(torch.count_nonzero(layer.mixture.weight)) for layer in layers)
    return held / sum(layer.mixture.weight.numel() for layer in layers)


@pytest.mark.effect
@pytest.mark.slow
def test_mixtures_become_sparse_and_accuracy_stays(digits: Splits) -> None:
    scores: dict[str, list[float]] = {"dense": [], "light": []}
    for seed in range(3):
        bench = bench_of(digits, 12, seed)
        light = Lcnn(size=12, strength=3.0, epochs=12).apply(small(seed), bench)
        dense = bench.fit(normalised(small(seed)))
        note: Any = light.lineage[-1]
        before, after = sum(note.settings["dense"].values()), sum(note.settings["multiplications"].values())
        assert live(light) < 0.1, live(light)
        assert before >= 5 * after, (before, after)
        for name, model in (("dense", dense), ("light", light)):
            scores[name].append(100 * bench.evaluate(model, "test").value)
    assert mean(scores["light"]) >= mean(scores["dense"]) - 1, scores
    plain = Lcnn(size=12, strength=0.0, epochs=3).apply(small(), bench_of(digits, 3))
    assert live(plain) > 0.6, live(plain)


@pytest.mark.effect
@pytest.mark.slow
def test_new_classes_from_few_examples_with_frozen_dictionaries_are_no_worse(digits: Splits) -> None:
    """Six classes first; then two examples each of the other four, for a new output layer.

    The lookup network learns its mixtures with it, on frozen dictionaries; beside it, its whole trunk is frozen, and so
    is that of a plain network with the same normalisation.
    """
    labels = torch.tensor([int(digits.train[i][1]) for i in range(len(digits.train))])
    tested = torch.tensor([int(digits.test[i][1]) for i in range(len(digits.test))])
    base = Subset(digits.train, torch.nonzero(labels < 6).flatten().tolist())
    novel = Subset(digits.test, torch.nonzero(tested >= 6).flatten().tolist())
    bench = Bench(train=base, test=novel, training=bench_of(digits, 6).training)
    lookup = Lcnn(size=12, strength=0.3, epochs=6).apply(small(), bench)
    plain = bench.fit(normalised(small()))
    trunk = tuple(str(place) for place in range(9))
    dictionaries = tuple(f"{place}.{part}" for place in (0, 2, 5) for part in ("dictionary", "norm"))
    training = Training(epochs=40, batch_size=8, optimizer=SGD(lr=0.01, momentum=0.9), schedule=Cosine())
    scores: list[list[float]] = []
    for episode in range(5):
        generator = torch.Generator().manual_seed(episode)
        picked = []
        for label in range(6, 10):
            known = torch.nonzero(labels == label).flatten()
            picked.append(known[torch.randperm(len(known), generator=generator)[:2]])
        data = Subset(digits.train, torch.cat(picked).tolist())
        few = Bench(train=data, validation=novel, test=novel, seed=episode, training=training)
        found = []
        for model, held in ((lookup, dictionaries), (lookup, trunk), (plain, trunk)):
            torch.manual_seed(episode)
            start = replace_layers(model, {"9": nn.Linear(48, 10)})
            found.append(100 * few.evaluate(few.fit(start, influence=Paced(held, 0.0)), "test").value)
        scores.append(found)
    mixtures, frozen, other = (mean(column) for column in zip(*scores, strict=True))
    assert mixtures >= other, scores
    assert mixtures >= frozen, scores
