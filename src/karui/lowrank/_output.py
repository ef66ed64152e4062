"""Which layer of a network gives its output: the one that techniques for large output layers act on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from karui.errors import SettingError, require
from karui.lowrank._scan import Seen, scan
from karui.model import Model
from karui.model.taps import layer_at


def output_layer(
    model: Model, named: str, fits: Callable[[Any], str], *, shared: bool = False
) -> tuple[Seen | None, str]:
    """The output layer as the example met it, or None and why there is none.

    Args:
        model: the model.
        named: path of the layer that is wanted; "" finds the last one that fits, if the model's output is its own.
        fits: the technique's objection to a layer, "" for none.
        shared: whether a layer whose weight is shared may be replaced.

    Raises:
        SettingError: there is no layer of that name, or it does not fit.
    """
    if named:
        layer_at(model.module, named, SettingError)
    seen, left = scan(model, fits, shared=shared)
    if named:
        found = next((one for one in seen if one.path == named), None)
        why = next((choice.reason for choice in left if choice.path == named), "it has no weight")
        require(found is not None, f"layer is '{named}', which cannot be replaced as the output layer: {why}")
        return found, ""
    last = max(seen, key=lambda one: one.order, default=None)
    if last is None or not last.final:
        told = [f" ({choice.path}: {choice.reason})" for choice in left[-1:] if last is None]
        return None, f"the last such layer does not give the model's output{''.join(told)}; name one with layer=..."
    return last, ""
