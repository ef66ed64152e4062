"""What fails while a menu is made or carried out is left out and told; all else goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.errors import CaptureError, SurgeryError
from karui.index import Entry
from karui.model import Classification, Model, coupled_groups
from karui.recipes.budget import menu as menus
from karui.recipes.budget.cache import TimingCache
from karui.recipes.budget.menu import Menu, Offer, menu
from karui.recipes.budget.refusals import Refusals
from karui.recipes.budget.skips import LeaveOut
from karui.recipes.budget.timing import Stopwatch
from karui.recipes.budget.visits import Visitor
from karui.technique import Bench, Candidate


def low_rank() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 4, bias=False), nn.Linear(4, 256))


class Breaks(nn.Module):
    """A layer that a lineage can hold, and that nothing can run."""

    def settings(self) -> dict[str, Any]:
        return {}

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("kernel is only for another processor")


Breaks.__module__ = "karui.layers.of_a_test"


def offer(text: str, make: Callable[[], Any], path: str = "2") -> Candidate:
    return Candidate(place="2", technique=LeaveOut(part="2"), text=text, layers=lambda: {path: make()})


@dataclass(frozen=True, kw_only=True)
class Good:
    """A technique without a fault."""

    def apply(self, model: Model, bench: Bench) -> Model:
        del bench
        return model

    def candidates(self, model: Model, bench: Bench, *, multiple: int = 1) -> Iterator[Any]:
        del model, bench, multiple
        yield offer("rank 4", low_rank)


@dataclass(frozen=True, kw_only=True)
class Fails(Good):
    """Fails after its first offer."""

    def candidates(self, model: Model, bench: Bench, *, multiple: int = 1) -> Iterator[Any]:
        yield from super().candidates(model, bench, multiple=multiple)
        raise ValueError("this chapter fails on this model")


@dataclass(frozen=True, kw_only=True)
class Needs(Good):
    """Has a setting without default."""

    bits: int


@dataclass(frozen=True, kw_only=True)
class Strange(Good):
    """Offers what is no candidate."""

    def candidates(self, model: Model, bench: Bench, *, multiple: int = 1) -> Iterator[Any]:
        del model, bench, multiple
        yield "rank 4"


@dataclass(frozen=True, kw_only=True)
class Faulty(Good):
    """Offers candidates that cannot be carried out, and one that can."""

    def candidates(self, model: Model, bench: Bench, *, multiple: int = 1) -> Iterator[Any]:
        def raises() -> nn.Module:
            raise ZeroDivisionError("no columns")

        yield offer("breaks", Breaks)
        yield offer("typo", low_rank, "22")
        yield offer("raises", raises)
        yield offer("no layer", lambda: "relu")
        yield offer("own class", lambda: Own(256, 256))
        yield Candidate(place="0", technique=LeaveOut(part="0"), text="no group", cut={"nowhere": torch.arange(2)})
        yield from super().candidates(model, bench, multiple=multiple)


class Own(nn.Linear):
    """Of a class that no lineage can hold."""


def catalogue(kinds: list[type], monkeypatch: pytest.MonkeyPatch) -> None:
    """These techniques alone."""
    room = ModuleType("room_of_a_test")
    entries = []
    for kind in kinds:
        setattr(room, kind.__name__, kind)
        card = {"survey": 1, "slug": kind.__name__.lower(), "title": "", "kind": "replace"}
        entries.append(Entry(room="lowrank", module=room.__name__, name=kind.__name__, card=card, source=""))
    monkeypatch.setitem(sys.modules, room.__name__, room)
    monkeypatch.setattr(menus, "techniques", lambda: tuple(entries))


def menu_of(kinds: list[type], monkeypatch: pytest.MonkeyPatch) -> Menu:
    """The menu of a small network, from these techniques alone."""
    catalogue(kinds, monkeypatch)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    model = Model(net.eval(), example=(torch.zeros(2, 8),), task=Classification())
    bench = Bench(train=TensorDataset(torch.randn(64, 8), torch.zeros(64, dtype=torch.long)))
    return menu(model, bench, Stopwatch(cache=TimingCache()))


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    ("kind", "note"),
    [
        (Fails, "fails offers no more: ValueError: this chapter fails on this model"),
        (Needs, "needs offers nothing: TypeError: "),
        (Strange, "strange offers nothing: it gave a str where a Candidate is due"),
    ],
)
def test_a_technique_that_fails_is_left_out_and_told(kind: type, note: str, monkeypatch: pytest.MonkeyPatch):
    found = menu_of([kind, Good], monkeypatch)
    assert [told for told in found.notes if told.startswith(note)]
    assert [o.candidate.text for o in found.offers["layer 2"]] == ["rank 4"] * (2 if kind is Fails else 1)


@pytest.mark.usefixtures("steady")
def test_a_candidate_that_fails_is_left_out_and_others_of_its_technique_stay(monkeypatch: pytest.MonkeyPatch):
    found = menu_of([Faulty], monkeypatch)
    assert [[o.candidate.text for o in offers] for offers in found.offers.values()] == [["rank 4"]]
    notes = "\n".join(found.notes)
    assert "LeaveOut is left out at 2 (breaks): CaptureError: The new Breaks cannot be exported to ONNX" in notes
    assert "2 (typo): SurgeryError: The model has no layer '22'." in notes
    assert "2 (raises): ZeroDivisionError: no columns" in notes
    assert "2 (no layer): " in notes
    assert "2 (own class): SurgeryError: A layer of class" in notes
    assert "0 (no group): " in notes
    assert found.slower == 0


@pytest.mark.usefixtures("steady")
def test_a_candidate_that_fails_on_data_is_left_out(monkeypatch: pytest.MonkeyPatch):
    """Timed and exported, but not run: the network is as it was for the next."""
    made: list[nn.Module] = []

    def once() -> nn.Module:
        made.append(low_rank())
        return made[-1] if len(made) == 1 else nn.Linear(3, 3)

    monkeypatch.setattr(Good, "candidates", lambda *_, **__: iter([offer("once", once), offer("rank 4", low_rank)]))
    monkeypatch.setattr("karui.recipes.budget.tables.Cost.doubtful", False)
    found = menu_of([Good], monkeypatch)
    assert [o.candidate.text for o in found.offers["layer 2"]] == ["rank 4"]
    assert any("2 (once): RuntimeError" in note for note in found.notes)


def test_a_reason_is_told_once_and_an_interrupt_goes_through():
    refusals, some = Refusals(), [offer(f"rank {k}", low_rank) for k in range(6)]
    for candidate in some[:5]:
        with refusals.trying(candidate):
            raise ValueError("no\nsecond line")
    assert refusals.notes == ("LeaveOut is left out at 2 (rank 0), 2 (rank 1), 2 (rank 2) and 2 more: ValueError: no",)
    assert refusals.left(some) == [some[5]]
    with pytest.raises(KeyboardInterrupt), refusals.trying(some[5]):
        raise KeyboardInterrupt
    assert refusals.left(some) == [some[5]]


def deep() -> Model:
    torch.manual_seed(0)
    wide = [layer for _ in range(3) for layer in (nn.Linear(256, 256), nn.ReLU())]
    net = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), *wide, nn.Linear(256, 4))
    return Model(net.eval(), example=(torch.zeros(2, 8),), task=Classification())


PLACES = ("2", "4", "6")


def refuses(step: str, refused: Callable[[set[str]], bool], error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the surgery fails by this error at some places."""
    plain = getattr(menus, step)

    def failing(model: Model, what: Any = None, **named: Any) -> Any:
        thin = {path for path in PLACES if isinstance(model.module.get_submodule(path), nn.Sequential)}
        if refused(thin if what is None else set(what)):
            raise error
        return plain(model, **named) if what is None else plain(model, what, **named)

    monkeypatch.setattr(menus, step, failing)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("remove_units", CaptureError("The program of training cannot be captured.")),
        ("replace_layers", OverflowError("a table for one")),
        ("onnx_form", CaptureError("No operator for two.")),
        ("replace_layers", SurgeryError("It does not run.")),
    ],
)
def test_what_works_alone_and_fails_together_is_struck_off(
    step: str, error: Exception, monkeypatch: pytest.MonkeyPatch
):
    """Whatever is raised; and it is the place that does not go with others before it, not the last one."""
    model = deep()

    def offered(path: str) -> Offer:
        name = LeaveOut(part=path)
        cut = Candidate(place=path, technique=name, text="half", cut={path: torch.arange(128)})
        new = Candidate(place=path, technique=name, text="rank 4", layers=lambda: {path: low_rank()})
        return Offer(candidate=cut if step == "remove_units" else new, harm=0.1, seconds=-1.0, bytes=-1.0)

    def made() -> Menu:
        offers = {path: (offered(path),) for path in PLACES}
        return Menu(model=model, offers=offers, tables=(), analysis=coupled_groups(model))

    refuses(step, lambda paths: {"2", "4"} <= paths, error, monkeypatch)
    found = made()
    with pytest.raises(SurgeryError) as told:
        found.carry_out(dict.fromkeys(PLACES, 1))
    assert str(error) in str(told.value)
    assert found.failed == {"4"}
    assert found.carry_out({"2": 1, "4": 0, "6": 1}).parameters < model.parameters
    refuses(step, lambda paths: "2" in paths, error, monkeypatch)
    found = made()
    with pytest.raises(SurgeryError):
        found.carry_out({"2": 1, "6": 1})
    assert found.failed == {"2"}


