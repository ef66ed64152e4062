"""Who may teach: torch modules, functions, estimators, ONNX files and ensembles of them, for every technique."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier
from torch import nn
from torch.utils.data import TensorDataset

from karui.architectures.perceptron import perceptron
from karui.artifact import save
from karui.data import RandomCrop, Splits
from karui.data.splits import take
from karui.distill._onnx_teachers import onnx_teacher
from karui.distill._teachers import remark, teachers_of
from karui.distill.attention import AttentionTransfer
from karui.distill.born_again import BornAgain
from karui.distill.data_free import DataFree
from karui.distill.detection import DetectionDistillation
from karui.distill.hint import FitNets
from karui.distill.knowledge import KnowledgeDistillation
from karui.distill.logits import LogitRegression
from karui.distill.munge import ModelCompression
from karui.distill.mutual import MutualLearning
from karui.distill.neurons import NeuronSelection
from karui.distill.predictors import FLOOR, predictor
from karui.errors import NeedError
from karui.measuring import Clock
from karui.measuring.engines import Torch
from karui.model import Classification, Model, Regression
from karui.recipes import recipe_from_values
from karui.recipes.recipe import recipe_from
from karui.recipes.run import run_recipe
from karui.technique import Bench, Then, lacking
from karui.technique.protocol import require_fit
from karui.train import SGD, Adam, Constant, Influence, Moment, Training
from karui.train.fingerprint import fingerprint
from karui.train.guide import Guide
from karui.train.teaching import Teachers

OUTPUTS_ALONE: tuple[Callable[..., Any], ...] = (
    KnowledgeDistillation,
    LogitRegression,
    ModelCompression,
    functools.partial(FitNets, hint_epochs=0),
    functools.partial(DetectionDistillation, hint=0.0),
)


def mlp(*widths: int, seed: int = 0, classes: int = 10) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(perceptron((64, *widths, classes)), example=(torch.zeros(1, 1, 8, 8),), task=Classification())


@pytest.fixture(scope="module")
def few(digits: Splits) -> TensorDataset:
    return take(digits.train, torch.arange(120))


@pytest.fixture(scope="module")
def bench(digits: Splits, few: TensorDataset) -> Bench:
    training = Training(epochs=1, batch_size=64, optimizer=Adam(lr=3e-3), schedule=Constant())
    return Bench(train=few, validation=digits.validation, test=digits.test, training=training)


@pytest.fixture
def outside(forest: RandomForestClassifier, onnx_file: Path) -> dict[str, Any]:
    """A teacher of each kind that is no torch module."""
    return {"forest": forest, "onnx": str(onnx_file), "function": plain}


def table_of(data: TensorDataset) -> tuple[np.ndarray, np.ndarray]:
    return data.tensors[0].flatten(1).double().numpy(), data.tensors[1].numpy()


@pytest.fixture(scope="module")
def forest(few: TensorDataset) -> RandomForestClassifier:
    return RandomForestClassifier(20, random_state=0).fit(*table_of(few))


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that ends in logits, for any number of samples."""
    return written(mlp(16, seed=3), tmp_path_factory.mktemp("onnx") / "teacher.onnx")


