"""Where a teacher lies, and how it is asked: in evaluation mode, on the device of the inputs, in each process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import nn
from torch.utils.data import TensorDataset

from karui.data.splits import take
from karui.distill._teachers import teachers_of
from karui.distill.attention import AttentionTransfer
from karui.distill.detection import DetectionDistillation
from karui.distill.hint import FitNets
from karui.distill.knowledge import KnowledgeDistillation
from karui.distill.logits import LogitRegression
from karui.distill.munge import ModelCompression
from karui.distill.neurons import NeuronSelection
from karui.distill.predictors import predictor
from karui.model import Model
from karui.technique import Bench
from karui.train import SGD, Constant, Training
from karui.train.guide import Guide
from karui.train.teaching import Teachers


def test_the_teacher_is_in_evaluation_mode_without_gradient_and_on_the_device_of_the_inputs(
    nets: Any, forest: RandomForestClassifier, bench: Bench
) -> None:
    seen: list[tuple[bool, bool]] = []

    class Watching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(64), nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return self.layer(nn.functional.dropout(self.norm(x.flatten(1)), training=self.training))

    module = Watching().train()
    KnowledgeDistillation(teacher=module, epochs=1).apply(nets.mlp(8), bench)
    assert set(seen) == {(False, False)}
    assert int(module.norm.num_batches_tracked or 0) == 0
    teachers = Teachers(teachers_of("knowledge_distillation", module, nets.mlp(8), bench))
    assert teachers((torch.zeros(3, 1, 8, 8, device="meta"),)).device.type == "meta"
    assert next(module.parameters()).device.type == "cpu"
    wild = predictor(lambda x: x.flatten(1)[:, :10] * nn.Parameter(torch.ones(10)))
    assert not wild(torch.zeros(2, 1, 8, 8)).requires_grad
    moved = predictor(lambda x: np.zeros((len(x), 10)))
    assert moved(torch.zeros(3, 64, device="meta")).device.type == "meta"
    assert list(predictor(forest).parameters()) == list(predictor(forest).buffers()) == []


class Listed(nn.Module):
    """Its networks lie in a list, a dictionary or a function of it, where torch does not find them."""

    def __init__(self, network: nn.Module, how: str) -> None:
        super().__init__()
        kinds = {"list": [network], "dictionary": {"one": (network,)}, "function": lambda x: network(1 * x)}
        self.parts: Any = kinds[how]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if callable(self.parts):
            return self.parts(x)
        (network,) = self.parts["one"] if isinstance(self.parts, dict) else self.parts
        return network(x)


@pytest.mark.parametrize("how", ["list", "dictionary", "function"])
@pytest.mark.parametrize(
    "technique",
    [KnowledgeDistillation(epochs=1), AttentionTransfer(by="gradients", epochs=1)],
    ids=lambda step: type(step).__name__,
)
def test_networks_in_a_plain_list_of_a_teacher_are_asked_in_evaluation_mode_and_not_trained(
    nets: Any, technique: Any, how: str, bench: Bench
) -> None:
    seen: list[tuple[bool, bool]] = []
    network = nets.Watched(seen).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    replace(technique, teacher=Listed(network, how)).apply(nets.student(), bench)
    assert seen
    assert {training for training, _ in seen} == {False}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_networks_in_a_plain_list_follow_to_the_device_of_the_inputs() -> None:
    network = Listed(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "list")
    guide = Guide(Model(network, example=(torch.zeros(1, 1, 8, 8),)))
    outputs, _ = guide((torch.zeros(3, 1, 8, 8, device="meta"),))
    assert outputs.device.type == "meta"
    assert network.parts[0][1].weight.device.type == "cpu"


class _Holds:
    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda network: lambda x: network(2 * x),
        lambda network: network.forward,
        functools.partial,
        _Holds,
    ],
    ids=["closure", "method", "partial", "object"],
)
def test_a_network_within_a_function_is_asked_in_evaluation_mode(wrapped: Callable[[nn.Module], Any]) -> None:
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    asked, one = predictor(wrapped(network)), torch.randn(1, 4)
    assert torch.equal(asked(one), asked(one))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training
    assert network[1].training


@pytest.mark.parametrize(
    "technique",
    [
        pytest.param(KnowledgeDistillation(epochs=1), marks=pytest.mark.paper(30)),
        pytest.param(LogitRegression(epochs=1), marks=pytest.mark.paper(31)),
        pytest.param(NeuronSelection(epochs=1, number=5, by="random"), marks=pytest.mark.paper(32)),
        pytest.param(FitNets(layer="1", teacher_layer="norm", hint_epochs=1, epochs=1), marks=pytest.mark.paper(33)),
        pytest.param(AttentionTransfer(layers=("1",), teacher_layers=("norm",), epochs=1), marks=pytest.mark.paper(34)),
        pytest.param(AttentionTransfer(by="gradients", epochs=1), marks=pytest.mark.paper(34)),
        pytest.param(DetectionDistillation(epochs=1), marks=pytest.mark.paper(35)),
        pytest.param(ModelCompression(copies=1, held=0.2, epochs=1), marks=pytest.mark.paper(36)),
    ],
    ids=lambda step: f"{type(step).__name__} {getattr(step, 'by', '')}".strip(),
)
def test_two_processes_learn_from_a_teacher_as_one_does(
    nets: Any, technique: Any, bench: Bench, few: TensorDataset
) -> None:
    training = Training(epochs=1, optimizer=SGD(lr=0.01), schedule=Constant(), accelerator="cpu")
    data, step = take(few, torch.arange(96)), replace(technique, teacher=nets.Watched([]))
    one, two = (
        step.apply(nets.student(), replace(bench, train=data, training=replace(training, **more))).module.state_dict()
        for more in ({"batch_size": 32}, {"batch_size": 16, "devices": 2})
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(value, one[name]) for name, value in nets.student().module.state_dict().items())


def test_a_student_in_two_processes_is_taught_as_in_one(nets: Any, few: TensorDataset, bench: Bench) -> None:
    """Each process has a frozen copy of the teacher, which none of them trains."""
    teacher = nets.mlp(16, seed=3)
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    one = Training(epochs=2, batch_size=30, optimizer=SGD(lr=0.05), schedule=Constant(), accelerator="cpu")
    alone, both = (
        KnowledgeDistillation(teacher=teacher, epochs=2).apply(
            nets.mlp(8), replace(bench, train=few, training=training)
        )
        for training in (one, replace(one, batch_size=15, devices=2, strategy="ddp"))
    )
    for name, value in alone.module.state_dict().items():
        torch.testing.assert_close(both.module.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
