"""Stand-ins: zeros in the places of results that nobody reads, where a run is only watched.

An analysis labels the operators of a run, and a recording keeps them. Neither needs the numbers that follow from the
model's input, and both refuse to let Python read one, so that no path can hang on them. So a contraction runs for the
first inputs of its shapes, which tells how its result is laid out; for the next inputs of the same shapes there are
zeros. What follows from parameters and constants alone is always computed: Python may read it, or keep it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from karui.errors import CaptureError
from karui.model.escapes import DataDependentError

# Operators that take the time of a network, and give new tensors whose layout hangs on no value.
HEAVY = frozenset(
    {
        "addmm",
        "baddbmm",
        "bmm",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "convolution",
        "gelu",
        "linear",
        "matmul",
        "mm",
        "_native_batch_norm_legit_no_training",
        "native_layer_norm",
        "layer_norm",
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "softmax",
        "_softmax",
    }
)

Watched = TypeVar("Watched")


class StandIns:
    """Results by the shapes of what they were made of."""

    def __init__(self) -> None:
        self.known: dict[Any, Any] = {}

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator gives, with zeros in the place of numbers where its layout is known."""
        name = func.overloadpacket.__name__
        # In training mode this one moves its statistics, too.
        steady = name == "native_batch_norm" and len(args) > 5 and args[5] is False
        if not steady and name not in HEAVY:
            return func(*args, **kwargs)
        key = (func, _layout(args), _layout(tuple(kwargs.items())) if kwargs else ())
        layout = self.known.get(key)
        if layout is None:
            result = func(*args, **kwargs)
            self.known[key] = _layout(result)
            return result
        return _zeros(layout)


def _layout(value: Any) -> Any:
    """A value with its tensors, also nested ones, as what their layout is."""
    if isinstance(value, Tensor):
        return _Layout((value.shape, value.stride(), value.dtype, value.device))
    return tuple([_layout(part) for part in value]) if isinstance(value, (list, tuple)) else value


class _Layout(tuple[Any, ...]):
    """Shape, strides, type and device of a tensor."""

    __slots__ = ()


def _zeros(layout: Any) -> Any:
    """Zeros of a layout, or of nested ones; what is none is as it was."""
    if isinstance(layout, _Layout):
        shape, stride, dtype, device = layout
        return torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()
    return tuple([_zeros(part) for part in layout]) if isinstance(layout, tuple) else layout


def watched(run: Callable[[StandIns | None], Watched], sized: Callable[[Watched], bool]) -> Watched:
    """What a run with stand-ins says; that of a real one where zeros may have led it astray.

    Args:
        run: the run, given stand-ins or None.
        sized: whether some tensor's size hung on the values of the input.

    Raises:
        CaptureError: the real run fails, or its path hangs on the values of the input.
    """
    try:
        found = run(StandIns())
    except DataDependentError:
        raise
    except CaptureError:  # an index that was made of numbers, say
        return run(None)
    return run(None) if sized(found) else found
