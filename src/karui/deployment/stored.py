"""Weights stored in 8 bits for operators that compute in 32: recurrent layers, transposed convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int8

from karui.deployment.layers import STORED

if TYPE_CHECKING:
    import onnx

AXIS = 1
"""Of a weight: the gates' units of a recurrent layer, the output channels of a transposed convolution."""


def store_weights(proto: onnx.ModelProto, names: Sequence[str]) -> None:
    """Replace the weights of these operators, in place, by integers and an operator that widens them.

    The full 8 bits are used: nothing is summed in integers, so nothing can overflow. A weight of fewer than two
    dimensions stays, as does one that is no constant.
    """
    from onnx import helper, numpy_helper

    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    wide = {
        node.input[place]: node
        for node in proto.graph.node
        if node.name in set(names)
        for place in STORED[node.op_type]
    }
    added = []
    for name in wide:
        if name not in weights or weights[name].data_type != 1 or len(weights[name].dims) <= AXIS:
            continue
        codes, scales = rounded(numpy_helper.to_array(weights[name]))
        parts = {"codes": codes, "scale": scales, "zero": np.zeros(len(scales), dtype=np.int8)}
        for part, values in parts.items():
            proto.graph.initializer.append(numpy_helper.from_array(values, f"{name}_{part}"))
        inputs = [f"{name}_{part}" for part in parts]
        added.append(helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}_widened", axis=AXIS))
        proto.graph.initializer.remove(weights[name])
    for node in reversed(added):
        proto.graph.node.insert(0, node)


def rounded(
    weight: Float[np.ndarray, "first channels *rest"],
) -> tuple[Int8[np.ndarray, "first channels *rest"], Float[np.ndarray, "channels"]]:
    """A weight as integers from -127 to 127, and the scale of each channel.

    Example:
        >>> codes, scales = rounded(np.array([[1.0, -0.5, 0.0]], dtype=np.float32))
        >>> codes.tolist(), [round(float(scale), 4) for scale in scales]
        ([[127, -127, 0]], [0.0079, 0.0039, 1.0])
    """
    axes = tuple(axis for axis in range(weight.ndim) if axis != AXIS)
    largest = np.abs(weight).max(axis=axes)
    scales = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    shape = [-1 if axis == AXIS else 1 for axis in range(weight.ndim)]
    codes = np.clip(np.rint(weight / scales.reshape(shape)), -127, 127)
    return codes.astype(np.int8), scales
