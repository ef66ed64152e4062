"""check: every fault of data is one line that names where and what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset, TensorDataset

from karui.data import Splits, check
from karui.errors import DataError
from karui.model import Classification, CustomTask, Model, Regression


def part(samples: int = 6, features: int = 3, classes: int = 2) -> TensorDataset:
    return TensorDataset(torch.zeros(samples, features), torch.arange(samples) % classes)


GOOD = Splits(train=part(), validation=part(), test=part(), classes=("a", "b"), name="mine")


def model(classes: int = 2) -> Model:
    return Model(nn.Linear(3, classes), example=(torch.zeros(1, 3),), task=Classification())


def poisoned(where: str) -> TensorDataset:
    x, y = torch.zeros(6, 3), torch.zeros(6, 1)
    (x if where == "input" else y)[4, 0] = float("inf")
    return TensorDataset(x, y)


class Listed(Dataset[object]):
    """Samples from a list; an exception in the list is raised."""

    def __init__(self, *samples: object) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> object:
        if isinstance(self.samples[number], Exception):
            raise self.samples[number]
        return self.samples[number]


def sample(features: int = 3, label: int = 0) -> tuple[Tensor, int]:
    return torch.zeros(features), label


def test_good_data_passes() -> None:
    check(GOOD)
    net = model()
    net.module.train()
    check(GOOD, net)
    assert net.module.training
    check(replace(GOOD, train=Listed(sample(), sample(label=1))), model())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"test": part(0)}, "The test split of 'mine' is empty."),
        ({"validation": None}, "The validation split of 'mine' is empty."),
        ({"train": part(classes=1)}, "All training samples of 'mine' are of one class (0)."),
        ({"test": part(classes=1)}, "All test samples of 'mine' are of one class (0)."),
        ({"test": part(classes=3)}, "'mine', test split: class [2] is out of range for 2 classes."),
        ({"test": TensorDataset(torch.zeros(2, 3), torch.tensor([0, -1]))}, "class [-1] is out of range"),
        (
            {"test": part(features=4)},
            "of the test split are (4,) float32, those of the train split (3,) float32.",
        ),
        ({"train": poisoned("input")}, "'mine', train split: the input of sample 4 holds values that are not finite."),
        ({"train": poisoned("target")}, "the target of sample 4 holds values that are not finite."),
        ({"train": TensorDataset(torch.zeros(6, 3))}, "'mine', train split: sample 0 has no target."),
        ({"train": Listed(sample(), sample(4))}, "sample 1 is (4,) float32, the first one (3,) float32."),
        ({"train": Listed(sample(), OSError("disk"))}, "train split: sample 1 cannot be read: OSError: disk."),
        ({"train": Listed(("picture", 0))}, "the input of sample 0 is a str, not a tensor."),
        # A split taken out of a larger set names the sample as that set does.
        ({"train": Subset(poisoned("input"), [1, 2, 4])}, "the input of sample 4 holds values that are not finite."),
        ({"train": Subset(Listed(sample(), sample(label=1), OSError("disk")), [0, 2])}, "sample 2 cannot be read"),
    ],
)
def test_each_fault_is_told(change: dict[str, object], words: str) -> None:
    with pytest.raises(DataError) as caught:
        check(replace(GOOD, **change))
    assert words in caught.value.message
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_data_that_does_not_match_the_model() -> None:
    other = replace(GOOD, train=part(features=4), validation=part(features=4), test=part(features=4))
    with pytest.raises(DataError, match=r"its example input is \(3,\), a sample is \(4,\)"):
        check(other, model())
    with pytest.raises(DataError, match=r"is class 1; the model has 1 classes"):
        check(replace(GOOD, classes=()), model(classes=1))
    real = TensorDataset(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(DataError, match=r"targets are torch.float32, and classification needs class numbers"):
        check(Splits(train=real, validation=real, test=real), model())
    regression = replace(model(), task=Regression())
    for targets in (torch.zeros(4, 5), torch.zeros(4)):  # the second would be spread over the outputs, and wrong
        wide = TensorDataset(torch.zeros(4, 3), targets)
        with pytest.raises(DataError, match="loss cannot compare"):
            check(Splits(train=wide, validation=wide, test=wide), regression)


def test_a_void_class_counts_for_nothing() -> None:
    targets = torch.full((4, 5, 5), 11)
    targets[3, 0] = 1
    maps = TensorDataset(torch.zeros(4, 3, 5, 5), targets)
    splits = Splits(train=maps, validation=maps, test=maps)
    net = Model(nn.Conv2d(3, 2, 1), example=(torch.zeros(1, 3, 5, 5),), task=Classification(ignore=11))
    check(splits, net)
    with pytest.raises(DataError, match="is class 11; the model has 2 classes"):
        check(splits, replace(net, task=Classification()))


def same(data: TensorDataset) -> Splits:
    return Splits(train=data, validation=data, test=data, name="mine")


def test_class_minus_100_is_no_label() -> None:
    words, tags = torch.zeros(4, 3, 5), torch.tensor([[0, 1, -100, -100, -100]] * 4)
    net = Model(nn.Conv1d(3, 2, 1), example=(torch.zeros(1, 3, 5),), task=Classification())
    check(same(TensorDataset(words, tags)), net)
    with pytest.raises(DataError, match="is class -1; the model has 2 classes"):
        check(same(TensorDataset(words, tags.clamp(min=-1))), net)
    few = TensorDataset(torch.zeros(4, 3), torch.tensor([0, -100, 1, -100]))
    for classes in ((), ("a", "b")):
        check(replace(same(few), classes=classes))
        check(replace(same(few), classes=classes), model())
    check(replace(same(TensorDataset(torch.zeros(3, 3), torch.tensor([0, 9, 1]))), classes=("a", "b")), void_9())
    with pytest.raises(DataError, match=r"All training samples of 'mine' are of one class \(1\)"):
        check(same(TensorDataset(torch.zeros(3, 3), torch.tensor([1, -100, 1]))))


def void_9() -> Model:
    return replace(model(), task=Classification(ignore=9))


@pytest.mark.parametrize(
    ("net", "targets"),
    [
        (model(), torch.tensor([-100, -100])),
        (void_9(), torch.tensor([9, -100])),
        (replace(model(), task=Regression()), torch.full((2, 2), -torch.inf)),
    ],
)
def test_a_split_without_any_label_is_refused(net: Model, targets: Tensor) -> None:
    some = torch.tensor([0, 1]) if targets.ndim == 1 else torch.zeros(2, 2)
    good, silent = (TensorDataset(torch.zeros(2, 3), y) for y in (some, targets))
    check(same(good), net)
    with pytest.raises(DataError, match="'mine', validation split: no sample has a label") as caught:
        check(replace(same(good), validation=silent), net)
    assert "\n" not in str(caught.value)


def test_minus_infinity_is_no_number_where_the_task_leaves_it_out() -> None:
    targets = torch.zeros(6, 2)
    targets[0], targets[4, 1] = -torch.inf, -torch.inf
    splits = same(TensorDataset(torch.zeros(6, 3), targets))
    check(splits)
    check(splits, replace(model(), task=Regression()))

    def distance(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()

    def patient(outputs: Tensor, targets: Tensor) -> Tensor:
        return distance(outputs[targets > -torch.inf], targets[targets > -torch.inf])

    def scores(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean(1)

    check(splits, replace(model(), task=CustomTask(loss=patient, scores=scores)))
    with pytest.raises(DataError, match="train split: the target of sample 0 holds minus infinity, and the task's"):
        check(splits, replace(model(), task=CustomTask(loss=distance, scores=scores)))
    for bad in (torch.nan, torch.inf):
        targets[5, 0] = bad
        with pytest.raises(DataError, match="the target of sample 5 holds values that are not finite"):
            check(splits, replace(model(), task=Regression()))


class Named(nn.Module):
    """Outputs in a dict, as many published networks give them."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": x[:, :2]}


