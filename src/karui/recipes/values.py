"""Settings as plain values and back: what a recipe file, the command line and a run's record have in common.

Plain values are booleans, numbers, strings, lists and tables. A nested value object is a table of its fields, with its
class under `kind` where the annotation leaves a choice; a nested technique is a table with its slug under `technique`;
None, where it is not the default, is the table `{none = true}` (TOML has no null).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import importlib
import pathlib
import sys
import types
from typing import Any, Literal, Union, get_args, get_origin

from karui.errors import SettingError, did_you_mean, require
from karui.technique.kinds import hints_of

KIND, TECHNIQUE = "kind", "technique"
NONE = {"none": True}


def settings(value: Any) -> dict[str, Any]:
    """The fields of a settings dataclass as plain values; a None that is the default is left out.

    Raises:
        SettingError: a field holds something that cannot be written.

    Example:
        >>> from karui.model import Classification
        >>> settings(Classification(label_smoothing=0.1))
        {'label_smoothing': 0.1}
    """
    hints = hints_of(type(value))
    told = {}
    for field in _fields(type(value)):
        held = getattr(value, field.name)
        if held is None and field.default is None:
            continue
        told[field.name] = encode(held, hints[field.name], f"{type(value).__name__}.{field.name}")
    return told


def encode(value: Any, hint: Any = Any, where: str = "value") -> Any:
    """`value` as a plain one.

    Raises:
        SettingError: it cannot be written, for example a tensor or a lambda.
    """
    if value is None:
        return dict(NONE)
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list | frozenset | set):
        items = sorted(value) if isinstance(value, frozenset | set) else value
        inner = _item_hint(hint)
        return [encode(item, inner, f"{where}[{i}]") for i, item in enumerate(items)]
    if isinstance(value, collections.abc.Mapping):
        return {str(key): encode(item, Any, f"{where}.{key}") for key, item in value.items()}
    return _encode_object(value, hint, where)


def _item_hint(hint: Any) -> Any:
    """What the items of a sequence are annotated as, where they are all alike."""
    inner = [item for item in get_args(hint) if item is not Ellipsis]
    return inner[0] if len(inner) == 1 else Any


def _encode_object(value: Any, hint: Any, where: str) -> Any:
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        card = getattr(type(value), "card", None)
        if card is not None:
            return {TECHNIQUE: card.slug, **settings(value)}
        kind = _kind(type(value), hint)
        return {KIND: kind, **settings(value)} if kind else settings(value)
    require(
        callable(value) and "<" not in getattr(value, "__qualname__", "<"),
        f"{where} is {value!r}, which cannot be written to a recipe.",
        "Use a number, a string, a value object or a function of a module.",
    )
    return _import_path(value)


def _kind(cls: type, hint: Any) -> str:
    """The name under `kind`: none where the annotation leaves no choice, short where its module knows it."""
    inner = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = [choice for choice in inner if choice is not type(None)]
    if choices == [cls]:
        return ""
    homes = [sys.modules[choice.__module__] for choice in choices if isinstance(choice, type)]
    known = any(vars(home).get(cls.__name__) is cls for home in homes)
    return cls.__name__ if known else _import_path(cls)


def _import_path(value: Any) -> str:
    return f"{value.__module__}:{value.__qualname__}"


def build(cls: type, given: collections.abc.Mapping[str, Any], where: str) -> Any:
    """The settings dataclass `cls` from plain values; what is not given keeps its default.

    Args:
        cls: the dataclass.
        given: plain values by field name.
        where: what an error calls it, for example "step 2 (l1_filter_pruning)".

    Raises:
        SettingError: a name is unknown, a value has the wrong type, or the class refuses it.
    """
    hints = hints_of(cls)
    names = [field.name for field in _fields(cls)]
    for name in given:
        if name not in names:
            did_you_mean(name, names, f"{where}: setting", SettingError)
    values = {name: decode(value, hints[name], f"{where}: {name}") for name, value in given.items()}
    try:
        return cls(**values)
    except SettingError as error:
        raise SettingError(f"{where}: {error.message}", error.hint) from error
    except TypeError as error:
        missing = [
            field.name
            for field in _fields(cls)
            if field.name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        require(not missing, f"{where}: {', '.join(missing)} must be given.")
        raise SettingError(f"{where}: {error}.") from error


def decode(value: Any, hint: Any, where: str) -> Any:
    """A plain value as what the annotation `hint` asks for.

    Raises:
        SettingError: it does not fit; the message names the place, the value and the type.

    Example:
        >>> decode([1, 2], tuple[float, ...], "step 1: rates")
        (1.0, 2.0)
    """
    origin = get_origin(hint) or hint
    for kinds, reader in _READERS:
        if origin in kinds:
            return reader(value, hint, where)
    if isinstance(hint, type) and isinstance(value, collections.abc.Mapping):
        return _decode_object(value, hint, where)
    raise _misfit(value, hint, where)


def _decode_plain(value: Any, hint: type, where: str) -> Any:
    if hint is float and type(value) is int:
        return float(value)
    if hint is pathlib.Path and isinstance(value, str):
        return pathlib.Path(value)
    if type(value) is not hint:
        raise _misfit(value, hint, where)
    return value


def _decode_literal(value: Any, hint: Any, where: str) -> Any:
    choices = get_args(hint)
    require(value in choices, f"{where} is {value!r}.", f"Choose from {', '.join(map(repr, choices))}.")
    return value


def _decode_sequence(value: Any, hint: Any, where: str) -> Any:
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if not isinstance(value, list | tuple):
        raise _misfit(value, hint, where)
    if origin is tuple and inner and inner[-1] is not Ellipsis:
        require(len(value) == len(inner), f"{where} has {len(value)} values; give {len(inner)}, as in {_told(hint)}.")
        return tuple(decode(v, h, f"{where}[{i}]") for i, (v, h) in enumerate(zip(value, inner, strict=True)))
    items = (decode(v, inner[0] if inner else Any, f"{where}[{i}]") for i, v in enumerate(value))
    return tuple(items) if origin in (tuple, collections.abc.Sequence) else origin(items)


def _decode_mapping(value: Any, hint: Any, where: str) -> Any:
    if not isinstance(value, collections.abc.Mapping):
        raise _misfit(value, hint, where)
    key, item = get_args(hint) or (str, Any)
    return {(int(name) if key is int else name): decode(held, item, f"{where}.{name}") for name, held in value.items()}


def _decode_union(value: Any, hint: Any, where: str) -> Any:
    if value in (None, NONE) and type(None) in get_args(hint):
        return None
    choices = [choice for choice in get_args(hint) if choice is not type(None)]
    # An exact type goes first, so that 1 stays an integer in `float | int`.
    choices.sort(key=lambda choice: choice is not type(value))
    if len(choices) == 1:
        return decode(value, choices[0], where)
    for choice in choices:
        try:
            return decode(value, choice, where)
        except SettingError:
            continue
    raise _misfit(value, hint, where)


def _decode_callable(value: Any, hint: Any, where: str) -> Any:
    made = _import(value, where) if isinstance(value, str) else _by_shape(value, where)
    if not callable(made):
        raise _misfit(value, hint, where)
    return made


def _decode_any(value: Any, hint: Any, where: str) -> Any:
    del hint
    return _by_shape(value, where)


def _decode_object(value: collections.abc.Mapping[str, Any], hint: type, where: str) -> Any:
    """A nested value object: of the class it names, or of the annotation's."""
    made = _by_shape(value, where, home=hint.__module__)
    if isinstance(made, collections.abc.Mapping):
        require(dataclasses.is_dataclass(hint), f"{where} is a table without `kind`.", "Name the class under `kind`.")
        return build(hint, value, where)
    fits = isinstance(made, hint) if not getattr(hint, "_is_protocol", False) else True
    if not fits:
        raise _misfit(value, hint, where)
    return made


