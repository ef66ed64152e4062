"""Teachers stay as they are, and outside of what they teach."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.data import Splits
from karui.errors import NeedError, SettingError, TrainingError
from karui.model import Classification, Model, Regression
from karui.model.task import UNLABELLED
from karui.train import SGD, Adam, Constant, Influence, Moment, Training, Turn, fit
from karui.train.teaching import SoftTargets, Teachers

pytestmark = pytest.mark.paper(30)
SHORT = Training(epochs=1, batch_size=120, optimizer=Adam(lr=1e-2), schedule=Constant())


def test_the_teacher_is_frozen_in_evaluation_mode_and_not_the_given_object(small_cnn: Callable[..., Model]) -> None:
    model = small_cnn()
    model.module.train()
    teachers = Teachers((model,))
    (module,) = teachers.modules
    before = copy.deepcopy(module.state_dict())
    for _ in range(3):
        logits = teachers((torch.rand(8, 1, 8, 8),))
    assert logits.shape == (1, 8, 10)
    assert not logits.requires_grad
    assert module is not model.module
    assert model.module.training
    assert not any(part.training for part in module.modules())
    assert not any(p.requires_grad for p in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items()), "statistics must rest"


def test_nothing_of_the_teacher_is_in_optimizer_or_student(
    digits: Splits, small_cnn: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = small_cnn(seed=1), small_cnn((4, 4, 4))
    trained_ones: list[nn.Parameter] = []
    make = Adam.make

    def spy(self: Adam, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        trained_ones.extend(p for group in groups for p in group["params"])
        return make(self, groups)

    monkeypatch.setattr(Adam, "make", spy)
    teachers = Teachers((teacher,))
    before = copy.deepcopy(teachers.modules[0].state_dict())
    trained = fit(student, digits.train, training=SHORT, influence=SoftTargets(teachers=teachers))
    assert sum(p.numel() for p in trained_ones) == student.parameters
    assert not {id(p) for p in trained_ones} & {id(p) for p in teachers.modules[0].parameters()}
    assert trained.module.state_dict().keys() == student.module.state_dict().keys()
    assert trained.parameters == student.parameters
    assert all(torch.equal(before[name], value) for name, value in teachers.modules[0].state_dict().items())


def test_the_teacher_sees_the_augmented_batch(digits: Splits, small_cnn: Callable[..., Model]) -> None:
    seen = {"augmented": [], "teacher": []}

    def augment(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen["augmented"].append(batch + torch.rand(batch.shape, generator=generator))
        return seen["augmented"][-1]

    teachers = Teachers((small_cnn(seed=1),))
    teachers.modules[0].register_forward_hook(lambda _module, inputs, _outputs: seen["teacher"].append(inputs[0]))
    training = replace(SHORT, augment=augment)
    fit(small_cnn(), digits.train, training=training, influence=SoftTargets(teachers=teachers))
    assert len(seen["teacher"]) == 9
    assert all(torch.equal(a, b) for a, b in zip(seen["augmented"], seen["teacher"], strict=True))


def test_weight_zero_is_plain_training(digits: Splits, small_cnn: Callable[..., Model]) -> None:
    student, teachers = small_cnn(), Teachers((small_cnn(seed=1),))
    plain = fit(student, digits.train, training=SHORT)
    taught = fit(student, digits.train, training=SHORT, influence=SoftTargets(teachers=teachers, weight=0.0))
    other = fit(student, digits.train, training=SHORT, influence=SoftTargets(teachers=teachers, weight=0.5))
    assert all(torch.equal(taught.module.state_dict()[k], v) for k, v in plain.module.state_dict().items())
    assert not all(torch.equal(other.module.state_dict()[k], v) for k, v in plain.module.state_dict().items())


def test_remembered_answers_are_the_answers(digits: Splits, small_cnn: Callable[..., Model]) -> None:
    asked = []
    teachers = Teachers((small_cnn(seed=1), small_cnn(seed=2)), remember=600)
    fresh = Teachers((small_cnn(seed=1), small_cnn(seed=2)))
    teachers.modules[0].register_forward_hook(lambda _m, inputs, _o: asked.append(len(inputs[0])))
    x = torch.stack([digits.test[i][0] for i in range(100)])
    teachers((x,))
    shuffled = x[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    torch.testing.assert_close(teachers((shuffled,)), fresh((shuffled,)), rtol=1e-5, atol=1e-5)
    assert asked == [100]
    torch.testing.assert_close(teachers((shuffled + 0.1,)), fresh((shuffled + 0.1,)), rtol=1e-5, atol=1e-5)
    assert asked == [100, 100], "another input is asked anew"


def test_memory_keeps_to_its_size() -> None:
    teachers = Teachers((Model(nn.Linear(3, 4), example=(torch.zeros(1, 3),)),), remember=5)
    for seed in range(4):
        teachers((torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)),))
    assert len(teachers._answers) == 5


def test_a_killed_distillation_resumes_under_the_same_name(
    digits: Splits, small_cnn: Callable[..., Model], tmp_path: Path
) -> None:
    """What an influence has seen must not change a training's fingerprint."""
    for _ in range(2):
        soft = SoftTargets(teachers=Teachers((small_cnn(seed=1),), remember=2000))
        fit(small_cnn(), digits.train, training=SHORT, influence=soft, checkpoints=tmp_path)
        fit(small_cnn(), digits.train, training=SHORT, influence=soft, checkpoints=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_batch_without_labels_learns_from_the_teacher_alone(small_cnn: Callable[..., Model]) -> None:
    student, teachers = small_cnn(), Teachers((small_cnn(seed=1),))
    x, unlabelled = torch.rand(6, 1, 8, 8), torch.full((6,), UNLABELLED)
    outputs = student.module(x)
    moment = Moment(student.module, (x,), unlabelled, outputs)
    assert student.task is not None
    lost = student.task.loss(outputs, unlabelled)
    assert lost.isnan()
    soft = SoftTargets(teachers=teachers, weight=0.4).objective(lost, moment)
    torch.testing.assert_close(soft, SoftTargets(teachers=teachers, weight=1.0).objective(lost, moment))


def test_what_does_not_fit_is_told(small_cnn: Callable[..., Model]) -> None:
    with pytest.raises(NeedError, match="no teacher"):
        Teachers(())
    with pytest.raises(SettingError, match="temperature is 0"):
        SoftTargets(teachers=Teachers((small_cnn(),)), temperature=0.0)
    with pytest.raises(SettingError, match="weight is 1.5"):
        SoftTargets(teachers=Teachers((small_cnn(),)), weight=1.5)
    data = TensorDataset(torch.rand(8, 1, 8, 8), torch.zeros(8, dtype=torch.long))
    with pytest.raises(NeedError, match=r"\(8, 10\) and the teacher logits of shape \(8, 7\)"):
        fit(small_cnn(), data, training=SHORT, influence=SoftTargets(teachers=Teachers((small_cnn(classes=7),))))
    flat = Model(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), example=(torch.zeros(1, 3),), task=Regression())
    with pytest.raises(NeedError, match="not logits"):
        Teachers((flat,))((torch.zeros(5, 3),))


