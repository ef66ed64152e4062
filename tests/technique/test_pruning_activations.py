"""Criteria that look at data: their pure functions, and where maps are read."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from karui.errors import NeedError
from karui.model import Classification, Model, coupled_groups
from karui.technique import Bench
from karui.technique.pruning.activations import (
    ByActivations,
    BySensitivity,
    Pooled,
    entropy,
    histogram_entropy,
    mean_activation,
    nonzero_share,
    pooled_maps,
    scaled_entropy,
)

pytestmark = pytest.mark.paper(69)


class Net(nn.Module):
    """Two convolutions, pooling, and a flatten into a hidden layer: units are read by a convolution and by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.hidden, self.head = nn.Linear(6 * 2 * 2, 5), nn.Linear(5, 3)

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = functional.relu(self.one(x))
        two = functional.max_pool2d(functional.relu(self.two(one)), 4)
        return one, two, functional.relu(self.hidden(two.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.maps(x)[2])


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model(Net(), example=(torch.rand(2, 1, 8, 8),), task=Classification())


@pytest.fixture
def bench() -> Bench:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.rand(50, 1, 8, 8, generator=generator), torch.randint(3, (50,), generator=generator))
    return Bench(train=data, validation=data, test=data)


def test_entropy_of_a_constant_map_is_zero_and_of_a_uniform_histogram_log_bins() -> None:
    values = torch.stack([torch.full((1000,), 3.7), torch.linspace(-2, 5, 1000)], dim=1)
    got = histogram_entropy(values, bins=10)
    assert got[0] == 0
    assert got[1].item() == pytest.approx(math.log(10), abs=1e-3)


def test_entropy_counts_two_equal_halves_as_log_two() -> None:
    assert histogram_entropy(torch.tensor([[0.0], [0.0], [5.0], [5.0]])).item() == pytest.approx(math.log(2))


def test_entropy_ignores_scale_and_scaled_entropy_does_not() -> None:
    base = torch.rand(64, 3, generator=torch.Generator().manual_seed(0))
    one, twice = (Pooled(values, torch.zeros_like(values)) for values in (base, 2 * base))
    torch.testing.assert_close(entropy(one), entropy(twice))
    torch.testing.assert_close(2 * scaled_entropy(one), scaled_entropy(twice))


def test_maps_are_those_that_the_next_layer_reads(model: Model, bench: Bench) -> None:
    groups = {group.name: group for group in coupled_groups(model).groups}
    x = bench.train.tensors[0]
    got = pooled_maps(model.module, list(groups.values()), [(x[:20],), (x[20:],)])
    net = model.module
    assert isinstance(net, Net)
    for name, maps in zip(("one", "two", "hidden"), net.maps(x), strict=True):
        want = maps.flatten(2) if maps.ndim > 2 else maps.unsqueeze(2)
        torch.testing.assert_close(got[name].mean, want.mean(2))
        torch.testing.assert_close(got[name].zeros, (want == 0).float().mean(2))


def test_looking_leaves_no_hook_and_no_mode_behind(model: Model, bench: Bench) -> None:
    model.module.train()
    pooled_maps(model.module, coupled_groups(model).groups, [(bench.train.tensors[0],)])
    assert all(layer.training for layer in model.module.modules())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.module.modules())


def test_a_dead_unit_has_the_least_score_of_every_activation_criterion(model: Model, bench: Bench) -> None:
    with torch.no_grad():
        model.module.get_parameter("two.weight")[3] = 0
        model.module.get_parameter("two.bias")[3] = -1
    groups = [group for group in coupled_groups(model).groups if group.name == "two"]
    for measure in (mean_activation, nonzero_share, entropy, scaled_entropy):
        scores = ByActivations(measure)(model, groups, bench)["two"]
        assert scores.argmin() == 3, measure.__name__
        assert scores[3] == 0


def test_sensitivity_is_the_norm_of_the_gradient_and_leaves_the_model_alone(model: Model, bench: Bench) -> None:
    groups = coupled_groups(model).groups
    got = BySensitivity(samples=50, batch=50)(model, groups, bench)
    assert all(parameter.grad is None for parameter in model.module.parameters())
    x, y = bench.train.tensors
    loss = functional.cross_entropy(model.module(x), y)
    for name in ("one", "two", "hidden"):
        (gradient,) = torch.autograd.grad(loss, [model.module.get_parameter(f"{name}.weight")], retain_graph=True)
        torch.testing.assert_close(got[name], gradient.abs().flatten(1).sum(1))


def test_sensitivity_without_a_task_is_refused(model: Model, bench: Bench) -> None:
    bare = Model(model.module, example=model.example)
    with pytest.raises(NeedError, match="labels"):
        BySensitivity()(bare, coupled_groups(bare).groups, bench)
