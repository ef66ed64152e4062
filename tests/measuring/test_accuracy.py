import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from karui.errors import DataError, NeedError
from karui.measuring import evaluate, sample_scores
from karui.measuring.accuracy import mean_interval
from karui.model import Classification, CustomTask, Model, Regression


class Pairs(Dataset):
    """A data set that can only be asked sample by sample."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, number):
        if number >= len(self):
            raise IndexError(number)
        return self.inputs[number], self.targets[number]


@pytest.fixture
def digits_like():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(50, 6, generator=generator), torch.randint(3, (50,), generator=generator)


def classifier():
    torch.manual_seed(0)
    return Model(nn.Linear(6, 3), example=(torch.zeros(1, 6),), task=Classification())


def test_accuracy_is_the_share_of_right_answers_whatever_the_batch(digits_like):
    model = classifier()
    inputs, targets = digits_like
    right = (model.module(inputs).argmax(1) == targets).double().mean().item()
    for size in (1, 7, 50, 256):
        score = evaluate(model, TensorDataset(inputs, targets), size)
        assert score.value == pytest.approx(right)
        assert score.low < score.value < score.high
        assert (score.count, score.metric, score.higher_is_better) == (50, "accuracy", True)


def test_every_kind_of_data_set_gives_the_same_scores_in_order(digits_like):
    model, picks = classifier(), [7, 3, 40, 11, 2]
    tensors = TensorDataset(*digits_like)
    want = sample_scores(model, tensors)[picks]
    nested = Subset(Subset(tensors, [*picks, 0, 1]), range(5))
    for dataset in (Subset(tensors, picks), nested, Subset(Pairs(*digits_like), picks)):
        assert torch.equal(sample_scores(model, dataset, 2), want)


def test_wilson_interval():
    # 9 of 10: computed with an independent formula, the roots of (p - x)^2 = z^2 x (1 - x) / n.
    value, low, high = mean_interval(torch.tensor([1.0] * 9 + [0.0]))
    for edge in (low, high):
        assert (0.9 - edge) ** 2 == pytest.approx(1.959964**2 * edge * (1 - edge) / 10, rel=1e-4)
    assert value == pytest.approx(0.9)


def test_intervals_stay_sound_at_the_ends():
    assert mean_interval(torch.ones(20))[1:] == (pytest.approx(0.8389, abs=1e-3), 1.0)
    assert mean_interval(torch.zeros(20))[1] == 0.0
    assert mean_interval(torch.tensor([2.5]))[1:] == (-math.inf, math.inf)


def test_the_normal_interval_covers_the_mean_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(400):
        _, low, high = mean_interval(torch.randn(60, generator=generator) * 3 + 2)
        hits += low <= 2 <= high
    assert 0.9 < hits / 400 < 0.99


def test_regression_is_judged_by_squared_error():
    model = Model(nn.Identity(), example=(torch.zeros(1, 1),), task=Regression())
    score = evaluate(model, TensorDataset(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [4.0]])))
    assert (score.value, score.higher_is_better) == (2.5, False)


def test_samples_without_label_are_not_counted(digits_like):
    inputs, targets = digits_like
    silent = targets.clone()
    silent[::2] = -100
    score = evaluate(classifier(), TensorDataset(inputs, silent), batch_size=7)
    assert score == evaluate(classifier(), TensorDataset(inputs[1::2], targets[1::2]))
    assert score.count == 25
    numbers = inputs[:, :3].clone()
    numbers[::5] = -math.inf
    regression = Model(classifier().module, example=(torch.zeros(1, 6),), task=Regression())
    score = evaluate(regression, TensorDataset(inputs, numbers))
    assert score.count == 40
    assert math.isfinite(score.value)
    with pytest.raises(DataError, match="No sample of the data set has a label"):
        evaluate(classifier(), TensorDataset(inputs, torch.full((50,), -100)))


def test_several_inputs_and_a_task_of_ones_own():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a + b

    task = CustomTask(loss=lambda o, t: (o - t).abs().mean(), scores=lambda o, t: (o - t).abs().flatten(1).sum(1))
    model = Model(Sum(), example=(torch.zeros(1, 2), torch.zeros(1, 2)), task=task)
    data = Pairs([(torch.ones(2), torch.ones(2) * k) for k in range(3)], torch.zeros(3, 2))
    assert sample_scores(model, data, 2).tolist() == [2.0, 4.0, 6.0]
    one_by_one = TensorDataset(torch.ones(3, 2), torch.arange(3.0)[:, None].expand(3, 2), torch.zeros(3, 2))
    for same in (one_by_one, Subset(one_by_one, [0, 1, 2]), ConcatDataset([one_by_one])):
        assert sample_scores(model, same, 2).tolist() == [2.0, 4.0, 6.0]


def test_the_model_keeps_its_mode_and_gets_no_gradient(digits_like):
    net = nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.9), nn.BatchNorm1d(3))
    model = Model(net, example=(torch.zeros(1, 6),), task=Classification())
    first, second = (evaluate(model, TensorDataset(*digits_like)) for _ in range(2))
    assert first == second
    assert all(part.training for part in net.modules())
    assert net[0].weight.grad is None
    assert net[2].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("dataset", "error", "words"),
    [
        (None, NeedError, "no data"),
        (TensorDataset(torch.zeros(0, 6), torch.zeros(0).long()), DataError, "empty"),
        (TensorDataset(torch.zeros(4, 5), torch.zeros(4).long()), DataError, r"\[4, 5\].*\[1, 6\]"),
        (Pairs([torch.zeros(6)] * 2, [(1, 2)] * 2), DataError, "evaluated"),
    ],
)
def test_data_that_does_not_fit_is_refused_in_one_line(dataset, error, words):
    with pytest.raises(error, match=words) as told:
        evaluate(classifier(), dataset)
    assert "\n" not in str(told.value)


def test_a_model_without_a_task_cannot_be_judged(digits_like):
    model = Model(nn.Linear(6, 3), example=(torch.zeros(1, 6),))
    with pytest.raises(NeedError, match="no task"):
        evaluate(model, TensorDataset(*digits_like))


def test_classes_that_come_last_are_told_to_come_second():
    class Words(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x, -x, x], -1)

    rows = TensorDataset(torch.randn(6, 5), torch.zeros(6, 5).long())
    model = Model(Words(), example=(torch.zeros(1, 5),), task=Classification())
    with pytest.raises(DataError, match=r"dimension 1\. Logits are .*: end its forward with logits\.movedim\(-1, 1\)"):
        evaluate(model, rows)


def test_outputs_that_the_task_does_not_take_are_told():
    rows = TensorDataset(torch.randn(6, 5), torch.zeros(6, 3))
    model = Model(nn.Linear(5, 2), example=(torch.zeros(1, 5),), task=Regression())
    with pytest.raises(DataError, match=r"Its outputs are \[6, 2\]; see Regression for the form that it takes"):
        evaluate(model, rows)
