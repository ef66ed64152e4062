"""Fingerprints: equal content, equal name; any change that could change a training, another name."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from karui.model import Classification, Model
from karui.train import Influence, Training
from karui.train.fingerprint import fingerprint


def scaled(factor: float) -> object:
    return lambda x: x * factor


def model(weight: float = 1.0) -> Model:
    net = nn.Linear(2, 2)
    nn.init.constant_(net.weight, weight)
    nn.init.zeros_(net.bias)
    return Model(net, example=(torch.zeros(1, 2),), task=Classification())


@dataclass(frozen=True)
class Teacher(Influence):
    teacher: Model
    temperature: float = 4.0


class Own(Dataset[tuple[float, int]]):
    def __init__(self, *values: float) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, number: int) -> tuple[float, int]:
        return self.values[number], number


class Method:
    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self) -> float:
        return self.weight


class Times(nn.Module):
    """A factor that torch knows nothing of."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


@pytest.mark.parametrize(
    ("make", "other"),
    [
        (lambda: torch.ones(3), torch.zeros(3)),
        (lambda: torch.ones(3), torch.ones(3, 1)),
        (lambda: torch.ones(3), torch.ones(3, dtype=torch.float64)),
        (lambda: np.arange(3), np.arange(4)),
        (lambda: torch.tensor(float("nan"), dtype=torch.bfloat16), torch.tensor(0.0, dtype=torch.bfloat16)),
        (model, model(2.0)),
        (lambda: Teacher(model()), Teacher(model(2.0))),
        (lambda: Teacher(model()), Teacher(model(), temperature=2.0)),
        (lambda: nn.Sequential(Times(2.0)), nn.Sequential(Times(3.0))),
        (lambda: scaled(2.0), scaled(3.0)),
        (lambda: lambda x: x * 2, lambda x: x * 3),
        (lambda: functools.partial(round, ndigits=2), functools.partial(round, ndigits=3)),
        (lambda: Method(1.0).loss, Method(2.0).loss),
        (lambda: TensorDataset(torch.ones(3)), TensorDataset(torch.zeros(3))),
        (lambda: Own(1.0, 2.0), Own(1.0, 3.0)),
        (lambda: Own(1.0, 2.0), Own(1.0, 2.0, 2.0)),
        (lambda: Own(1.0, 2.0, 3.0), Own(1.0, 5.0, 3.0)),
        (lambda: {"a": 1, "b": {2, 3}}, {"a": 1, "b": {2, 4}}),
        (lambda: [[1], [2, 3]], [[1, 2], [3]]),
        (Training, Training(epochs=11)),
        (object, 3),
    ],
)  # fmt: skip
def test_equal_content_has_one_name_and_other_content_another(make: object, other: object) -> None:
    assert fingerprint(make()) == fingerprint(make())
    assert fingerprint(make()) != fingerprint(other)


def test_a_module_counts_by_its_code_and_not_by_its_mode() -> None:
    plain = type("Times", (Times,), {"__module__": __name__})
    assert repr(plain(2.0)) == repr(Times(2.0)) == repr(Times(3.0))
    assert fingerprint(Times(2.0)) == fingerprint(Times(2.0).eval())
    other = type("Times", (Times,), {"__module__": __name__, "forward": lambda self, x: self.factor + x})
    assert fingerprint(other(2.0)) != fingerprint(plain(2.0))


def test_few_samples_of_a_long_data_set_are_read() -> None:
    class Counted(Own):
        def __init__(self) -> None:
            super().__init__(*map(float, range(1000)))
            self.read: list[int] = []

        def __getitem__(self, number: int) -> tuple[float, int]:
            self.read.append(number)
            return super().__getitem__(number)

    data = Counted()
    fingerprint(data)
    assert len(data.read) == 64
    assert {0, 999} <= set(data.read)


def test_what_contains_itself_ends() -> None:
    ring: list[object] = [1]
    ring.append(ring)
    assert fingerprint(ring) == fingerprint(ring)