class Pull(Influence):
    """Another term: the outputs towards 0, whatever the labels."""

    def objective(self, loss: Tensor, moment: Moment) -> Tensor:
        return loss + moment.outputs.square().mean()


@pytest.mark.parametrize("own", [False, True], ids=["the task's loss", "a turn's own"])
def test_the_loss_of_a_batch_without_any_label_is_nothing_and_other_terms_count(own: bool) -> None:
    """The mean over no labels is not a number: it stopped every training on such samples but that by soft targets."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    silent = TensorDataset(x, torch.full((12,), UNLABELLED))
    model = Model(nn.Linear(4, 3), example=(x[:2],), task=Classification())
    training = Training(epochs=1, batch_size=6, optimizer=SGD(lr=0.1, weight_decay=0.0))

    def objective(module: nn.Module, inputs: tuple[Tensor, ...], targets: Tensor) -> tuple[Tensor, Tensor]:
        outputs = module(*inputs)
        return outputs, nn.functional.cross_entropy(outputs, targets)

    turns = (Turn(objective=objective),) if own else None
    still = fit(model, silent, training=training, turns=turns)
    assert torch.equal(still.module.weight, model.module.weight)
    pulled = fit(model, silent, training=training, turns=turns, influence=Pull())
    with torch.no_grad():
        assert pulled.module(x).square().mean() < model.module(x).square().mean()
    broken = Model(nn.Linear(4, 3), example=(x[:2],), task=Classification())
    with torch.no_grad():
        broken.module.bias[0] = torch.inf
    with pytest.raises(TrainingError, match="became nan"):
        fit(broken, silent, training=training, turns=turns)
