"""Zeros stand in for what a watched run need not compute; nothing that is told, kept or built may hang on them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.errors import CaptureError
from karui.model import Model, coupled_groups, remove_units
from karui.model.capturing import capture_programs
from karui.model.graphform import graph_form
from karui.model.standins import HEAVY, StandIns, watched
from karui.model.trace import Trace, capture, run_traced

LINEAR = torch.ops.aten.linear.default


class Attending(nn.Module):
    """Two equal layers of attention over a convolution, so that shapes come again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.layers = nn.Sequential(
            *[nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(2)]
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


class Dividing(nn.Module):
    """Looks rows up by a number that has no sense where the second of two equal layers gives zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.table = nn.Embedding(3, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(functional.relu(self.first(x)))
        return self.head(self.table((1 + 1 / y.abs().amax(1)).clamp(max=2).long()))


class Remembering(nn.Module):
    """Keeps what it makes of its parameters where no copy of the module sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.one, self.other):
            self.kept.append(layer.weight @ layer.weight)
            x = layer(x)
        return x * self.kept[-1].sum()


def test_the_first_of_a_kind_is_computed_and_the_next_is_zeros_of_the_same_layout() -> None:
    stand_ins = StandIns()
    x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    assert torch.equal(stand_ins.compute(LINEAR, (x, w, b), {}), functional.linear(x, w, b))
    again = stand_ins.compute(LINEAR, (x, w, b), {})
    assert again.shape == (2, 4)
    assert not again.any()
    assert torch.equal(stand_ins.compute(LINEAR, (x, w), {}), functional.linear(x, w))  # another kind
    assert torch.equal(
        stand_ins.compute(LINEAR, (x.double(), w.double()), {}), functional.linear(x.double(), w.double())
    )


def test_layouts_are_kept_as_they_are() -> None:
    stand_ins = StandIns()
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last)
    given = (x, torch.randn(6, 8, 3, 3), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    func = torch.ops.aten.convolution.default
    first, again = stand_ins.compute(func, given, {}), stand_ins.compute(func, given, {})
    assert first.stride() == again.stride()
    assert again.data_ptr() != stand_ins.compute(func, given, {}).data_ptr()


def test_a_batch_normalisation_that_trains_is_computed() -> None:
    stand_ins, func = StandIns(), torch.ops.aten.native_batch_norm.default
    x, one, mean, var = torch.randn(4, 3), torch.ones(3), torch.zeros(3), torch.ones(3)
    for training in (False, True):
        made = [
            stand_ins.compute(func, (x, one, mean, mean.clone(), var.clone(), training, 0.1, 1e-5), {})[0]
            for _ in range(2)
        ]
        assert made[0].any()
        assert bool(made[1].any()) is training


def test_no_heavy_operator_writes_into_what_it_is_given_or_is_a_view() -> None:
    for name in HEAVY:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            schema = getattr(packet, overload)._schema
            if "out" not in overload:
                assert not schema.is_mutable
                assert all(returned.alias_info is None for returned in schema.returns)


@pytest.mark.parametrize("factory", [Attending, lambda: nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])])
def test_an_analysis_is_what_a_real_run_says(factory: type[nn.Module]) -> None:
    net = factory().eval()
    x = torch.randn(1, 3, 8, 8) if isinstance(net, Attending) else torch.randn(1, 4)
    real = Trace(example=(x,))
    run_traced(net, (x,), real, training=False)
    found = capture(net, (x,))
    assert [s.name for s in found.steps[: found.evaluated]] == [s.name for s in real.steps]
    assert [v.sizes for s in found.steps[: found.evaluated] for v in s.outputs] == [
        v.sizes for s in real.steps for v in s.outputs
    ]


def test_where_zeros_lead_astray_the_real_run_counts() -> None:
    net = Dividing().eval()
    found = coupled_groups(Model(net, (torch.randn(5, 4),)))
    assert {m.tensor for g in found for m in g.members} >= {"first.weight", "second.weight", "head.weight"}
    tried: list[bool] = []

    def run(stand_ins: StandIns | None) -> bool:
        tried.append(stand_ins is not None)
        if stand_ins is not None:
            raise CaptureError("An index is out of range.")
        return True

    assert watched(run, lambda _: False)
    assert tried == [True, False]
    tried.clear()
    assert watched(lambda stand_ins: tried.append(stand_ins is not None) or len(tried) == 1, bool) is False
    assert tried == [True, False]


def test_what_follows_from_parameters_is_computed() -> None:
    net = Remembering().eval()
    capture(net, (torch.randn(1, 4),))
    capture_programs(net, (torch.randn(1, 4),))
    assert net.kept
    assert all(kept.any() for kept in net.kept)


def test_a_recorded_program_computes_what_the_model_does() -> None:
    net, x = Attending().eval(), torch.randn(5, 3, 8, 8)
    programs = capture_programs(net, (x[:1],))
    assert programs[0].recorded
    with torch.no_grad():
        assert torch.allclose(graph_form(net, *programs)(x), net(x), atol=1e-6)


def test_a_cut_of_such_a_network_is_proved() -> None:
    model = Model(Attending().eval(), (torch.randn(1, 3, 8, 8),))
    found = coupled_groups(model)
    chosen = {g.name: torch.tensor([0]) for g in found if g.exact}
    assert remove_units(model, chosen, analysis=found).parameters < model.parameters
