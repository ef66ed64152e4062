"""What a person may ask for: `time=0.5`, `time=2.5ms`, `bytes=200KB`, and how much accuracy may be lost."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from karui.errors import UsageError, require
from karui.measuring.values import bytes_text, seconds_text

SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
BYTES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3}
UNITS: Mapping[str, Mapping[str, float]] = {"time": SECONDS, "bytes": BYTES}
EXAMPLES = {"time": "time=0.5 (half of the dense model's) or time=2.5ms", "bytes": "bytes=0.3 or bytes=200KB"}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The most that a quantity may be: a share of the dense model's, or so many seconds or bytes.

    Settings:
        quantity: "time" or "bytes".
        amount: the share, or the number of seconds or bytes.
        absolute: which of the two `amount` is.
    """

    quantity: str
    amount: float
    absolute: bool = False

    def share(self, dense: float) -> float:
        """The limit as a share of the dense model's quantity; a limit above that is no limit."""
        return min(1.0, self.amount / dense) if self.absolute else self.amount

    def __str__(self) -> str:
        if not self.absolute:
            return f"{self.quantity}={self.amount:g}"
        text = seconds_text if self.quantity == "time" else bytes_text
        return f"{self.quantity}={text(self.amount).replace(' ', '')}"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """All limits together.

    Settings:
        limits: at most one for each quantity.
        max_drop: how much worse the metric may become: points of accuracy, or per cent of any other metric's value;
            None sets no floor.

    Raises:
        UsageError: the floor is out of range.

    Example:
        >>> str(read_budget("time=0.5,bytes=200KB", max_drop=1.0))
        'time=0.5,bytes=200kB, at most 1 lost'
    """

    limits: tuple[Limit, ...] = field(default_factory=tuple)
    max_drop: float | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.max_drop, Real)
        fits = self.max_drop is None or (number and 0 <= self.max_drop <= 100)
        told = f"--max-drop is {self.max_drop:g}." if number else f"--max-drop is {self.max_drop!r}."
        hint = "Give points of accuracy (or per cent of another metric) from 0 to 100, for example 1.0."
        require(fits, told, hint, UsageError)

    @property
    def shares(self) -> dict[str, float]:
        """The limits that are shares, by quantity; absolute ones need the dense model's measurement."""
        return {limit.quantity: limit.amount for limit in self.limits if not limit.absolute}

    def against(self, dense: Mapping[str, float]) -> dict[str, float]:
        """Every limit as a share of what the dense model takes."""
        return {limit.quantity: limit.share(dense[limit.quantity]) for limit in self.limits}

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {"limits": [str(limit) for limit in self.limits], "max_drop": self.max_drop}

    def __str__(self) -> str:
        told = ",".join(map(str, self.limits)) or "no limit"
        return told if self.max_drop is None else f"{told}, at most {self.max_drop:g} lost"


def read_budget(given: str | Mapping[str, float | str] | None, *, max_drop: float | None = None) -> Budget:
    """The budget that `--budget` and `--max-drop` say.

    Args:
        given: "time=0.5,bytes=200KB", or a mapping of the same; None or empty sets no limit.
        max_drop: see `Budget`.

    Raises:
        UsageError: it is neither text nor a mapping, a key is unknown or given twice, an amount cannot be read or
            is out of range.

    Example:
        >>> read_budget({"time": "2.5ms"}).limits[0].amount
        0.0025
    """
    known = given is None or isinstance(given, str | Mapping)
    told = f"The budget is {given!r}, and it does not say of what."
    require(known, told, 'Give "time=0.5,bytes=200KB", or {"time": 0.5, "bytes": "200KB"}.', UsageError)
    if given is None or isinstance(given, str):
        parts = [part.partition("=") for part in (given or "").split(",") if part.strip()]
        pairs = [(key.strip(), value.strip()) for key, _, value in parts]
    else:
        pairs = [(key, str(value)) for key, value in given.items()]
    keys = [key for key, _ in pairs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    require(twice is None, f"--budget gives {twice} twice.", "Give each quantity once.", UsageError)
    return Budget(limits=tuple(_limit(key, value) for key, value in pairs), max_drop=max_drop)


def _limit(key: str, value: str) -> Limit:
    listing = f"Give {' and '.join(EXAMPLES.values())}."
    require(key in UNITS, f"Budget '{key}' is not known.", listing, UsageError)
    units = UNITS[key]
    hint = f"Give {EXAMPLES[key]}; a share lies above 0 and below 1."
    found = re.fullmatch(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([A-Za-zµ]*)", value)
    known = found is not None and (not found[2] or found[2] in units)
    listing = f" Units: {', '.join(units)}."
    require(known, f"'{key}={value}' is no budget.", hint + listing, UsageError)
    assert found is not None  # noqa: S101  (refused above)
    amount, absolute = float(found[1]) * units.get(found[2], 1.0), bool(found[2])
    if absolute:
        require(amount > 0, f"{key}={value} leaves nothing.", hint, UsageError)
        require(math.isfinite(amount), f"{key}={value} is no limit.", hint, UsageError)
    else:
        require(0 < amount < 1, f"{key}={value} is no share of the dense model's {key}.", hint, UsageError)
    return Limit(quantity=key, amount=amount, absolute=absolute)