def written(
    model: Model, path: Path, *, batch: int | str = "batch", shape: tuple[int, ...] = (1, 8, 8), soft: bool = False
) -> Path:
    """A perceptron of one hidden layer as an ONNX file, written by hand: an export takes seconds."""
    hidden, last = (layer for layer in model.module.modules() if isinstance(layer, nn.Linear))
    weights = {"w1": hidden.weight, "b1": hidden.bias, "w2": last.weight, "b2": last.bias}
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w1", "b1"], ["hidden"], transB=1),
        helper.make_node("Relu", ["hidden"], ["kept"]),
        helper.make_node("Gemm", ["kept", "w2", "b2"], ["logits"], transB=1),
        helper.make_node("Softmax" if soft else "Identity", ["logits"], ["said"]),
        helper.make_node("Identity", ["said"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "teacher",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [batch, last.out_features])],
        [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def plain(x: torch.Tensor) -> torch.Tensor:
    return 3 * x.flatten(1)[:, 10:20]


def answers(teacher: Any, x: torch.Tensor, bench: Bench) -> torch.Tensor:
    return Teachers(teachers_of("knowledge_distillation", teacher, mlp(8), bench))((x,))


def same(a: Model, b: Model) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_each_says_what_it_said_before(
    forest: RandomForestClassifier, onnx_file: Path, few: TensorDataset, bench: Bench
) -> None:
    x = few.tensors[0][:30]
    said = torch.from_numpy(forest.predict_proba(x.flatten(1).double().numpy())).float()
    torch.testing.assert_close(answers(forest, x, bench)[0].softmax(1), said, atol=11 * FLOOR, rtol=0)
    network = mlp(16, seed=3)
    for teacher in (network, network.module, onnx_file, str(onnx_file)):
        torch.testing.assert_close(answers(teacher, x, bench)[0], network.module(x).detach(), atol=1e-4, rtol=1e-4)
    assert torch.equal(answers(plain, x, bench)[0], plain(x))
    several = answers((forest, onnx_file, plain, network.module), x, bench)
    assert several.shape == (4, 30, 10)
    torch.testing.assert_close(several[0], answers(forest, x, bench)[0])


@pytest.mark.parametrize("technique", OUTPUTS_ALONE, ids=lambda one: getattr(one, "func", one).__name__)
@pytest.mark.parametrize("kind", ["forest", "onnx", "function", "module", "ensemble"])
def test_every_technique_that_needs_outputs_alone_takes_any_of_them(
    technique: Callable[..., Any], kind: str, outside: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    module = mlp(12, seed=4).module
    known = {**outside, "module": module}
    teacher = known[kind] if kind in known else tuple(known.values())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.train()
    settings = {"copies": 1} if technique is ModelCompression else {}
    step = technique(teacher=teacher, epochs=1, **settings)
    assert lacking(step, mlp(8), bench) == []
    assert "the teacher is" in step.remarks(mlp(8))[0]
    taught = step.apply(mlp(8), bench)
    assert same(taught, step.apply(mlp(8), bench))
    assert not same(taught, mlp(8))
    assert [type(part) for part in taught.module.modules()] == [type(part) for part in mlp(8).module.modules()]
    saved = save(taught, tmp_path / "light", onnx=False)
    assert {p.name for p in (tmp_path / "light").iterdir()} == {"model.json", "model.safetensors"}, saved
    assert taught.parameters == mlp(8).parameters, "nothing of the teacher is in the student"
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert module.training, "the teacher that was given is left as it was"
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_the_teacher_is_in_evaluation_mode_without_gradient_and_on_the_device_of_the_inputs(
    forest: RandomForestClassifier, bench: Bench
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
    KnowledgeDistillation(teacher=module, epochs=1).apply(mlp(8), bench)
    assert set(seen) == {(False, False)}
    assert int(module.norm.num_batches_tracked or 0) == 0
    teachers = Teachers(teachers_of("knowledge_distillation", module, mlp(8), bench))
    assert teachers((torch.zeros(3, 1, 8, 8, device="meta"),)).device.type == "meta"
    assert next(module.parameters()).device.type == "cpu"
    wild = predictor(lambda x: x.flatten(1)[:, :10] * nn.Parameter(torch.ones(10)))
    assert not wild(torch.zeros(2, 1, 8, 8)).requires_grad
    moved = predictor(lambda x: np.zeros((len(x), 10)))
    assert moved(torch.zeros(3, 64, device="meta")).device.type == "meta"
    assert list(predictor(forest).parameters()) == list(predictor(forest).buffers()) == []


class Watched(nn.Module):
    """A network with statistics and dropout that notes, at each call, in what state it was asked."""

    def __init__(self, seen: list[tuple[bool, bool]]) -> None:
        super().__init__()
        self.conv, self.norm, self.hidden = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(256, 12)
        self.drop, self.last, self.seen = nn.Dropout(0.5), nn.Linear(12, 10), seen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        self.seen.append((self.training, trained))
        maps = torch.relu(self.norm(self.conv(x)))
        return self.last(self.drop(torch.relu(self.hidden(maps.flatten(1)))))

    def __deepcopy__(self, memo: dict[int, Any]) -> Watched:
        copied = Watched(self.seen)  # one list for all copies
        copied.load_state_dict(self.state_dict())
        return copied.train(self.training)


def student() -> Model:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 10))
    return Model(nn.Sequential(*layers), example=(torch.zeros(1, 1, 8, 8),), task=Classification())


@pytest.mark.parametrize(
    "technique",
    [
        pytest.param(KnowledgeDistillation(epochs=3), marks=pytest.mark.paper(30)),
        pytest.param(LogitRegression(epochs=3, normalise=False), marks=pytest.mark.paper(31)),
        pytest.param(FitNets(hint_epochs=0, epochs=3), marks=pytest.mark.paper(33)),
    ],
    ids=lambda step: type(step).__name__,
)
def test_a_teacher_is_asked_once_for_each_sample_unless_every_pass_augments_anew(technique: Any, bench: Bench) -> None:
    """Two batches, three passes; two more calls tell whether it fits, and the size of an answer."""

    def calls(bench: Bench) -> int:
        seen: list[tuple[bool, bool]] = []
        replace(technique, teacher=Watched(seen)).apply(student(), bench)
        return len(seen)

    assert calls(bench) == 2 + 2
    shifted = replace(bench, training=replace(bench.training, augment=RandomCrop(1)))
    assert calls(shifted) == 1 + 6


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
def test_two_processes_learn_from_a_teacher_as_one_does(technique: Any, bench: Bench, few: TensorDataset) -> None:
    training = Training(epochs=1, optimizer=SGD(lr=0.01), schedule=Constant(), accelerator="cpu")
    data, step = take(few, torch.arange(96)), replace(technique, teacher=Watched([]))
    one, two = (
        step.apply(student(), replace(bench, train=data, training=replace(training, **more))).module.state_dict()
        for more in ({"batch_size": 32}, {"batch_size": 16, "devices": 2})
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(value, one[name]) for name, value in student().module.state_dict().items())


class Killed(Influence):
    """Kills the training that it is in at a step, the first time."""

    def __init__(self, done: list[int]) -> None:
        self.done = done

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        if moment.step == 3 and not self.done:
            self.done.append(moment.step)
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "technique",
    [
        pytest.param(KnowledgeDistillation(epochs=3), marks=pytest.mark.paper(30)),
        pytest.param(LogitRegression(epochs=3), marks=pytest.mark.paper(31)),
        pytest.param(FitNets(hint_epochs=0, epochs=3), marks=pytest.mark.paper(33)),
        pytest.param(ModelCompression(copies=1, epochs=3), marks=pytest.mark.paper(36)),
    ],
    ids=lambda step: type(step).__name__,
)
def test_a_killed_training_with_kept_answers_ends_as_if_it_had_not_been(
    technique: Any, bench: Bench, tmp_path: Path
) -> None:
    step, training = replace(technique, teacher=Watched([])), replace(bench.training, checkpoint_seconds=0.0)
    whole, cut = (
        replace(bench, training=training, checkpoints=tmp_path / name, influence=Killed(done))
        for name, done in (("whole", [0]), ("cut", []))
    )
    wanted = step.apply(student(), whole)
    with pytest.raises(KeyboardInterrupt):
        step.apply(student(), cut)
    assert list((tmp_path / "cut").rglob("*.answers")), "what was said so far is kept"
    assert same(step.apply(student(), cut), wanted)


