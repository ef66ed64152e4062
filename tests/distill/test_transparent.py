"""Transparent distillation, [40]: students, statistics, and what the paper claims."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import GradientBoostingRegressor, RandomForestClassifier
from torch import nn
from torch.utils.data import TensorDataset

from karui.architectures.perceptron import perceptron
from karui.artifact import export_onnx
from karui.distill._fidelity import Difference, auc, r_squared
from karui.distill._teachers import spoken, teachers_of
from karui.distill.comparison import compare
from karui.distill.shape_plots import partial_dependence, shape_figure
from karui.distill.transparent import TransparentDistillation, export_shapes, hard_lesson, lesson_of
from karui.errors import NeedError, SettingError
from karui.measuring.engines import onnx_session
from karui.model import Classification, Model, Regression
from karui.technique import Bench, lacking
from karui.train import Adam, Training

pytestmark = pytest.mark.paper(40)
QUICK = TransparentDistillation(rounds=20, bags=2, bins=16, pair_bins=8, pairs=1)


def table(samples: int = 200, inputs: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(samples, inputs, generator=torch.Generator().manual_seed(seed))


def teacher(outputs: int = 2, inputs: int = 4, seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        task = Classification() if outputs > 1 else Regression()
        module = perceptron((inputs, 16, outputs))
        if outputs == 1:
            module = nn.Sequential(module, nn.Flatten(0))
        return Model(module, example=(torch.zeros(2, inputs),), task=task)


def bench_of(model: Model, samples: int = 200) -> Bench:
    x = table(samples)
    y = model.module(x).detach()
    return Bench(train=TensorDataset(x, y.argmax(1) if y.ndim > 1 else y))


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_the_layer_predicts_what_the_exported_tables_add_up_to(outputs: int, tmp_path: Path) -> None:
    model = teacher(outputs)
    bench = bench_of(model)
    lesson, _ = lesson_of(model, bench.train)
    student = QUICK.apply(model, bench)
    export_shapes(QUICK.shapes(lesson, bench.seed), tmp_path / "shapes.json", ("a", "b", "c", "d"))
    told = json.loads((tmp_path / "shapes.json").read_text())
    assert told["inputs"] == ["a", "b", "c", "d"]
    x = table(50, seed=3)
    total = np.tile(told["intercept"], (50, 1))
    for column, edges, main in zip(x.numpy().T, told["edges"], told["mains"], strict=True):
        total = total + np.array(main)[(column[:, None] >= np.array(edges)).sum(1)]
    for (i, j), cells in zip(told["pairs"], told["tables"], strict=True):
        a, b = ((x.numpy()[:, [k]] >= np.array(told["coarse"][k])).sum(1) for k in (i, j))
        total = total + np.array(cells)[a, b]
    answer = student.module(x).detach()
    expected = {1: total[:, 0], 2: np.concatenate([-total / 2, total / 2], axis=1), 3: total}[outputs]
    np.testing.assert_allclose(answer.numpy(), expected, rtol=1e-5, atol=1e-5)
    fidelity = student.lineage[-1].settings["fidelity (R2 on scores)"]
    held = lesson_of(model, bench.validation)[0].targets
    assert fidelity == pytest.approx(r_squared(lesson_of(student, bench.validation)[0].targets, held), abs=1e-4)


def test_boosted_trees_are_scikit_learns() -> None:
    model = teacher(1)
    bench = bench_of(model)
    lesson, _ = lesson_of(model, bench.train)
    student = TransparentDistillation(student="boosted_trees", rounds=30, depth=3).apply(model, bench)
    grown = GradientBoostingRegressor(n_estimators=30, learning_rate=0.1, max_depth=3, random_state=0)
    grown.fit(lesson.inputs, lesson.targets[:, 0])
    x = table(300, seed=4)
    np.testing.assert_allclose(student.module(x).detach().numpy(), grown.predict(x.numpy()), rtol=1e-4, atol=1e-4)
    on_edges = torch.from_numpy(lesson.inputs)
    np.testing.assert_allclose(
        student.module(on_edges).detach().numpy(), grown.predict(lesson.inputs), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["tree", "boosted_trees"])
def test_trees_run_from_an_onnx_file_as_in_torch(kind: str, tmp_path: Path) -> None:
    model = teacher(3)
    technique = TransparentDistillation(student=kind, rounds=5, depth=3)  # pyright: ignore[reportArgumentType]
    student = technique.apply(model, bench_of(model))
    export_onnx(student, tmp_path / "trees.onnx")
    session = onnx_session((tmp_path / "trees.onnx").read_bytes(), 1)
    x = table(300, seed=4)
    said = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(said, student.module(x).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["ga2m", "tree", "boosted_trees"])
def test_a_student_that_is_its_own_teacher_is_matched(kind: str) -> None:
    """Fidelity 1 where the teacher is of the student's class: one tree exactly, sums of shapes or trees nearly."""
    start = teacher(3)
    bench = bench_of(start, 600)
    technique = TransparentDistillation(student=kind, depth=3, bags=1, bins=16)  # pyright: ignore
    first = technique.apply(start, bench)
    second = technique.apply(first, bench)
    wanted, said = (lesson_of(one, bench.train)[0].targets for one in (first, second))
    assert r_squared(said, wanted) > {"tree": 0.9999, "ga2m": 0.999, "boosted_trees": 0.997}[kind]


