"""Shallow wide students, [31]: the linear bottleneck, and how wide a budget is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import process_time

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.artifact import load, save
from karui.distill.logits import LogitRegression
from karui.distill.shallow import factored_first_layer, multiplied_out, shallow_student, wide_shallow, widest
from karui.errors import SettingError, SurgeryError, UsageError
from karui.layers.factored import FactoredLinear
from karui.model import Classification, Model
from karui.technique import Bench
from karui.train import SGD, Constant, Training

pytestmark = pytest.mark.paper(31)


def picture_model(classes: int = 10) -> Model:
    return Model(
        nn.Sequential(nn.Flatten(), nn.Linear(64, classes)),
        example=(torch.zeros(2, 1, 8, 8),),
        task=Classification(),
    )


def test_the_bottleneck_is_one_linear_layer_w_equal_to_u_v() -> None:
    net = Model(wide_shallow(64, 300, 10, rank=8), example=(torch.zeros(1, 64),))
    factors = net.module[1]  # pyright: ignore[reportIndexIssue]
    assert isinstance(factors, FactoredLinear)
    v, u = (part.weight.double() for part in factors.children())
    dense = multiplied_out(net)
    whole = dense.module[1]  # pyright: ignore[reportIndexIssue]
    torch.testing.assert_close(whole.weight.double(), u @ v, rtol=1e-6, atol=1e-7)
    assert torch.equal(whole.bias, factors[1].bias)
    x = torch.randn(20, 64)
    torch.testing.assert_close(dense.module(x), net.module(x), rtol=1e-4, atol=1e-5)
    assert sum(part.weight.numel() for part in factors.children()) == 8 * (300 + 64)
    assert [type(part) for part in factors.children()] == [nn.Linear, nn.Linear], "no non-linearity between"


def test_the_count_of_the_papers_largest_student() -> None:
    """SNN-400k: a bottleneck of 250 and 183 outputs, about 174 million weights whatever the number of its inputs."""
    for inputs in (1_000, 2_000):
        weights = 400_000 * (250 + 183) + 250 * inputs
        assert weights == pytest.approx(174e6, rel=0.01)
        assert widest(weights + 400_000 + 183, inputs, 183, rank=250) == 400_000
        assert weights < 0.4 * (400_000 * (inputs + 183))
    small = wide_shallow(15, 40, 7, rank=5)
    assert sum(p.numel() for p in small.parameters()) == 40 * (5 + 7) + 5 * 15 + 40 + 7


@pytest.mark.parametrize("budget", [2_000, 12_345, 80_000])
@pytest.mark.parametrize(("rank", "filters"), [(8, 0), (0, 0), (None, 0), (6, 4), (0, 3)])
def test_a_student_uses_its_budget_up_to_one_unit(budget: int, rank: int | None, filters: int) -> None:
    student = shallow_student(picture_model(), budget, rank, filters)
    first = student.module[4 if filters else 1]  # pyright: ignore[reportIndexIssue]
    unit = (first.rank if isinstance(first, FactoredLinear) else first.in_features) + 1 + 10
    assert budget - unit < student.parameters <= budget
    assert student.module(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_it_is_drawn_by_its_seed_and_saved(tmp_path: Path) -> None:
    made = [shallow_student(picture_model(), 3000, 8, 4, seed=seed) for seed in (0, 0, 1)]
    first = [next(model.module.parameters()) for model in made]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    save(made[2], tmp_path / "shallow", onnx=False)
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(load(tmp_path / "shallow").module(x), made[2].module(x))


def test_the_first_layer_of_any_student_is_factored_anew() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
    model = Model(net, example=(torch.zeros(1, 1, 8, 8),))
    factored = factored_first_layer(model, 8, seed=1)
    assert model.parameters - factored.parameters == 64 * 200 - 8 * (64 + 200)
    same, other = factored_first_layer(model, 8, seed=1), factored_first_layer(model, 8, seed=2)
    assert torch.equal(same.module.get_parameter("1.0.weight"), factored.module.get_parameter("1.0.weight"))
    assert not torch.equal(other.module.get_parameter("1.0.weight"), factored.module.get_parameter("1.0.weight"))
    with pytest.raises(SurgeryError, match="rank is 64"):
        factored_first_layer(model, 64)
    with pytest.raises(SurgeryError, match="no linear layer"):
        factored_first_layer(Model(nn.Conv2d(1, 2, 3), example=(torch.zeros(1, 1, 8, 8),)), 2)


def test_what_cannot_be_built_is_told() -> None:
    with pytest.raises(SettingError, match="parameters is 100"):
        shallow_student(picture_model(), 100, 8)
    with pytest.raises(UsageError, match="pictures"):
        shallow_student(Model(nn.Linear(64, 10), example=(torch.zeros(1, 64),)), 5000, filters=4)
    with pytest.raises(UsageError, match="one score for each class"):
        shallow_student(replace(picture_model(), module=nn.Identity()), 5000)


@pytest.mark.effect
@pytest.mark.slow
def test_a_bottleneck_reaches_a_loss_for_which_the_full_layer_needs_longer() -> None:
    """4,096 hidden units on 784 inputs, a made-up teacher: in as much processor time the full layer is behind."""
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    data = TensorDataset(torch.randn(1500, 784, generator=draw))
    teacher = Model(net, example=(torch.zeros(1, 784),))
    bench = Bench(train=data, validation=data, training=Training(optimizer=SGD(lr=0.01), schedule=Constant()))

    def reached(rank: int, epochs: int) -> tuple[float, float]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            student = Model(wide_shallow(784, 4096, 10, rank=rank), example=(torch.zeros(1, 784),))
        before = process_time()
        taught = LogitRegression(teacher=teacher, epochs=epochs, remember=1500).apply(student, bench)
        return process_time() - before, taught.lineage[-1].settings["history"][-1]["loss"]

    took, wanted = reached(100, 12)
    longer, loss = 0.0, 0.0
    epochs = 2
    while longer < took:
        longer, loss = reached(0, epochs)
        epochs += 1
    assert loss > 1.2 * wanted, (took, wanted, longer, loss)


def test_a_wide_layer_behind_a_bottleneck_costs_a_fraction_of_the_work() -> None:
    from karui.measuring import count

    nets = [Model(wide_shallow(784, 4096, 10, rank=rank), example=(torch.zeros(1, 784),)) for rank in (0, 100)]
    full, narrow = (count(net).macs for net in nets)
    assert narrow < 0.17 * full
