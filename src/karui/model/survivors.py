"""Normalisation over survivors only: how the proof of a cut across a normalisation computes the masked model.

A mean, a layer or group normalisation, or a standardised weight counts the units that were zeroed; after the cut they
are not there to be counted. So the masked model takes such statistics over the surviving indices and leaves zeros in
the others' places. Everything else runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from karui.errors import SurgeryError, require
from karui.model.rules import rule_for, tensors_in
from karui.model.running import Steady, double_precision, tensors
from karui.model.trace import Step, Trace, Value, as_exported, mode_of, plain_attention
from karui.model.walking import lent, named_buffers

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
# Operators that place or cast numbers, and compute none: which of them run hangs on the batch and on the precision.
PLACING = frozenset(
    {
        "_to_copy",
        "_unsafe_view",
        "alias",
        "clone",
        "contiguous",
        "detach",
        "expand",
        "permute",
        "squeeze",
        "t",
        "transpose",
        "unsqueeze",
        "view",
    }
)

Compute = Callable[[int, Any, Any, Any], Any]


class Computed(TorchDispatchMode):
    """Computes each operator in a way of its own; those that place numbers run as they are, and are not counted."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _, split = rule_for(func)
        if split is not None:
            with self:
                return split(*args, **kwargs)
        if func.overloadpacket.__name__ in PLACING:
            return func(*args, **kwargs)
        self.count += 1
        return self.compute(self.count - 1, func, args, kwargs)


def run_on_survivors(
    module: nn.Module, inputs: tuple[Any, ...], trace: Trace, alive: np.ndarray, *, training: bool
) -> list[Tensor]:
    """The outputs in double precision when statistics count only what stays alive; `trace` is of such a run.

    Raises:
        SurgeryError: the run is another one than the trace's.
    """
    buffers = {id(b): b.clone() for b in named_buffers(module).values()} if training else {}
    kept = torch.random.get_rng_state()
    try:
        with (
            torch.no_grad(),
            double_precision(),
            mode_of(module, training),
            plain_attention(),
            as_exported(trace.exported),
            lent(module, buffers),
            Steady() if training else nullcontext(),
            Computed(on_survivors(trace.steps, alive)),
        ):
            return tensors(module(*inputs))
    finally:
        torch.random.set_rng_state(kept)


def on_survivors(steps: list[Step], alive: np.ndarray) -> Compute:
    """How each operator is computed, `compute(number, func, args, kwargs)`, when only these labels stay.

    The numbers are those of operators that do more than place numbers.
    """
    steps = [step for step in steps if step.name.split(".")[1] not in PLACING]

    def stay(value: Value) -> list[Tensor | None]:
        kept = [np.flatnonzero(alive[d]) for d in value.dims]
        return [None if len(k) == len(d) else torch.from_numpy(k) for k, d in zip(kept, value.dims, strict=True)]

    def compute(number: int, func: Any, args: Any, kwargs: Any) -> Any:
        step = steps[number] if number < len(steps) else None
        require(
            step is not None and step.name == str(func),
            f"The model runs {func} where it ran {step.name if step else 'nothing'} before.",
            "It must compute the same operators each time.",
            SurgeryError,
        )
        assert step is not None  # noqa: S101  (for the type checker)
        kept = [stay(value) for value in step.inputs]
        name = func.overloadpacket.__name__
        if name not in COUNTING or not any(k is not None for dims in kept for k in dims):
            return func(*args, **kwargs)
        rest = iter(zip(kept, step.inputs, strict=True))
        small_args, small_kwargs = tree_map_only(Tensor, lambda t: _take(t, *next(rest)), (args, kwargs))
        groups = int(alive[step.outputs[-1].dims[-1]].sum()) if step.outputs[-1].dims else 1
        result = func(*_resized(name, small_args, groups), **small_kwargs)
        small = zip(tensors_in(result), [stay(v) for v in step.outputs], strict=True)
        # The plain result lends its memory order, which decides what comes next (a view or a copy, which attention).
        return tree_map_only(
            Tensor, lambda whole: _spread(torch.empty_like(whole), *next(small)), func(*args, **kwargs)
        )

    return compute


def _take(tensor: Tensor, kept: list[Tensor | None], value: Value) -> Tensor:
    """The survivors' part of a tensor."""
    for dim, indices in enumerate(kept):
        if indices is not None:
            require(
                tensor.shape[dim] == len(value.dims[dim]),
                f"The model makes {tensor.shape[dim]} indices where it made {len(value.dims[dim])} before.",
                "It must compute the same shapes each time.",
                SurgeryError,
            )
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