@pytest.mark.usefixtures("steady")
def test_a_run_goes_on_where_what_works_alone_fails_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def candidates(*_: Any, **__: Any) -> Iterator[Candidate]:
        for path in PLACES:
            yield Candidate(
                place=path, technique=LeaveOut(part=path), text="rank 4", layers=lambda path=path: {path: low_rank()}
            )

    catalogue([Good], monkeypatch)
    monkeypatch.setattr(Good, "candidates", candidates)
    monkeypatch.setattr(menus, "skips", lambda _: ())
    refuses("replace_layers", lambda paths: len(paths) > 1, OverflowError("a table for one"), monkeypatch)
    data = TensorDataset(torch.randn(64, 8), torch.zeros(64, dtype=torch.long))
    visitor = Visitor(
        dense=deep(), bench=Bench(train=data, validation=data), out=tmp_path, watch=Stopwatch(), mark="", int8=False,
        max_drop=None, wanted=("bytes",), find_rate=False, tell=lambda _: None,
    )  # fmt: skip
    point = visitor.lighten(visitor.start(), {"bytes": 0.1}, 0)
    assert point is not None
    assert len(point.chosen) == 1
    notes = [note for note in visitor.notes if note.startswith("left out, as it was refused: layer ")]
    assert len(notes) == 2
    assert all(note.endswith(". OverflowError: a table for one") for note in notes)
