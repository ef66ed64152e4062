"""A proof on corners of images is believed only where it tells what the whole image does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import SurgeryError
from karui.model import Candidate, Cut, Model, coupled_groups, prove, remove_units
from karui.model import proof as proofs
from karui.model.corners import corners, prove_on_corners
from karui.model.cut import make_cut
from karui.model.proof import second_input
from karui.model.running import outputs
from karui.model.verdict import Proof


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(8, 6, 3)
        self.head = nn.Linear(6, 3)

    def read(self, x: Tensor) -> Tensor:
        return self.b(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.read(functional.relu(self.a(x)))).mean((2, 3)))


class Twofold(Net):
    """The same operators on other weights where the image is small."""

    def read(self, x: Tensor) -> Tensor:
        return self.b(x) if x.shape[-1] > 12 else self.c(x)


class Scaled(Net):
    """The same operators on the same weights, with a number that hangs on the size and on the count of channels."""

    def read(self, x: Tensor) -> Tensor:
        return self.b(x * (x.shape[1] / 8 if x.shape[-1] > 12 else 1.0))


class Flat(Net):
    """An image of one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6 * 28 * 28, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.relu(self.b(functional.relu(self.a(x)))).flatten(1))


def on_corners(net: nn.Module, wrong: Cut | None = None) -> Proof | None:
    torch.manual_seed(0)
    model = Model(net.eval(), example=(torch.randn(1, 3, 32, 32),))
    found = coupled_groups(model)
    units = {"a": torch.tensor([1, 4])}
    candidate = Candidate(wrong or make_cut(net, found, units), found, units)
    light = candidate.build(net)
    other = second_input(candidate)
    single = outputs(light, other)
    with candidate.hollow(light, net) as hollow:
        return prove_on_corners(net, candidate, (found.trace.example, other), hollow, single)


def test_corners_are_of_images_alone() -> None:
    image, words = torch.randn(2, 3, 40, 24), torch.zeros(1, 1, 64, 64, dtype=torch.long)
    small = corners((image, words))
    assert small is not None
    assert torch.equal(small[0], image[..., :10, :8])
    assert small[1] is words
    assert corners((torch.randn(1, 3, 8, 8), torch.randn(4, 5))) is None


def test_a_convolutional_network_is_proved_on_corners() -> None:
    found = on_corners(Net())
    assert found is not None
    assert found.holds
    assert found.visible


@pytest.mark.parametrize("kind", [Twofold, Flat])
def test_what_takes_another_way_for_a_corner_is_proved_on_the_whole(kind: type[Net]) -> None:
    net = kind()
    assert on_corners(net) is None
    model = Model(net, example=(torch.randn(1, 3, 32, 32),))
    assert remove_units(model, {"a": torch.tensor([1])}).module.a.out_channels == 7


def test_what_differs_on_the_whole_image_alone_is_refused() -> None:
    assert on_corners(Scaled()) is None
    model = Model(Scaled().eval(), example=(torch.randn(1, 3, 32, 32),))
    found = coupled_groups(model)
    units = {"a": torch.tensor([1])}
    candidate = Candidate(make_cut(model.module, found, units), found, units)
    light = candidate.build(model.module)
    with pytest.raises(SurgeryError, match="differs from the masked one"):
        prove(model, candidate, light, outputs(light, second_input(candidate)))


def test_wrong_channels_do_not_pass_on_corners() -> None:
    net = Net()
    model = Model(net.eval(), example=(torch.randn(1, 3, 32, 32),))
    found = coupled_groups(model)
    step = make_cut(net, found, {"a": torch.tensor([1, 4])})
    kept = [["b.weight", 1, [0, 1, 2, 3, 5, 7]] if k[0] == "b.weight" else k for k in step.kept]
    assert kept != step.kept
    assert on_corners(net, Cut(kept, step.sizes, step.removed)) is None


def test_hidden_units_are_left_to_the_whole_proof() -> None:
    net = Net()
    with torch.no_grad():
        net.b.weight[:, [1, 4]] = 0
    assert on_corners(net) is None


def test_own_size_grids_and_gradients_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Grid(Net):
        """Keeps a grid for the last size in a buffer and in an attribute."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("grid", torch.zeros(1), persistent=False)
            self.size = 0

        def forward(self, x: Tensor) -> Tensor:
            self.grid, self.size = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype), x.shape[-1]
            return super().forward(x + self.grid)

    net = Grid().eval()
    x = torch.randn(1, 3, 32, 32)
    net(x)
    net.b.requires_grad_(False)
    given = net.grid, net.size, {n: (p, p.requires_grad) for n, p in net.named_parameters()}
    tried = []
    monkeypatch.setattr(proofs, "prove_on_corners", lambda *a: tried.append(found := prove_on_corners(*a)) or found)
    light = remove_units(Model(net, example=(x,)), {"a": torch.tensor([1])}).module
    assert tried
    assert net.grid is given[0]
    assert (net.size, light.size, light.grid.shape) == (32, 32, (32,))
    assert all(p is given[2][n][0] and p.requires_grad == given[2][n][1] for n, p in net.named_parameters())
    assert light.grid.dtype == light.a.weight.dtype == torch.float32
