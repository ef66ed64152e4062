"""Models that decide by values, sizes or modes, or that run without gradients: proved rightly, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from karui.errors import CaptureError, SurgeryError
from karui.model import Model, coupled_groups, remove_units
from karui.model.copying import copied

Forward = Callable[["Two", Tensor], Tensor]
GONE = {"a": torch.tensor([0, 4])}


class Two(nn.Module):
    """Two layers of one shape, and a forward that is given."""

    def __init__(self, run: Forward) -> None:
        super().__init__()
        self.run, self.last = run, torch.zeros(1)
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self, x).relu())


def model(run: Forward, batch: int = 2) -> Model:
    torch.manual_seed(0)
    return Model(Two(run).eval(), example=(torch.randn(batch, 6),))


READS: dict[str, Forward] = {
    "equal": lambda net, x: net.b(x) if torch.equal(x, x.abs()) else net.a(x),
    "numpy": lambda net, x: net.b(x) if x.detach().numpy().max() > 6 else net.a(x),
    "tolist": lambda net, x: net.b(x) if max(x.flatten().tolist()) > 6 else net.a(x),
    "nonzero": lambda net, x: net.b(x) if len(torch.nonzero(x > 6)) else net.a(x),
    "mask": lambda net, x: net.b(x) if x[x > 6].numel() else net.a(x),
}


@pytest.mark.parametrize("how", READS)
def test_paths_that_depend_on_values_are_refused_however_they_are_read(how: str) -> None:
    with pytest.raises(CaptureError, match=r"depends on its input"):
        coupled_groups(model(READS[how]))


def test_sizes_that_decide_no_path_hinder_no_cut() -> None:
    def run(net: Two, x: Tensor) -> Tensor:
        return net.a(x).index_select(0, torch.nonzero(x[:, 0] > -9)[:, 0])

    assert remove_units(model(run), GONE).module.a.out_features == 6


@pytest.mark.parametrize("batch", [1, 2])
def test_a_path_that_depends_on_the_batch_is_refused(batch: int) -> None:
    def run(net: Two, x: Tensor) -> Tensor:
        return net.a(x) if x.shape[0] == 1 else net.b(x)

    with pytest.raises(SurgeryError, match="does not run"):
        remove_units(model(run, batch), GONE)


def frozen(net: Two, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.a(x).sigmoid()


def in_place(net: Two, x: Tensor) -> Tensor:
    y = net.a(x).relu()
    y[:, 3:] *= 2
    return y


def recomputed(net: Two, x: Tensor) -> Tensor:
    return checkpoint(lambda z: net.a(z).relu(), x, use_reentrant=False)


def kept(net: Two, x: Tensor) -> Tensor:
    net.last = net.a(x)
    return net.last


class Frozen(Two):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("run", [frozen, in_place, recomputed, kept])
def test_forwards_without_gradients_are_proved(run: Forward) -> None:
    dense = model(run)
    light = remove_units(dense, GONE)
    masked = copy.deepcopy(dense.module)  # which a forward that keeps its results must still allow
    with torch.no_grad():
        masked.a.weight[GONE["a"]] = 0
        masked.a.bias[GONE["a"]] = 0
        masked.head.weight[:, GONE["a"]] = 0
        for batch in (1, 5):
            x = torch.randn(batch, 6)
            torch.testing.assert_close(light.module(x), masked(x))


def test_a_network_that_never_has_gradients_is_proved() -> None:
    torch.manual_seed(0)
    dense = Model(Frozen(lambda net, x: net.a(x)).eval(), example=(torch.randn(2, 6),))
    assert remove_units(dense, GONE).module.a.out_features == 6


def test_units_that_nothing_shows_are_refused_without_gradients_too() -> None:
    def run(net: Two, x: Tensor) -> Tensor:
        with torch.no_grad():
            net.last = net.a(x)
            return net.b(x)

    with pytest.raises(SurgeryError, match="do not show"):
        remove_units(model(run), {"a": torch.tensor([1])})


def test_what_a_forward_left_in_its_module_is_copied_by_value() -> None:
    net = Two(kept)
    net(torch.randn(2, 6))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    twin = copied(net)
    torch.testing.assert_close(twin.last, net.last.detach())
    assert twin.last.is_leaf
    assert Model(net, example=(torch.randn(2, 6),)).copy().module.last.is_leaf


def test_a_capture_leaves_no_attribute_behind() -> None:
    dense = model(kept)
    before = dense.module.last
    coupled_groups(dense)
    remove_units(dense, GONE)
    assert dense.module.last is before


class Several(nn.Module):
    """A forward of any number of inputs whose size is frozen, so that it needs its graph form."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.head(torch.stack([self.a(x).relu().view(-1, 8) for x in inputs]).sum(0))


def test_a_forward_of_any_number_of_inputs_takes_its_graph_form() -> None:
    light = remove_units(Model(Several(), example=(torch.randn(2, 6), torch.randn(2, 6))), GONE)
    assert light.module(torch.randn(5, 6), torch.randn(5, 6)).shape == (5, 3)


class TrainedHead(nn.Module):
    """A head that only training has, with frozen sizes: each of its two programs holds what the other lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head, self.aux, self.last = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x).relu()
        return self.head(z) + self.last(self.aux(z).relu().view(-1, 5)) if self.training else self.head(z)


def test_units_of_the_training_program_alone_are_cut_in_graph_form() -> None:
    light = remove_units(Model(TrainedHead().eval(), example=(torch.randn(2, 6),)), {"aux": torch.tensor([1])})
    assert light.module.train()(torch.randn(4, 6)).shape == (4, 3)
    assert light.module.eval()(torch.randn(4, 6)).shape == (4, 3)
