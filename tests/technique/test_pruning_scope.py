"""What may be cut: shortcuts, projections, patterns, and how much."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import SettingError
from karui.model import Model, coupled_groups
from karui.technique import Bench
from karui.technique.pruning.criteria import L1
from karui.technique.pruning.plan import candidates, remarks, shares
from karui.technique.pruning.scope import Quota, Scope, judged, makers, map_sizes, projection

pytestmark = pytest.mark.paper(62)


class Block(nn.Module):
    """A residual block with a projection shortcut where the width changes; `kernel` is of its last layer."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel, padding=kernel // 2)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.shortcut(x) + self.conv2(functional.relu(self.conv1(x))))


class Residual(nn.Module):
    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.a, self.b, self.c = Block(8, 8, kernel), Block(8, 12, kernel), Block(12, 12, kernel)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.a(self.stem(x)))).mean((2, 3)))


def residual(kernel: int = 3) -> Model:
    torch.manual_seed(0)
    return Model(Residual(kernel), example=(torch.rand(2, 1, 8, 8),))


def test_only_the_first_convolution_of_a_block_is_free_by_default() -> None:
    found = candidates(residual(), Scope())
    assert {group.name for group in found.groups} == {"a.conv1", "b.conv1", "c.conv1"}
    assert all("tied" in reason for _, reason in found.left)


def test_tied_groups_are_cut_when_asked_for() -> None:
    found = candidates(residual(), Scope(tied=True))
    assert len(found.groups) == 5
    assert sum(len(makers(group, found.sizes)) > 1 for group in found.analysis.groups) == 2


@pytest.mark.parametrize("kernel", [3, 1])
def test_the_projections_filters_choose_for_all_that_is_tied_to_it(kernel: int) -> None:
    model = residual(kernel)
    analysis = coupled_groups(model)
    tied = next(group for group in analysis.groups if "b.conv2.weight" in group.sources)
    assert projection(tied, analysis, model.module) == "b.shortcut.weight"
    scores = L1(model, [judged(tied, analysis, model.module, map_sizes(model))], Bench())[tied.name]
    by_projection = model.module.get_parameter("b.shortcut.weight").abs().sum((1, 2, 3))
    # Units are numbered alike in all tied layers, whichever one names the group.
    torch.testing.assert_close(scores, by_projection)


def test_without_a_projection_all_that_write_into_the_maps_are_judged_together() -> None:
    model = residual()
    analysis = coupled_groups(model)
    tied = next(group for group in analysis.groups if "stem.weight" in group.sources)
    assert projection(tied, analysis, model.module) is None
    together = sum(model.module.get_parameter(name).abs().sum((1, 2, 3)) for name in ("stem.weight", "a.conv2.weight"))
    torch.testing.assert_close(
        L1(model, [judged(tied, analysis, model.module, map_sizes(model))], Bench())[tied.name], together
    )


def test_patterns_skip_and_share() -> None:
    model = residual()
    assert {group.name for group in candidates(model, Scope(skip=("b.*",))).groups} == {"a.conv1", "c.conv1"}
    found = candidates(model, Scope())
    asked = shares(found, Quota(ratio=0.25, ratios={"b.conv1": 0.5, "[bc].conv1": 0.75}))
    assert asked == {"a.conv1": 0.25, "b.conv1": 0.5, "c.conv1": 0.75}


def test_a_name_that_is_not_there_is_told_with_the_closest() -> None:
    model = residual()
    with pytest.raises(SettingError, match=r"a\.conv1"):
        candidates(model, Scope(skip=("a.conv9",)))
    with pytest.raises(SettingError, match=r"b\.conv1"):
        shares(candidates(model, Scope()), Quota(ratios={"b.conv11": 0.5}))


def test_a_share_for_a_layer_that_is_left_whole_says_why() -> None:
    with pytest.raises(SettingError, match="tied=true"):
        shares(candidates(residual(), Scope()), Quota(ratios={"a.conv2": 0.5}))


def test_linear_layers_are_left_whole_when_asked() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.ReLU(), nn.Linear(6, 2))
    model = Model(net, example=(torch.rand(1, 1, 8, 8),))
    assert [group.name for group in candidates(model, Scope()).groups] == ["0", "3"]
    assert [group.name for group in candidates(model, Scope(linear=False)).groups] == ["0"]


def test_remarks_tell_every_group_and_every_lock() -> None:
    told = remarks(residual(), Scope(), Quota(ratio=0.5))
    assert any(line.startswith("a.conv1: 8 units, cut 4 (50 %)") for line in told)
    assert any("stem" in line and "left whole" in line for line in told)
    assert any("head" in line and "locked" in line for line in told)


@pytest.mark.parametrize(
    "settings", [{"ratio": 1.0}, {"ratio": -0.1}, {"ratios": {"a": 1.5}}, {"multiple": 0}], ids=str
)
def test_a_quota_out_of_range_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(SettingError, match=next(iter(settings))):
        Quota(**settings)  # pyright: ignore


class Gated(nn.Module):
    """A squeeze-excite block: a gate multiplies whole maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(1, 8, 3), nn.Linear(8, 4), nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(x.mean((2, 3))))))
        return self.head((x * gate[:, :, None, None]).mean((2, 3)))


def test_a_gate_ties_nothing_and_the_filters_alone_are_judged() -> None:
    torch.manual_seed(0)
    model = Model(Gated(), example=(torch.rand(2, 1, 8, 8),))
    group = next(group for group in candidates(model, Scope()).groups if group.name == "conv")
    assert group.sources == ("conv.weight",)
