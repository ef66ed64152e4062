"""Recovery runs under the dense network unless that has nothing to teach: the default of every budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from karui.data import Splits
from karui.distill import KnowledgeDistillation
from karui.model import CustomTask, Model, Regression
from karui.recipes.budget.lesson import SOFT, lesson
from karui.recipes.budget.recover import recover
from karui.sparsify import L1Filters
from karui.technique import Bench
from karui.train import Adam, Influence, Moment, Training


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


def table(outputs: int, targets: torch.Tensor | None = None, **how: Any) -> tuple[Model, Model, Bench]:
    """A dense network of numbers, a small one, and a bench; targets are sums of its inputs where none are given."""
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.cumsum(1)[:, :outputs] if targets is None else targets)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        small, dense = (
            Model(nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, outputs)), example=(x[:2],), **how)
            for width in (4, 16)
        )
    training = Training(epochs=1, batch_size=20, optimizer=Adam(lr=1e-2))
    return small, dense, Bench(train=data, validation=data, training=training)


@pytest.mark.paper(31)
@pytest.mark.parametrize("outputs", [1, 3])
def test_a_regression_recovers_under_the_numbers_of_the_dense_network(outputs: int) -> None:
    small, dense, bench = table(outputs, task=Regression())
    recovered = recover(small, dense, bench, 1, "recover")

    class Numbers(Influence):
        def objective(self, loss: torch.Tensor, moment: Moment) -> torch.Tensor:
            with torch.no_grad():
                wanted = dense.module(*moment.inputs)
            return 0.9 * (moment.outputs - wanted).square().mean() + 0.1 * loss

    wanted = bench.fit(small, influence=Numbers(), label="recover")
    for ours, theirs in zip(recovered.module.parameters(), wanted.module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not same(recovered, bench.fit(small, label="recover"))
    assert "teacher: answers are not kept" in recovered.lineage[-2].describe()


@pytest.mark.paper(30)
def test_scores_of_classes_under_a_task_of_ones_own_teach_too() -> None:
    own = CustomTask(loss=functional.cross_entropy, scores=lambda outputs, y: (outputs.argmax(1) == y).float())
    small, dense, bench = table(3, torch.arange(60) % 3, task=own)
    assert lesson(dense, bench) == SOFT
    soft = KnowledgeDistillation(teacher=dense).influence(small, bench)
    assert same(recover(small, dense, bench, 1, "recover"), bench.under(soft).fit(small, label="recover"))


class Pair(nn.Module):
    """Two tensors of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(x), x


def test_where_nothing_can_be_taught_the_lineage_says_why() -> None:
    numbers = CustomTask(loss=functional.l1_loss, scores=lambda outputs, y: (outputs - y).abs().mean(1))
    small, dense, bench = table(3, task=numbers)
    recovered = recover(small, dense, bench, 1, "recover")
    assert same(recovered, bench.fit(small, label="recover"))
    told = recovered.lineage[-2].describe()
    assert told.startswith("teacher: none, as targets of the task CustomTask are no numbers of classes")
    shares = CustomTask(loss=lambda p, y: functional.nll_loss(p.log(), y), scores=lambda p, y: p.argmax(1) == y)
    _, dense, bench = table(3, torch.arange(60) % 3, task=shares)
    soft = Model(nn.Sequential(dense.module, nn.Softmax(1)), example=dense.example, task=shares)
    assert "are probabilities" in lesson(soft, bench).why
    two = CustomTask(loss=lambda both, y: (both[0].sum(1) - y.sum(1)).square().mean(), scores=lambda _, y: y[:, 0])
    pair = Model(Pair(), example=dense.example, task=two)
    _, _, bench = table(3, task=Regression())
    assert "it gives a tuple" in lesson(pair, bench).why
    assert same(recover(pair, pair.copy(), bench, 1, "recover"), bench.fit(pair, label="recover"))