def test_teachers_of_other_kinds_are_learned_from_in_the_given_models_place(tmp_path: Path) -> None:
    """The student takes the form of the given model, and says what the teacher does."""
    model, other = teacher(3), teacher(3, seed=7)
    bench = bench_of(model, 400)
    x, y = bench.train.tensors
    forest = RandomForestClassifier(20, random_state=0).fit(x.double().numpy(), y.numpy())
    grown = replace(QUICK, student="tree", depth=8)
    by_other = replace(grown, teacher=other).apply(model, bench)
    assert torch.equal(by_other.module(x), grown.apply(other, bench).module(x))
    for given in (forest, (other, forest), lambda x: x[:, :3]):
        step = replace(grown, teacher=given)
        assert lacking(step, model, bench) == []
        assert any("the teacher is" in text for text in step.remarks(model))
        made = step.apply(model, bench)
        assert not torch.equal(made.module(x), grown.apply(model, bench).module(x))
    both = lesson_of(spoken("x", teachers_of("x", (other, model), teacher(3), bench), model), bench.train)[0]
    mean = (other.module(x) + model.module(x)).detach() / 2
    torch.testing.assert_close(torch.from_numpy(both.targets), (mean - mean.mean(1, keepdim=True)).double())
    line = teacher(1)
    numbers = replace(grown, teacher=lambda x: x[:, :1]).apply(line, bench_of(line))
    assert numbers.module(x).shape == (len(x),), "the form of the model, not that of the teacher"
    with pytest.raises(
        NeedError, match=r"gives outputs of shape \(batch, 3\) and the teacher a tensor of shape .*, 2\)"
    ):
        replace(QUICK, teacher=teacher(2)).apply(model, bench)
    assert "no file nowhere.onnx" in lacking(replace(QUICK, teacher="nowhere.onnx"), model, bench)[0][0]


def test_soft_probabilities_are_learned_by_log_loss() -> None:
    model = teacher(3)
    bench = bench_of(model, 500)
    lesson, _ = lesson_of(model, bench.train, "probability")
    assert lesson.loss == "log"
    np.testing.assert_allclose(lesson.targets.sum(1), 1, rtol=1e-6)
    student = TransparentDistillation(target="probability", bags=1, bins=16).apply(model, bench)
    x = table(200, seed=5)
    gap = (student.module(x).softmax(1) - model.module(x).softmax(1)).abs().mean().item()
    assert gap < 0.05
    with pytest.raises(SettingError, match="no classifier"):
        TransparentDistillation(target="probability").apply(teacher(1), bench_of(teacher(1)))


def test_labels_are_only_looked_at_for_the_direct_student() -> None:
    model = teacher(2)
    bench = bench_of(model)
    lesson, truth = lesson_of(model, bench.train)
    x, y = bench.train.tensors
    wrong = Bench(train=TensorDataset(x, torch.zeros_like(y)), validation=bench.validation)
    first, second = QUICK.apply(model, bench), QUICK.apply(model, wrong)
    assert torch.equal(first.module(table(9)), second.module(table(9)))
    direct = hard_lesson(lesson, truth)
    assert direct.loss == "log"
    assert set(np.unique(direct.targets)) == {0.0, 1.0}


def test_statistics() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.normal(size=(50, 2))
    assert r_squared(wanted, wanted) == 1
    assert r_squared(np.tile(wanted.mean(0), (50, 1)), wanted) == pytest.approx(0)
    assert auc(np.array([[0.1], [0.4], [0.35], [0.8]]), np.array([0, 0, 1, 1])) == 0.75
    sure, not_so = (Difference(name="d", values=v) for v in ((0.2, 0.21, 0.19), (0.2, -0.3, 0.1)))
    assert sure.is_significant
    assert "not significant" in str(not_so)
    low, high = sure.interval
    assert (low, high) == pytest.approx((0.2 - 4.3027 * 0.01 / 3**0.5, 0.2 + 4.3027 * 0.01 / 3**0.5), abs=1e-5)


