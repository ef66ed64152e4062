"""Shortcuts that subsample and pad with zeros, as one small convolution of integers.

Where a residual network widens without weights, its shortcut takes every second pixel and adds channels of zeros:
slices and a pad. ONNX Runtime has no integer kernel for a pad, so that values are widened before it and narrowed after
it. A convolution of 1 x 1 with a stride, whose weights are ones and zeros, computes the same in integers, to the bit.
On ResNet-20 (one thread, batch 1) the two shortcuts took 8 % of the time of the form in 8 bits, and take half of that.

Its work grows with the square of the channels, and that of moving values with the channels: so only few channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

MOST = 4096
"""Weights of a convolution that takes less time than what it replaces."""
END = 2**31 - 1
"""An end of a slice from here on is the end of the tensor."""


@dataclass(frozen=True)
class _Way:
    """A shortcut: from a widened value to a pad, and what lies between the two.

    Settings:
        start: the widened value that it reads.
        pad: the last operator of it.
        between: the others, all of which go.
        strides: of rows and of columns.
    """

    start: str
    pad: onnx.NodeProto
    between: tuple[onnx.NodeProto, ...]
    strides: tuple[int, int]


def integer_shortcuts(proto: onnx.ModelProto, channels: Mapping[str, int]) -> None:
    """Put a convolution of integers in the place of each shortcut of slices and a pad, in place.

    Args:
        proto: a graph with narrowed and widened values (QDQ).
        channels: those of its values; see `channels_of`.
    """
    graph = _Graph(proto)
    for pad in [node for node in proto.graph.node if node.op_type == "Pad"]:
        way = graph.way(pad)
        added = graph.added(pad)
        inside = channels.get(pad.output[0], 0) - sum(added) if added is not None else 0
        if way is None or added is None or inside < 1 or inside * (inside + sum(added)) > MOST:
            continue
        weight = np.zeros((inside + sum(added), inside, 1, 1), dtype=np.int8)
        weight[added[0] + np.arange(inside), np.arange(inside)] = 1
        graph.replace(way, weight)


def channels_of(proto: onnx.ModelProto) -> dict[str, int]:
    """The channels of each value that is an image, in a graph whose operators stand in order."""
    import onnx

    told = onnx.shape_inference.infer_shapes(proto).graph
    shapes = {put.name: put.type.tensor_type.shape.dim for put in (*told.input, *told.value_info)}
    return {name: dims[1].dim_value for name, dims in shapes.items() if len(dims) == 4 and dims[1].dim_value}


class _Graph:
    """A graph by who makes and reads its values."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.makers = {output: node for node in proto.graph.node for output in node.output}
        self.readers: dict[str, list[onnx.NodeProto | None]] = {put.name: [None] for put in proto.graph.output}
        for node in proto.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def values(self, name: str) -> list[int] | None:
        """A constant's values; None where it is none."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name]).ravel().tolist() if name in self.constants else None

    def _real(self, name: str) -> list[int] | None:
        """A constant's values, also where they are widened from integers; without their scale."""
        widen = self.makers.get(name)
        if widen is None or widen.op_type != "DequantizeLinear":
            return self.values(name)
        codes, zero = self.values(widen.input[0]), self.values(widen.input[2])
        return None if codes is None or zero is None else [code - zero[0] for code in codes]

    def way(self, pad: onnx.NodeProto) -> _Way | None:
        """The shortcut that ends in a pad; None where its values are not integers of one scale throughout."""
        value, between, strides = pad.input[0], [], [1, 1]
        while (found := self._step(value)) is not None:
            value, nodes, steps = found
            between += nodes
            strides = [a * b for a, b in zip(strides, steps, strict=True)]
        start, end = self.makers.get(value), self.readers.get(pad.output[0], [])
        if start is None or start.op_type != "DequantizeLinear" or len(end) != 1 or end[0] is None:
            return None
        alike = end[0].op_type == "QuantizeLinear" and end[0].input[1:] == start.input[1:]
        return _Way(value, pad, tuple(between), (strides[0], strides[1])) if alike else None

    def _step(self, value: str) -> tuple[str, list[onnx.NodeProto], list[int]] | None:
        """A slice before a value, with what narrows and widens after it: its input, those nodes, its strides."""
        nodes = []
        for kind in ("DequantizeLinear", "QuantizeLinear", "Slice"):
            node = self.makers.get(value)
            if node is None or node.op_type != kind or len(self.readers[value]) != 1:
                return None
            nodes.append(node)
            value = node.input[0]
        widen, narrow, piece = nodes
        before, strides = self.makers.get(value), self._strides(piece)
        alike = before is not None and narrow.input[1:] == widen.input[1:] == before.input[1:]
        return (value, nodes, strides) if alike and strides is not None else None

    def _strides(self, piece: onnx.NodeProto) -> list[int] | None:
        """The strides of rows and columns of a slice that goes from the first to the last of them."""
        told = [self.values(name) for name in piece.input[1:]]
        if len(told) != 4 or any(each is None for each in told):
            return None
        strides = [1, 1]
        for start, end, axis, step in zip(*told, strict=True):  # pyright: ignore[reportArgumentType]
            if start != 0 or end < END or axis not in (2, 3) or step < 1:
                return None
            strides[axis - 2] = step
        return strides

    def added(self, pad: onnx.NodeProto) -> tuple[int, int] | None:
        """The channels that a pad adds before and after; None where it adds anything else, or no zeros."""
        from onnx import helper

        modes = [helper.get_attribute_value(a) for a in pad.attribute if a.name == "mode"]
        filling = [self._real(name) for name in pad.input[2:] if name]
        amounts = self.values(pad.input[1])
        if modes not in ([], [b"constant"]) or filling not in ([], [[0]]) or amounts is None or len(amounts) != 8:
            return None
        low, high = amounts[1], amounts[5]
        others = [amount for place, amount in enumerate(amounts) if place not in (1, 5)]
        return (low, high) if not any(others) and min(low, high) >= 0 else None

    def replace(self, way: _Way, weight: np.ndarray) -> None:
        """A convolution in the place of a shortcut, under the name of its pad."""
        from onnx import helper, numpy_helper

        graph, name = self.proto.graph, way.pad.name
        parts = {"codes": weight, "scale": np.float32(1), "zero": np.int8(0)}
        for part, values in parts.items():
            graph.initializer.append(numpy_helper.from_array(np.asarray(values), f"{name}_{part}"))
        inputs, wide = [f"{name}_{part}" for part in parts], f"{name}_weight"
        widened = helper.make_node("DequantizeLinear", inputs, [wide], name=f"{name}_widened")
        made = helper.make_node(
            "Conv", [way.start, wide], way.pad.output, name=name, kernel_shape=[1, 1], strides=list(way.strides)
        )
        place = list(graph.node).index(way.pad)
        graph.node.insert(place, made)
        graph.node.insert(place, widened)
        for node in (way.pad, *way.between):
            graph.node.remove(node)
