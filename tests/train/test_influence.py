"""Influence: each part is called when it should be, in order, and sees what it should see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import TensorDataset

from karui.errors import UsageError
from karui.model import Classification, Model, Regression, copied
from karui.train import Influence, Moment, Together, Training, Turn, fit
from karui.train.forward import Forward

SHORT = Training(epochs=2, batch_size=5)


def data() -> TensorDataset:
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum(1, keepdim=True))


def model() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    return Model(net, example=(torch.zeros(1, 3),), task=Regression())


class Diary(Influence):
    """Writes down what is called."""

    def __init__(self, name: str, diary: list[str]) -> None:
        self.name = name
        self.diary = diary

    def attach(self, module: nn.Module) -> None:
        self.diary.append(f"{self.name} attach")

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        self.diary.append(f"{self.name} objective {moment.step}/{moment.steps} {moment.epoch}/{moment.epochs}")
        return loss

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        assert not torch.is_grad_enabled()
        self.diary.append(f"{self.name} constraints {moment.step}")

    def finish(self, module: nn.Module) -> nn.Module:
        self.diary.append(f"{self.name} finish")
        return module


def test_the_parts_are_called_in_order() -> None:
    diary: list[str] = []
    fit(model(), data(), training=SHORT, influence=Together(Diary("a", diary), Diary("b", diary)))
    steps = [
        f"{name} {what}"
        for step in range(4)
        for what in (f"objective {step}/4 {step // 2}/2", f"constraints {step}")
        for name in "ab"
    ]
    assert diary == ["a attach", "b attach", *steps, "b finish", "a finish"]


def test_taps_show_the_outputs_of_layers_with_their_gradient() -> None:
    class Sparse(Influence):
        """A penalty on a hidden layer."""

        taps = ("1",)

        def objective(self, loss: Tensor, moment: Moment) -> Tensor:
            assert moment.taps["1"].shape == (5, 4)
            assert torch.equal(moment.module[2](moment.taps["1"]), moment.outputs)
            return loss + 5.0 * moment.taps["1"].mean()

    plain = fit(model(), data(), training=SHORT)
    sparse = fit(model(), data(), training=SHORT, influence=Sparse())
    hidden = [net.module[:2](data().tensors[0]).mean().item() for net in (plain, sparse)]
    assert hidden[1] < hidden[0]
    assert not any(layer._forward_hooks for layer in sparse.module.modules())


def test_a_tap_on_a_layer_that_is_not_there_is_refused() -> None:
    class Lost(Influence):
        taps = ("layer9",)

    with pytest.raises(UsageError, match="no layer 'layer9'"):
        fit(model(), data(), influence=Lost())


def test_what_attach_adds_is_trained_and_what_finish_removes_is_gone() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.scale

    scales = []

    class Scaled(Influence):
        def attach(self, module: nn.Module) -> None:
            parametrize.register_parametrization(module[0], "weight", Scale())

        def finish(self, module: nn.Module) -> nn.Module:
            scales.append(module[0].parametrizations.weight[0].scale.item())
            parametrize.remove_parametrizations(module[0], "weight")
            return module

    trained = fit(model(), data(), training=SHORT, influence=Scaled())
    assert scales[0] != 1.0
    assert trained.module.state_dict().keys() == model().module.state_dict().keys()


def test_constraints_hold_after_every_step_and_at_the_end() -> None:
    class NotNegative(Influence):
        def constraints(self, module: nn.Module, moment: Moment) -> None:
            for parameter in module.parameters():
                parameter.clamp_(min=0)

    trained = fit(model(), data(), training=SHORT, influence=NotNegative())
    assert all(bool((p >= 0).all()) for p in trained.module.parameters())


def test_an_error_leaves_no_hook_and_no_changed_model() -> None:
    class Failing(Influence):
        taps = ("0",)

        def objective(self, loss: Tensor, moment: Moment) -> Tensor:
            raise RuntimeError("stop here")

    start = model()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop here"):
        fit(start, data(), influence=Failing())
    assert not any(layer._forward_hooks for layer in start.module.modules())
    assert torch.equal(torch.get_rng_state(), state)


class Early(Influence):
    """Keeps what it saw ahead of each step, and what came of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def ahead(self, inputs: tuple[Any, ...]) -> str:
        self.log.append(f"{self.name} ahead")
        return f"{self.name} of {len(inputs[0])}"

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        self.log.append(moment.ahead)
        return loss


def test_an_influence_is_asked_before_the_network_and_each_part_finds_its_own_answer() -> None:
    """A teacher that is asked after the network has to be given fresh memory for all its intermediate results."""
    log: list[str] = []
    model = Model(nn.Linear(2, 2), example=(torch.zeros(1, 2),), task=Classification())
    module = copied(model.module)
    module.register_forward_hook(lambda *_: log.append("network"))
    parts = Together(Early("a", log), Together(Influence(), Early("b", log)))
    forward = Forward(module, (Turn(),), model.task, parts, {})
    forward(0, (torch.zeros(3, 2),), torch.zeros(3, dtype=torch.long), {})
    assert log == ["a ahead", "b ahead", "network", "a of 3", "b of 3"]
