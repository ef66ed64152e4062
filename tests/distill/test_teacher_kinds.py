"""Who may teach, by whatever name: torch modules, functions, estimators, ONNX files and ensembles of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier
from torch import nn
from torch.utils.data import TensorDataset

from karui.distill._teachers import remark
from karui.distill.knowledge import KnowledgeDistillation
from karui.distill.munge import ModelCompression
from karui.distill.predictors import FLOOR, predictor
from karui.errors import NeedError
from karui.recipes import recipe_from_values
from karui.recipes.recipe import recipe_from
from karui.technique import Bench


def test_each_says_what_it_said_before(
    nets: Any, forest: RandomForestClassifier, onnx_file: Path, few: TensorDataset, bench: Bench
) -> None:
    x = few.tensors[0][:30]
    said = torch.from_numpy(forest.predict_proba(x.flatten(1).double().numpy())).float()
    torch.testing.assert_close(nets.answers(forest, x, bench)[0].softmax(1), said, atol=11 * FLOOR, rtol=0)
    network = nets.mlp(16, seed=3)
    for teacher in (network, network.module, onnx_file, str(onnx_file)):
        torch.testing.assert_close(nets.answers(teacher, x, bench)[0], network.module(x).detach(), atol=1e-4, rtol=1e-4)
    assert torch.equal(nets.answers(nets.plain, x, bench)[0], nets.plain(x))
    several = nets.answers((forest, onnx_file, nets.plain, network.module), x, bench)
    assert several.shape == (4, 30, 10)
    torch.testing.assert_close(several[0], nets.answers(forest, x, bench)[0])


def test_what_cannot_teach_is_refused_in_one_line(nets: Any, bench: Bench, few: TensorDataset, tmp_path: Path) -> None:
    def refused(teacher: Any, *words: str) -> None:
        with pytest.raises(NeedError) as caught:
            KnowledgeDistillation(teacher=teacher).apply(nets.mlp(8), bench)
        assert all(word in str(caught.value) for word in words), caught.value
        assert "\n" not in str(caught.value)

    refused(RandomForestClassifier(), "RandomForestClassifier", "not fitted")
    refused(LinearSVC().fit(*nets.table_of(few)), "LinearSVC", "no probabilities")
    refused(7, "int is no teacher")
    refused(DecisionTreeClassifier, "no teacher")
    refused("nowhere.onnx", "no file nowhere.onnx")
    refused("nowhere.py:factory", "no file nowhere.py")
    refused("timm:resnet18", "without trained weights")
    refused(str(tmp_path), "holds no saved model")
    (tmp_path / "broken.onnx").write_bytes(b"nothing")
    refused(tmp_path / "broken.onnx", "broken.onnx")
    refused(lambda x: {"logits": x}, "gives")
    refused(lambda x: x.flatten(1)[:3, :10], "one row for each sample")
    refused(lambda x: x.flatten(1)[:, :1], "(1, 10)", "(1, 1)")
    refused(predictor(nets.plain, gives="probabilities"), "no probabilities")
    refused(None, "needs a teacher", ".onnx file", "file.py:factory")


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("made", [torch.jit.script, lambda net: torch.jit.trace(net, torch.zeros(2, 1, 8, 8))])
def test_torchscript_modules_teach(nets: Any, made: Callable[[nn.Module], Any], bench: Bench) -> None:
    net = nets.mlp(16, seed=3).module.eval()
    student = nets.mlp(8)
    taught = KnowledgeDistillation(teacher=made(net)).apply(student, bench)
    assert nets.same(taught, KnowledgeDistillation(teacher=net).apply(student, bench))


FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def ensemble():
    return [net(), lambda x: x.flatten(1)[:, :10]]

def fails():
    raise RuntimeError("no weights here")

def nothing():
    return "somewhere"
"""


def test_teachers_by_name_in_recipes_and_on_the_command_line(
    nets: Any, bench: Bench, tmp_path: Path, onnx_file: Path
) -> None:
    (tmp_path / "mine.py").write_text(FACTORY, encoding="utf-8")
    where = str(tmp_path / "mine.py")
    x = torch.rand(3, 1, 8, 8)
    (step,) = recipe_from(f"knowledge_distillation:teacher={where}:ensemble,epochs=1").steps
    assert step == KnowledgeDistillation(teacher=f"{where}:ensemble", epochs=1)
    assert nets.answers(f"{where}:ensemble", x, bench).shape == (2, 3, 10)
    assert not nets.same(step.apply(nets.mlp(8), bench), nets.mlp(8))
    (named,) = recipe_from(f"logit_regression:teacher={onnx_file},epochs=1").steps
    assert not nets.same(named.apply(nets.mlp(8), bench), nets.mlp(8))
    both = {"technique": "munge_compression", "teacher": [str(onnx_file), f"{where}:net"], "copies": 1, "epochs": 1}
    (several,) = recipe_from_values({"step": [both]}).steps
    assert several == ModelCompression(teacher=(str(onnx_file), f"{where}:net"), copies=1, epochs=1)
    assert not nets.same(several.apply(nets.mlp(8), bench), nets.mlp(8))
    for name, words in (("fails", "no weights here"), ("nothing", "gives a str"), ("absent", "has no 'absent'")):
        with pytest.raises(NeedError, match=words):
            replace(step, teacher=f"{where}:{name}").apply(nets.mlp(8), bench)  # pyright: ignore[reportArgumentType]


def test_the_plan_names_the_teacher(nets: Any, forest: RandomForestClassifier) -> None:
    assert "the teacher is a RandomForestClassifier;" in remark(forest)
    assert "a Model and plain and x.onnx" in remark((nets.mlp(8), nets.plain, "x.onnx"))
    assert "the start of the pipeline" in remark(None)
