"""Factors before 8 bits: what is computed stays, who is no pair stays as it is, and 8 bits lose less."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from karui.deployment import Deployment, Int8Form, as_model, dynamic, int8, quantise_dynamically, to_int8
from karui.deployment.factors import balanced, with_balanced_factors
from karui.measuring import OnnxForm, onnx_form
from karui.measuring.hollow import Hollow
from karui.model import Model


def steep(*layers: nn.Module) -> nn.Sequential:
    """Layers of which the odd ones' outputs differ in size by a thousand times, and the next ones undo that."""
    with torch.no_grad():
        for first, second in zip(layers[::2], layers[1::2], strict=True):
            sizes = torch.logspace(1.5, -1.5, len(first.weight))
            first.weight.mul_(sizes.view(-1, *[1] * (first.weight.ndim - 1)))
            if first.bias is not None:
                first.bias.mul_(sizes)
            second.weight.div_(sizes.view(1, -1, *[1] * (second.weight.ndim - 2)))
    return nn.Sequential(*layers).eval()


def rebalanced(net: nn.Module, *shape: int) -> tuple[Model, OnnxForm, OnnxForm]:
    model = Model(net.eval(), example=(torch.randn(*shape),))
    form = onnx_form(model)
    return model, form, with_balanced_factors(form, Hollow(form))


def outputs(form: OnnxForm | Int8Form, model: Model, inputs: Tensor) -> Tensor:
    made = Deployment(name="it", engine="onnxruntime", precision="fp32", data=form.data)
    return as_model(made, model).module(inputs)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (lambda: steep(nn.Linear(64, 8, bias=False), nn.Linear(8, 40)), (5, 64)),
        (lambda: steep(nn.Linear(64, 8), nn.Linear(8, 40, bias=False)), (5, 64)),
        (lambda: steep(nn.Linear(6, 20), nn.Linear(20, 9)), (5, 6)),  # more between than on either side
        (lambda: steep(nn.Linear(6, 20), nn.Linear(20, 30)), (5, 6)),  # and a bias that no input can reach
        (lambda: steep(nn.Linear(32, 6, bias=False), nn.Linear(6, 24)), (2, 7, 32)),  # products with matrices
        (lambda: steep(nn.Conv2d(8, 4, (3, 1), padding=(1, 0)), nn.Conv2d(4, 9, (1, 3), stride=2)), (2, 8, 12, 12)),
        (lambda: steep(nn.Conv2d(8, 4, 1), nn.Conv2d(4, 9, 3, padding=1)), (2, 8, 12, 12)),
        (lambda: steep(nn.Conv1d(8, 4, 3, dilation=2), nn.Conv1d(4, 9, 1)), (2, 8, 30)),
    ],
)
def test_a_pair_gets_another_basis_and_computes_the_same(net: Callable[[], nn.Module], shape: tuple[int, ...]):
    torch.manual_seed(0)
    model, form, light = rebalanced(net(), *shape)
    assert light.data != form.data
    assert light.layers == form.layers
    inputs = torch.randn(shape)
    ours, theirs = outputs(form, model, inputs), outputs(light, model, inputs)
    assert (ours - theirs).abs().max() < 1e-5 * ours.abs().max()


def test_three_factors_are_two_pairs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.Conv2d(4, 5, 3, bias=False), nn.Conv2d(5, 9, 1))
    model, form, light = rebalanced(net, 2, 8, 12, 12)
    before, after = ({t.name: t.raw_data for t in whole(each)} for each in (form, light))
    assert sum(before[name] != after[name] for name in before) == 3  # the last bias stays
    inputs = torch.randn(2, 8, 12, 12)
    assert torch.allclose(outputs(form, model, inputs), outputs(light, model, inputs), atol=1e-5)


def whole(form: OnnxForm) -> list:
    graph = Hollow(form)
    graph.fill(graph.proto.graph.initializer)
    return list(graph.proto.graph.initializer)


class ReadTwice(nn.Module):
    """What lies between the factors has a second reader."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both."""
        inner = self.first(x)
        return self.second(inner), inner.relu()


class Tied(nn.Module):
    """A weight is read by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        """Twice the same."""
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16)), (2, 16)),
        (nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)), (1, 8, 6, 6)),
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=2)), (1, 8, 6, 6)),
        (nn.Sequential(nn.Conv2d(8, 4, 6), nn.Flatten(), nn.Linear(4, 9)), (1, 8, 6, 6)),
        (ReadTwice(), (2, 16)),
        (Tied(), (2, 16)),
    ],
)
def test_what_is_no_pair_stays_as_it_is(net: nn.Module, shape: tuple[int, ...]):
    _, form, light = rebalanced(net, *shape)
    assert light is form


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_stay_as_they_are(value: float):
    net = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 16))
    with torch.no_grad():
        net[0].weight[1, 2] = value
    _, form, light = rebalanced(net, 2, 16)
    assert [t.raw_data for t in whole(light)] == [t.raw_data for t in whole(form)]


def test_factors_of_zeros_stay_zero():
    one, other = balanced(np.zeros((4, 9)), np.ones((8, 4)))
    assert np.isfinite(one).all()
    assert np.isfinite(other).all()
    assert not (other @ one).any()


@pytest.mark.parametrize("dynamically", [True, False])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_8_bits_lose_less(dynamically: bool, kind: str, monkeypatch: pytest.MonkeyPatch):
    if dynamically and kind == "convolution":
        pytest.skip("dynamic 8 bits leave convolutions in 32")
    torch.manual_seed(0)
    if kind == "linear":
        net, shape = steep(nn.Linear(64, 16, bias=False), nn.Linear(16, 200)), (256, 64)
    else:
        net, shape = steep(nn.Conv2d(16, 8, (3, 1), bias=False), nn.Conv2d(8, 24, (1, 3))), (32, 16, 12, 12)
    model = Model(net, example=(torch.zeros(1, *shape[1:]),))
    form, inputs = onnx_form(model), torch.randn(shape)
    with torch.no_grad():
        right = model.module(inputs)

    def error() -> float:
        narrow = quantise_dynamically(form) if dynamically else to_int8(form, [(inputs,)])
        return float((outputs(narrow, model, inputs) - right).norm() / right.norm())

    mended = error()
    for module in (int8, dynamic):
        monkeypatch.setattr(module, "with_balanced_factors", lambda form, _: form)
    assert mended < 0.03
    assert 5 * mended < error()


def test_a_bias_of_one_number_for_all_outputs_is_no_vector_of_them():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(16, 8)), nn.Parameter(torch.randn(1))
            self.last = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.addmm(self.bias, x, self.weight))

    model, form, light = rebalanced(Product(), 3, 16)
    assert light.data == form.data
    assert quantise_dynamically(form).data
    assert model.module(torch.zeros(2, 16)).shape == (2, 4)