def _by_shape(value: Any, where: str, home: str = "") -> Any:
    """What a table makes by its `technique` or `kind`; anything else as it is."""
    if not isinstance(value, collections.abc.Mapping):
        return [_by_shape(item, where) for item in value] if isinstance(value, list) else value
    given = dict(value)
    if TECHNIQUE in given:
        from karui.survey import find_technique

        slug = given.pop(TECHNIQUE)
        return build(find_technique(slug).load(), given, f"{where} ({slug})")
    if KIND in given:
        kind = given.pop(KIND)
        require(isinstance(kind, str), f"{where}: kind is {kind!r}; give the name of a class.")
        cls = _import(kind if ":" in kind else f"{home}:{kind}", where)
        require(dataclasses.is_dataclass(cls), f"{where}: {kind} is no class of settings.")
        return build(cls, given, f"{where} ({cls.__name__})")
    return None if given == NONE else given


def _import(path: str, where: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingError(f"{where}: '{path}' cannot be imported: {error}.", "Write package.module:name.") from error


def _told(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")


def _misfit(value: Any, hint: Any, where: str) -> SettingError:
    return SettingError(f"{where} is {value!r}, a {type(value).__name__}; it takes {_told(hint)}.")


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


_READERS = (
    ((Any,), _decode_any),
    ((Union, types.UnionType), _decode_union),
    ((Literal,), _decode_literal),
    ((bool, int, float, str, pathlib.Path), _decode_plain),
    ((tuple, list, frozenset, set, collections.abc.Sequence), _decode_sequence),
    ((dict, collections.abc.Mapping), _decode_mapping),
    ((type, collections.abc.Callable), _decode_callable),
)
