"""A fingerprint of everything that decides a training: equal content, equal name, in every process."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pickle
import re
import secrets
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from karui.model import Model
from karui.model.reach import is_foreign, slots

LOOKED_AT = 64
"""Samples of a data set without tensors that count, evenly spread from the first to the last."""


def fingerprint(*parts: Any) -> str:
    """A name for what the parts say.

    Tensors count by their values; modules by theirs and, of foreign classes, by their code and other attributes; data
    sets without tensors by length and 64 samples spread over them; functions by their code and what they enclose; other
    objects by their class and attributes, those that can be called by their code too, and those without attributes as
    pickle writes them. What even that cannot tell is like nothing else, not even itself in another process.

    Example:
        >>> fingerprint({"epochs": 3}, torch.ones(2)) == fingerprint({"epochs": 3}, torch.ones(2))
        True
        >>> fingerprint(torch.ones(2)) == fingerprint(torch.zeros(2))
        False
    """
    digest = hashlib.blake2b(digest_size=12)
    for part in parts:
        _feed(digest, part, ())
    return digest.hexdigest()


def _feed(digest: Any, value: Any, above: tuple[int, ...]) -> None:
    """Add a value to the digest; `above` are the objects it lies in, which are not entered twice."""
    if isinstance(value, bytes):
        digest.update(len(value).to_bytes(8, "big") + value)
    elif id(value) not in above:
        digest.update(type(value).__qualname__.encode() + b"(")
        for part in _parts(value):
            _feed(digest, part, (*above, id(value)))
        digest.update(b")")


@functools.singledispatch
def _parts(value: Any) -> Iterable[Any]:
    """What a value consists of, down to bytes. Addresses are left out, as they differ from process to process."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [part for field in dataclasses.fields(value) for part in (field.name, getattr(value, field.name))]
    if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        return (_shown(value),)
    foreign = is_foreign(type(value))
    hidden = slots(value) if foreign else ()  # karui's own keep in slots what they do not want to be told by
    own = {**getattr(value, "__dict__", {}), **{name: getattr(value, name) for name in hidden}}
    code = _code(type(value)) if callable(value) else ()
    if own or code:
        return [*code, *(part for pair in own.items() for part in pair)]
    if type(value).__repr__ is not object.__repr__:
        return (_shown(value),)
    # What has no room for attributes is made in another language; of the others the class's name is all that they have.
    return (_written(value),) if foreign and not hasattr(value, "__dict__") else ()


def _written(value: Any) -> bytes:
    """As pickle writes it; what cannot be told is like nothing else."""
    try:
        return pickle.dumps(value)
    except Exception:  # noqa: BLE001  (pickling is the object's own code, and may raise anything)
        return secrets.token_bytes(16)


def _shown(value: Any) -> bytes:
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode()


def _code(kind: type) -> list[tuple[str, types.FunctionType]]:
    """The methods of a class and of those it inherits from, as far as they are neither torch's nor karui's."""
    foreign = [each for each in kind.__mro__ if is_foreign(each)]
    return [
        (name, part) for each in foreign for name, part in vars(each).items() if isinstance(part, types.FunctionType)
    ]


@_parts.register
def _(value: Tensor) -> Iterable[Any]:
    plain = value.detach().cpu().contiguous()
    return str((plain.dtype, tuple(plain.shape))).encode(), plain.reshape(-1).view(torch.uint8).numpy().tobytes()


@_parts.register
def _(value: np.ndarray) -> Iterable[Any]:
    return str((value.dtype, value.shape)).encode(), value.tobytes()


@_parts.register
def _(value: nn.Module) -> Iterable[Any]:
    own = [part for module in value.modules() for part in (*_own(module), getattr(module, "code", None))]
    return repr(value).encode(), dict(value.named_parameters()), dict(value.named_buffers()), own


_OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that every module has: `training` says nothing of what is computed in the end, and the others are shown
by `repr` or are registered values."""


def _own(module: nn.Module) -> Iterable[Any]:
    """What a module of foreign code computes beside its values: its methods, and attributes that are not registered."""
    code = _code(type(module))
    attributes = [(name, vars(module)[name]) for name in sorted(vars(module).keys() - _OF_MODULES)]
    return [*code, *attributes] if any(map(is_foreign, type(module).__mro__)) else ()


@_parts.register
def _(value: Model) -> Iterable[Any]:
    return value.module, value.task


@_parts.register
def _(value: TensorDataset) -> Iterable[Any]:
    return value.tensors


@_parts.register
def _(value: Dataset) -> Iterable[Any]:
    samples = len(value)  # pyright: ignore[reportArgumentType]  (sized, as a training needs it)
    spread = np.unique(np.linspace(0, samples - 1, min(samples, LOOKED_AT)).round().astype(int))
    return samples, *(value[int(number)] for number in spread)


@_parts.register
def _(value: Mapping) -> Iterable[Any]:
    return [part for pair in value.items() for part in pair]


@_parts.register(list)
@_parts.register(tuple)
def _(value: Iterable[Any]) -> Iterable[Any]:
    return value


@_parts.register(set)
@_parts.register(frozenset)
def _(value: Iterable[Any]) -> Iterable[Any]:
    return sorted(value, key=repr)


@_parts.register
def _(value: types.FunctionType) -> Iterable[Any]:
    return (
        value.__qualname__,
        value.__code__,
        value.__defaults__,
        value.__kwdefaults__,
        [cell.cell_contents for cell in value.__closure__ or ()],
    )


@_parts.register
def _(value: types.CodeType) -> Iterable[Any]:
    return value.co_code, value.co_names, value.co_consts


@_parts.register
def _(value: types.MethodType) -> Iterable[Any]:
    return value.__func__, value.__self__


@_parts.register
def _(value: functools.partial) -> Iterable[Any]:
    return value.func, value.args, value.keywords
