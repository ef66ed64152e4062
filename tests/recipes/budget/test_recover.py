"""Recovery runs under the dense network unless the task has no soft targets: the default of every budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.data import Splits
from karui.distill import KnowledgeDistillation
from karui.model import Model, Regression
from karui.recipes.budget.recover import recover
from karui.sparsify import L1Filters
from karui.technique import Bench
from karui.train import Training


def same(a: Model, b: Model) -> bool:
    ours, theirs = a.module.state_dict(), b.module.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.paper(30)
def test_a_classifier_recovers_under_the_dense_network(
    digits: Splits, small_cnn: Callable[..., Model], tmp_path: Path
) -> None:
    bench = Bench(train=digits.train, validation=digits.validation, training=Training(epochs=1, batch_size=120))
    dense = small_cnn()
    cut = L1Filters(ratio=0.5, epochs=0).apply(dense, bench)
    before = {name: value.clone() for name, value in dense.module.state_dict().items()}
    recovered = recover(cut, dense, bench, 1, "recover")
    teaching = KnowledgeDistillation(teacher=dense).influence(cut, bench)
    assert same(recovered, bench.under(teaching).fit(cut, label="recover"))
    assert not same(recovered, bench.fit(cut, label="recover"))
    assert all(torch.equal(value, before[name]) for name, value in dense.module.state_dict().items())
    kept = Bench(train=digits.train, training=bench.training, validation=digits.validation, checkpoints=tmp_path)
    recover(cut, dense, kept, 1, "first")
    recover(cut, dense, kept, 1, "second")
    (folder,) = (tmp_path / "answers").iterdir()
    assert len(list(folder.iterdir())) == 1, "the second recovery asked the teacher nothing"


def test_without_soft_targets_it_learns_from_the_data_alone() -> None:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    line = Model(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), example=(x[:2],), task=Regression())
    bench = Bench(train=TensorDataset(x, x.sum(1)), validation=TensorDataset(x, x.sum(1)), training=Training(epochs=1))
    assert same(recover(line, line.copy(), bench, 1, "recover"), bench.fit(line, label="recover"))
