"""Several networks in one training: who sees what, whose parameters move, and what each keeps of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from karui.errors import NeedError
from karui.model import Classification, Model
from karui.technique import Bench
from karui.technique.joint import fit_together
from karui.train import SGD, Adam, Constant, Influence, Moment, Training, fit
from karui.train.joint import Answer, Joint, Member, joined, member_turns, silent
from karui.train.masks import MaskKeeper

PLAIN = Training(
    epochs=1, batch_size=12, optimizer=SGD(lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0), schedule=Constant()
)


def net(seed: int, width: int = 6, norm: bool = True, dropout: float = 0.0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        between = [nn.BatchNorm1d(width)] if norm else []
        after = [nn.Dropout(dropout)] if dropout else []
        module = nn.Sequential(nn.Linear(5, width), *between, nn.ReLU(), *after, nn.Linear(width, 3))
        return Model(module, example=(torch.zeros(2, 5),), task=Classification())


def data_of(samples: int = 12, seed: int = 0) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(samples, 5, generator=draw), torch.arange(samples) % 3)


def no_pull(number: int, hard: Tensor, targets: Any, own: Answer, others: tuple[Answer, ...]) -> Tensor:
    return hard


def towards(number: int, hard: Tensor, targets: Any, own: Answer, others: tuple[Answer, ...]) -> Tensor:
    return hard + sum((own.outputs - other.outputs).square().mean() for other in others)


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("alternating", [True, False])
def test_without_a_pull_each_trains_as_it_does_alone_bit_for_bit(alternating: bool) -> None:
    """Running statistics and dropout, too: the passes that only tell what a member says leave no trace."""
    data, training = data_of(30), replace(PLAIN, epochs=3, optimizer=Adam())
    models = (net(0, dropout=0.5), net(1, dropout=0.5), net(2, width=9, dropout=0.3))
    bench = Bench(train=data, validation=data, training=training)
    together = fit_together(models, bench, pull=no_pull, alternating=alternating)
    for model, trained in zip(models, together, strict=True):
        assert same(trained.module, fit(model, data, training=training).module)
        assert not trained.module.training


@pytest.mark.parametrize("alternating", [True, False])
def test_a_step_written_out_by_hand(alternating: bool) -> None:
    """Alternating, the second one sees what the first one says after its update; else what it said before."""
    data = data_of()
    x, y = data.tensors
    models = (net(0, norm=False), net(1, norm=False))
    bench = Bench(train=data, validation=data, training=PLAIN)
    got = fit_together(models, bench, pull=towards, alternating=alternating)
    modules = [model.copy().module for model in models]
    with torch.no_grad():
        before = [module(x) for module in modules]
    for number, module in enumerate(modules):
        with torch.no_grad():
            other = modules[1 - number](x) if alternating else before[1 - number]
        outputs = module(x)
        loss = functional.cross_entropy(outputs, y) + (outputs - other).square().mean()
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter.sub_(0.1 * gradient)
        for parameter, trained in zip(module.parameters(), got[number].module.parameters(), strict=True):
            torch.testing.assert_close(trained, parameter, rtol=1e-5, atol=1e-6)


def test_others_answers_have_no_gradient_and_their_layers_are_shown() -> None:
    seen: list[tuple[int, bool, bool, tuple[str, ...]]] = []

    def watch(number: int, hard: Tensor, targets: Any, own: Answer, others: tuple[Answer, ...]) -> Tensor:
        (other,) = others
        seen.append((number, own.layers["0"].requires_grad, other.layers["0"].requires_grad, tuple(other.layers)))
        return hard

    bench = Bench(train=data_of(), validation=data_of(), training=PLAIN)
    fit_together((net(0), net(1)), bench, pull=watch, layers=("0",))
    assert seen == [(0, True, False, ("0",)), (1, True, False, ("0",))]


def test_members_of_equal_values_say_the_same_under_dropout() -> None:
    """Else what they say of their layers would differ by chance alone."""
    apart: list[float] = []

    def watch(number: int, hard: Tensor, targets: Any, own: Answer, others: tuple[Answer, ...]) -> Tensor:
        apart.append(float((own.outputs - others[0].outputs).detach().abs().max()))
        return hard

    bench = Bench(train=data_of(), validation=data_of(), training=PLAIN)
    fit_together((net(0, dropout=0.5), net(0, dropout=0.5)), bench, pull=watch, alternating=False)
    assert apart == [0.0, 0.0] or max(apart) < 1e-6


def test_a_silent_pass_leaves_no_trace() -> None:
    module = net(0, dropout=0.5).module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x, drawn = torch.randn(8, 5), torch.get_rng_state()
    answer = silent(module, (x,), ("4",))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(answer.outputs, answer.layers["4"])
    assert not answer.outputs.requires_grad


@dataclass(frozen=True, eq=False)
class Watch(Influence):
    """Notes which module and which tapped value it is shown."""

    met: list[Any]

    @property
    def taps(self) -> tuple[str, ...]:
        return ("0", "")

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        same_outputs = torch.equal(moment.taps[""], moment.outputs)
        self.met.append(("objective", tuple(moment.taps["0"].shape), same_outputs, type(moment.module)))
        return loss

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        self.met.append(("constraints", type(module)))


def test_an_influence_on_one_member_sees_it_as_if_it_trained_alone() -> None:
    met: list[Any] = []
    bench = Bench(train=data_of(), validation=data_of(), training=PLAIN)
    fit_together((net(0), net(1, width=9)), bench, pull=towards, influences={1: Watch(met)})
    assert met == [("objective", (12, 9), True, nn.Sequential), ("constraints", nn.Sequential)]
    assert Member(1, Watch([])).taps == ("members.1.0", "members.1")


def test_the_benchs_influence_acts_on_members_of_the_first_ones_structure() -> None:
    masks = {"0.weight": torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.5}
    bench = Bench(train=data_of(), validation=data_of(), training=PLAIN).under(MaskKeeper(masks))
    first, second, third = fit_together((net(0), net(1), net(2, width=9)), bench, pull=towards)
    for model in (first, second):
        assert bool((model.module[0].weight[~masks["0.weight"]] == 0).all())
        assert not any("survivors" in name for name in model.module.state_dict())
    assert bool((third.module[0].weight != 0).all())


@pytest.mark.parametrize("alternating", [True, False])
def test_two_processes_train_members_as_one_does(alternating: bool) -> None:
    models, task = (net(0, norm=False), net(1, width=9, norm=False)), Classification()
    turns = member_turns(task, 2, towards, alternating=alternating)
    one, two = (
        fit(joined(models), data_of(32), training=replace(PLAIN, epochs=2, accelerator="cpu", **more), turns=turns)
        for more in ({"batch_size": 16}, {"batch_size": 8, "devices": 2})
    )
    assert isinstance(two.module, Joint)
    for name, value in one.module.state_dict().items():
        torch.testing.assert_close(two.module.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_members_without_a_task_are_refused() -> None:
    with pytest.raises(NeedError, match="no task"):
        joined((replace(net(0), task=None), net(1)))


def test_a_network_given_twice_becomes_two() -> None:
    one = net(0)
    both = joined([one, one, net(1)]).module
    assert isinstance(both, Joint)
    first, second = both.members[0], both.members[1]
    assert first is not second
    pairs = list(zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)
