"""Units that nobody reads, or that read nothing, [63]: found to the fixed point, outputs unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from karui.measuring.inference import inference
from karui.model import Model, coupled_groups
from karui.technique.pruning.dead_units import settle
from karui.train.masks import connections, zero_pruned

pytestmark = pytest.mark.paper(63)


class Branches(nn.Module):
    """A residual sum, batch normalisation, padding, a flatten and hidden units: where constants can and cannot move."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 6, 3)
        self.right = nn.Conv2d(6, 6, 3)
        self.hidden = nn.Linear(6 * 36, 12)
        self.middle = nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.left(x) + self.right(x)).flatten(1)
        return self.head(torch.tanh(self.middle(torch.relu(self.hidden(x)))))


def branches(seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Branches().eval()
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.5)
    return Model(net, example=(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)),))


def outputs(model: Model, x: Tensor) -> Tensor:
    with inference(model.module) as module:
        return module(x)


@pytest.mark.parametrize("seed", range(5))
def test_dead_units_to_the_fixed_point_leave_the_outputs(seed: int) -> None:
    model, x = branches(seed), torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(seed)
    masks = {name: torch.rand(w.shape, generator=draw) < 0.5 for name, w in connections(model.module).items()}
    masks["hidden.weight"][[1, 2]] = False  # nothing reaches these: they emit relu(b)
    masks["middle.weight"][:, [3, 4]] = False  # nobody reads these
    masks["middle.weight"][5] = False  # nothing reaches it: tanh(b), which is not zero
    masks["head.weight"][:, 6] = False
    masks["left.weight"][2] = masks["right.weight"][2] = False  # both branches of a sum
    masks["left.weight"][3] = False  # one branch only: alive
    zero_pruned(model.module, masks)
    before = outputs(model, x)
    working = model.copy()
    settled = settle(working, coupled_groups(model))
    torch.testing.assert_close(outputs(working, x), before, rtol=1e-4, atol=1e-5)
    found = {name: set(units.tolist()) for name, units in settled.unread.items()}
    assert {1, 2, 3, 4} <= found["hidden"]
    assert {5, 6} <= found["middle"]
    assert 2 in found["left"]
    assert 3 not in found["left"]
    assert settled.folded >= 3
    again = working.copy()
    assert settle(again, coupled_groups(model)).folded == 0, "a fixed point"
    assert all(torch.equal(again.module.state_dict()[k], v) for k, v in working.module.state_dict().items())


class Overwritten(nn.Module):
    """One layer reads what the first one gives; then a ReLU writes over it in place, and another layer reads that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.early, self.late = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        early = self.early(x)
        return early + self.late(x.relu_())


def test_a_constant_is_what_its_reader_was_given_not_what_became_of_it() -> None:
    torch.manual_seed(0)
    net = Overwritten().eval()
    with torch.no_grad():
        net.first.weight[2] = 0.0
        net.first.bias[2] = -3.0
    model, x = Model(net, example=(torch.randn(2, 5),)), torch.randn(7, 5)
    before, working = outputs(model, x), model.copy()
    assert settle(working, coupled_groups(model)).folded == 1
    torch.testing.assert_close(outputs(working, x), before)
    assert not working.module.get_parameter("early.weight")[:, 2].any()


def test_a_unit_dies_of_its_neighbours() -> None:
    """Nobody reads the head's only input, so nobody reads what feeds it, and so on up."""
    model = branches()
    with torch.no_grad():
        model.module.get_parameter("head.weight")[:, 1:] = 0.0
        model.module.get_parameter("middle.weight")[0, 5:] = 0.0
    settled = settle(model.copy(), coupled_groups(model))
    assert settled.unread["middle"].tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert settled.unread["hidden"].tolist() == [5, 6, 7, 8, 9, 10, 11]


def test_a_constant_does_not_cross_zero_padding_nor_into_a_layer_without_bias() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 1, bias=False)
    )
    with torch.no_grad():
        net[0].weight[0] = 0.0
        net[0].bias[0] = 1.0
        net[0].weight[1] = 0.0
        net[0].bias[1] = -1.0  # emits zero: may go anywhere
        net[2].weight[0] = 0.0
        net[2].bias[0] = 1.0
    model = Model(net, example=(torch.randn(2, 1, 8, 8),))
    x = torch.randn(4, 1, 8, 8)
    before = outputs(model, x)
    settled = settle(model, coupled_groups(model))
    assert {name: units.tolist() for name, units in settled.unread.items()} == {"0": [1]}
    torch.testing.assert_close(outputs(model, x), before)
