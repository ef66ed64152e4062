"""Copies of modules: what `copy.deepcopy` makes, several times faster, and smaller where a cut says so.

Surgery copies a network three times (the cut one, and two in double precision, by turns, for the proof), and one of a
hundred layers is thousands of small dictionaries. Nearly all of them are empty or hold numbers, which are taken as
they are; whatever is out of the ordinary goes through `copy.deepcopy`, with the same memo.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from karui.model.reach import networks
from karui.model.trace import minds_mode, mode_of
from karui.model.walking import layers, named_buffers, named_parameters

ATOMS = frozenset({int, float, bool, str, type(None)})
PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size)
CONTAINERS = (dict, list, tuple, OrderedDict)
# What every module has: its layers, tensors and hooks.
STANDARD = frozenset(vars(nn.Module()))
EMPTIES = frozenset({dict, list, set, OrderedDict})
HELD = ("_parameters", "_buffers", "_modules")


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy, without what layers keep between evaluation runs; `memo` as in `copy.deepcopy`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> twin = copied(net)
        >>> torch.equal(twin[0].weight, net[0].weight), twin[0].weight is net[0].weight
        (True, False)
    """
    memo = {} if memo is None else memo
    if not minds_mode(layers(module).values()):
        return _module(module, memo)
    with mode_of(module, True):
        twin = _module(module, memo)
    for one, other in zip(module.modules(), twin.modules(), strict=True):
        other.__dict__["training"] = one.training
    return twin


def frozen(module: nn.Module, *, shared: bool = False) -> nn.Module:
    """A copy for evaluation alone, whose parameters cannot be trained.

    So are the networks that lie in lists and attributes of it, of which torch knows not.

    Args:
        module: left as it is.
        shared: whether parameters lie where the module's do: it takes no memory, and changes when they are changed in
            place. Buffers are copied either way.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> twin = frozen(net, shared=True)
        >>> twin.weight.data_ptr() == net.weight.data_ptr(), twin.weight.requires_grad, net.weight.requires_grad
        (True, False, True)
        >>> frozen(net).weight.data_ptr() == net.weight.data_ptr()
        False
    """
    given = networks(module)
    memo: dict[int, Any] = {}
    if shared:
        memo = {id(p): nn.Parameter(p.detach(), False) for one in given for p in named_parameters(one).values()}
    twin = copied(module, memo)
    for one in networks(twin):
        if all(one is not other for other in given):
            one.eval().requires_grad_(False)
    return twin


def doubled(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy in double precision, as `copied(module, memo).double()` gives, with each tensor copied once.

    Example:
        >>> doubled(nn.Linear(2, 3)).weight.dtype
        torch.float64
    """
    memo = {} if memo is None else memo
    for p in named_parameters(module).values():
        if p.is_floating_point():
            value = memo.get(id(p), p).detach()
            memo[id(p)] = nn.Parameter(value.to(torch.float64, copy=True), p.requires_grad)
    for b in named_buffers(module).values():
        if b.is_floating_point():
            memo[id(b)] = memo.get(id(b), b).detach().to(torch.float64, copy=True)
    twin = copied(module, memo)
    # What copies or casts itself in a way of its own may hold more.
    usual = all(_usual(cls) and cls._apply is nn.Module._apply for cls in {type(m) for m in layers(module).values()})  # noqa: SLF001  (what `double` calls)
    return twin if usual else twin.double()


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file takes them: without gaps, none in the memory of another. Others are copied, and no more.

    Example:
        >>> whole = torch.zeros(2, 3)
        >>> made = apart({"whole": whole, "row": whole[1]})
        >>> made["whole"].data_ptr() == whole.data_ptr(), made["row"].data_ptr() == whole[1].data_ptr()
        (True, False)
    """
    made: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        place = plain.untyped_storage().data_ptr()
        made[name] = plain.clone() if place in seen else plain
        seen.add(place)
    return made


def stateless(module: nn.Module) -> bool:
    """Whether its layers hold nothing of their own that a run may write into: only numbers, words and tensors.

    Such a network can run in another precision without a copy, as its attributes are set back afterwards.
    """
    return all(
        name in STANDARD or type(value) in ATOMS or isinstance(value, (*PLAIN, Tensor)) or _plain_tuple(value)
        for layer in layers(module).values()
        for name, value in vars(layer).items()
    )


def _plain_tuple(value: Any) -> bool:
    return type(value) is tuple and all(isinstance(part, PLAIN) for part in value)


def left_over(value: Any) -> dict[int, Any]:
    """Twins of results that a forward left in a module, such as an attention map: a memo for `copy.deepcopy`.

    They hang on the graph of that run, which `copy.deepcopy` refuses to copy; their values are all that is taken.
    """
    return {
        id(t): t.detach().clone()
        for t in tree_leaves(value)
        if isinstance(t, Tensor) and t.requires_grad and not t.is_leaf
    }


def _module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A module's twin; one that copies itself in a way of its own does."""
    if id(module) in memo:
        return memo[id(module)]
    if not _usual(type(module)):
        for layer in module.modules():
            memo.update(left_over([v for name, v in vars(layer).items() if name not in HELD]))
        return copy.deepcopy(module, memo)
    twin = type(module).__new__(type(module))
    memo[id(module)] = twin
    own = twin.__dict__
    for name, value in vars(module).items():
        kind = type(value)
        if kind in ATOMS:
            own[name] = value
        elif name in HELD:
            own[name] = {leaf: _value(held, memo) for leaf, held in value.items()} if value else {}
        elif kind in EMPTIES and not value and id(value) not in memo:
            own[name] = memo[id(value)] = kind()
        elif name != "_compiled_call_impl":  # a compiled forward belongs to the module it was compiled for
            own[name] = _value(value, memo)
    return twin


@cache
def _usual(cls: type[nn.Module]) -> bool:
    """Whether a class is copied as `nn.Module` is."""
    restored = next(c for c in cls.__mro__ if "__setstate__" in vars(c))
    return (
        not hasattr(cls, "__deepcopy__")
        and cls.__getstate__ is nn.Module.__getstate__
        and cls.__reduce_ex__ is object.__reduce_ex__
        and cls.__reduce__ is object.__reduce__
        and restored.__module__.startswith("torch.nn.")
    )


def _value(value: Any, memo: dict[int, Any]) -> Any:
    """The twin of an attribute."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, nn.Module):
        return _module(value, memo)
    if id(value) in memo:
        return memo[id(value)]
    kind = type(value)
    if kind is nn.Parameter:
        made: Any = nn.Parameter(value.detach().clone(), value.requires_grad)
    elif kind is Tensor and not value.requires_grad and not vars(value):
        made = value.clone()
    elif _plain_tuple(value):
        return value
    elif kind in EMPTIES and not value:
        made = kind()
    else:
        if kind is Tensor or kind in CONTAINERS:
            memo.update({key: twin for key, twin in left_over(value).items() if key not in memo})
        return copy.deepcopy(value, memo)
    memo[id(value)] = made
    return made
