"""Normalisation over survivors only: how the proof of a cut across a normalisation computes the masked model.

A mean, a layer or group normalisation, or a standardised weight counts the units that were zeroed; after the cut they
are not there to be counted. So the masked model takes such statistics over the surviving indices and leaves zeros in
the others' places. Everything else runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from karui.errors import SurgeryError, require
from karui.model.rules import tensors_in
from karui.model.trace import Step, Value

COUNTING = frozenset(
    {
        "mean",
        "var",
        "std",
        "var_mean",
        "std_mean",
        "native_layer_norm",
        "_fused_rms_norm",
        "native_group_norm",
        "native_batch_norm",
        "_native_batch_norm_legit",
    }
)


def on_survivors(steps: list[Step], alive: np.ndarray) -> Callable[[int, Any, Any, Any], Any]:
    """How a tracer is to compute each operator, `compute(number, func, args, kwargs)`, when only these labels stay."""

    def stay(value: Value) -> list[Tensor | None]:
        kept = [np.flatnonzero(alive[d]) for d in value.dims]
        return [None if len(k) == len(d) else torch.from_numpy(k) for k, d in zip(kept, value.dims, strict=True)]

    def compute(number: int, func: Any, args: Any, kwargs: Any) -> Any:
        step = steps[number]
        require(
            step.name == str(func),
            f"The model runs {func} where it ran {step.name} before.",
            "It must compute the same operators each time.",
            SurgeryError,
        )
        kept = [stay(value) for value in step.inputs]
        name = func.overloadpacket.__name__
        if name not in COUNTING or not any(k is not None for dims in kept for k in dims):
            return func(*args, **kwargs)
        rest = iter(kept)
        small_args, small_kwargs = tree_map_only(Tensor, lambda t: _take(t, next(rest)), (args, kwargs))
        groups = int(alive[step.outputs[-1].dims[-1]].sum()) if step.outputs[-1].dims else 1
        result = func(*_resized(name, small_args, groups), **small_kwargs)
        small = zip(tensors_in(result), [stay(v) for v in step.outputs], strict=True)
        # The plain result lends its memory order, which decides what comes next (a view or a copy, which attention).
        return tree_map_only(
            Tensor, lambda whole: _spread(torch.empty_like(whole), *next(small)), func(*args, **kwargs)
        )

    return compute


def _take(tensor: Tensor, kept: list[Tensor | None]) -> Tensor:
    """The survivors' part of a tensor."""
    for dim, indices in enumerate(kept):
        if indices is not None:
            tensor = tensor.index_select(dim, indices)
    return tensor


def _spread(whole: Tensor, tensor: Tensor, kept: list[Tensor | None]) -> Tensor:
    """The whole tensor again, with zeros where nobody survives."""
    if all(indices is None for indices in kept):
        return whole.copy_(tensor)
    places = [torch.arange(n) if k is None else k for k, n in zip(kept, whole.shape, strict=True)]
    shape = [[-1 if d == dim else 1 for d in range(len(places))] for dim in range(len(places))]
    where = [place.reshape(size) for place, size in zip(places, shape, strict=True)]
    return whole.zero_().index_put_(tuple(where), tensor)


def _resized(name: str, args: tuple[Any, ...], groups: int) -> tuple[Any, ...]:
    """Arguments that repeat a size, for the smaller tensors."""
    x, *rest = args
    if name in ("native_layer_norm", "_fused_rms_norm"):
        rest[0] = list(x.shape[x.ndim - len(rest[0]) :])
    elif name == "native_group_norm":
        rest[3], rest[5] = x.shape[1], groups
    return (x, *rest)
