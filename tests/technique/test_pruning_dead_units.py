"""Units that nobody reads, or that read nothing, [63]: found to the fixed point, outputs unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from karui.measuring.inference import inference
from karui.model import Model, coupled_groups
from karui.sparsify import MagnitudePruning
from karui.technique import Bench
from karui.technique.pruning.dead_units import cut_unread, settle, without_dead_units
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


class Recurrent(nn.Module):
    """Hidden units that the head and the recurrence read."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = layer(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0])


class Stepwise(nn.Module):
    """The same by a cell, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.GRUCell(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = None
        for step in range(x.shape[1]):
            hidden = self.layer(x[:, step], hidden)
        return self.head(hidden)


class Summed(nn.Module):
    """A factor that sums over the features: it reads them without a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.head(hidden) * hidden.sum(-1, keepdim=True)


class Tied(nn.Module):
    """One layer applied three times: it reads what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.first(x))
        for _ in range(3):
            hidden = torch.sigmoid(self.middle(hidden))
        return self.head(hidden)


class Faint(Summed):
    """A sum that a rectifier hides for most inputs and weights."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.head(hidden) + (hidden.sum(-1, keepdim=True) - 3.0).relu()


class Borrowed(nn.Module):
    """The head's weight is used a second time without its bias, so a constant that moves into that is lost there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.head(hidden) * F.linear(hidden, self.head.weight)


def made(net: nn.Module, steps: int = 0) -> tuple[Model, Tensor]:
    """A network of these with other weights, whose head does not read unit 0; and inputs that it has not seen."""
    draw = torch.Generator().manual_seed(3)
    shape = (steps, 4) if steps else (4,)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw))
        net.get_parameter("head.weight")[:, 0] = 0.0
    example = torch.randn(2, *shape, generator=draw)
    return Model(net.eval(), example=(example,)), torch.randn(50, *shape, generator=draw)


HIDDEN = {
    "LSTM": lambda: made(Recurrent(nn.LSTM), 5),
    "GRU": lambda: made(Recurrent(nn.GRU), 5),
    "RNN": lambda: made(Recurrent(nn.RNN), 5),
    "cell": lambda: made(Stepwise(), 5),
    "sum": lambda: made(Summed()),
    "tied layer": lambda: made(Tied()),
    "hidden sum": lambda: made(Faint()),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_unit_that_something_else_reads_stays_and_the_note_says_so(name: str) -> None:
    model, x = HIDDEN[name]()
    light = without_dead_units(model)
    assert torch.equal(outputs(light, x), outputs(model, x))
    assert light.parameters == model.parameters
    if name in {"sum", "hidden sum"}:
        assert "'first' is left whole: something besides its weights reads its units" in light.lineage[-1].describe()


@pytest.mark.parametrize("name", ["sum", "tied layer", "hidden sum"])
def test_pruning_by_magnitude_leaves_the_outputs_of_the_masked_network(name: str) -> None:
    model, x = HIDDEN[name]()
    with torch.no_grad():
        model.module.get_parameter("head.weight")[:, :3] *= 1e-3
    masked, light = (
        MagnitudePruning(keep=0.5, rounds=1, epochs=0, dead=dead).apply(model, Bench()) for dead in (False, True)
    )
    torch.testing.assert_close(outputs(light, x), outputs(masked, x), rtol=1e-5, atol=1e-6)
    assert light.parameters == masked.parameters


@pytest.mark.parametrize(
    ("name", "weight"), [("LSTM", "layer.weight_hh_l0"), ("cell", "layer.weight_hh"), ("tied layer", "middle.weight")]
)
def test_a_unit_that_neither_the_head_nor_the_recurrence_reads_goes(name: str, weight: str) -> None:
    model, x = HIDDEN[name]()
    with torch.no_grad():
        model.module.get_parameter(weight)[:, 0] = 0.0
    light = without_dead_units(model)
    assert light.module.get_parameter("head.weight").shape == (3, 5)
    torch.testing.assert_close(outputs(light, x), outputs(model, x))


def test_a_constant_that_the_outputs_would_miss_stays() -> None:
    model, x = made(Borrowed())
    with torch.no_grad():
        model.module.get_parameter("head.weight")[:, 0] = 1.0
        model.module.get_parameter("first.weight")[0] = 0.0
    working = model.copy()
    settled = settle(working, coupled_groups(model))
    assert settled.folded == 0
    assert list(settled.whole) == ["first"]
    assert torch.equal(outputs(working, x), outputs(model, x))
    assert "'first' is left whole" in cut_unread(working, coupled_groups(model), settled).lineage[-1].describe()
