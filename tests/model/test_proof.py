"""The proof refuses wrong cuts, and refuses to prove blindly."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import SurgeryError
from karui.model import Analysis, BlindError, Candidate, Cut, Group, Model, coupled_groups, prove, remove_units
from karui.model.cut import make_cut
from karui.model.running import difference


class Shuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.a(x))
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(functional.relu(self.b(x)).mean((2, 3)))


def shuffled() -> Model:
    torch.manual_seed(0)
    return Model(Shuffled().eval(), example=(torch.randn(1, 3, 4, 4),))


def wrongly(found: Analysis, name: str, tensor: str, indices: list[list[int]]) -> Analysis:
    """The analysis of a library that reads the wrong channels of one member."""
    group = found[name]
    members = tuple(
        dataclasses.replace(m, indices=torch.tensor(indices)) if m.tensor == tensor else m for m in group.members
    )
    changed: list[Group] = [dataclasses.replace(g, members=members) if g is group else g for g in found]
    return dataclasses.replace(found, groups=tuple(changed))


def without(step: Cut, tensor: str, dim: int, gone: list[int], size: int) -> Cut:
    kept = [k for k in step.kept if (k[0], k[1]) != (tensor, dim)]
    return dataclasses.replace(step, kept=[*kept, [tensor, dim, [i for i in range(size) if i not in gone]]])


def test_right_cut_at_a_shuffle_is_proved() -> None:
    model = shuffled()
    found = coupled_groups(model)
    units = {"a": torch.tensor([1])}
    proof = prove(model, Candidate(make_cut(model.module, found, units), found, units))
    assert proof.holds
    assert proof.visible
    assert not proof.redrawn


def test_wrong_channels_at_a_shuffle_are_refused() -> None:
    model = shuffled()
    found = coupled_groups(model)
    right = found["a"]
    reads = next(m for m in right.members if m.tensor == "b.weight")
    makes = next(m for m in right.members if m.tensor == "a.weight")
    assert reads.indices.tolist() != makes.indices.tolist()
    units = {"a": torch.tensor([1])}
    step = without(make_cut(model.module, found, units), "b.weight", 1, makes.indices[1].tolist(), 8)
    fooled = wrongly(found, "a", "b.weight", makes.indices.tolist())
    with pytest.raises(SurgeryError, match="differs from the masked one"):
        prove(model, Candidate(step, fooled, units))


def test_every_wrong_choice_of_consumer_channels_is_refused() -> None:
    model = Model(
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).eval(),
        (torch.randn(2, 3),),
    )
    found = coupled_groups(model)
    units = {"0": torch.tensor([2])}
    step = make_cut(model.module, found, units)
    for wrong in (0, 1, 3, 4):
        fooled = wrongly(found, "0", "2.weight", [[wrong]] * 5)
        with pytest.raises(SurgeryError, match="differs"):
            prove(model, Candidate(without(step, "2.weight", 1, [wrong], 5), fooled, units))


def test_units_hidden_by_zero_weights_are_proved_on_redrawn_ones() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).eval()
    nn.init.zeros_(net[2].weight)
    model = Model(net, example=(torch.randn(2, 3),))
    found = coupled_groups(model)
    units = {"0": torch.tensor([0])}
    assert prove(model, Candidate(make_cut(net, found, units), found, units)).redrawn
    wrong = without(make_cut(net, found, units), "2.weight", 1, [1], 5)
    with pytest.raises(SurgeryError, match="differs"):
        prove(model, Candidate(wrong, wrongly(found, "0", "2.weight", [[1]] * 5), units))


def test_statistics_of_the_old_weights_do_not_blow_up_redrawn_ones() -> None:
    torch.manual_seed(0)
    blocks = [part for _ in range(24) for part in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU6())]
    net = nn.Sequential(*blocks, nn.Linear(8, 2)).eval()
    for layer in net:
        if isinstance(layer, nn.BatchNorm1d) and layer.running_var is not None:
            layer.running_var.fill_(1e-3)
            layer.weight.data.fill_(0.05)
    net[1].weight.data[3] = net[1].bias.data[3] = 0
    model = Model(net, example=(torch.randn(2, 8),))
    found = coupled_groups(model)
    units = {"0": torch.tensor([3])}
    assert prove(model, Candidate(make_cut(net, found, units), found, units)).redrawn


class Gated(nn.Module):
    """Squeeze-excite gates one after another; a unit of a gate is on or off for every input."""

    def __init__(self, gates: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(8, 4) for _ in range(gates))
        self.up = nn.ModuleList(nn.Linear(4, 8) for _ in range(gates))

    def forward(self, x: Tensor) -> Tensor:
        for down, up in zip(self.down, self.up, strict=True):
            x = x + x * torch.sigmoid(up(functional.relu(down(x))))
        return x


def test_units_that_a_rectifier_hides_in_many_gates_are_proved() -> None:
    torch.manual_seed(0)
    net = Gated(16).eval()
    for name, p in net.named_parameters():
        if name.startswith("down") and name.endswith("bias"):
            nn.init.constant_(p, -3)
    model = Model(net, example=(torch.rand(1, 8),))
    found = coupled_groups(model)
    units = {group.name: torch.tensor([1]) for group in found}
    assert len(units) == 16
    step = make_cut(net, found, units)
    assert prove(model, Candidate(step, found, units)).redrawn
    wrong = without(step, "up.7.weight", 1, [2], 4)
    with pytest.raises(SurgeryError, match="differs"):
        prove(model, Candidate(wrong, wrongly(found, "down.7", "up.7.weight", [[2]] * 4), units))


class Strided(nn.Module):
    """Statistics over channels, and a view that fits one memory order only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(3, 8), nn.GroupNorm(1, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).permute(0, 3, 1, 2)
        x = self.norm(x)
        return self.head(x.permute(0, 2, 3, 1).view(x.shape[0], -1, x.shape[1]))


def test_statistics_over_survivors_keep_the_memory_order() -> None:
    torch.manual_seed(0)
    model = Model(Strided().eval(), (torch.randn(2, 4, 4, 3),))
    light = remove_units(model, {"a": torch.tensor([1, 5])}, allow_normalisation=True)
    assert light.module.a.out_features == 6


def test_blind_proofs_are_refused() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 5), nn.Linear(5, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x) + 0 * self.b(self.a(x))

    model = Model(Silent(), example=(torch.randn(2, 3),))
    with pytest.raises(BlindError, match="units of 'a' do not show"):
        remove_units(model, {"a": torch.tensor([0])})


def test_the_proof_changes_neither_model_nor_chance() -> None:
    model = shuffled()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    remove_units(model, {"a": torch.tensor([1])})
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())


def test_difference_sees_shapes_and_infinities() -> None:
    one = [torch.tensor([1.0, float("inf")])]
    assert difference(one, [torch.tensor([1.0, float("inf")])]) == 0
    assert difference(one, [torch.tensor([1.0, float("nan")])]) == float("inf")
    assert difference(one, [torch.zeros(3)]) == float("inf")
