"""Fingerprints: equal content, equal name; any change that could change a training, another name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
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


def _forest(labels: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    forest = RandomForestClassifier(3, random_state=0).fit(np.arange(8.0)[:, None], labels)
    return lambda x: forest.predict_proba(2 * x)


class Point:
    __slots__ = ("x",)

    def __init__(self, x: float) -> None:
        self.x = x


def _calling(factor: float) -> Any:
    code = f"class Calls:\n    def __call__(self, x):\n        return x * {factor}\n"
    space: dict[str, Any] = {"__name__": "mine"}
    exec(code, space)  # noqa: S102  (two classes of one name)
    return space["Calls"]()


def _scaled(factor: float) -> Any:
    def scale(x: torch.Tensor, *, by: float = factor) -> torch.Tensor:
        return x * by

    return scale


def _traced(factor: float) -> nn.Module:
    return torch.fx.symbolic_trace(Times(factor))


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.layer, self.factor = nn.Identity(), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.factor


@pytest.mark.parametrize(
    ("one", "alike", "other"),
    [
        (_forest([0, 1] * 4), _forest([0, 1] * 4), _forest([1, 0] * 4)),
        (Point(1.0), Point(1.0), Point(2.0)),
        (_calling(2.0), _calling(2.0), _calling(3.0)),
        (_scaled(2.0), _scaled(2.0), _scaled(3.0)),
        (_traced(2.0), _traced(2.0), _traced(3.0)),
    ],
    ids=["forest in a function", "slots", "code of a callable", "keyword default", "traced program"],
)
def test_what_hides_its_content_counts_by_it_all_the_same(one: Any, alike: Any, other: Any) -> None:
    assert fingerprint(one) == fingerprint(alike)
    assert fingerprint(one) != fingerprint(other)


def test_an_object_without_attributes_counts_by_its_class_also_where_it_cannot_be_written() -> None:
    class Here:
        pass

    assert fingerprint(Here()) == fingerprint(Here())


class Sealed:
    """Shows no attributes, and does not let itself be written."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(protocol)


def test_what_cannot_be_told_is_like_nothing_else() -> None:
    assert fingerprint(object()) == fingerprint(object())
    assert fingerprint(Sealed()) != fingerprint(Sealed())