class Spoilt(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] * float("nan")


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("mask")


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Named(), "The model gives a dict, and classification needs a tensor"),
        (nn.Flatten(0), "The model gives a tensor of shape (6,), and classification needs"),
        (Spoilt(), "computes values that are not numbers (NaN) from the first samples of 'mine'"),
        (Fails(), "The model cannot take the data 'mine'"),
        (nn.Conv1d(3, 2, 1), "cannot take the data"),
    ],
)
def test_a_model_that_classification_cannot_judge(net: nn.Module, words: str) -> None:
    with pytest.raises(DataError) as caught:
        check(GOOD, replace(model(), module=net))
    assert words in caught.value.message
    assert caught.value.hint


def test_targets_of_another_shape_than_the_outputs() -> None:
    pairs = TensorDataset(torch.zeros(4, 3), torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(DataError, match=r"the target of a sample has shape \(2,\); the model's output takes one class"):
        check(Splits(train=pairs, validation=pairs, test=pairs), model())


def test_a_task_of_ones_own_is_tried() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()

    numbers = TensorDataset(torch.zeros(4, 3), torch.zeros(4, 2))
    splits = Splits(train=numbers, validation=numbers, test=numbers)
    check(splits, replace(model(), task=CustomTask(loss=loss, scores=lambda o, t: (o - t).abs().mean(1))))
    whole = replace(model(), task=CustomTask(loss=loss, scores=loss))
    with pytest.raises(DataError, match=r"scores are a tensor of shape \(\) for 2 samples"):
        check(splits, whole)


def test_classes_that_come_after_positions_are_told() -> None:
    tokens = TensorDataset(torch.zeros(4, 6, 3), torch.zeros(4, 6, dtype=torch.long))
    with pytest.raises(DataError, match=r"transpose\(1, 2\)"):
        check(Splits(train=tokens, validation=tokens, test=tokens), model())


class Two(nn.Module):
    def forward(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sum": given["a"] + given["b"], "first": given["a"][:, :1]}


def two_losses(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    return sum(((outputs[name] - targets[name]) ** 2).mean() for name in outputs)  # pyright: ignore[reportReturnType]


def two_scores(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
    return (outputs["sum"] - targets["sum"]).abs().sum(1)


def named(first: float = 0.0, a: object = None) -> tuple[dict[str, object], dict[str, Tensor]]:
    given = {"a": torch.ones(3) if a is None else a, "b": torch.ones(3)}
    return given, {"sum": torch.zeros(3), "first": torch.tensor([first])}


TWO = Model(
    Two(),
    example=({"a": torch.zeros(1, 3), "b": torch.zeros(1, 3)},),
    task=CustomTask(loss=two_losses, scores=two_scores),
)


def test_inputs_and_targets_may_be_dicts() -> None:
    samples = Listed(named(), named(1.0))
    check(Splits(train=samples, validation=samples, test=samples), TWO)


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (named(float("nan")), "the target of sample 1 holds values that are not finite"),
        (named(a=torch.ones(2)), r"sample 1 is \(2,\) float32 and \(3,\) float32, the first one \(3,\)"),
        (named(a="word"), "the input of sample 1 is a dict with a str in it, not a tensor"),
        ((named()[0], {"sum": "word"}), "the target of sample 1 is a dict with a str in it, which holds no numbers"),
    ],
)
def test_faults_within_dicts_are_found(spoilt: object, words: str) -> None:
    samples, good = Listed(named(), spoilt), Listed(named(), named())
    with pytest.raises(DataError, match=words):
        check(Splits(train=samples, validation=good, test=good), TWO)


def test_a_classification_needs_plain_targets() -> None:
    samples = Listed((torch.zeros(3), {"label": 0}), (torch.zeros(3), {"label": 1}))
    with pytest.raises(DataError, match="a target is a dict, and classification needs class numbers"):
        check(Splits(train=samples, validation=samples, test=samples), model())
