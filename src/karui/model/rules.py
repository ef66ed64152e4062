"""What operators say of the labels: how a rule is written and found.

A rule is called after the operator has run. It reads the labels of the inputs, merges or locks some, and sets the
labels of the outputs. Here are element-wise operators and unknown ones; data movement is in `karui.model.movement`,
reductions and windows in `karui.model.reduce`, contractions and normalisations in `karui.model.contract`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from karui.model.escapes import reads_number
from karui.model.labels import NO_RULE, SINGLE, Dims

if TYPE_CHECKING:
    from karui.model.trace import Tracer


@dataclass(frozen=True)
class Call:
    """An operator that ran: what it was given and what it made."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    @property
    def name(self) -> str:
        """The operator's name without its overload."""
        return self.func.overloadpacket.__name__

    def get(self, name: str, default: Any = None) -> Any:
        """The value of an argument, however it was given."""
        place, usual = _arguments(self.func).get(name, (len(self.args), default))
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, usual)


@cache
def _arguments(func: Any) -> dict[str, tuple[int, Any]]:
    """Place and default of each argument of an operator."""
    known = func._schema.arguments  # noqa: SLF001  (the only way to an operator's schema)
    return {a.name: (k, a.default_value if a.has_default_value() else None) for k, a in enumerate(known)}


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors among an operator's arguments or results, in order; they nest lists, tuples, dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return found
    for part in value:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (list, tuple, dict)):
            found += tensors_in(part)
    return found


Rule = Callable[["Tracer", Call], None]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators, by the names of their packets."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


@cache
def rule_for(func: Any) -> tuple[Rule, Callable[..., Any] | None]:
    """The rule of an operator, or the decomposition that takes it apart first."""
    from karui.model import contract, movement, reduce  # noqa: F401  (they register their rules)

    name = func.overloadpacket.__name__
    found = RULES.get(name) or RULES.get(name.rstrip("_"))
    if found is not None:
        return found, None
    if torch.Tag.pointwise in func.tags or torch.Tag.pointwise in _functional_tags(func):
        return pointwise, None
    split = _decompositions().get(func)
    return unknown, split


@dataclass(frozen=True)
class Known:
    """What is known of an operator, whatever it is given.

    Settings:
        name: its name, with its overload.
        rule: what it says of the labels.
        split: the decomposition that takes it apart first, if it has no rule.
        places, words: the arguments that may be or hold tensors, by place and by name.
        reads_number: whether it gives a number or a truth to Python.
        sized: whether the size of its output may hang on values.
    """

    name: str
    rule: Rule
    split: Callable[..., Any] | None
    places: tuple[int, ...]
    words: frozenset[str]
    reads_number: bool
    sized: bool

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors among its arguments, in order."""
        found: list[Tensor] = []
        for place in self.places:
            if place >= len(args):
                break
            part = args[place]
            if isinstance(part, Tensor):
                found.append(part)
            elif part is not None:
                found += tensors_in(part)
        if kwargs:
            found += tensors_in([part for name, part in kwargs.items() if name in self.words])
        return found


@cache
def known_of(func: Any) -> Known:
    """What is known of an operator."""
    found, split = rule_for(func)
    places = {a.name: k for k, a in enumerate(func._schema.arguments) if "Tensor" in str(a.type)}  # noqa: SLF001  (as above)
    return Known(
        str(func),
        found,
        split,
        tuple(places.values()),
        frozenset(places),
        reads_number(func),
        torch.Tag.dynamic_output_shape in func.tags,
    )


def _functional_tags(func: Any) -> Sequence[Any]:
    """Tags of the out-of-place twin of an operator, which the in-place one does not repeat."""
    twin = getattr(torch.ops.aten, func.overloadpacket.__name__.rstrip("_"), None)
    overload = getattr(twin, func._schema.overload_name or "default", None) if twin is not None else None  # noqa: SLF001  (the only way)
    return overload.tags if overload is not None else ()


@cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    from torch._decomp import core_aten_decompositions

    return dict(core_aten_decompositions())


def broadcast(tracer: Tracer, operands: Sequence[tuple[Dims, Sequence[int]]], shape: Sequence[int]) -> Dims:
    """Merge the labels of operands that meet under broadcasting, and return those of the result."""
    out = []
    for back in range(1, len(shape) + 1):
        size = shape[-back]
        met = [dims[-back] for dims, sizes in operands if len(sizes) >= back and sizes[-back] == size]
        if size == 1 or not met:
            out.append(tracer.labels.fixed(size, "it is spread by broadcasting"))
            continue
        for other in met[1:]:
            tracer.labels.merge(met[0], other)
        out.append(met[0])
    return tuple(reversed(out))


def pointwise(tracer: Tracer, call: Call) -> None:
    """Labels that meet are one."""
    inputs = [t for t in known_of(call.func).tensors(call.args, call.kwargs) if t.ndim]
    for out in tensors_in(call.result):
        met = [tracer.value(t).dims for t in inputs]
        if all(t.shape == out.shape for t in inputs) and met:
            for other in met[1:]:
                for one, its in zip(met[0], other, strict=True):
                    if len(one) != 1:
                        tracer.labels.merge(one, its)
            dims = tuple([d if len(d) != 1 else tracer.labels.fixed(1, SINGLE) for d in met[0]])
        else:
            dims = broadcast(tracer, [(d, t.shape) for d, t in zip(met, inputs, strict=True)], out.shape)
        if not any(out is t for t in inputs):
            tracer.set(out, dims)


def unknown(tracer: Tracer, call: Call) -> None:
    """Every index that flows through an operator without a rule must stay."""
    reason = f"operator {call.func} {NO_RULE}"
    for t in tensors_in((call.args, call.kwargs)):
        for d in tracer.value(t).dims:
            tracer.labels.lock(d, reason)
    for out in tensors_in(call.result):
        tracer.set(out, tuple(tracer.labels.fixed(n, reason) for n in out.shape))


rule("_prelu_kernel copy lerp")(pointwise)
