"""Teachers that are no networks of torch: scikit-learn's estimators and ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from torch import nn
from torch.utils.data import TensorDataset

from karui.distill._onnx_teachers import onnx_teacher
from karui.distill.knowledge import KnowledgeDistillation
from karui.distill.munge import ModelCompression
from karui.distill.predictors import FLOOR, predictor
from karui.errors import NeedError
from karui.model import Model, Regression
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
