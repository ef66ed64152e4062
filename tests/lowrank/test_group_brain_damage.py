"""Group-wise brain damage (survey 26): what must hold, and what the paper shows."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from karui.data import Splits
from karui.errors import NeedError, SettingError
from karui.layers.group_sparse import GroupSparseConv, GroupSparseLinear
from karui.lowrank._columns import (
    BrainDamage,
    columns_of,
    fixed_columns,
    group_penalty,
    shrink_columns,
    surviving,
)
from karui.lowrank.group_brain_damage import GroupBrainDamage
from karui.measuring import count
from karui.model import Classification, Model
from karui.recipes import recipe_from_values
from karui.technique import Bench
from karui.train import SGD, Adam, Cosine, Influence, Moment, Together, Training

pytestmark = pytest.mark.paper(26)


def technique(**settings: Any) -> GroupBrainDamage:
    return GroupBrainDamage(**{"epochs": 0, "tuning": 0, **settings})


def convolutions(widths: tuple[int, ...] = (12, 16, 16), kernel: int = 5) -> nn.Module:
    """Convolutions with batch normalisation on the 8x8 digits, the map halved before the last."""
    layers, channels = [], 1
    for depth, width in enumerate(widths):
        layers += [nn.Conv2d(channels, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if depth == 1 else []
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def network(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(convolutions().eval(), example=(torch.rand(2, 1, 8, 8),), task=Classification())


def run(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module.eval()(x)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_penalty_its_gradient_and_its_proximal_step_are_the_formulas(groups: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 2, dtype=torch.float64)
    weight[:, 1, 2, 0] = 0
    weight.requires_grad_()
    penalty = group_penalty(weight, groups)
    blocks = weight.detach().reshape(groups, 6 // groups, 4, 3, 2)
    norms = blocks.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(penalty, norms.sum())
    (0.3 * penalty).backward()
    wanted = torch.where(norms > 0, 0.3 * blocks / norms.clamp(min=1e-300), 0.0)  # 0 at 0
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, wanted.reshape(weight.shape))
    shrunk = blocks * (1 - 1.2 / norms.clamp(min=1e-300)).clamp(min=0)
    torch.testing.assert_close(shrink_columns(weight.detach(), 1.2, groups), shrunk.reshape(weight.shape))


def test_the_smallest_norms_go_first_and_the_density_is_exact() -> None:
    torch.manual_seed(0)
    norms = {"a": torch.rand(2, 12), "b": torch.rand(1, 30) + 0.5}
    alive = {path: torch.ones_like(norm, dtype=torch.bool) for path, norm in norms.items()}
    for density in (0.75, 0.5, 0.25, 0.01):
        before, alive = alive, surviving(norms, alive, density, across=False)
        for path, norm in norms.items():
            for row, mask, was in zip(norm, alive[path], before[path], strict=True):
                assert int(mask.sum()) == max(1, round(density * len(row)))
                assert not (mask & ~was).any()
                assert row[mask].min() > row[~mask].max()
    together = surviving(norms, {p: torch.ones_like(n, dtype=torch.bool) for p, n in norms.items()}, 0.5, across=True)
    assert sum(int(mask.sum()) for mask in together.values()) == 27
    assert together["b"].float().mean() > together["a"].float().mean()


def test_patterns_that_nobody_learned_are_controls() -> None:
    conv = nn.Conv2d(4, 6, (3, 5), groups=2)
    assert fixed_columns(conv, "centre", 0.25, 0).unflatten(1, (2, 3, 5)).nonzero().tolist() == [
        [group, channel, 1, 2] for group in range(2) for channel in range(2)
    ]
    cross = fixed_columns(conv, "cross", 0.25, 0).unflatten(1, (2, 3, 5))[0, 0]
    assert cross.int().tolist() == [[0, 0, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]]
    drawn = [fixed_columns(conv, "random", 0.3, seed) for seed in (0, 0, 1)]
    assert drawn[0].sum(1).tolist() == [9, 9]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


class Watch(Influence):
    """Remembers the columns of one layer, step by step; it stands behind the removal."""

    def __init__(self) -> None:
        self.columns: list[Tensor] = []

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        del moment
        layer: Any = module.get_submodule("3")
        self.columns.append(columns_of(layer.weight.detach() != 0))


OPTIMISERS = [SGD(lr=0.05, momentum=0.9, weight_decay=1e-2), Adam(lr=2e-3, weight_decay=1e-2)]


@pytest.mark.parametrize("optimizer", OPTIMISERS, ids=["momentum", "adam"])
def test_what_is_removed_stays_zero_and_the_density_falls_to_the_target(optimizer: Any, digits: Splits) -> None:
    training = Training(batch_size=50, optimizer=optimizer)
    bench = Bench(train=Subset(digits.train, range(500)), validation=digits.validation, training=training)
    model, watch = network(), Watch()
    damage = technique(density=0.2, rounds=6, shrink=0.01, skip=("0",)).influence(model, bench)
    assert isinstance(damage, BrainDamage)
    trained = bench.fit(model, epochs=3, influence=Together(damage, watch))
    for earlier, later in zip(watch.columns, watch.columns[1:], strict=False):
        assert not (later & ~earlier).any()
    counts = list(dict.fromkeys(int(one.sum()) for one in watch.columns))
    assert counts == [300, *(round(300 * 0.2 ** (step / 6)) for step in range(1, 7))]
    light = technique(skip=("0",), cut_unread=False).compress(trained)
    assert [tuple(layer.weight.shape) for layer in light.module.modules() if isinstance(layer, GroupSparseConv)] == [
        (16, 60), (16, 80),
    ]  # fmt: skip
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(run(light, x), run(trained, x), rtol=1e-4, atol=1e-5)


def test_proximal_steps_leave_layers_that_do_not_learn() -> None:
    model = network()
    frozen, learns = (model.module.get_parameter(f"{i}.weight") for i in (3, 7))
    frozen.requires_grad_(False)
    before = [frozen.clone(), learns.detach().clone()]
    damage = technique(shrink=0.1, density=1.0).influence(model, Bench())
    damage.attach(model.module)
    with torch.no_grad():
        damage.constraints(model.module, Moment(model.module, (), None, None, steps=10, epochs=1))
    assert torch.equal(frozen, before[0])
    assert learns.abs().sum() < before[1].abs().sum()


def test_the_penalty_is_a_share_of_the_loss_or_has_the_weight_that_was_given() -> None:
    model, bench = network(), Bench()
    moment = Moment(model.module, (), None, None)
    total = sum(group_penalty(model.module.get_parameter(f"{i}.weight")).item() for i in (0, 3, 7))
    for settings, added in (({"share": 0.2}, 0.4), ({"lam": 0.01}, 0.01 * total), ({"lam": 0.0}, 0.0)):
        objective = technique(**settings).influence(model, bench).objective(torch.tensor(2.0), moment)
        assert objective.item() == pytest.approx(2.0 + added, rel=1e-5)
    fixed = technique(pattern="random").influence(model, bench)
    assert fixed.objective(torch.tensor(2.0), moment).item() == 2.0


def test_multiply_adds_are_density_times_dense_and_linear_layers_join_if_asked() -> None:
    model = network()
    light = technique(density=0.25, skip=("0",), cut_unread=False).apply(model, Bench())
    before, after = count(model).macs, count(light).macs
    rest = 12 * 25 * 64 + 160
    assert after - rest == (before - rest) / 4
    lines = technique(density=0.25, linear=True).remarks(model)
    assert lines[0] == "0: 6 of 25 columns, 312 -> 84 parameters"
    assert "12: 4 of 16 columns, 170 -> 50 parameters" in lines
    both = technique(density=0.25, linear=True, cut_unread=False).apply(model, Bench())
    assert sum(isinstance(layer, GroupSparseLinear) for layer in both.module.modules()) == 1


def test_units_of_which_no_column_is_left_are_cut_out_of_the_layer_before() -> None:
    model = network()
    with torch.no_grad():
        model.module.get_parameter("3.weight")[:, 2:7] = 0
    light = technique(density=1.0).apply(model, Bench())
    first: Any = light.module.get_submodule("0")
    assert first.out_channels == 7
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(run(light, x), run(model, x), rtol=1e-4, atol=1e-5)
    kept: Any = technique(density=1.0, cut_unread=False).apply(model, Bench()).module.get_submodule("0")
    assert kept.out_channels == 12


def test_layers_without_columns_of_their_own_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 8, 1))
    lines = technique(pattern="cross").remarks(Model(net, example=(torch.zeros(1, 4, 8, 8),)))
    assert "0: left as it is: each of its groups has one filter: a column would be a single weight" in lines
    assert "1: left as it is: ConvTranspose2d is neither a linear layer nor a convolution" in lines
    assert "2: left as it is: its kernel has one position, which 'cross' keeps" in lines
    with pytest.raises(NeedError, match="training data"):
        technique(epochs=1).apply(network(), Bench())


def test_it_is_a_step_of_a_recipe() -> None:
    steps = recipe_from_values({"step": [{"technique": "group_brain_damage", "density": 0.3, "skip": ["0"]}]}).steps
    assert steps == (GroupBrainDamage(density=0.3, skip=("0",)),)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"density": 0.0}, "density"), ({"rounds": 0}, "rounds"), ({"lam": -1.0}, "lam"), ({"share": -0.1}, "share"),
        ({"shrink": float("nan")}, "shrink"), ({"pattern": "star"}, "pattern"), ({"tuning": -1}, "tuning"),
        ({"skip": ("stem",)}, "stem"),
    ],
)  # fmt: skip
def test_wrong_settings_name_themselves(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(SettingError, match=name):
        technique(**settings).apply(network(), Bench())


@pytest.mark.effect
def test_removed_gradually_it_beats_removal_at_once_with_and_without_the_penalty(digits: Splits) -> None:
    """Kernels of 5x5, a tenth of the columns of the inner convolutions, 500 digits, 3 seeds, equal epochs.

    A pattern drawn at random and trained from the start was as good at this length: that learned ones beat it did not
    show.
    """
    ways: dict[str, dict[str, Any]] = {
        "gradual": {"rounds": 20},
        "at once": {"rounds": 1},
        "at once, no penalty": {"rounds": 1, "lam": 0.0},
    }
    scores: dict[str, list[float]] = {name: [] for name in ways}
    spread = []
    for seed in range(3):
        training = Training(epochs=12, batch_size=32, optimizer=Adam(lr=2e-3), schedule=Cosine())
        bench = Bench(
            train=Subset(digits.train, range(500)),
            validation=digits.validation,
            test=digits.test,
            training=training,
            seed=seed,
        )
        dense = bench.fit(network(seed))
        for name, settings in ways.items():
            made = technique(density=0.1, epochs=4, tuning=2, skip=("0",), **settings).apply(dense, bench)
            scores[name].append(100 * bench.evaluate(made, "test").value)
            layers = [one for one in made.module.modules() if isinstance(one, GroupSparseConv)]
            masks = [columns_of(layer.kernel() != 0)[0].unflatten(0, (-1, 25)) for layer in layers]
            spread += [len({tuple(row) for row in mask.tolist()}) for mask in masks]
    assert min(spread) > 1  # patterns differ between channels
    assert mean(scores["gradual"]) > mean(scores["at once"]) + 8, scores
    assert mean(scores["gradual"]) > mean(scores["at once, no penalty"]) + 8, scores
