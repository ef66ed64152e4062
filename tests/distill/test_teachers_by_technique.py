"""Each technique and its teachers: whom it takes, and whom it refuses before anything is trained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import nn
from torch.utils.data import TensorDataset

from karui.architectures.perceptron import perceptron
from karui.artifact import save
from karui.distill.attention import AttentionTransfer
from karui.distill.data_free import DataFree
from karui.distill.detection import DetectionDistillation
from karui.distill.hint import FitNets
from karui.distill.knowledge import KnowledgeDistillation
from karui.distill.logits import LogitRegression
from karui.distill.munge import ModelCompression
from karui.distill.mutual import MutualLearning
from karui.distill.neurons import NeuronSelection
from karui.errors import NeedError
from karui.model import Classification, Model
from karui.technique import Bench, Then, lacking
from karui.technique.protocol import require_fit

OUTPUTS_ALONE: tuple[Callable[..., Any], ...] = (
    KnowledgeDistillation,
    LogitRegression,
    ModelCompression,
    functools.partial(FitNets, hint_epochs=0),
    functools.partial(DetectionDistillation, hint=0.0),
)


LOOKING_INSIDE: dict[str, Callable[..., Any]] = {
    "neurons": functools.partial(NeuronSelection, number=2, by="random"),
    "hints": FitNets,
    "maps": AttentionTransfer,
    "gradients": functools.partial(AttentionTransfer, by="gradients"),
    "boxes": DetectionDistillation,
    "records": DataFree,
}


ALL = {**{getattr(one, "func", one).__name__: one for one in OUTPUTS_ALONE}, **LOOKING_INSIDE}


def plain(x: torch.Tensor) -> torch.Tensor:
    return 3 * x.flatten(1)[:, 10:20]


@pytest.mark.parametrize("technique", OUTPUTS_ALONE, ids=lambda one: getattr(one, "func", one).__name__)
@pytest.mark.parametrize("kind", ["forest", "onnx", "function", "module", "ensemble"])
def test_every_technique_that_needs_outputs_alone_takes_any_of_them(
    technique: Callable[..., Any], kind: str, *, nets: Any, outside: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    module = nets.mlp(12, seed=4).module
    known = {**outside, "module": module}
    teacher = known[kind] if kind in known else tuple(known.values())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.train()
    settings = {"copies": 1} if technique is ModelCompression else {}
    step = technique(teacher=teacher, epochs=1, **settings)
    assert lacking(step, nets.mlp(8), bench) == []
    assert "the teacher is" in step.remarks(nets.mlp(8))[0]
    taught = step.apply(nets.mlp(8), bench)
    assert nets.same(taught, step.apply(nets.mlp(8), bench))
    assert not nets.same(taught, nets.mlp(8))
    assert [type(part) for part in taught.module.modules()] == [type(part) for part in nets.mlp(8).module.modules()]
    saved = save(taught, tmp_path / "light", onnx=False)
    assert {p.name for p in (tmp_path / "light").iterdir()} == {"model.json", "model.safetensors"}, saved
    assert taught.parameters == nets.mlp(8).parameters, "nothing of the teacher is in the student"
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.training, "the teacher that was given is left as it was"
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_a_wrong_shape_names_both(nets: Any, forest: RandomForestClassifier, onnx_file: Path, bench: Bench) -> None:
    wide = torch.zeros(4, 1, 9, 9)
    with pytest.raises(NeedError, match=r"RandomForestClassifier, takes tables of shape \(batch, 64\).*\(4, 1, 9, 9\)"):
        nets.answers(forest, wide, bench)
    with pytest.raises(NeedError, match=r"teacher.onnx takes inputs of shape \(batch, 1, 8, 8\).*\(4, 1, 9, 9\)"):
        nets.answers(onnx_file, wide, bench)
    with pytest.raises(NeedError, match=r"shape \(4, 10\) and another a tensor of shape \(4, 7\)"):
        nets.answers((plain, nets.mlp(8, classes=7)), torch.zeros(4, 1, 8, 8), bench)
    student, bench = (
        nets.mlp(8, classes=7),
        replace(bench, train=TensorDataset(bench.train.tensors[0], bench.train.tensors[1] % 7)),
    )
    for technique in OUTPUTS_ALONE:
        with pytest.raises(NeedError, match=r"\(\d+, 7\).*\(\d+, 10\)"):
            technique(teacher=forest, epochs=1).apply(student, bench)


@pytest.mark.parametrize("name", ALL)
def test_a_teacher_of_other_inputs_is_refused_before_anything_is_trained(
    nets: Any, name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets.never_trained(monkeypatch)
    coloured = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    own = Model(coloured, example=(torch.zeros(2, 3, 8, 8),), task=Classification())
    for teacher, words in (
        (coloured, "begins with '0', which takes 3 channels"),
        (own, "takes a tensor of shape (2, 3"),
    ):
        step = ALL[name](teacher=teacher)
        for refused in (
            lambda step=step: step.apply(nets.student(), bench),
            lambda step=step: step.fits(nets.student(), bench),
        ):
            with pytest.raises(NeedError) as caught:
                refused()
            assert words in caught.value.message
            assert "is given a tensor of shape (1, 1, 8, 8)" in caught.value.message
            assert step.card.slug in caught.value.message
            assert "teacher=file.py:factory" in caught.value.hint
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("neurons", "maps")])
def test_a_teacher_of_other_classes_is_refused_before_anything_is_trained(
    nets: Any, name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets.never_trained(monkeypatch)
    step = ALL[name](teacher=nets.mlp(16, classes=7))
    for refused in (step.apply, step.fits):
        with pytest.raises(NeedError, match=r"student gives .*\(1, 10\) and the teacher .*\(1, 7\)") as caught:
            refused(nets.mlp(8), bench)
        assert caught.value.hint
        assert "\n" not in str(caught.value)


@pytest.mark.paper(34)
def test_maps_need_no_common_classes_but_soft_targets_beside_them_do(
    nets: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = nets.student()
    other.module[-1] = nn.Linear(8, 7)
    step = AttentionTransfer(teacher=other, epochs=1)
    assert not nets.same(step.apply(nets.student(), bench), nets.student())
    nets.never_trained(monkeypatch)
    with pytest.raises(NeedError, match=r"\(1, 10\) and the teacher .*\(1, 7\).*soft=0"):
        replace(step, soft=0.5).apply(nets.student(), bench)


def test_a_pipeline_asks_named_teachers_before_its_first_step(
    nets: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    nets.never_trained(monkeypatch)
    first, wrong = KnowledgeDistillation(teacher=nets.mlp(16)), KnowledgeDistillation(teacher=nets.mlp(16, classes=7))
    with pytest.raises(NeedError, match=r"\(1, 7\)"):
        Then(first, wrong).apply(nets.mlp(8), bench)
    narrowed = NeuronSelection(teacher=nets.mlp(16), number=7, by="random")
    require_fit((narrowed, wrong), nets.mlp(8), bench)  # what comes after new outputs is not known yet


@pytest.mark.parametrize(
    "technique",
    [
        AttentionTransfer(teacher=plain, layers=("1",)),
        FitNets(teacher=plain, layer="1", teacher_layer="1"),
        NeuronSelection(teacher=plain, layer="1"),
        DetectionDistillation(teacher=plain),
        DataFree(teacher=plain),
        MutualLearning(partners=(plain,)),
    ],
    ids=lambda step: type(step).__name__,
)
def test_who_looks_inside_says_which_teachers_can_be_looked_into(nets: Any, technique: Any, bench: Bench) -> None:
    with pytest.raises(NeedError, match="plain gives outputs alone") as caught:
        technique.apply(nets.mlp(8), bench)
    assert technique.card.slug in caught.value.message
    assert "torch module" in caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "technique",
    [
        AttentionTransfer(layers=("2",), teacher_layers=("2",)),
        AttentionTransfer(by="gradients"),
        FitNets(layer="2", teacher_layer="2"),
        DetectionDistillation(layer="2", teacher_layer="2"),
        DataFree(),
    ],
    ids=lambda step: f"{type(step).__name__} {getattr(step, 'by', '')}".strip(),
)
def test_who_matches_inner_layers_refuses_several_teachers_and_passes_none_over(
    nets: Any, technique: Any, bench: Bench
) -> None:
    for several in ((nets.mlp(8, seed=1), nets.mlp(8, seed=2)), f"{__file__}:two"):
        with pytest.raises(NeedError, match="was given 2 teachers") as caught:
            replace(technique, teacher=several).apply(nets.mlp(8), bench)
        assert "knowledge_distillation" in caught.value.hint


def two() -> list[nn.Module]:
    """A factory that makes an ensemble."""
    return [perceptron((64, 8, 10)), perceptron((64, 8, 10))]
