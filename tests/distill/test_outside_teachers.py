"""Teachers that are no networks of torch: scikit-learn's estimators and ONNX files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
    VotingClassifier,
)
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.tree import DecisionTreeClassifier
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from karui.data import Splits
from karui.distill._fidelity import r_squared
from karui.distill._onnx_teachers import onnx_teacher
from karui.distill.knowledge import KnowledgeDistillation
from karui.distill.logits import LogitRegression
from karui.distill.munge import ModelCompression
from karui.distill.predictors import FLOOR, predictor
from karui.distill.transparent import TransparentDistillation
from karui.errors import NeedError
from karui.model import Classification, Model, Regression
from karui.technique import Bench
from karui.train import Adam, Constant, Training


def test_classes_that_an_estimator_has_not_seen_keep_their_numbers(nets: Any, few: TensorDataset) -> None:
    x, y = nets.table_of(few)
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
    nets: Any, tmp_path: Path, few: TensorDataset
) -> None:
    model, x = nets.mlp(16, seed=5), few.tensors[0][:7]
    said = model.module(x).detach()
    soft = onnx_teacher(nets.written(model, tmp_path / "soft.onnx", batch=3, soft=True))
    assert soft.gives == "probabilities"
    torch.testing.assert_close(soft(x).softmax(1), said.softmax(1), atol=11 * FLOOR, rtol=0)
    table = onnx_teacher(nets.written(model, tmp_path / "table.onnx", shape=(64,)))
    assert table.gives == "logits"
    torch.testing.assert_close(table(x), said, atol=1e-5, rtol=1e-5)


def test_an_onnx_teacher_may_have_its_weights_beside_it(
    nets: Any, onnx_file: Path, bench: Bench, tmp_path: Path
) -> None:
    whole, parted = onnx.load(onnx_file), tmp_path / "parted.onnx"
    onnx.save(whole, parted, save_as_external_data=True, location="weights.data", size_threshold=0)
    student = nets.mlp(8)
    taught = KnowledgeDistillation(teacher=parted).apply(student, bench)
    assert nets.same(taught, KnowledgeDistillation(teacher=onnx_file).apply(student, bench))
    (tmp_path / "weights.data").unlink()
    with pytest.raises(NeedError, match="has its weights in another file, weights.data, which is not there"):
        KnowledgeDistillation(teacher=parted).apply(student, bench)


def table_bench(x: np.ndarray, y: np.ndarray) -> tuple[Model, Bench]:
    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    net = nn.Linear(x.shape[1], len(np.unique(y)))
    training = Training(epochs=1, batch_size=64, optimizer=Adam(lr=3e-3), schedule=Constant())
    model = Model(net, example=(data.tensors[0][:1],), task=Classification())
    return model, Bench(train=data, validation=data, training=training)


@pytest.mark.paper(40)
@pytest.mark.parametrize("strength", [1.0, 100.0])
def test_an_additive_estimator_is_recovered_on_its_true_logits(strength: float) -> None:
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x).astype(np.float32)[:, :8]
    teacher = LogisticRegression(C=strength, max_iter=5000).fit(x, y)
    true = torch.from_numpy(teacher.decision_function(x)).float()
    said = predictor(teacher)(torch.from_numpy(x))
    assert float(true.abs().max()) > 14
    torch.testing.assert_close(said[:, 1] - said[:, 0], true, atol=1e-4, rtol=1e-5)
    model, bench = table_bench(x, y)
    student = TransparentDistillation(teacher=teacher, rounds=300, rate=0.2).apply(model, bench).module
    out = student(torch.from_numpy(x)).detach()
    assert r_squared((out[:, 1] - out[:, 0]).numpy()[:, None], true.numpy()[:, None]) > 0.99


@pytest.mark.paper(30)
def test_soft_targets_of_estimators_are_those_of_their_scores(digits: Splits) -> None:
    x = digits.train.tensors[0][:400].flatten(1).numpy()
    y = digits.train.tensors[1][:400].numpy()
    linear = LogisticRegression(C=100, max_iter=2000).fit(x, y)
    boosted = HistGradientBoostingClassifier(max_iter=20, learning_rate=1.0).fit(x, y < 5)
    bayes, network = GaussianNB().fit(x, y), MLPClassifier((16,), max_iter=500, tol=1e-2, random_state=0).fit(x, y)
    scores = {
        linear: linear.decision_function(x),
        make_pipeline(FunctionTransformer(), linear): linear.decision_function(x),
        boosted: np.stack([0 * boosted.decision_function(x), boosted.decision_function(x)], 1),
        bayes: bayes.predict_joint_log_proba(x),
        network: np.log(network.predict_proba(x)),
    }
    for teacher, wanted in scores.items():
        said = predictor(teacher)(torch.from_numpy(x))
        for temperature in (1.0, 4.0, 20.0):
            soft = (torch.from_numpy(wanted) / temperature).softmax(1).float()
            torch.testing.assert_close((said / temperature).softmax(1), soft, atol=2e-6, rtol=1e-3)


def test_decisions_that_are_no_logits_are_passed_over_for_each_sample_by_itself(digits: Splits) -> None:
    x, y = digits.train.tensors[0][:200].flatten(1).numpy(), digits.train.tensors[1][:200].numpy()
    votes = OneVsRestClassifier(LogisticRegression(C=10)).fit(x, y)  # its probabilities are sigmoids, made to sum to 1
    said = predictor(votes)(torch.from_numpy(x))
    torch.testing.assert_close(said.softmax(1), torch.from_numpy(votes.predict_proba(x)).float(), atol=1e-6, rtol=1e-4)
    alone = torch.cat([predictor(votes)(torch.from_numpy(x[row : row + 1])) for row in range(5)])
    torch.testing.assert_close(said[:5], alone)


@pytest.mark.parametrize("ending", ["Softmax", "LogSoftmax", "Sigmoid"])
def test_what_goes_into_the_ending_of_an_onnx_file_is_asked_for(nets: Any, tmp_path: Path, ending: str) -> None:
    model = nets.mlp(16, seed=5, classes=1 if ending == "Sigmoid" else 10)
    x = 400 * torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))  # no probability but 0 and 1
    file = nets.written(model, tmp_path / "ended.onnx")
    graph = onnx.load(file)
    graph.graph.node[-2].op_type = ending
    onnx.save(graph, file)
    scores = model.module(x).detach()
    wanted = torch.cat([torch.zeros_like(scores), scores], 1) if ending == "Sigmoid" else scores
    assert float(wanted.log_softmax(1).min()) < -20
    torch.testing.assert_close(onnx_teacher(file)(x), wanted, atol=1e-3, rtol=1e-4)
    told = onnx_teacher(file, gives="numbers")(x)
    ended = scores.sigmoid() if ending == "Sigmoid" else scores.softmax(1)
    torch.testing.assert_close(told.exp() if ending == "LogSoftmax" else told, ended, atol=1e-4, rtol=1e-4)


def test_a_softmax_that_is_not_over_classes_stays(nets: Any, tmp_path: Path) -> None:
    file = nets.written(nets.mlp(16, seed=5), tmp_path / "over_samples.onnx", soft=True)
    graph = onnx.load(file)
    graph.graph.node[-2].attribute.append(helper.make_attribute("axis", 0))
    onnx.save(graph, file)
    with pytest.raises(NeedError, match="gives rows that are no probabilities"):
        onnx_teacher(file)(torch.rand(3, 1, 8, 8))


@pytest.mark.paper(30)
@pytest.mark.paper(31)
@pytest.mark.paper(40)
def test_zeros_are_told_and_count_as_the_floor_of_votes_or_as_what_rounding_leaves(
    nets: Any, few: TensorDataset, bench: Bench, tmp_path: Path
) -> None:
    x, y = nets.table_of(few)
    forest = RandomForestClassifier(20, random_state=0).fit(x, y)
    zeros, inputs = torch.from_numpy(forest.predict_proba(x) == 0), few.tensors[0]
    averaged = VotingClassifier([("one", forest)], voting="soft").fit(x, y)
    for votes in (forest, make_pipeline(FunctionTransformer(), forest), averaged):
        said = predictor(votes)(inputs)
        assert float(said.min()) == np.float32(np.log(FLOOR))
    assert torch.equal(predictor(forest)(inputs) == np.float32(np.log(FLOOR)), zeros)
    for dtype, bits in ((torch.float64, 53), (torch.float32, 24)):
        hard = predictor(lambda x, dtype=dtype: torch.eye(10, dtype=dtype)[: len(x)], gives="probabilities")
        assert float(hard(inputs[:3]).min()) == pytest.approx(-bits * np.log(2))
    mine = predictor(lambda _: np.eye(10)[:3], gives="probabilities", floor=1e-3)
    assert float(mine(inputs[:3]).min()) == pytest.approx(np.log(1e-3))
    share = re.compile(r"teacher: ([\d,]+) of ([\d,]+) probabilities .* were zero.* as 1.0e-04")
    for technique in (KnowledgeDistillation(epochs=2), LogitRegression(epochs=2)):
        for width in (8, 9):  # the second finds all of the answers beside the checkpoints
            made = replace(technique, teacher=forest).apply(nets.mlp(width), replace(bench, checkpoints=tmp_path))
            (line,) = filter(None, (share.match(edit.describe()) for edit in made.lineage))
            zero, told = (int(number.replace(",", "")) for number in line.groups())
            assert zero / told == pytest.approx(zeros.double().mean().item())
    model, table = table_bench(x.astype(np.float32), y)
    made = TransparentDistillation(teacher=forest, rounds=2).apply(model, table)
    assert any("were zero, which has no logarithm" in edit.describe() for edit in made.lineage)
    made = KnowledgeDistillation(teacher=nets.mlp(16, seed=3), epochs=1).apply(nets.mlp(8), bench)
    assert not any("were zero" in edit.describe() for edit in made.lineage)


class Joined(nn.Module):
    """Takes a dict of two tables."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(7, hidden), nn.Linear(hidden, 3)

    def forward(self, tables: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.last(self.hidden(torch.cat([tables["a"], tables["b"]], 1)).relu())


class Tables(Dataset[Any]):
    """Samples of such tables."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, number: int) -> Any:
        draw = torch.Generator().manual_seed(number)
        return {"a": torch.randn(4, generator=draw), "b": torch.randn(3, generator=draw)}, torch.tensor(number % 3)


def joined_onnx(net: Joined, path: Path) -> Path:
    weights = {"w1": net.hidden.weight, "b1": net.hidden.bias, "w2": net.last.weight, "b2": net.last.bias}
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["both"], axis=1),
        helper.make_node("Gemm", ["both", "w1", "b1"], ["hidden"], transB=1),
        helper.make_node("Relu", ["hidden"], ["kept"]),
        helper.make_node("Gemm", ["kept", "w2", "b2"], ["y"], transB=1),
    ]
    numbers = [numpy_helper.from_array(tensor.detach().numpy(), name) for name, tensor in weights.items()]
    puts = [helper.make_tensor_value_info(name, 1, ["batch", size]) for name, size in (("a", 4), ("b", 3), ("y", 3))]
    graph = helper.make_graph(nodes, "joined", puts[1::-1], puts[2:], numbers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_functions_and_files_teach_students_of_inputs_in_a_dict(tmp_path: Path, nets: Any) -> None:
    net = Joined(9).eval()
    example = ({"a": torch.zeros(2, 4), "b": torch.zeros(2, 3)},)
    bench = Bench(train=Tables(), validation=Tables(), training=Training(epochs=1, batch_size=8))
    taught = {}
    for name, teacher in {
        "module": net,
        "function": lambda tables: net(tables).detach(),
        "file": joined_onnx(net, tmp_path / "joined.onnx"),
    }.items():
        torch.manual_seed(0)
        student = Model(Joined(4), example=example, task=Classification())
        taught[name] = KnowledgeDistillation(teacher=teacher, epochs=1).apply(student, bench).module.hidden.weight
    torch.testing.assert_close(taught["function"], taught["module"])
    torch.testing.assert_close(taught["file"], taught["module"], atol=1e-5, rtol=1e-4)
    forest = RandomForestClassifier(2).fit(np.zeros((4, 7)), [0, 1, 2, 0])
    with pytest.raises(NeedError, match="takes one table, not a dict"):
        KnowledgeDistillation(teacher=forest).fits(Model(Joined(4), example=example, task=Classification()), bench)
    other = nets.written(nets.mlp(16), tmp_path / "other.onnx")
    with pytest.raises(NeedError, match="takes x, and the inputs have no x"):
        KnowledgeDistillation(teacher=other).fits(Model(Joined(4), example=example, task=Classification()), bench)


def test_what_numpy_cannot_hold_is_widened_for_teachers_of_numpy(nets: Any, bench: Bench, onnx_file: Path) -> None:
    short = replace(bench, training=replace(bench.training, precision="bf16-mixed"))
    net = nets.mlp(16, seed=3).module.eval()
    weights = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    for teacher in (onnx_file, lambda x: x.flatten(1).numpy() @ weights, lambda x: net(x).numpy()):
        made = KnowledgeDistillation(teacher=teacher, epochs=1).apply(nets.mlp(8), short)
        assert all(torch.isfinite(p).all() for p in made.module.parameters())