def test_what_it_cannot_do_is_told() -> None:
    for name in ("student", "target"):
        with pytest.raises(SettingError, match=f"{name} is 'none'"):
            TransparentDistillation(**{name: "none"})
    with pytest.raises(SettingError, match="trees learn logits"):
        TransparentDistillation(student="tree", target="probability")
    maps = Model(nn.Conv2d(1, 2, 1), example=(torch.zeros(1, 1, 4, 4),), task=Classification())
    with pytest.raises(NeedError, match=r"needs outputs \[batch\]"):
        QUICK.apply(maps, Bench(train=TensorDataset(torch.zeros(20, 1, 4, 4), torch.zeros(20, dtype=torch.long))))
    named = Model(nn.Linear(3, 2), example=({"x": torch.zeros(1, 3)},), task=Classification())
    for look in (lambda: QUICK.fits(named, Bench()), lambda: QUICK.remarks(named)):
        with pytest.raises(NeedError, match="one input tensor, and this one takes a dict"):
            look()


def test_plots_show_the_tables_as_they_are() -> None:
    """Inputs by importance, each a step at every edge; then the pairs."""
    model = teacher(3)
    lesson, _ = lesson_of(model, bench_of(model).train)
    shapes = QUICK.shapes(lesson)
    figure = shape_figure(shapes, ("a", "b", "c", "d"), output=1, most=3)
    order = np.argsort(-shapes.importance()[:, 1])[:3]
    titles = [note.text for note in figure.layout.annotations]
    assert titles[:3] == ["abcd"[i] for i in order]
    assert len(titles) == 4
    curve, first = figure.data[2], order[0]
    assert curve.y.tolist() == np.repeat(shapes.mains[first][:, 1], 2).tolist()
    assert curve.x[1:-1:2].tolist() == shapes.edges[first].tolist()
    width = figure.data[1].y - figure.data[0].y
    np.testing.assert_allclose(width, 2 * 1.96 * np.repeat(shapes.bands[first][:, 1], 2), atol=1e-12)
    assert np.array(figure.data[-1].z).tolist() == shapes.tables[0][:, :, 1].T.tolist()
    with pytest.raises(SettingError, match="output is 3"):
        shape_figure(shapes, output=3)


def test_partial_dependence_of_an_additive_network_is_its_students_shapes() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(2 * x[:, 0]) + x[:, 1].square() - x[:, 2]

    model = Model(Sum(), example=(torch.zeros(1, 4),), task=Regression())
    bench = bench_of(model, 1500)
    lesson, _ = lesson_of(model, bench.train)
    shapes = TransparentDistillation(bags=1, bins=24, rounds=100).shapes(lesson)
    tables = partial_dependence(model, bench.train, shapes, samples=50)
    assert [table.shape for table in tables] == [main.shape for main in shapes.mains]
    for table, main, weights in zip(tables, shapes.mains, shapes.weights, strict=True):
        assert abs((weights[:, None] * table).sum()) < 1e-6 * weights.sum()
        assert np.average(np.abs(table - main)[:, 0], weights=weights) < 0.12, "bins have a width"
    figure = shape_figure(shapes, beside={"network": tables, "labels": shapes.mains})
    dashed = [curve for curve in figure.data if curve.name == "network"]
    assert len(dashed) == 4
    first = int(np.argsort(-shapes.importance()[:, 0], kind="stable")[0])
    assert dashed[0].y.tolist() == np.repeat(tables[first][:, 0], 2).tolist()
    assert dashed[0].line.dash == "dash"
    assert [curve.showlegend for curve in dashed] == [True, False, False, False]


@pytest.mark.effect
@pytest.mark.slow
def test_the_additive_student_says_what_the_network_says() -> None:
    """Breast cancer, five splits: far truer than the same student taught by labels, and as good as the network."""
    x, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)
    training = Training(epochs=20, batch_size=32, optimizer=Adam(lr=2e-3, weight_decay=1e-3))

    def teach(train: object, seed: int) -> Model:
        bench = Bench(train=train, validation=train, training=training, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return bench.fit(Model(perceptron((30, 32, 2)), example=(x[:2],), task=Classification()))

    technique = TransparentDistillation(rounds=60, bags=2, bins=32)
    found = compare(technique, teach, TensorDataset(x, torch.tensor(y)), splits=5)
    assert found.spread("distilled fidelity R2").mean >= 0.9
    better = found.difference("fidelity R2, distilled - direct")
    assert better.mean >= 0.1
    assert better.is_significant
    assert abs(found.difference("accuracy AUC, distilled - network").mean) < 0.02
    assert found.spread("distilled fidelity AUC").mean > 0.98
    assert "no causes" in str(found)
