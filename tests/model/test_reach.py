"""Networks are found wherever a value keeps them, each once, and whole programs are not walked through."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from karui.model import Model
from karui.model.reach import networks

INNER = nn.Linear(2, 2)


class Holding(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.registered, self.held = nn.Linear(2, 2), held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.registered(x)


class Named(nn.Module):
    """Its forward names a network of the file."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return INNER(x)


@pytest.mark.parametrize(
    "held",
    [[INNER, INNER], {"a": (INNER,)}, functools.partial(INNER, 1), INNER.forward, lambda x: INNER(2 * x), {INNER}],
    ids=["list", "dictionary", "partial", "method", "function", "set"],
)
def test_a_module_comes_first_then_what_it_holds_without_registering(held: Any) -> None:
    outer = Holding([held])
    assert networks(outer) == (outer, INNER)
    assert networks(held) == (INNER,)


def test_what_the_forward_names_is_reached_too() -> None:
    assert networks(nn.Sequential(Named()))[1:] == (INNER,)


LISTED = [INNER]


def helper(x: torch.Tensor) -> torch.Tensor:
    return INNER(x)


class Shared:
    net = INNER

    @staticmethod
    def ask(x: torch.Tensor) -> torch.Tensor:
        return Shared.net(x)


SPACE = SimpleNamespace(net=INNER, model=Model(INNER, example=(torch.zeros(1, 2),)))


class Slotted:
    __slots__ = ("net",)

    def __init__(self) -> None:
        self.net = INNER


class Calling:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return helper(x)


class Delegating(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return LISTED[0](x)


def keyword(x: torch.Tensor, *, net: nn.Module = INNER) -> torch.Tensor:
    return net(x)


@pytest.mark.parametrize(
    "held",
    [lambda x: [net(x) for net in LISTED], lambda x: [INNER(x) for _ in "ab"], lambda x: helper(2 * x), Shared.ask,
     lambda x: SPACE.net(2 * x), lambda x: SPACE.model.module(2 * x), Slotted(), Calling(), keyword,
     Delegating().forward],
    ids=["list", "comprehension", "helper", "class", "namespace", "model", "slots", "callable", "keyword", "method"],
)  # fmt: skip
def test_what_a_function_names_by_another_way_is_reached(held: Any) -> None:
    assert INNER in networks(held)


def test_circles_end_and_what_holds_nothing_reaches_nothing() -> None:
    circle: list[Any] = []
    circle.append(circle)
    outer = Holding(circle)
    circle.append(outer)
    assert networks(outer) == (outer,)
    assert networks(("words", 3, torch.ones(2), None, int)) == ()


def test_a_captured_program_is_one_network() -> None:
    program = torch.export.export(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (torch.ones(1, 2),)).module()
    assert networks(program) == (program,)
    outer = Holding(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)))
    assert networks(outer) == (outer,)
