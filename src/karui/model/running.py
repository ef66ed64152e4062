"""Running a model so that two runs can be compared: in double precision, without chance, and without traces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from karui.model.trace import mode_of, plain_attention
from karui.model.walking import lent, named_buffers

CONVOLUTIONS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d}) | frozenset(
    {torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
)


@contextmanager
def double_precision() -> Iterator[None]:
    """Tensors made on the way are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Steady(TorchDispatchMode):
    """Dropout keeps everything, so that a training run is the same function each time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "bernoulli_":
            return args[0].fill_(1)
        if name == "bernoulli":
            return torch.ones_like(args[0])
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        return func(*args, **(kwargs or {}))


class Widened(TorchDispatchMode):
    """Every operator computes in float64, and widens the parameters that it takes as it takes them.

    A network in double precision so takes one layer's weights beside its own, where a copy takes twice its own.

    Raises:
        RuntimeError: an operator writes into a tensor of 32 bits: what it writes would be lost.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide, named = double((args, kwargs or {}))
        if func._schema.is_mutable and any(  # noqa: SLF001  (no public way tells)
            given is not taken for given, taken in zip(tensors((args, kwargs)), tensors((wide, named)), strict=True)
        ):
            raise RuntimeError(f"{func} writes into a tensor that is not in double precision")
        return double(func(*wide, **named))


class _WidenedConvolutions(TorchFunctionMode):
    """Convolutions look at the types of what they are given before any operator sees it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = args, kwargs or {}
        wide, named = double(given) if func in CONVOLUTIONS else given
        return func(*wide, **named)


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """The module computes in double precision for a while, on inputs in that; its parameters stay where they are.

    Raises:
        RuntimeError, ValueError: in a forward that minds of what precision its parameters are.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> with torch.no_grad(), widened(layer):
        ...     made = layer(torch.ones(1, 2, dtype=torch.float64))
        >>> made.dtype, layer.weight.dtype
        (torch.float64, torch.float32)
    """
    buffers = {id(b): b.double() for b in named_buffers(module).values() if b.is_floating_point()}
    with lent(module, buffers), double_precision(), Widened(), _WidenedConvolutions():
        yield


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested value."""
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def outputs(
    module: nn.Module,
    inputs: tuple[Any, ...],
    *,
    training: bool = False,
    under: AbstractContextManager[Any] | None = None,
) -> list[Tensor]:
    """The tensors that a module returns; its buffers and the random state stay as they are.

    `under` is entered around the forward alone.
    """
    kept = torch.random.get_rng_state()
    buffers = {id(b): b.clone() for b in named_buffers(module).values()} if training else {}
    steady = Steady() if training else nullcontext()
    under = under or nullcontext()
    try:
        with torch.no_grad(), mode_of(module, training), plain_attention(), lent(module, buffers), steady, under:
            made = module(*inputs)
    finally:
        torch.random.set_rng_state(kept)
    return [t.detach() for t in tensors(made)]


def run_double(module: nn.Module, inputs: tuple[Any, ...], *, training: bool = False) -> list[Tensor]:
    """The same where tensors made on the way are float64 too."""
    with double_precision():
        return outputs(module, inputs, training=training)


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest absolute difference of two lists of outputs; infinite where shapes differ."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.numel():
            gap = (a.double() - b.double()).abs()
            gap = torch.where(a == b, torch.zeros_like(gap), gap)
            worst = max(worst, float(torch.nan_to_num(gap, nan=float("inf")).max()))
    return worst


def double(value: Any) -> Any:
    """A nested value with its floating tensors in float64."""
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, value)


def joined(one: tuple[Any, ...], other: tuple[Any, ...]) -> tuple[Any, ...]:
    """Two inputs as one batch."""
    return tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) and a.ndim else a, one, other)


def random_like(value: Any, generator: torch.Generator) -> Any:
    """A random input of the same shape and kind."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator, dtype=value.dtype)
    if value.numel() and value.dtype != torch.bool:
        order = torch.randperm(value.numel(), generator=generator)
        return value.reshape(-1)[order].reshape(value.shape)
    return value
