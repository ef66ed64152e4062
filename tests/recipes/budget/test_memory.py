"""A budget holds three copies of a model at most, and calibration data one batch at a time.

Networks and ONNX files count, in memory and by what they hold. What a training keeps beside the weights and what an
engine makes of a file for itself do not.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import karui
import karui.data
from karui.data import calibration
from karui.measuring import onnx, onnx_form
from karui.measuring.filed import Filed
from karui.model import Classification, Model
from karui.recipes.budget import harm
from karui.technique import Bench
from karui.train import SGD, Training

LARGE = 20_000
"""Values of a parameter that is counted."""


@dataclass
class Alive:
    """Values of large parameters and of ONNX files that are there at once, shared parameters counted once."""

    seen: dict[int, weakref.ref[nn.Parameter]] = field(default_factory=dict)
    files: dict[int, int] = field(default_factory=dict)
    most: float = 0
    collects: bool = True

    def add(self, parameter: nn.Parameter) -> None:
        """A new parameter: only then can there be more than before."""
        if parameter.numel() < LARGE:
            return
        self.seen[id(parameter)] = weakref.ref(parameter)
        self.look()

    def read(self, data: bytes) -> bytes:
        """What was read from a file, counted until nobody holds it."""
        if len(data) < 4 * LARGE:
            return data
        made = Read(data)
        made.files = self.files
        self.files[id(made)] = len(made)
        self.look()
        return made

    def look(self) -> None:
        """See whether there is more than before."""
        if self._now() > self.most:
            if self.collects:
                gc.collect()
            self.most = max(self.most, self._now())

    def _now(self) -> float:
        here = [parameter for held in self.seen.values() if (parameter := held()) is not None]
        held = {p.data_ptr(): p.numel() for p in here if type(p) is nn.Parameter and p.device.type == "cpu"}
        return sum(held.values()) + sum(self.files.values()) / 4


class Read(bytes):
    """Bytes that tell when they go."""

    files: dict[int, int]

    def __del__(self) -> None:
        self.files.pop(id(self), None)


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    """Every parameter that is made is counted, and every form that is read."""
    made, plain, read = Alive(), nn.Parameter.__new__, Filed.__get__

    def counted(cls: type, data: Any = None, requires_grad: bool = True) -> nn.Parameter:
        parameter = plain(cls, data, requires_grad)
        made.add(parameter)
        return parameter

    monkeypatch.setattr(onnx, "LARGE", 0)  # these networks stand for large ones
    monkeypatch.setattr(nn.Parameter, "__new__", counted)
    monkeypatch.setattr(Filed, "__get__", lambda *given: made.read(read(*given)))
    return made


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calibration batches were there at once, at each that was drawn; harm sees small ones."""
    held: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    counts: list[int] = []
    drawn = calibration.calibration_batches

    def watched(*given: Any, **named: Any) -> Iterator[tuple[Any, ...]]:
        for batch in drawn(*given, **named):
            held.update(batch)
            counts.append(len(held))
            yield batch

    monkeypatch.setattr(calibration, "calibration_batches", watched)
    monkeypatch.setattr(karui.data, "calibration_batches", watched)
    monkeypatch.setattr(harm, "BATCH", 32)
    return counts


def dense() -> tuple[Model, int]:
    """A network, and how many values its large parameters have."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(128, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 4),
    )
    whole = sum(p.numel() for p in net.parameters() if p.numel() >= LARGE)
    return Model(net.eval(), example=(torch.zeros(2, 128),), task=Classification()), whole


def test_copies_are_counted(alive: Alive):
    model, whole = dense()
    assert alive.most == whole
    copies = [model.copy() for _ in range(3)]
    assert alive.most == 4 * whole
    del copies
    model.copy()
    assert alive.most == 4 * whole


def test_files_are_counted_while_they_are_in_use(alive: Alive):
    model, whole = dense()
    form = onnx_form(model)
    alive.most = 0
    held = [form.data, form.data]
    assert 3 * whole < alive.most < 3.1 * whole
    del held
    alive.most = 0
    assert form.data
    assert whole < alive.most < 2.1 * whole


@pytest.mark.slow
@pytest.mark.usefixtures("steady", "short_menu")
@pytest.mark.parametrize(
    ("budget", "int8"), [("bytes=0.8", False), ("bytes=0.4", False), ("bytes=0.4", True), ("bytes=0.15", True)]
)
def test_three_copies_and_one_batch_at_a_time(alive: Alive, batches: list[int], budget: str, int8: bool):
    """The dense network, and what is made of it: cut, proved, trained, saved, written in 32 bits and in 8.

    In the last case a point of seven tenths is cut again; see `test_memory_of_steps` for the steps by themselves.
    """
    model, whole = dense()
    alive.collects = False  # a captured program that nobody lets go keeps its weights: only a cycle holds it
    draw = torch.Generator().manual_seed(0)
    rows = TensorDataset(torch.randn(320, 128, generator=draw), torch.randint(4, (320,), generator=draw))
    bench = Bench(train=rows, test=rows, training=Training(batch_size=64, optimizer=SGD(lr=0.01)))
    done = karui.compress(model, bench, budget=budget, max_drop=100, epochs=3, int8=int8)
    assert len(done.record["budget"]["points"]) > 1 or (int8 and done.met)
    assert 2 * whole < alive.most <= 3 * whole, f"{alive.most / whole:.2f} copies"
    assert len(batches) >= 4
    assert max(batches) <= 2  # the one that is used, and the next while it takes its place
