"""Cuts of networks made of convolutions, residual sums, concatenations and flattened features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import SurgeryError, UsageError
from karui.model import Cut, Model, coupled_groups, edit_from_json, edit_to_json, remove_units


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.one = nn.Conv2d(8, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn(self.stem(x)))
        x = x + self.two(functional.relu(self.one(x)))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 6, 3, padding=1)
        self.wise = nn.Conv2d(10, 10, 3, padding=1, groups=10)
        self.c = nn.Conv2d(10, 4, 1)
        self.fc = nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = functional.relu(self.a(x))
        both = torch.cat([a, functional.relu(self.b(a))], 1)
        return self.fc(functional.max_pool2d(self.c(self.wise(both)), 2).flatten(1))


def model(net: nn.Module, size: int = 6) -> Model:
    torch.manual_seed(0)
    return Model(net, example=(torch.randn(1, 3, size, size),))


def test_residual_sum_couples_its_layers() -> None:
    found = coupled_groups(model(Residual()))
    stream = found["stem"]
    assert [(g.name, g.size) for g in found] == [("stem", 8), ("one", 6)]
    assert set(stream.sources) == {"stem.weight", "two.weight"}
    assert {m.tensor for m in stream.members if m.role == "in"} == {"one.weight", "head.weight"}
    assert [(place.name, place.size) for place in found.locked] == [("head", 5)]


def test_cut_shrinks_every_tensor_and_attribute() -> None:
    dense = model(Residual())
    light = remove_units(dense, {"stem": torch.tensor([0, 3]), "one": torch.tensor([5])})
    net = light.module
    assert net.stem.out_channels == net.bn.num_features == net.two.out_channels == net.head.in_features == 6
    assert net.one.weight.shape == (5, 6, 3, 3)
    assert net(torch.randn(4, 3, 6, 6)).shape == (4, 5)
    assert dense.module.stem.out_channels == 8


def test_cut_equals_zeroed_units() -> None:
    dense = model(Residual())
    light = remove_units(dense, {"one": torch.tensor([1, 2])}, prove=False)
    masked = dense.copy().module
    with torch.no_grad():
        masked.two.weight[:, [1, 2]] = 0
    x = torch.randn(3, 3, 6, 6)
    torch.testing.assert_close(light.module.eval()(x), masked.eval()(x))


def test_concatenation_depthwise_and_flatten() -> None:
    dense = model(Dense())
    found = coupled_groups(dense)
    assert [(g.name, g.size) for g in found] == [("a", 4), ("b", 6), ("c", 4)]
    light = remove_units(dense, {"a": torch.tensor([1]), "b": torch.tensor([0, 5]), "c": torch.tensor([2])})
    assert light.module.wise.groups == 7
    assert light.module.fc.weight.shape == (3, 27)


def test_replay_of_the_saved_edit_gives_the_same_structure() -> None:
    dense = model(Dense())
    light = remove_units(dense, {"a": torch.tensor([1]), "c": torch.tensor([2])})
    step = edit_from_json(edit_to_json(light.lineage[0]))
    assert isinstance(step, Cut)
    again = step.replay(Dense(), dense.example)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in light.module.state_dict().items()
    }


def test_rows_are_the_slices_of_units() -> None:
    dense = model(Dense())
    found = coupled_groups(dense)
    torch.testing.assert_close(found["c"].rows(dense.module, "c.weight"), dense.module.c.weight.detach().flatten(1))
    assert found["c"].rows(dense.module, "fc.weight").shape == (4, 9 * 3)


def test_wrong_requests_are_refused() -> None:
    dense = model(Residual())
    with pytest.raises(UsageError, match="Did you mean"):
        remove_units(dense, {"stme": torch.tensor([0])})
    with pytest.raises(SurgeryError, match="has 6 units"):
        remove_units(dense, {"one": torch.tensor([6])})
    with pytest.raises(SurgeryError, match="all 6 units"):
        remove_units(dense, {"one": torch.arange(6)})
    assert remove_units(dense, {"one": torch.tensor([], dtype=torch.int64)}) is dense
