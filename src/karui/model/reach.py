"""Networks that a value reaches: also those in plain lists, attributes and functions, of which torch knows not.

`nn.Module.eval`, `to` and `modules` act on what is registered. A part that lies in a list runs all the same, in the
mode and on the device that it happens to have.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from karui.model.walking import layers

_KNOWN = frozenset({"torch", "karui", "builtins"})
"""Packages whose modules register all that they run."""
_STANDARD = frozenset(vars(nn.Module()))
_ATOMS = (str, bytes, int, float, complex, type(None), Tensor, np.ndarray, torch.dtype, torch.device)


def is_foreign(kind: type) -> bool:
    """Whether a class is neither torch's nor karui's.

    Example:
        >>> is_foreign(nn.Linear)
        False
    """
    return kind.__module__.partition(".")[0] not in _KNOWN


def networks(value: Any) -> tuple[nn.Module, ...]:
    """The torch modules that a value is or reaches, each once; a module first, and without what is registered with it.

    Args:
        value: a module; or a function, which reaches what it encloses, names, is bound to or holds; or anything else.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> [one is net for one in networks(lambda x: net(x))]
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
    """What a module of foreign code may run that is not registered with it: attributes, and what its forward names."""
    if not any(map(is_foreign, type(part).__mro__)):
        return ()
    return *(held for name, held in vars(part).items() if name not in _STANDARD), type(part).forward


def _enclosed(cell: types.CellType) -> Iterator[Any]:
    with contextlib.suppress(ValueError):  # nothing is in it yet
        yield cell.cell_contents


def _within(value: Any) -> Iterable[Any]:
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset):
        return value
    return _of_function(value) if isinstance(value, types.FunctionType) else _attributes(value)


def _of_function(value: types.FunctionType) -> Iterable[Any]:
    named = [value.__globals__.get(name) for name in value.__code__.co_names]
    cells = [held for cell in value.__closure__ or () for held in _enclosed(cell)]
    return *cells, *(value.__defaults__ or ()), *(one for one in named if isinstance(one, nn.Module))


def _attributes(value: Any) -> Iterable[Any]:
    """Those of an object; torch's and numpy's own hold no networks, or hold whole programs."""
    if isinstance(value, type | types.ModuleType) or type(value).__module__.partition(".")[0] in ("torch", "numpy"):
        return ()
    return vars(value).values() if "__dict__" in dir(value) else ()
