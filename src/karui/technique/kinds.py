"""The kinds of settings: what a technique is given fits the annotations of its fields, or is refused by name."""

from __future__ import annotations

import collections.abc
import functools
import importlib
import math
import pathlib
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
from torch import Tensor

from karui.errors import SettingError, require

_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    """The annotations of a settings class, also those that name what is imported for type checking only."""
    names: dict[str, Any] = {**vars(typing), **vars(collections.abc), "Path": pathlib.Path}
    for floor in ("karui.model", "karui.train", "karui.measuring", "karui.technique"):
        names |= {name: value for name, value in vars(importlib.import_module(floor)).items() if name[0].isupper()}
    return typing.get_type_hints(cls, globalns={**names, **vars(sys.modules[cls.__module__])})


def fitted(value: Any, hint: Any, where: str) -> Any:
    """A setting as its annotation has it: scalars of numpy and torch as numbers, lists as tuples where it says so.

    Numbers, texts, truth values, choices, and sequences, tables and alternatives of them are looked at; whatever else
    an annotation names (a model, a function) is the technique's own matter.

    Raises:
        SettingError: it is of another kind; the message names `where`, the value, and what it takes.

    Example:
        >>> fitted([1, 2.5], tuple[float, ...], "penalties")
        (1, 2.5)
        >>> fitted("conv1", tuple[str, ...], "skip")
        Traceback (most recent call last):
        karui.errors.SettingError: skip is 'conv1', a str; it takes several values. Write ('conv1',) for one.
    """
    if isinstance(value, np.generic | Tensor) and value.ndim == 0:
        value = value.item()
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return _one_of(value, inner, where)
    if kind is Literal:
        require(value in inner, f"{where} is {value!r}.", f"Choose from {', '.join(map(repr, inner))}.")
    elif kind in _WORDS:
        require(_is(value, kind), f"{where} is {value!r}, a {type(value).__name__}; it takes {_WORDS[kind]}.")
    elif kind in (tuple, collections.abc.Sequence):
        return _several(value, kind, inner, where)
    elif kind in (dict, Mapping):
        _table(value, inner[1] if inner else Any, where)
    return value


def require_finite(value: Any, hint: Any, where: str) -> None:
    """Refuse a number that is infinite or none at all, where the annotation asks for a number."""
    asked = float in (hint, *get_args(hint))
    if asked and isinstance(value, float):
        require(math.isfinite(value), f"{where} is {value}; give a finite number.")
    elif asked and isinstance(value, tuple | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            require_finite(item, float, where)


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a plain kind: an int is a float too, but a truth value is no number."""
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, kind)


def _one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    """The value as the first kind that it fits."""
    kinds = tuple(part for kind in kinds for part in (get_args(kind) if get_origin(kind) is Union else (kind,)))
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    kinds = tuple(kind for kind in kinds if get_origin(kind) is not Literal)
    if choices:  # together they are one list to choose from
        kinds = (*kinds, Literal[tuple(choices)])
    refused = SettingError(f"{where} is {value!r}.")
    for kind in kinds:
        if kind is types.NoneType:
            if value is None:
                return value
            continue
        try:
            return fitted(value, kind, where)
        except SettingError as error:
            refused = error
    raise refused


def _table(value: Any, item: Any, where: str) -> None:
    require(isinstance(value, Mapping), f"{where} is {value!r}, a {type(value).__name__}; it takes a table.")
    for key, held in value.items():
        fitted(held, item, f"{where}[{key!r}]")


def _several(value: Any, kind: Any, inner: tuple[Any, ...], where: str) -> Any:
    """A sequence, each of its items as its annotation has it; a table where pairs are asked for is their sequence."""
    if isinstance(value, Mapping) and inner and get_origin(inner[0]) is tuple and len(get_args(inner[0])) == 2:
        value = tuple(value.items())
    told = f"{where} is {value!r}, a {type(value).__name__}; it takes several values."
    require(not isinstance(value, str), told, f"Write ({value!r},) for one.")
    require(isinstance(value, collections.abc.Sequence), told, "Write (...), with commas.")
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        require(len(value) == len(inner), f"{where} is {value!r}; it takes {len(inner)} values.")
        items = inner
    else:
        items = (inner[0] if inner else Any,) * len(value)
    made = tuple(fitted(v, item, f"{where}[{i}]") for i, (v, item) in enumerate(zip(value, items, strict=True)))
    return made if kind is tuple else value
