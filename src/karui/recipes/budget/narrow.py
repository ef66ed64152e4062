"""Blocks in 8 bits: timed with integers coming in and going out, as they stand in a quantised network.

What pays in 32 bits need not pay in 8: an integer convolution from 16 to 8 channels takes longer than one to 16, and
thin factors of a layer cost as much as the layer. So where the form in 8 bits is the one that counts, the menu is timed
in 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper

from karui.deployment import calibrate, quantise
from karui.errors import KaruiError
from karui.measuring import OnnxForm
from karui.recipes.budget.blocks import Block

if TYPE_CHECKING:
    from karui.recipes.budget.recorder import Timed


@dataclass(frozen=True, eq=False)
class Narrow:
    """A block in 8 bits as the bytes of an ONNX file.

    Settings:
        file: the bytes; narrowing of its inputs and widening of its output are the neighbours' and left out.
    """

    file: bytes = field(repr=False)

    def data(self) -> bytes:
        """The block as the bytes of an ONNX file."""
        return self.file

    def feed(self) -> dict[str, np.ndarray]:
        """Inputs of the right shapes; their values do not matter to the time."""
        draw = np.random.default_rng(0)
        made = {}
        for put in self._inputs:
            dtype = helper.tensor_dtype_to_np_dtype(put.type.tensor_type.elem_type)
            shape = [size.dim_value for size in put.type.tensor_type.shape.dim]
            made[put.name] = (draw.random(shape) * 200).astype(dtype)
        return made

    @cached_property
    def _inputs(self) -> list[onnx.ValueInfoProto]:
        return list(onnx.load_model_from_string(self.file).graph.input)


def narrowed(block: Block) -> Timed:
    """A block in 8 bits; as it is where it has no such form."""
    import torch

    whole = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(block.data()))
    form = OnnxForm(data=whole.SerializeToString(), layers=dict.fromkeys((n.name for n in whole.graph.node), "block"))
    try:
        made = quantise(calibrate(form, [tuple(torch.from_numpy(array) for array in block.feed().values())]))
    except KaruiError:
        return block
    return Narrow(_open(onnx.load_model_from_string(made.data)).SerializeToString()) if made.quantised else block


def _open(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Integers in place of floats where the block meets its neighbours."""
    graph = proto.graph
    puts = {put.name: put for put in graph.input}
    for node in [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] in puts]:
        if sum(node.input[0] in other.input for other in graph.node) > 1:
            continue  # another operator reads it in 32 bits
        put = puts[node.input[0]]
        put.name, put.type.tensor_type.elem_type = node.output[0], onnx.TensorProto.UINT8
        graph.node.remove(node)
    [out] = graph.output
    last = next(n for n in graph.node if out.name in n.output)
    if last.op_type == "DequantizeLinear" and last.input[0] not in puts:
        out.name, out.type.tensor_type.elem_type = last.input[0], onnx.TensorProto.UINT8
        graph.node.remove(last)
    return proto