@pytest.mark.paper(37)
def test_a_generation_asks_the_one_before_once_for_each_sample(bench: Bench) -> None:
    seen: list[tuple[bool, bool]] = []
    model = Model(Watched(seen), example=(torch.zeros(1, 1, 8, 8),), task=Classification())
    BornAgain(generations=2, epochs=3).apply(model, bench)
    assert seen.count((False, False)) == 2 * (1 + 2)


def test_a_wrong_shape_names_both(forest: RandomForestClassifier, onnx_file: Path, bench: Bench) -> None:
    wide = torch.zeros(4, 1, 9, 9)
    with pytest.raises(NeedError, match=r"RandomForestClassifier, takes tables of shape \(batch, 64\).*\(4, 1, 9, 9\)"):
        answers(forest, wide, bench)
    with pytest.raises(NeedError, match=r"teacher.onnx takes inputs of shape \(batch, 1, 8, 8\).*\(4, 1, 9, 9\)"):
        answers(onnx_file, wide, bench)
    with pytest.raises(NeedError, match=r"shape \(4, 10\) and another a tensor of shape \(4, 7\)"):
        answers((plain, mlp(8, classes=7)), torch.zeros(4, 1, 8, 8), bench)
    student, bench = (
        mlp(8, classes=7),
        replace(bench, train=TensorDataset(bench.train.tensors[0], bench.train.tensors[1] % 7)),
    )
    for technique in OUTPUTS_ALONE:
        with pytest.raises(NeedError, match=r"\(\d+, 7\).*\(\d+, 10\)"):
            technique(teacher=forest, epochs=1).apply(student, bench)


