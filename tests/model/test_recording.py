"""Recorded programs: right for any batch, in both modes; what a recording does not see is left to an export."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from karui.model import GraphForm, Model, coupled_groups, edit_from_json, edit_to_json
from karui.model.capturing import capture_programs, record_program
from karui.model.cut import cut_graph
from karui.model.graphform import graph_form
from karui.model.recording import UnrecordedError
from karui.model.trace import widen

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A few layers and a table, and a forward that is given."""

    def __init__(self, run: Forward) -> None:
        super().__init__()
        self.run = run
        self.a, self.norm, self.drop = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.table = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def windows(net: Net, x: Tensor) -> Tensor:
    """Sizes that are multiples of the batch, in views, expansions and new tensors; a part for each sample."""
    batch = x.shape[0]
    y = net.a(x).view(batch * 2, 4).reshape(batch, 2, 4).transpose(1, 2).reshape(batch * 8)
    y = y + torch.arange(8 * batch).view(batch, 8).flatten() * x.new_ones(batch * 8)
    return torch.cat([y.view(-1, 8), net.table.expand(batch, -1)], 1).narrow(0, 0, batch)


def written(net: Net, x: Tensor) -> Tensor:
    """A constant, and a new tensor, that are written into."""
    scale = torch.tensor([1.0] * 8)
    scale += 1
    y = net.a(x)
    y[:, 2:4] = 0
    return y.mul_(scale)


SEEN: dict[str, Forward] = {
    "windows": windows,
    "written": written,
    "parts": lambda net, x: sum(part * (k + 1) for k, part in enumerate(net.a(x).chunk(4, 1))) + x.max(1)[0][:, None],
    "attention": lambda net, x: functional.scaled_dot_product_attention(*[net.a(x).view(-1, 2, 2, 2)] * 3).flatten(1),
}


@pytest.mark.parametrize("how", SEEN)
@pytest.mark.parametrize("training", [False, True])
def test_a_recorded_program_computes_what_the_model_does_for_any_batch(how: str, training: bool) -> None:
    torch.manual_seed(0)
    net = Net(SEEN[how]).train(training)
    program = record_program(net, (torch.randn(2, 6),), training=training)
    form = graph_form(net, program, program)
    for batch in (1, 2, 3, 7):
        x = torch.randn(batch, 6)
        for _ in range(2):
            torch.testing.assert_close(form(x), net(x))


def test_layers_are_called_whole_and_train() -> None:
    torch.manual_seed(0)
    net = Net(lambda net, x: net.drop(net.norm(net.a(x))))
    evaluation, training = capture_programs(net, (torch.randn(1, 6),))
    assert evaluation.recorded
    assert [n.target for n in evaluation.graph.nodes if n.op.startswith("call")] == ["a", "norm", "drop"]
    form, own = graph_form(copy.deepcopy(net), evaluation, training).train(), copy.deepcopy(net).train()
    x = torch.randn(32, 6)
    torch.manual_seed(1)
    one = form(x)
    torch.manual_seed(1)
    torch.testing.assert_close(one, own(x))
    one.sum().backward()
    assert form.a.weight.grad is not None
    assert int(form.norm.num_batches_tracked) == 1
    torch.testing.assert_close(form.norm.running_mean, own.norm.running_mean)


def test_parameters_and_buffers_are_as_before() -> None:
    net = Net(lambda net, x: net.norm(net.a(x)))
    before = copy.deepcopy(net.state_dict())
    record_program(net, (torch.randn(2, 6),), training=True)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())


class Doubled(torch.autograd.Function):
    """An operation with a slope of its own."""

    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(_ctx: object, *grads: Tensor) -> Tensor:
        return grads[0] * 2


def still(net: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.a(x)
    return y + x.sum()


def narrow(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net.a(x)


UNSEEN: dict[str, tuple[Forward, str]] = {
    "path": (lambda net, x: net.a(x) if x.shape[0] != 3 else net.a(x) * 2, "path"),
    "share": (lambda net, x: net.a(x) * (1 / x.shape[0]), "multiple"),
    "one more": (lambda net, x: net.a(x) + torch.zeros(x.shape[0] + 1).sum(), "multiple"),
    "constant": (lambda net, x: net.a(x) + torch.tensor([1.0] * len(x))[:, None], "constant"),
    "fixed": (lambda net, x: net.a(x).view(2, 8), "invalid"),
    "still": (still, "gradients"),
    "slope": (lambda net, x: Doubled.apply(net.a(x)), "gradients"),
    "narrow": (narrow, "autocast"),
    "mapped": (lambda net, x: torch.vmap(net.a)(x), "transform"),
    "number": (lambda net, x: net.a(x) * float(net.table[0]), "decides"),
    "sizes": (lambda net, x: net.a(x) + x[x > 0].sum(), "decides"),
}


@pytest.mark.parametrize("how", UNSEEN)
def test_what_a_recording_does_not_see_is_not_recorded(how: str) -> None:
    torch.manual_seed(0)
    run, why = UNSEEN[how]
    with pytest.raises(UnrecordedError, match=why):
        record_program(Net(run).eval(), widen((torch.randn(1, 6),)), training=False)


@pytest.mark.parametrize("how", ["still", "narrow", "share"])
def test_it_is_exported_instead(how: str) -> None:
    torch.manual_seed(0)
    net = Net(UNSEEN[how][0]).eval()
    programs = capture_programs(net, (torch.randn(1, 6),))
    assert not programs[0].recorded
    x = torch.randn(5, 6)
    torch.testing.assert_close(graph_form(net, *programs).eval()(x), net(x))


class Split(nn.Module):
    """Sizes written in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).reshape(x.shape[0], 8))


@pytest.mark.parametrize("recorded", [True, False])
def test_a_cut_is_replayed_on_programs_of_its_own_kind(recorded: bool) -> None:
    torch.manual_seed(0)
    net, example = Split().eval(), (torch.randn(1, 6),)
    model, gone = Model(net, example=example), {"a": torch.tensor([1, 2])}
    programs = capture_programs(net, example, recorded=recorded)
    light = cut_graph(model, coupled_groups(model), gone, programs)
    told = edit_to_json(light.lineage[0])
    assert told["recorded"] is recorded
    if not recorded:  # as lineages were before there were recordings
        del told["recorded"]
    again = edit_from_json(told).replay(copy.deepcopy(net), example)
    again.load_state_dict(light.module.state_dict())
    assert isinstance(again, GraphForm)
    x = torch.randn(3, 6)
    torch.testing.assert_close(again.eval()(x), light.module.eval()(x))
