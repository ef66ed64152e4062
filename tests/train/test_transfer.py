"""Transfer sets of labelled and unlabelled samples, whatever the form of both."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from karui.data import Batches
from karui.distill import FitNets, KnowledgeDistillation, LogitRegression, MutualLearning
from karui.distill.born_again import BornAgain
from karui.errors import DataError
from karui.model import Classification, Model, Regression, Task
from karui.technique import Bench
from karui.train import Training
from karui.train.transfer import with_unlabelled

pytestmark = pytest.mark.paper(31)


class Listed(Dataset):
    """A data set of one's own, which holds no tensors of all samples."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def batch(both: Dataset, *order: int) -> tuple[tuple[Any, ...], Any]:
    return Batches(both).fetch(torch.tensor(order))


X, MORE = torch.arange(3.0).expand(2, 3), torch.ones(3)
FORMS = {
    "an int": (4, Regression(), -100),
    "a float": (4.0, Regression(), float("-inf")),
    "a number of numpy": (np.int64(4), None, -100),
    "positions": (torch.tensor([4, 5]), Classification(), [-100, -100]),
    "positions of an array": (np.array([4, 5]), Classification(ignore=255), [255, 255]),
    "bytes": (torch.tensor(4, dtype=torch.uint8), None, -100),
    "numbers": (torch.tensor([4.0, 5.0]), Regression(), [float("-inf")] * 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_mark_of_no_label_has_the_form_of_labels(form: str) -> None:
    """A scalar -100 did not go into one batch with positions, or with numbers; nor in either order."""
    target, task, wanted = FORMS[form]
    both = with_unlabelled(Listed([(X[0], target), (X[1], target)]), Listed([MORE, MORE]), task)
    for order in ((0, 2), (2, 0)):
        (inputs,), targets = batch(both, *order)
        assert inputs.shape == (2, 3)
        torch.testing.assert_close(targets[order.index(2)], torch.tensor(wanted).to(targets))
        torch.testing.assert_close(targets[order.index(0)], torch.as_tensor(target).to(targets))


@pytest.mark.parametrize(
    ("targets", "task", "wanted"),
    [
        (torch.tensor([[1, 2], [3, 4]]), None, [-100, -100]),
        (torch.tensor([[1, 2], [3, 4]]), Classification(ignore=7), [7, 7]),
        (torch.tensor([1.0, 2.0]), Regression(), float("-inf")),
        (torch.tensor([1, 2], dtype=torch.uint8), None, -100),
    ],
)
def test_so_it_has_where_both_are_tensors(targets: Tensor, task: Task | None, wanted: Any) -> None:
    both = with_unlabelled(TensorDataset(X, targets), TensorDataset(MORE[None]), task)
    assert type(both) is TensorDataset
    told = both.tensors[1]
    torch.testing.assert_close(told[2], torch.tensor(wanted).to(told))
    torch.testing.assert_close(told[:2], targets.to(told))


@pytest.mark.parametrize("labelled", [(X[0], X[1], 4), ((X[0], X[1]), 4)], ids=["side by side", "a tuple"])
@pytest.mark.parametrize("pool", [(MORE, MORE), ((MORE, MORE),), (MORE, MORE, 9), [(MORE, MORE), 9]])
def test_a_pool_of_several_inputs_may_have_targets_or_none(labelled: Any, pool: Any) -> None:
    """The last entry of a pool without targets is an input, and was dropped as a target."""
    both = with_unlabelled(Listed([labelled]), Listed([pool]))
    inputs, targets = batch(both, 1, 0)
    assert [x[0].tolist() for x in inputs] == [[1.0] * 3] * 2
    assert [x[1].tolist() for x in inputs] == [[0.0, 1.0, 2.0]] * 2
    assert targets.tolist() == [-100, 4]


def test_a_pool_of_other_inputs_and_no_labelled_sample_are_told_at_once() -> None:
    with pytest.raises(DataError, match=r"has 1 inputs, and a labelled one 2\. Give the same inputs"):
        with_unlabelled(Listed([(X[0], X[1], 4)]), Listed([MORE]))
    with pytest.raises(DataError, match=r"labelled data have no samples"):
        with_unlabelled(Listed([]), Listed([MORE]))
    bare = with_unlabelled(Listed([X[0]]), Listed([MORE]))
    assert batch(bare, 0, 1)[1].tolist() == [-100, -100]


def sequences(width: int, task: Task, seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Conv1d(3, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, 5, 1))
    return Model(net, example=(torch.zeros(2, 3, 8),), task=task)


TEACHER = sequences(9, Classification(), seed=1)
WAYS = {
    "plain": None,
    "[30]": KnowledgeDistillation(teacher=TEACHER, epochs=1),
    "[31]": LogitRegression(teacher=TEACHER, epochs=1),
    "[33]": FitNets(teacher=TEACHER, epochs=1, hint_epochs=0),
    "[37]": BornAgain(epochs=1),
    "[37] cwtm": BornAgain(epochs=1, loss="cwtm"),
    "[39]": MutualLearning(epochs=1),
}


def trained(way: str, train: Any, task: Task, batch_size: int) -> Model:
    bench = Bench(train=train, validation=train, training=Training(epochs=1, batch_size=batch_size))
    technique, student = WAYS[way], sequences(4, task)
    return bench.fit(student) if technique is None else technique.apply(student, bench)


@pytest.mark.parametrize("way", WAYS)
def test_batches_of_ignored_positions_stop_no_training(way: str) -> None:
    """A sample all of whose positions are void, in batches of one, had a loss that is no number."""
    y = torch.arange(48).reshape(6, 8) % 5
    y[::2] = 255
    made = trained(way, TensorDataset(torch.randn(6, 3, 8), y), Classification(ignore=255), 1)
    assert all(bool(value.isfinite().all()) for value in made.module.state_dict().values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("told", [True, False], ids=["the task's mark", "-100"])
def test_a_pool_goes_with_an_ignored_class(way: str, told: bool) -> None:
    """torch knows one ignored number only: -100 was out of bounds beside 255."""
    task, x, y = Classification(ignore=255), torch.randn(6, 3, 8), torch.arange(48).reshape(6, 8) % 5
    pool = Listed(list(torch.randn(6, 3, 8)))
    both = with_unlabelled(Listed(list(zip(x, y, strict=True))), pool, task if told else None)
    made = trained(way, both, task, 3)
    assert all(bool(value.isfinite().all()) for value in made.module.state_dict().values())


def test_a_pool_of_a_regression_counts_by_the_teacher_alone() -> None:
    """-100 was learned as a number like any other where targets count beside a teacher."""
    x, pool = torch.randn(8, 4), torch.randn(8, 4)
    nets = [Model(nn.Linear(4, 1), example=(x[:2],), task=Regression()) for _ in range(2)]
    both = with_unlabelled(TensorDataset(x, nets[1].module(x).detach()), TensorDataset(pool), Regression())
    bench = Bench(train=both, validation=both, training=Training(epochs=2, batch_size=5))
    half = LogitRegression(teacher=nets[1], normalise=False).influence(nets[0], bench, weight=0.5)
    for one in (bench, bench.under(half)):
        made = one.fit(nets[0])
        assert all(bool(value.isfinite().all()) for value in made.module.state_dict().values())
        assert float(made.module(x).detach().abs().max()) < 10
