"""What the tests of teachers share: data, and a teacher of each kind."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch.utils.data import TensorDataset

from karui.data import Splits
from karui.data.splits import take
from karui.technique import Bench
from karui.train import Adam, Constant, Training


@pytest.fixture(scope="session")
def nets() -> Any:
    """The module of small networks and helpers."""
    spec = importlib.util.spec_from_file_location("teacher_nets", Path(__file__).with_name("teacher_nets.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def few(digits: Splits) -> TensorDataset:
    return take(digits.train, torch.arange(120))


@pytest.fixture(scope="session")
def bench(digits: Splits, few: TensorDataset) -> Bench:
    training = Training(epochs=1, batch_size=64, optimizer=Adam(lr=3e-3), schedule=Constant())
    return Bench(train=few, validation=digits.validation, test=digits.test, training=training)


@pytest.fixture(scope="session")
def forest(nets: Any, few: TensorDataset) -> RandomForestClassifier:
    return RandomForestClassifier(20, random_state=0).fit(*nets.table_of(few))


@pytest.fixture(scope="session")
def onnx_file(nets: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that ends in logits, for any number of samples."""
    return nets.written(nets.mlp(16, seed=3), tmp_path_factory.mktemp("onnx") / "teacher.onnx")


@pytest.fixture
def outside(nets: Any, forest: RandomForestClassifier, onnx_file: Path) -> dict[str, Any]:
    """A teacher of each kind that is no torch module."""
    return {"forest": forest, "onnx": str(onnx_file), "function": nets.plain}
