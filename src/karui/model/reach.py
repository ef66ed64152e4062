"""Networks that a value reaches: also those in plain lists, attributes and functions, of which torch knows not.

`nn.Module.eval`, `to` and `modules` act on what is registered. A part that lies in a list runs all the same, in the
mode and on the device that it happens to have.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from karui.model.walking import layers

_KNOWN = frozenset({"torch", "karui", "builtins"})
"""Packages whose modules register all that they run."""
_ARRAYS = frozenset({"torch", "numpy", "scipy", "sklearn"})
"""Packages whose objects are not looked into: they hold no networks, or hold whole programs."""
_CLOSED = _KNOWN | _ARRAYS | sys.stdlib_module_names
"""Packages whose functions and methods are not: they run no networks but those that they are given."""
_STANDARD = frozenset(vars(nn.Module()))
_ATOMS = (str, bytes, int, float, complex, type(None), Tensor, np.ndarray, torch.dtype, torch.device)


def is_foreign(kind: type) -> bool:
    """Whether a class is neither torch's nor karui's.

    Example:
        >>> is_foreign(nn.Linear)
        False
    """
    return kind.__module__.partition(".")[0] not in _KNOWN


def slots(value: Any) -> tuple[str, ...]:
    """Names of an object's attributes that lie in slots.

    Example:
        >>> class Point:
        ...     __slots__ = ("x", "y")
        >>> point = Point()
        >>> point.x = 1
        >>> slots(point)
        ('x',)
    """
    named = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
    flat = [name for names in named for name in ((names,) if isinstance(names, str) else names)]
    return tuple(name for name in flat if not name.startswith("__") and hasattr(value, name))


def networks(value: Any) -> tuple[nn.Module, ...]:
    """The torch modules that a value is or reaches, each once; a module first, and without what is registered with it.

    Args:
        value: a module; or a function, which reaches what it encloses, names, is bound to or holds, and what the
            functions that it names do; or anything else.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> [one is net for one in networks({"first": [net, functools.partial(net)]})]
        [True]
    """
    return tuple(_found(value, set()))


def _found(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    if isinstance(value, _ATOMS) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield value
        parts = layers(value).values()
        seen.update(map(id, parts))
        held = [one for part in parts for one in _held(part)]
    else:
        held = _within(value)
    for one in held:
        yield from _found(one, seen)


def _held(part: nn.Module) -> Iterable[Any]:
    """What a module of foreign code may run that is not registered with it: attributes, and what its methods name."""
    if not any(map(is_foreign, type(part).__mro__)):
        return ()
    return *(held for name, held in vars(part).items() if name not in _STANDARD), *_of_class(type(part))


def _of_class(kind: type) -> list[Any]:
    """What a class of foreign code and those above it hold: methods, networks, collections of them."""
    return [
        getattr(held, "__func__", held)  # of static and class methods
        for each in kind.__mro__
        if not _is_closed(each)
        for name, held in vars(each).items()
        if not name.startswith("__") or name == "__call__"
    ]


def _root(value: Any) -> str:
    return str(getattr(value, "__module__", None) or "builtins").partition(".")[0]


def _is_closed(value: Any) -> bool:
    return _root(value) in _CLOSED


def _enclosed(cell: types.CellType) -> Iterator[Any]:
    with contextlib.suppress(ValueError):  # nothing is in it yet
        yield cell.cell_contents


def _within(value: Any) -> Iterable[Any]:
    found: Iterable[Any] = ()
    if isinstance(value, types.MethodType):
        found = value.__func__, value.__self__
    elif isinstance(value, functools.partial):
        found = value.func, value.args, value.keywords
    elif isinstance(value, dict):
        found = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        found = value
    elif isinstance(value, types.FunctionType):
        found = () if _is_closed(value) else _of_function(value)
    elif isinstance(value, type):
        found = _of_class(value)
    elif not isinstance(value, types.ModuleType | types.BuiltinFunctionType) and _root(type(value)) not in _ARRAYS:
        found = _attributes(value)
    return found


def _of_function(value: types.FunctionType) -> Iterable[Any]:
    cells = [held for cell in value.__closure__ or () for held in _enclosed(cell)]
    named = [value.__globals__.get(name) for name in _names(value.__code__)]
    return *cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *named


def _names(code: types.CodeType) -> Iterator[str]:
    """Names that a function's code, and the functions and comprehensions written in it, look up."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _names(inner)


def _attributes(value: Any) -> Iterable[Any]:
    """Those of an object, and what its methods name."""
    own = vars(value).values() if hasattr(value, "__dict__") else ()
    return *own, *(getattr(value, name) for name in slots(value)), *_of_class(type(value))
