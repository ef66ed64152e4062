"""The protocol: a technique is its settings, with one verb."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from karui.errors import NeedError, require
from karui.technique.kinds import fitted, hints_of, require_finite

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique.bench import Bench
    from karui.technique.card import Card, Need


@runtime_checkable
class Technique(Protocol):
    """A frozen dataclass of settings with one method.

    Every technique of the catalogue also carries its `Card` as the class attribute `card` (see `technique`); a pipeline
    (`Then`) is a technique without one.
    """

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The lighter model; the given one stays as it is. A builder takes None where `bench` tells the task."""
        ...


T = TypeVar("T", bound=type)


def technique(card: Card) -> Callable[[T], T]:
    """Class decorator: put the card on a settings dataclass, and let `apply` refuse what lacks the card's needs.

    Settings of another kind than their annotation are refused as they are given, before the class looks at them;
    numbers that are not finite after it did, where its own message may say more.

    Raises:
        SettingError: the class is no frozen dataclass, or the card's identity names a setting that is not there.
    """

    def decorate(cls: T) -> T:
        params = getattr(cls, "__dataclass_params__", None)
        require(params is not None and params.frozen, f"{cls.__name__} must be a frozen dataclass of its settings")
        names = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted((set(card.identity or {}) | set(card.quick)) - names)
        require(not unknown, f"card '{card.slug}': {unknown} are not settings of {cls.__name__}")
        cls.card = card  # pyright: ignore[reportAttributeAccessIssue]
        apply = cls.apply  # pyright: ignore[reportAttributeAccessIssue]

        @functools.wraps(apply)
        def checked(self: Technique, model: Model | None, bench: Bench) -> Model:
            missing = lacking(self, model, bench)
            if missing:
                raise NeedError(*missing[0])
            return apply(self, model, bench)

        cls.apply = checked  # pyright: ignore[reportAttributeAccessIssue]
        cls.__init__ = _of_their_kinds(cls)
        return cls

    return decorate


def _of_their_kinds(cls: type) -> Callable[..., None]:
    """The class's `__init__`, which refuses settings of a wrong kind."""
    init = cls.__init__

    @functools.wraps(init)
    def checked(self: Any, *given: Any, **settings: Any) -> None:
        hints = hints_of(cls)
        fit = {name: fitted(value, hints[name], name) if name in hints else value for name, value in settings.items()}
        init(self, *given, **fit)
        for name, value in fit.items():
            require_finite(value, hints[name], name)

    return checked


def card_of(step: Technique) -> Card | None:
    """The card of a technique of the catalogue; None for a pipeline."""
    return getattr(step, "card", None)


def require_passes(**passes: int) -> None:
    """Refuse a negative number of passes over the training data, by the name of its setting; 0 trains nothing."""
    for name, number in passes.items():
        require(number >= 0, f"{name} is {number}; give a number of passes over the training data, 0 or more")


def lacking(step: Technique, model: Model | None, bench: Bench) -> list[tuple[str, str]]:
    """What the technique, or any step of a pipeline, needs and was not given: (message, remedy) pairs.

    A technique whose needs depend on its settings tells them by a method of its own, `lacks(bench, first=...)`, where
    `first` says that no step comes before it.
    """
    missing, present = [], model is not None
    for number, part in enumerate(getattr(step, "steps", (step,))):
        card = card_of(part)
        if card is None:
            present = True
            continue
        missing += _lacks(card, needs_of(part), present, model, bench)
        own = getattr(part, "lacks", None)
        if own is not None:
            missing += own(bench, first=number == 0)
        present = True
    return missing


def require_fit(steps: tuple[Technique, ...], model: Model, bench: Bench) -> None:
    """Let each step of a pipeline that can look at what it is given besides the model, such as a teacher.

    A technique does so by a method of its own, `fits(model, bench)`, which trains nothing. Steps after one that gives
    other outputs are left out: what they will be given is not known.

    Raises:
        KaruiError: something does not fit.
    """
    for step in steps:
        own, card = getattr(step, "fits", None), card_of(step)
        if own is not None:
            own(model, bench)
        if card is None or not card.same_signature:
            break


def needs_of(step: Technique) -> tuple[Need, ...]:
    """What the technique needs with its settings: its own `needs()` where it has one, else what the card says.

    A pruning that is asked for no retraining needs no data, though its card says training.
    """
    own = getattr(step, "needs", None)
    card = card_of(step)
    return own() if own is not None else () if card is None else card.needs


def _lacks(
    card: Card, needs: tuple[Need, ...], present: bool, model: Model | None, bench: Bench
) -> list[tuple[str, str]]:
    missing = []
    if not present and card.kind not in ("build", "reader"):
        missing.append((f"'{card.slug}' needs a model to work on.", "Give one, or put a technique that builds first."))
    if bench.train is None and {"calibration", "labels", "training"} & set(needs):
        what = "training data" if "training" in needs else "calibration data"
        missing.append((f"'{card.slug}' needs {what}.", "Give Bench(train=...), or --data on the command line."))
    if "labels" in needs and model is not None and model.task is None:
        missing.append(
            (
                f"'{card.slug}' needs labels, and the model has no task to judge them by.",
                "Give Model(..., task=karui.Classification()), or another task.",
            )
        )
    return missing
