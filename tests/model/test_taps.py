from __future__ import annotations

import pytest
import torch
from torch import nn

from karui.errors import UsageError
from karui.model import layer_at, taps


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))


def test_values_of_nested_layers_and_of_the_network_itself() -> None:
    module = net()
    x = torch.randn(5, 4)
    with taps(module, ["0", "1.0", ""]) as seen:
        out = module(x)
    assert torch.equal(seen["0"], module[0](x))
    assert torch.equal(seen["1.0"], module[0](x).relu())
    assert seen[""] is out


def test_values_keep_their_gradient() -> None:
    module = net()
    with taps(module, ["0"]) as seen:
        module(torch.randn(5, 4))
    seen["0"].sum().backward()
    assert module[0].weight.grad is not None


class InPlace(nn.Module):
    """What torchvision's residual blocks do to the output of their last normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.second(self.act(self.first(x)))
        out += x
        return self.act(out)


@pytest.mark.parametrize("graded", [False, True])
def test_values_are_those_of_the_layer_whatever_writes_over_them_in_place(graded: bool) -> None:
    module, x = InPlace(), torch.randn(6, 4)
    first = module.first(x)
    second = module.second(first.relu())
    with torch.set_grad_enabled(graded), taps(module, ["first", "second"]) as seen:
        out = module(x)
    assert (first < 0).any()
    assert torch.equal(seen["first"], first)
    assert torch.equal(seen["second"], second)
    assert torch.equal(out, (second + x).relu())
    if graded:
        (through,) = torch.autograd.grad(out.sum(), seen["second"])
        assert torch.equal(through, (second + x > 0).float()), "the loss depends on what was seen"


def test_several_values_are_kept_too() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(3, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            outputs, _ = self.gru(x)
            return outputs.relu_()

    module, x = Recurrent(), torch.randn(2, 5, 3)
    with torch.no_grad(), taps(module, ["gru"]) as seen:
        module(x)
    assert torch.equal(seen["gru"][0], module.gru(x)[0])


def test_a_repeated_layer_leaves_its_last_output() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    module = Twice()
    with taps(module, ["layer"]) as seen:
        out = module(torch.randn(2, 3))
        first = seen["layer"]
        module(torch.randn(2, 3))
    assert torch.equal(first, out)
    assert not torch.equal(seen["layer"], first)


def test_a_shared_layer_is_seen_under_each_of_its_paths() -> None:
    shared = nn.Linear(3, 3)
    module = nn.Sequential(shared, shared)
    with taps(module, ["0", "1"]) as seen:
        out = module(torch.randn(2, 3))
    assert torch.equal(seen["0"], out)
    assert torch.equal(seen["1"], out)


def test_hooks_are_gone_also_after_an_error() -> None:
    module = net()
    with pytest.raises(ZeroDivisionError), taps(module, ["0"]):
        raise ZeroDivisionError
    assert not module[0]._forward_hooks


def test_unknown_path_names_the_closest() -> None:
    with pytest.raises(UsageError, match=r"no layer '1\.7'.*'1\.0'"), taps(net(), ["1.7"]):
        pass
    with pytest.raises(UsageError, match="Its layers are 0, 1"):
        layer_at(net(), "features")
    with pytest.raises(UsageError, match="'' is the model itself"):
        layer_at(nn.ReLU(), "x")
