"""Turns: two networks that teach each other, and a controller with data of its own, in one training."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from karui.data import Splits
from karui.errors import SettingError, TrainingError
from karui.model import Classification, Model
from karui.train import SGD, Constant, Influence, Moment, Training, Turn, fit


class Peers(nn.Module):
    """Two networks side by side; the first one answers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
        self.second = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def peers() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model(Peers(), example=(torch.zeros(1, 1, 8, 8),), task=Classification())


def divergence(outputs: Tensor, theirs: Tensor) -> Tensor:
    ours, other = outputs.log_softmax(1), theirs.log_softmax(1)
    return functional.kl_div(ours, other, log_target=True, reduction="batchmean")


def taught_by(name: str, other: str, weight: float = 1.0) -> Turn:
    """Cross-entropy and the divergence from the other network's present answers, for one of the two."""

    def objective(module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs = getattr(module, name)(*inputs)
        with torch.no_grad():
            theirs = getattr(module, other)(*inputs)
        mutual = divergence(outputs, theirs)
        return outputs, functional.cross_entropy(outputs, targets) + weight * mutual

    return Turn(name=name, parameters=lambda module: getattr(module, name).parameters(), objective=objective)


BOTH = (taught_by("first", "second"), taught_by("second", "first"))


def accuracy(net: nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    with torch.no_grad():
        return (net(x).argmax(1) == y).float().mean().item()


def test_two_networks_learn_from_each_other(digits: Splits) -> None:
    """Both learn, and agree more than two that train alone in the same way."""

    def disagreement(trained: Model) -> float:
        x = digits.test.tensors[0]
        with torch.no_grad():
            return divergence(trained.module.first(x), trained.module.second(x)).item()

    training = Training(epochs=10)
    alone = taught_by("first", "second", 0.0), taught_by("second", "first", 0.0)
    apart, together = (fit(peers(), digits.train, training=training, turns=turns) for turns in (alone, BOTH))
    for net in (together.module.first, together.module.second):
        assert accuracy(net, digits.test) > 0.9
    assert disagreement(together) < 0.7 * disagreement(apart)


def test_a_step_of_two_turns_written_out_by_hand() -> None:
    """The second turn sees what the first one moved, on the same batch; each moves its own parameters only."""
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(x, torch.arange(12) % 10)
    plain = SGD(lr=0.1, momentum=0.0, nesterov=False, weight_decay=0.0)
    training = Training(epochs=1, batch_size=12, optimizer=plain, schedule=Constant())
    got = fit(peers(), data, training=training, turns=BOTH).module.state_dict()
    net = peers().copy().module
    for turn in BOTH:
        own = list(turn.parameters(net))
        assert turn.objective is not None
        gradients = torch.autograd.grad(turn.objective(net, (x,), data.tensors[1])[1], own)
        with torch.no_grad():
            for parameter, gradient in zip(own, gradients, strict=True):
                parameter.sub_(0.1 * gradient)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)


def test_gradients_that_leak_into_another_turns_parameters_do_nothing() -> None:
    """An objective that forgets to detach the other network must not move it."""

    def leaky(module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs = module.first(*inputs) + module.second(*inputs)
        return outputs, functional.cross_entropy(outputs, targets)

    data = TensorDataset(torch.rand(12, 1, 8, 8), torch.arange(12) % 10)
    turns = (
        Turn(name="leaky", parameters=lambda module: module.first.parameters(), objective=leaky),
        Turn(name="never due", parameters=lambda module: module.second.parameters(), objective=leaky, every=100),
    )
    trained = fit(peers(), data, training=Training(epochs=3, batch_size=4), turns=turns)
    assert torch.equal(trained.module.second[1].weight, peers().module.second[1].weight)
    assert not torch.equal(trained.module.first[1].weight, peers().module.first[1].weight)


class Gated(nn.Module):
    """Shared weights, and a gate that is searched for."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 3)
        self.gate = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(x) * self.gate.sigmoid()


def test_a_turn_with_data_of_its_own_comes_at_the_end_of_each_epoch() -> None:
    """As an architecture search has it: weights on training data, then the controller on validation data."""
    train = TensorDataset(torch.zeros(20, 4), torch.arange(20) % 3)
    validation = TensorDataset(torch.ones(30, 4), torch.arange(30) % 3)
    seen = []

    class Watch(Influence):
        def constraints(self, module: nn.Module, moment: Moment) -> None:
            gate, shared = module.gate.detach().clone(), module.shared.weight.detach().clone()
            seen.append((float(moment.inputs[0].mean()), len(moment.targets), moment.step, moment.epoch, gate, shared))

    turns = (
        Turn(name="weights", parameters=lambda module: module.shared.parameters()),
        Turn(name="gate", parameters=lambda module: [module.gate], data=validation, every=None, updates=2),
    )
    model = Model(Gated(), example=(torch.zeros(1, 4),), task=Classification())
    fit(model, train, training=Training(epochs=2, batch_size=5), turns=turns, influence=Watch())
    assert [entry[:4] for entry in seen] == [
        *((0.0, 5, step, 0) for step in range(4)), (1.0, 5, 3, 0), (1.0, 5, 3, 0),
        *((0.0, 5, step, 1) for step in range(4, 8)), (1.0, 5, 7, 1), (1.0, 5, 7, 1),
    ]  # fmt: skip
    for before, after in pairwise(seen):
        moved_gate, moved_weights = not torch.equal(before[4], after[4]), not torch.equal(before[5], after[5])
        controller = after[0] == 1.0
        assert (moved_gate, moved_weights) in {(controller, False), (controller, not controller)}


def test_each_turn_has_its_own_optimizer_and_rare_ones_wait() -> None:
    due = [step for step in range(12) if Turn(every=5).is_due(step, 4)]
    assert due == [4, 9]
    assert [step for step in range(12) if Turn(every=None).is_due(step, 4)] == [3, 7, 11]
    still = Turn(name="first", parameters=lambda m: m.first.parameters(), optimizer=SGD(lr=1e-12, weight_decay=0.0))
    other = Turn(name="second", parameters=lambda m: m.second.parameters(), objective=BOTH[1].objective)
    data = TensorDataset(torch.rand(12, 1, 8, 8), torch.arange(12) % 10)
    net = fit(peers(), data, training=Training(epochs=1, batch_size=4), turns=(still, other)).module
    torch.testing.assert_close(net.first[1].weight, peers().module.first[1].weight, rtol=0, atol=1e-9)
    assert (net.second[1].weight - peers().module.second[1].weight).abs().max() > 1e-4


def test_turns_train_in_two_processes_as_in_one() -> None:
    generator = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.rand(32, 1, 8, 8, generator=generator), torch.arange(32) % 10)
    one = fit(peers(), data, training=Training(epochs=2, batch_size=16, accelerator="cpu"), turns=BOTH)
    two = fit(peers(), data, training=Training(epochs=2, batch_size=8, devices=2, accelerator="cpu"), turns=BOTH)
    for name, value in one.module.state_dict().items():
        torch.testing.assert_close(two.module.state_dict()[name], value, rtol=1e-4, atol=1e-6)


def test_turns_resume_exactly(tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(20, 4, generator=torch.Generator().manual_seed(2)), torch.arange(20) % 3)
    turns = (
        Turn(name="weights", parameters=lambda module: module.shared.parameters()),
        Turn(name="gate", parameters=lambda module: [module.gate], data=data, every=3, updates=2),
    )
    torch.manual_seed(0)
    model = Model(Gated(), example=(torch.zeros(1, 4),), task=Classification())

    class Stop(Influence):
        def constraints(self, module: nn.Module, moment: Moment) -> None:
            if moment.step == 6 and not (tmp_path / "go on").exists():
                raise TrainingError("stopped")

    def run() -> Model:
        training = Training(epochs=3, batch_size=5, checkpoint_seconds=0.0)
        return fit(model, data, training=training, turns=turns, influence=Stop(), checkpoints=tmp_path / "kept")

    with pytest.raises(TrainingError, match="stopped"):
        run()
    (tmp_path / "go on").touch()
    resumed = run()
    (tmp_path / "kept").rename(tmp_path / "away")
    whole = run()
    assert torch.equal(resumed.module.gate, whole.module.gate)
    assert torch.equal(resumed.module.shared.weight, whole.module.shared.weight)


def nobody(module: nn.Module) -> list[nn.Parameter]:
    return []


def test_turns_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SettingError, match="turn 'a': every is 0"):
        Turn(name="a", every=0)
    with pytest.raises(SettingError, match="turn 'a': updates is 0"):
        Turn(name="a", updates=0)
    data = TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    with pytest.raises(TrainingError, match="Turn 'nobody' of 'train' has no parameter"):
        fit(peers(), data, turns=(Turn(name="nobody", parameters=nobody),))

    def constant(module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
        return inputs[0], torch.tensor(1.0)

    with pytest.raises(TrainingError, match="depends on no parameter"):
        fit(peers(), data, turns=(Turn(objective=constant),))
