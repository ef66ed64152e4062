"""Measured values to JSON and back, and the text of a number."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from karui.errors import UsageError

V = TypeVar("V")


def to_json(value: Any) -> Any:
    """A dataclass, or a container of them, as JSON values; a number that is not finite becomes null.

    Example:
        >>> to_json({"low": float("-inf"), "shape": (1, 2)})
        {'low': None, 'shape': [1, 2]}
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def from_json(cls: type[V], values: Mapping[str, Any]) -> V:
    """The dataclass that `to_json` wrote. A null where the field is a number reads as "not known" (nan).

    Raises:
        UsageError: the values do not fit the class.
    """
    hints = typing.get_type_hints(cls)
    try:
        fields = {f.name for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
        return cls(**{name: _read(hints[name], item) for name, item in values.items() if name in fields})
    except (TypeError, AttributeError, KeyError) as error:
        raise UsageError(
            f"These values are no saved {cls.__name__}: {error}.", "Were they written by karui's to_json?"
        ) from error


def _read(hint: Any, value: Any) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        value = None if value is None else _read(next(arg for arg in args if arg is not type(None)), value)
    elif origin is tuple:
        each = [args[0]] * len(value) if args[1:] == (Ellipsis,) else args
        value = tuple(_read(inner, item) for inner, item in zip(each, value, strict=True))
    elif origin in (dict, Mapping):
        value = {key: _read(args[1], item) for key, item in value.items()}
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        value = from_json(hint, value)
    elif hint is float:
        value = math.nan if value is None else float(value)
    return value


def bytes_text(count: float) -> str:
    """A number of bytes as a person reads it.

    Example:
        >>> bytes_text(512), bytes_text(1_234_000)
        ('512 B', '1.23 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def count_text(count: float) -> str:
    """A count as a person reads it.

    Example:
        >>> count_text(40_813_184), count_text(270)
        ('40.8 M', '270')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def seconds_text(seconds: float) -> str:
    """A duration as a person reads it.

    Example:
        >>> seconds_text(0.00123), seconds_text(2.5)
        ('1.23 ms', '2.5 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"
