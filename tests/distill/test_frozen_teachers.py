"""A teacher is not trained by accident, is asked in evaluation mode, and leaves nothing in the student's files.

For every technique that has one, whatever it looks at: outputs, inner layers, gradients, records.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from karui.artifact import save
from karui.data import Splits
from karui.distill import (
    AttentionTransfer,
    BornAgain,
    DataFree,
    DetectionDistillation,
    FitNets,
    KnowledgeDistillation,
    LogitRegression,
    ModelCompression,
    NeuronSelection,
)
from karui.model import Classification, Model
from karui.technique import Bench
from karui.technique.redraw import redrawn
from karui.train import Adam, Constant, Training
from karui.train.guide import Guide
from karui.train.teaching import SoftTargets, Teachers

TAUGHT: dict[str, Callable[[Model], Any]] = {
    "knowledge_distillation": lambda t: KnowledgeDistillation(teacher=t, epochs=1),
    "logit_regression": lambda t: LogitRegression(teacher=t, epochs=1),
    "neuron_selection_distillation": lambda t: NeuronSelection(teacher=t, number=4, epochs=1),
    "fitnets_hint": lambda t: FitNets(teacher=t, layer="1", teacher_layer="1", hint_epochs=1, epochs=1),
    "attention_transfer": lambda t: AttentionTransfer(teacher=t, layers=("1",), soft=0.5, epochs=1),
    "attention_transfer by gradients": lambda t: AttentionTransfer(teacher=t, by="gradients", epochs=1),
    "detection_distillation": lambda t: DetectionDistillation(teacher=t, epochs=1),
    "munge_compression": lambda t: ModelCompression(teacher=t, copies=1, epochs=1),
    "data_free_distillation": lambda t: DataFree(teacher=t, kind="top", samples=4, iterations=5, epochs=1),
}


class Watched(nn.Sequential):
    """Convolutions with everything that tells the two modes apart, which notes whether it is called to train."""

    def __init__(self, seen: list[bool], width: int) -> None:
        super().__init__(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.3)),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 12), nn.ReLU(), nn.Linear(12, 10)),
        )
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        """As a sequence; a mode for training, or a parameter that wants a gradient, is noted."""
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        self.seen.append(self.training or trains)
        return super().forward(x)

    def __deepcopy__(self, memo: Any) -> Watched:
        other = Watched(self.seen, self[0].out_channels)  # pyright: ignore[reportArgumentType]
        other.load_state_dict(self.state_dict())
        return other.train(self.training)


def student() -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = (nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return Model(nn.Sequential(*parts, nn.Linear(12, 10)), (torch.zeros(2, 1, 8, 8),), Classification())


@pytest.fixture
def bench(digits: Splits) -> Bench:
    few = torch.utils.data.Subset(digits.train, range(90))
    training = Training(epochs=1, batch_size=30, optimizer=Adam(lr=1e-2), schedule=Constant())
    return Bench(train=few, validation=digits.validation, test=digits.test, training=training)


@pytest.mark.parametrize("slug", TAUGHT)
def test_the_teacher_stays_as_it_was_and_out_of_the_artifact(slug: str, bench: Bench, tmp_path: Path) -> None:
    seen: list[bool] = []
    teacher = Model(Watched(seen, 8).train(), example=(torch.zeros(2, 1, 8, 8),), task=Classification())
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    seen.clear()
    made = TAUGHT[slug](teacher).apply(student(), bench)
    assert seen, "it was asked"
    assert not any(seen), "in evaluation mode each time, and no parameter wants a gradient"
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in teacher.module.modules())
    assert teacher.module.training, "and the one that was given is in the mode that it was in"
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in teacher.module.parameters())
    save(made, tmp_path / "light", onnx=False)
    with safe_open(tmp_path / "light" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(student().module.state_dict()), "nothing but the student's own tensors"
    assert not any(isinstance(part, Watched) for part in made.module.modules())


def test_each_generation_stays_as_it_was_while_it_teaches(bench: Bench) -> None:
    seen: list[bool] = []
    first = Model(Watched(seen, 4), example=(torch.zeros(2, 1, 8, 8),), task=Classification())
    before = {name: value.clone() for name, value in first.module.state_dict().items()}
    (made,) = BornAgain(generations=1, epochs=1).study(first, bench)
    assert all(torch.equal(value, before[name]) for name, value in first.module.state_dict().items())
    assert made.module.state_dict().keys() == first.module.state_dict().keys()
    fresh = redrawn(first, 1)
    assert any(not torch.equal(value, before[name]) for name, value in fresh.module.state_dict().items())


def test_a_teacher_is_asked_on_the_device_of_the_inputs_and_gets_no_gradient() -> None:
    teacher = Model(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), example=(torch.zeros(1, 4),))
    far = (torch.zeros(5, 4, device="meta"),)
    outputs, shown = Guide(teacher, ("0",))(far)
    assert outputs.device.type == shown["0"].device.type == Teachers((teacher,))(far).device.type == "meta"
    assert next(teacher.module.parameters()).device.type == "cpu"
    guide = Guide(teacher, ("0",))
    assert not any(p.requires_grad for p in guide.module.parameters())
    x = torch.randn(5, 4, requires_grad=True)
    guide((x,))[0].sum().backward()
    assert all(p.grad is None for p in guide.module.parameters())
    assert x.grad is not None, "what asks for input gradients has them"


def moved(network: nn.Module) -> None:
    """Another network in the same place, as after a few steps of somebody's training."""
    with torch.no_grad():
        for value in network.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))


class Listed(nn.Module):
    """A network that lies in a list, of which torch knows not."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.parts = [network]

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0](x)


INFLUENCES = (
    "knowledge_distillation",
    "logit_regression",
    "attention_transfer",
    "attention_transfer by gradients",
    "detection_distillation",
)


@pytest.mark.parametrize("slug", INFLUENCES)
def test_a_teacher_that_is_trained_on_meanwhile_teaches_what_it_knew(slug: str, bench: Bench) -> None:
    def taught(*, meanwhile: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        network = nn.Sequential(*Watched([], 8))
        teacher = Model(network, example=(torch.zeros(2, 1, 8, 8),), task=Classification())
        influence = TAUGHT[slug](teacher).influence(student(), bench)
        if meanwhile:
            moved(network)
        return bench.fit(student(), influence=influence).module.state_dict()

    before, after = taught(meanwhile=False), taught(meanwhile=True)
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("wrapped", [lambda network: network, Listed], ids=["plain", "in a list"])
def test_a_frozen_network_says_what_it_said_unless_its_weights_are_shared(wrapped: Callable[..., nn.Module]) -> None:
    x = (torch.randn(5, 4),)
    for shared in (False, True):
        network = nn.Linear(4, 3)
        teachers = Teachers((Model(wrapped(network), example=x),), shared=shared)
        said = teachers(x)
        moved(network)
        assert torch.equal(teachers(x), said) is not shared
        assert network.weight.requires_grad


def test_under_a_budget_the_teacher_is_no_further_copy(bench: Bench) -> None:
    dense = Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), (torch.zeros(2, 1, 8, 8),), Classification())
    for shared in (False, True):
        soft = KnowledgeDistillation(teacher=dense).influence(dense.copy(), bench, shared=shared)
        assert isinstance(soft, SoftTargets)
        (kept,) = soft.teachers.modules
        assert (kept[1].weight.data_ptr() == dense.module[1].weight.data_ptr()) is shared