LOOKING_INSIDE: dict[str, Callable[..., Any]] = {
    "neurons": functools.partial(NeuronSelection, number=2, by="random"),
    "hints": FitNets,
    "maps": AttentionTransfer,
    "gradients": functools.partial(AttentionTransfer, by="gradients"),
    "boxes": DetectionDistillation,
    "records": DataFree,
}
ALL = {**{getattr(one, "func", one).__name__: one for one in OUTPUTS_ALONE}, **LOOKING_INSIDE}


def never_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr("karui.technique.bench.fit", train)


@pytest.mark.parametrize("name", ALL)
def test_a_teacher_of_other_inputs_is_refused_before_anything_is_trained(
    name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_trained(monkeypatch)
    coloured = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    own = Model(coloured, example=(torch.zeros(2, 3, 8, 8),), task=Classification())
    for teacher, words in (
        (coloured, "begins with '0', which takes 3 channels"),
        (own, "takes a tensor of shape (2, 3"),
    ):
        step = ALL[name](teacher=teacher)
        for refused in (lambda step=step: step.apply(student(), bench), lambda step=step: step.fits(student(), bench)):
            with pytest.raises(NeedError) as caught:
                refused()
            assert words in caught.value.message
            assert "is given a tensor of shape (1, 1, 8, 8)" in caught.value.message
            assert step.card.slug in caught.value.message
            assert "teacher=file.py:factory" in caught.value.hint
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("neurons", "maps")])
def test_a_teacher_of_other_classes_is_refused_before_anything_is_trained(
    name: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_trained(monkeypatch)
    step = ALL[name](teacher=mlp(16, classes=7))
    for refused in (step.apply, step.fits):
        with pytest.raises(NeedError, match=r"student gives .*\(1, 10\) and the teacher .*\(1, 7\)") as caught:
            refused(mlp(8), bench)
        assert caught.value.hint
        assert "\n" not in str(caught.value)


@pytest.mark.paper(34)
def test_maps_need_no_common_classes_but_soft_targets_beside_them_do(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = student()
    other.module[-1] = nn.Linear(8, 7)
    step = AttentionTransfer(teacher=other, epochs=1)
    assert not same(step.apply(student(), bench), student())
    never_trained(monkeypatch)
    with pytest.raises(NeedError, match=r"\(1, 10\) and the teacher .*\(1, 7\).*soft=0"):
        replace(step, soft=0.5).apply(student(), bench)


def test_a_pipeline_asks_named_teachers_before_its_first_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    never_trained(monkeypatch)
    first, wrong = KnowledgeDistillation(teacher=mlp(16)), KnowledgeDistillation(teacher=mlp(16, classes=7))
    with pytest.raises(NeedError, match=r"\(1, 7\)"):
        Then(first, wrong).apply(mlp(8), bench)
    narrowed = NeuronSelection(teacher=mlp(16), number=7, by="random")
    require_fit((narrowed, wrong), mlp(8), bench)  # what comes after new outputs is not known yet


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
def test_who_looks_inside_says_which_teachers_can_be_looked_into(technique: Any, bench: Bench) -> None:
    with pytest.raises(NeedError, match="plain gives outputs alone") as caught:
        technique.apply(mlp(8), bench)
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
def test_who_matches_inner_layers_refuses_several_teachers_and_passes_none_over(technique: Any, bench: Bench) -> None:
    for several in ((mlp(8, seed=1), mlp(8, seed=2)), f"{__file__}:two"):
        with pytest.raises(NeedError, match="was given 2 teachers") as caught:
            replace(technique, teacher=several).apply(mlp(8), bench)
        assert "knowledge_distillation" in caught.value.hint


def two() -> list[nn.Module]:
    """A factory that makes an ensemble."""
    return [mlp(8, seed=1).module, mlp(8, seed=2).module]


def test_what_cannot_teach_is_refused_in_one_line(bench: Bench, few: TensorDataset, tmp_path: Path) -> None:
    def refused(teacher: Any, *words: str) -> None:
        with pytest.raises(NeedError) as caught:
            KnowledgeDistillation(teacher=teacher).apply(mlp(8), bench)
        assert all(word in str(caught.value) for word in words), caught.value
        assert "\n" not in str(caught.value)

    refused(RandomForestClassifier(), "RandomForestClassifier", "not fitted")
    refused(LinearSVC().fit(*table_of(few)), "LinearSVC", "no probabilities")
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
    refused(predictor(plain, gives="probabilities"), "no probabilities")
    refused(None, "needs a teacher", ".onnx file", "file.py:factory")


def test_classes_that_an_estimator_has_not_seen_keep_their_numbers(few: TensorDataset) -> None:
    x, y = table_of(few)
    seen = np.isin(y, (1, 4))
    said = predictor(DecisionTreeClassifier(random_state=0).fit(x[seen], y[seen]))(few.tensors[0]).softmax(1)
    assert said.shape == (120, 5)
    assert set(said.argmax(1).tolist()) == {1, 4}
    assert float(said[:, [0, 2, 3]].max()) < 2 * FLOOR
    texts = predictor(DecisionTreeClassifier(random_state=0).fit(x, y.astype(str)))(few.tensors[0])
    assert texts.argmax(1).tolist() == y.tolist(), "names stand in the order of the alphabet"


def test_regressions_teach_numbers(bench: Bench) -> None:
    x = torch.randn(150, 3, generator=torch.Generator().manual_seed(0))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    line = make_pipeline(StandardScaler(), LinearRegression()).fit(x.numpy(), y[:, 0].numpy())
    student = Model(nn.Linear(3, 1), example=(x[:1],), task=Regression())
    training = Training(batch_size=16, optimizer=Adam(lr=0.05), schedule=Constant())
    bench = Bench(train=TensorDataset(x), training=training)
    for teacher in (line, lambda inputs: inputs @ torch.tensor([[1.0], [-2.0], [0.5]])):
        taught = ModelCompression(teacher=teacher, copies=2, epochs=10).apply(student, bench)
        torch.testing.assert_close(taught.module(x).detach(), y, atol=0.1, rtol=0)
    two = RandomForestRegressor(3).fit(x.numpy(), np.stack([y[:, 0], y[:, 0]], 1))
    with pytest.raises(NeedError, match=r"\(1, 1\).*\(1, 2\)"):
        ModelCompression(teacher=two, copies=1, epochs=1).apply(student, bench)


def test_an_onnx_file_that_ends_in_probabilities_is_seen_and_one_of_a_fixed_batch_is_fed_in_parts(
    tmp_path: Path, few: TensorDataset
) -> None:
    model, x = mlp(16, seed=5), few.tensors[0][:7]
    said = model.module(x).detach()
    soft = onnx_teacher(written(model, tmp_path / "soft.onnx", batch=3, soft=True))
    assert soft.gives == "probabilities"
    torch.testing.assert_close(soft(x).softmax(1), said.softmax(1), atol=11 * FLOOR, rtol=0)
    table = onnx_teacher(written(model, tmp_path / "table.onnx", shape=(64,)))
    assert table.gives == "logits"
    torch.testing.assert_close(table(x), said, atol=1e-5, rtol=1e-5)


def test_what_is_kept_on_disk_belongs_to_the_very_content(
    forest: RandomForestClassifier, few: TensorDataset, onnx_file: Path
) -> None:
    x, y = table_of(few)
    again = RandomForestClassifier(20, random_state=0).fit(x, y)
    other = RandomForestClassifier(20, random_state=1).fit(x, y)
    assert fingerprint(predictor(forest)) == fingerprint(predictor(again)) != fingerprint(predictor(other))
    assert fingerprint(onnx_teacher(onnx_file)) == fingerprint(onnx_teacher(onnx_file))
    assert fingerprint(predictor(plain)) != fingerprint(predictor(lambda x: 2 * x))


def test_a_student_in_two_processes_is_taught_as_in_one(few: TensorDataset, bench: Bench) -> None:
    """Each process has a frozen copy of the teacher, which none of them trains."""
    teacher = mlp(16, seed=3)
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    one = Training(epochs=2, batch_size=30, optimizer=SGD(lr=0.05), schedule=Constant(), accelerator="cpu")
    alone, both = (
        KnowledgeDistillation(teacher=teacher, epochs=2).apply(mlp(8), replace(bench, train=few, training=training))
        for training in (one, replace(one, batch_size=15, devices=2, strategy="ddp"))
    )
    for name, value in alone.module.state_dict().items():
        torch.testing.assert_close(both.module.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())


@pytest.mark.parametrize("technique", [KnowledgeDistillation, LogitRegression])
def test_answers_are_kept_by_themselves_but_not_under_augmentation_and_it_is_told(
    technique: Callable[..., Any], bench: Bench, few: TensorDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taught(bench: Bench, **settings: Any) -> tuple[Model, str]:
        made = technique(teacher=mlp(16, seed=3), epochs=3, **settings).apply(mlp(8), bench)
        return made, made.lineage[-2].describe()

    asked: list[int] = []
    ask = Teachers._ask
    monkeypatch.setattr(Teachers, "_ask", lambda self, inputs: asked.append(len(inputs[0])) or ask(self, inputs))
    anew, told = taught(bench, remember=0)
    assert "answers are not kept, as asked" in told
    often = sum(asked)
    asked.clear()
    kept, told = taught(replace(bench, checkpoints=tmp_path))
    assert "asked once for each input; those for 120 are kept beside the checkpoints" in told
    assert same(kept, anew)
    assert sum(asked) == 120 < often
    assert "in memory" in taught(bench)[1]
    asked.clear()
    moved = replace(bench, training=replace(bench.training, augment=RandomCrop(1)))
    _, told = taught(moved)
    assert "asked anew in each pass, as augmentation makes every sample a new one" in told
    assert sum(asked) >= 3 * 120
    monkeypatch.setattr("karui.distill._teachers.MEMORY", 2**12)
    assert "asked anew in each pass, as its answers for 120 samples would take" in taught(bench)[1]
    assert "beside the checkpoints" in taught(replace(bench, checkpoints=tmp_path))[1]  # there is more room there


def test_answers_in_double_precision_are_not_said_to_be_kept(bench: Bench, few: TensorDataset) -> None:
    def wide(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :10].double()

    made = KnowledgeDistillation(teacher=wide, epochs=1).apply(mlp(8), bench)
    assert "asked anew in each pass, as its answers are in double precision" in made.lineage[-2].describe()


@pytest.mark.parametrize(
    ("technique", "why"),
    [
        pytest.param(NeuronSelection(epochs=1, number=5, by="random"), r"give \(hidden\)", marks=pytest.mark.paper(32)),
        pytest.param(
            FitNets(layer="1", teacher_layer="norm", hint_epochs=1, epochs=0), r"\(norm\)", marks=pytest.mark.paper(33)
        ),
        pytest.param(
            AttentionTransfer(layers=("1",), teacher_layers=("norm",), epochs=1),
            r"\(norm\)",
            marks=pytest.mark.paper(34),
        ),
        pytest.param(
            AttentionTransfer(layers=("1",), teacher_layers=("norm",), epochs=1, soft=0.9),
            r"\(norm\)",
            marks=pytest.mark.paper(34),
        ),
        pytest.param(
            AttentionTransfer(by="gradients", epochs=1), "the gradient of its loss", marks=pytest.mark.paper(34)
        ),
        pytest.param(DetectionDistillation(epochs=1), r"\(drop|norm\)", marks=pytest.mark.paper(35)),
    ],
    ids=lambda one: f"{type(one).__name__} {getattr(one, 'by', '')}".strip() if not isinstance(one, str) else "",
)
def test_who_looks_inside_says_that_nothing_is_kept_and_why(technique: Any, why: str, bench: Bench) -> None:
    made = replace(technique, teacher=Watched([])).apply(student(), bench)
    (line,) = [line for line in told_of_teachers(made) if "asked anew in each pass" in line]
    assert re.search(why, line), line
    assert line.endswith("only answers are kept")


def told_of_teachers(made: Model) -> list[str]:
    return [edit.describe() for edit in made.lineage if edit.describe().startswith("teacher: ")]


@pytest.mark.paper(37)
def test_every_generation_says_whether_answers_are_kept(bench: Bench) -> None:
    made = BornAgain(generations=2, epochs=1).apply(student(), bench)
    assert any("asked once for each input; those for 120 are kept in memory" in line for line in told_of_teachers(made))


@pytest.mark.paper(30)
def test_a_training_under_a_teacher_says_whether_answers_are_kept(bench: Bench) -> None:
    """Whatever trains, though it knows of no teacher: the line is the influence's, and the loop writes it down."""
    soft = KnowledgeDistillation(teacher=mlp(16, seed=3)).influence(mlp(8), bench)
    (line,) = told_of_teachers(bench.under(soft).fit(mlp(8)))
    assert "asked once for each input; those for 120 are kept in memory" in line


@pytest.mark.paper(30)
def test_a_run_tells_whether_answers_are_kept(bench: Bench, tmp_path: Path, onnx_file: Path) -> None:
    recipe = recipe_from(f"knowledge_distillation:teacher={onnx_file},epochs=1")
    clock, told = Clock(batches=(1,), threads=(1,), engines=(Torch(),), rounds=5), []
    run_recipe(mlp(8), recipe, replace(bench, clock=clock), tmp_path / "out", train_first=True, tell=told.append)
    assert any("knowledge_distillation: teacher: asked once for each input" in line for line in told), told


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


def test_teachers_by_name_in_recipes_and_on_the_command_line(bench: Bench, tmp_path: Path, onnx_file: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY, encoding="utf-8")
    where = str(tmp_path / "mine.py")
    x = torch.rand(3, 1, 8, 8)
    (step,) = recipe_from(f"knowledge_distillation:teacher={where}:ensemble,epochs=1").steps
    assert step == KnowledgeDistillation(teacher=f"{where}:ensemble", epochs=1)
    assert answers(f"{where}:ensemble", x, bench).shape == (2, 3, 10)
    assert not same(step.apply(mlp(8), bench), mlp(8))
    (named,) = recipe_from(f"logit_regression:teacher={onnx_file},epochs=1").steps
    assert not same(named.apply(mlp(8), bench), mlp(8))
    both = {"technique": "munge_compression", "teacher": [str(onnx_file), f"{where}:net"], "copies": 1, "epochs": 1}
    (several,) = recipe_from_values({"step": [both]}).steps
    assert several == ModelCompression(teacher=(str(onnx_file), f"{where}:net"), copies=1, epochs=1)
    assert not same(several.apply(mlp(8), bench), mlp(8))
    for name, words in (("fails", "no weights here"), ("nothing", "gives a str"), ("absent", "has no 'absent'")):
        with pytest.raises(NeedError, match=words):
            replace(step, teacher=f"{where}:{name}").apply(mlp(8), bench)  # pyright: ignore[reportArgumentType]


def test_the_plan_names_the_teacher(forest: RandomForestClassifier) -> None:
    assert "the teacher is a RandomForestClassifier;" in remark(forest)
    assert "a Model and plain and x.onnx" in remark((mlp(8), plain, "x.onnx"))
    assert "the start of the pipeline" in remark(None)


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
    technique: Any, how: str, bench: Bench
) -> None:
    seen: list[tuple[bool, bool]] = []
    network = Watched(seen).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    replace(technique, teacher=Listed(network, how)).apply(student(), bench)
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


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("made", [torch.jit.script, lambda net: torch.jit.trace(net, torch.zeros(2, 1, 8, 8))])
def test_torchscript_modules_teach(made: Callable[[nn.Module], Any], bench: Bench) -> None:
    net = mlp(16, seed=3).module.eval()
    student = mlp(8)
    taught = KnowledgeDistillation(teacher=made(net)).apply(student, bench)
    assert same(taught, KnowledgeDistillation(teacher=net).apply(student, bench))


def test_an_onnx_teacher_may_have_its_weights_beside_it(onnx_file: Path, bench: Bench, tmp_path: Path) -> None:
    whole, parted = onnx.load(onnx_file), tmp_path / "parted.onnx"
    onnx.save(whole, parted, save_as_external_data=True, location="weights.data", size_threshold=0)
    student = mlp(8)
    taught = KnowledgeDistillation(teacher=parted).apply(student, bench)
    assert same(taught, KnowledgeDistillation(teacher=onnx_file).apply(student, bench))
    (tmp_path / "weights.data").unlink()
    with pytest.raises(NeedError, match="has its weights in another file, weights.data, which is not there"):
        KnowledgeDistillation(teacher=parted).apply(student, bench)
