"""A cut model lets its large weights go and has them back to the bit; what is not its own stays."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from karui.model import Model, coupled_groups
from karui.model.cut import Cut, make_cut
from karui.model.hollow import LARGE, Hollow
from karui.model.walking import all_tensors


def cut() -> tuple[nn.Sequential, Cut, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 3))
    found = coupled_groups(Model(net, example=(torch.zeros(1, 64),)))
    step = make_cut(net, found, {"0": torch.arange(7), "2": torch.arange(0, 20, 2)})
    return net, step, step.shrunk(net)


def values(module: nn.Module) -> list[Tensor]:
    return [t.clone() for t in all_tensors(module)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(a.dtype is b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_large_weights_go_and_come_back_to_the_bit():
    net, step, light = cut()
    before, x = values(light), torch.randn(2, 64)
    with Hollow(light, net, step.kept) as hollow:
        assert [t.numel() for t in all_tensors(light)] == [0 if t.numel() >= LARGE else t.numel() for t in before]
        with hollow.filled() as module:
            assert same(values(module), before)
        assert not light.get_parameter("0.weight").numel()
        wide = hollow.doubled()
        assert same(values(wide), [t.double() for t in before])
        assert wide(x.double()).dtype is torch.float64
        assert hollow.fill(torch.float64).get_parameter("0.weight").dtype is torch.float64
    assert same(values(light), before)


def test_a_weight_of_the_whole_model_stays():
    net, step, light = cut()
    mine = light.get_parameter("2.weight")
    mine.data = net.get_parameter("2.weight").detach()
    with Hollow(light, net, step.kept):
        assert mine.numel() == net.get_parameter("2.weight").numel()
        assert not light.get_parameter("0.weight").numel()


def test_weights_come_back_after_an_error():
    net, step, light = cut()
    before = values(light)
    try:
        with Hollow(light, net, step.kept):
            raise RuntimeError
    except RuntimeError:
        pass
    assert same(values(light), before)
