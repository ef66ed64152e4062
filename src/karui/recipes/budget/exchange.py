"""A block with another layer in place of its own: what followed the old layer follows the new one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper
from torch import Tensor, nn

from karui.errors import CaptureError
from karui.measuring import onnx_form
from karui.model import Model, describe_layer
from karui.recipes.budget.blocks import FEW, Block, Shape, constant, shaped

if TYPE_CHECKING:
    from collections.abc import Sequence

INPUT, OUTPUT = "new input", "new output"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Part:
    """Nodes from `INPUT` to `OUTPUT`, and their weights."""

    nodes: tuple[onnx.NodeProto, ...]
    weights: dict[str, np.ndarray]


def told_layer(layer: nn.Module) -> str:
    """A layer's class and settings, which decide its time.

    Raises:
        SurgeryError: they cannot be told; nor could the layer be put into a network, then.
    """
    return json.dumps(describe_layer(layer), sort_keys=True)


def exchanged(block: Block, layer: nn.Module, given: Shape, batch: int) -> Block:
    """The block with another layer in place of its own.

    Args:
        block: of the layer as it is, at that batch size.
        layer: the new one.
        given: shape of the layer's input, with one sample.
        batch: samples.

    Raises:
        CaptureError: the layer cannot be exported.
    """
    part = chain(layer, len(given)) or _exported(layer, given)
    own = block.nodes[0]
    names = {INPUT: own.input[0], OUTPUT: own.output[0]}
    nodes = []
    for node in part.nodes:
        made = onnx.NodeProto.FromString(node.SerializeToString())
        made.input[:] = [names.get(name, name) for name in node.input]
        made.output[:] = [names.get(name, name) for name in node.output]
        nodes.append(made)
    rest = block.nodes[1:]
    # A linear layer's own bias may be a sum of its own after the product; the new layer has its own.
    if own.op_type == "MatMul" and rest and rest[0].op_type == "Add" and set(rest[0].input) & set(block.weights):
        nodes[-1].output[:] = rest[0].output
        rest = rest[1:]
    read = {name for node in rest for name in node.input}
    weights = part.weights | {name: array for name, array in block.weights.items() if name in read}
    inputs = {own.input[0]: ((batch, *given[1:]), onnx.TensorProto.FLOAT)}
    inputs |= {name: told for name, told in block.inputs.items() if name in read and name not in inputs}
    return Block((*nodes, *rest), weights, inputs, block.output, block.opset, block.layer)


def chain(layer: nn.Module, dims: int) -> Part | None:
    """A convolution, a linear layer, or a sequence of them, written down without an export, which takes seconds."""
    plain = isinstance(layer, nn.Sequential) and type(layer).forward is nn.Sequential.forward
    stages = list(layer.children()) if plain else [layer]
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, np.ndarray] = {}
    for number, stage in enumerate(stages):
        value = INPUT if number == 0 else f"new value {number}"
        result = OUTPUT if number == len(stages) - 1 else f"new value {number + 1}"
        if type(stage) in _CONVOLUTIONS and isinstance(stage.padding, tuple) and stage.padding_mode == "zeros":
            made = _conv(stage, number, value, result, weights)
        elif type(stage) is nn.Linear:
            made = _linear(stage, number, value, result, weights, dims)
        else:
            return None
        nodes += made
    return Part(tuple(nodes), weights) if nodes else None


def _array(tensor: Tensor) -> np.ndarray:
    """A weight; of many numbers only the shape, as many new layers wait to be timed together."""
    if tensor.numel() > FEW:
        return shaped(tensor.shape)
    return tensor.detach().cpu().numpy().astype(np.float32)


def _conv(stage: nn.Module, number: int, value: str, result: str, weights: dict[str, np.ndarray]) -> Sequence:
    layer: nn.Conv2d = stage  # pyright: ignore[reportAssignmentType]  (of any number of dimensions)
    names = [f"new {number} weight"] + ([f"new {number} bias"] if layer.bias is not None else [])
    for name, tensor in zip(names, (layer.weight, layer.bias), strict=False):
        assert tensor is not None  # noqa: S101  (named only where it is there)
        weights[name] = _array(tensor)
    padding = [int(p) for p in layer.padding]
    settings = {
        "kernel_shape": list(layer.kernel_size),
        "strides": list(layer.stride),
        "dilations": list(layer.dilation),
        "pads": padding + padding,
        "group": layer.groups,
    }
    return [helper.make_node("Conv", [value, *names], [result], name=f"new {number}", **settings)]


def _linear(  # noqa: PLR0917  (what it reads, gives and adds to)
    stage: nn.Linear, number: int, value: str, result: str, weights: dict[str, np.ndarray], dims: int
) -> Sequence:
    weight, bias = f"new {number} weight", f"new {number} bias"
    if stage.bias is not None:
        weights[bias] = _array(stage.bias)
    if dims == 2:
        weights[weight] = _array(stage.weight)
        names = [value, weight] + ([bias] if stage.bias is not None else [])
        return [helper.make_node("Gemm", names, [result], name=f"new {number}", transB=1)]
    weights[weight] = np.ascontiguousarray(_array(stage.weight).T)
    product = f"new product {number}" if stage.bias is not None else result
    nodes = [helper.make_node("MatMul", [value, weight], [product], name=f"new {number}")]
    if stage.bias is not None:
        nodes.append(helper.make_node("Add", [product, bias], [result], name=f"new {number} sum"))
    return nodes


def _exported(layer: nn.Module, given: Shape) -> Part:
    """Any other layer, as the exporter writes it."""
    import torch

    try:
        form = onnx_form(Model(layer, example=(torch.zeros(2, *given[1:]),)))
    except CaptureError as error:  # to the exporter the layer is the model; whoever reads of one thinks of their own
        raise CaptureError(error.message.replace("The model", f"The new {type(layer).__name__}", 1)) from error
    graph = onnx.load_model_from_string(form.data).graph
    names = {node.output[0]: f"new {node.output[0]}" for node in graph.node}
    names |= {tensor.name: f"new {tensor.name}" for tensor in graph.initializer}
    names |= {graph.input[0].name: INPUT, graph.output[0].name: OUTPUT}
    nodes = []
    for node in graph.node:
        made = onnx.NodeProto.FromString(node.SerializeToString())
        made.name = f"new {node.name}"
        made.input[:] = [names.get(name, name) for name in node.input]
        made.output[:] = [names.get(name, name) for name in node.output]
        nodes.append(made)
    return Part(tuple(nodes), {names[t.name]: constant(t) for t in graph.initializer})
