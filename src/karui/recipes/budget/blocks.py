"""Blocks: each heavy operator of a model's ONNX graph with what an engine melts into it, at any width.

A layer is timed as it stands in the exported graph: a convolution with the normalisation that the exporter folded
into it, the sum and the rectifier that the engine fuses, on inputs of its real shape. Timing a module by itself would
miss all three. A block is data: nodes, the shapes of its weights and inputs; a resized one has other shapes.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import nn

from karui.measuring import OnnxForm, onnx_form
from karui.measuring.engines import onnx_session
from karui.measuring.filed import File
from karui.measuring.hollow import Hollow
from karui.measuring.inference import batch_of, tensors_of
from karui.model import Model

HEAVY = ("Conv", "Gemm", "MatMul")
FUSED = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Add", "Mul", "Gelu", "Elu")
POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
FOLLOWERS = (*FUSED, *POOLS)
"""Operators that follow a heavy one and are timed with it: they work on each channel by itself, and take less time
where there are fewer."""
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers whose widths can be read off, and whose blocks can be resized."""

FEW = 64
"""Values up to which a constant is kept as it is: limits of a Clip, shapes."""

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Block:
    """Nodes with one output, and the shapes of all that they read.

    Settings:
        nodes: in order; the first ones hold the heavy operator.
        weights: constants by name.
        inputs: shapes by name; the batch on the first dimension.
        output: name of the value that it gives.
        opset: of the graph that it comes from.
        layer: path of its layer.
    """

    nodes: tuple[onnx.NodeProto, ...]
    weights: Mapping[str, np.ndarray]
    inputs: Mapping[str, tuple[Shape, int]]
    output: str
    opset: int
    layer: str = ""

    @property
    def names(self) -> set[str]:
        """Of its nodes and the values that they give: an engine that melts nodes names the new one after either."""
        return {node.name for node in self.nodes} | {name for node in self.nodes for name in node.output}

    @property
    def bytes(self) -> int:
        """Bytes of its constants."""
        return sum(array.nbytes for array in self.weights.values())

    @property
    def key(self) -> str:
        """Operators and shapes in a few words, and a digest of every attribute: equal for blocks that cost the same."""
        names: dict[str, str] = {}
        told = []
        for node in self.nodes:
            parts = [names.setdefault(name, str(len(names))) for name in (*node.input, *node.output)]
            attributes = {a.name: str(helper.get_attribute_value(a)) for a in node.attribute}
            told.append([node.op_type, parts, sorted(attributes.items())])
        # Single numbers (limits of a Clip) and whole ones (a shape) decide what is computed; of weights only shapes do.
        weights = {
            names.get(name, ""): array.tolist() if array.size == 1 or array.dtype.kind != "f" else list(array.shape)
            for name, array in self.weights.items()
        }
        inputs = {names.get(name, ""): [list(shape), kind] for name, (shape, kind) in self.inputs.items()}
        text = json.dumps([told, sorted(weights.items(), key=str), sorted(inputs.items())], default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        shapes = [array.shape for array in self.weights.values() if array.ndim > 1]
        sizes = ",".join("x".join(map(str, shape)) for shape in shapes)
        first = next(iter(self.inputs.values()), ((), 0))[0]
        return f"{'+'.join(node.op_type for node in self.nodes)} {sizes} on {'x'.join(map(str, first))} {digest}"

    def data(self) -> bytes:
        """The block as the bytes of an ONNX file."""
        initializers = [numpy_helper.from_array(array, name) for name, array in self.weights.items()]
        inputs = [helper.make_tensor_value_info(name, kind, shape) for name, (shape, kind) in self.inputs.items()]
        output = helper.make_tensor_value_info(self.output, onnx.TensorProto.FLOAT, None)
        graph = helper.make_graph(list(self.nodes), "block", inputs, [output], initializers)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        made.ir_version = 10
        return made.SerializeToString()

    def feed(self) -> dict[str, np.ndarray]:
        """Inputs of the right shapes; their values do not matter to the time."""
        draw = np.random.default_rng(0)
        made = {}
        for name, (shape, kind) in self.inputs.items():
            dtype = helper.tensor_dtype_to_np_dtype(kind)
            whole = np.issubdtype(dtype, np.integer) or dtype.kind == "b"
            made[name] = np.zeros(shape, dtype) if whole else draw.standard_normal(shape).astype(dtype)
        return made


@dataclass(frozen=True, eq=False)
class Graph:
    """The blocks of a model, by the path of their layer, at one batch size.

    Settings:
        blocks: one for each call of a layer.
        form: the ONNX form.
    """

    blocks: Mapping[str, tuple[Block, ...]]
    form: OnnxForm = field(repr=False)


def blocks_of(model: Model, batch: int) -> Graph:
    """The heavy operators of the model's ONNX form, each with what follows it channel by channel.

    Raises:
        CaptureError: the model cannot be exported.
    """
    form = onnx_form(model)
    hollow = Hollow(form)
    proto, graph = hollow.proto, hollow.proto.graph
    shapes = _shapes(form, model.example, batch)
    hollow.fill(tensor for tensor in graph.initializer if not _many(tensor))
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    claimed: set[str] = set()
    found: dict[str, list[Block]] = {}
    for node in graph.node:
        if node.op_type in HEAVY and node.name not in claimed and any(name in constants for name in node.input):
            nodes = _with_followers(node, readers, claimed, {put.name for put in graph.output})
            block = _block(nodes, constants, shapes, opset, form.layers[node.name])
            found.setdefault(block.layer, []).append(block)
    return Graph({path: tuple(blocks) for path, blocks in found.items()}, form)


def _shapes(form: OnnxForm, example: tuple[Any, ...], batch: int) -> dict[str, tuple[Shape, int]]:
    """Shape and type of every value, found by running the graph at two batch sizes: what differs is the batch."""
    hollow = Hollow(form)
    proto = hollow.proto
    held = {put.name for put in proto.graph.output}
    values = [name for node in proto.graph.node for name in node.output if name and name not in held]
    proto.graph.output.extend([onnx.ValueInfoProto(name=name) for name in values])
    with tempfile.TemporaryDirectory(prefix="karui-") as folder:
        file = Path(folder) / "model.onnx"
        hollow.write(proto, file)
        session = onnx_session(file, threads=1, prepack=False)  # it runs twice, and its time does not matter
    names = [put.name for put in session.get_outputs()]
    seen = []
    for size in (1, 2):
        arrays = [t.numpy() for t in tensors_of(batch_of(example, size))]
        feed = dict(zip([put.name for put in session.get_inputs()], arrays, strict=True))
        results = dict(zip(names, session.run(None, feed), strict=True)) | feed
        seen.append({name: (np.shape(v), np.asarray(v).dtype) for name, v in results.items()})
    one, two = seen
    return {
        name: (
            tuple(a + (b - a) * (batch - 1) for a, b in zip(shape, two[name][0], strict=True)),
            helper.np_dtype_to_tensor_dtype(dtype),
        )
        for name, (shape, dtype) in one.items()
        if len(shape) == len(two[name][0])
    }


def _with_followers(
    node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]], claimed: set[str], outputs: set[str]
) -> list[onnx.NodeProto]:
    """The node and the chain of followers that alone read it."""
    nodes = [node]
    while True:
        value = nodes[-1].output[0]
        after = readers.get(value, [])
        whole = len({id(step) for step in after}) == 1 and value not in outputs
        if not whole or after[0].op_type not in FOLLOWERS or after[0].name in claimed:
            return nodes
        claimed.add(after[0].name)
        nodes.append(after[0])


def _block(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
    shapes: Mapping[str, tuple[Shape, int]],
    opset: int,
    layer: str,
) -> Block:
    made = {name for node in nodes for name in node.output}
    read = list(dict.fromkeys(name for node in nodes for name in node.input if name and name not in made))
    return Block(
        nodes=tuple(nodes),
        weights={name: constant(constants[name]) for name in read if name in constants},
        inputs={name: shapes[name] for name in read if name not in constants},
        output=nodes[-1].output[0],
        opset=opset,
        layer=layer,
    )


def resized(block: Block, layer: nn.Module, lost: Mapping[int, int]) -> Block | None:
    """The block with fewer rows (dimension 0 of its layer's weight: outputs) and columns (dimension 1: inputs).

    None where the block's operator is not the layer's own, or nothing is left.

    Args:
        block: of the layer as it is.
        layer: the convolution or linear layer.
        lost: how many indices go, by dimension of the weight.
    """
    node, weight = block.nodes[0], layer.get_parameter("weight")
    name = next((n for n in node.input if n in block.weights and block.weights[n].size == weight.numel()), None)
    if name is None or node.input[0] in block.weights:
        return None
    rows, columns = (weight.shape[dim] - lost.get(dim, 0) for dim in (0, 1))
    if min(rows, columns) < 1:
        return None
    array = block.weights[name]
    transposed = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _attribute(node, "transB"))
    shape = (columns, rows) if transposed else (rows, columns, *array.shape[2:])
    groups = 1
    if node.op_type == "Conv":
        was = int(getattr(layer, "groups", 1))
        each = weight.shape[0] // was
        groups = rows // each if was > 1 and weight.shape[1] == 1 else was
        if rows % groups:
            return None
    weights = {**block.weights, name: shaped(shape)}
    (given, kind), axis = block.inputs[node.input[0]], 1 if node.op_type == "Conv" else -1
    inputs = {**block.inputs, node.input[0]: (_with(given, axis, columns * groups), kind)}
    # Whatever else lies along the outputs: biases, the other summand of a residual sum, a gate.
    old = weight.shape[0]
    for other, held in weights.items():
        along = [dim for dim, size in enumerate(held.shape) if size == old]
        if other != name and along and held.size == old:
            weights[other] = shaped(_with(held.shape, along[0], rows))
    for other, (known, kind) in inputs.items():
        place = axis % len(known) if known else 0
        if other != node.input[0] and len(known) > 1 and known[place] == old:
            inputs[other] = (_with(known, place, rows), kind)
    nodes = list(block.nodes)
    if groups != getattr(layer, "groups", 1):
        nodes[0] = onnx.NodeProto.FromString(node.SerializeToString())
        next(a for a in nodes[0].attribute if a.name == "group").i = groups
    return replace(block, nodes=tuple(nodes), weights=weights, inputs=inputs)


def structure(data: bytes | File) -> str:
    """A digest of an ONNX file without the values of its weights: files of equal digest take equal time."""
    proto = Hollow(data).proto
    told: list[Any] = [
        [n.op_type, list(n.input), list(n.output), sorted(map(str, n.attribute))] for n in proto.graph.node
    ]
    told += [
        [t.name, list(t.dims), t.data_type, numpy_helper.to_array(t).tolist() if math.prod(t.dims) <= 8 else None]
        for t in proto.graph.initializer
        if t.data_type != onnx.TensorProto.FLOAT or math.prod(t.dims) > 8
    ]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:24]


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((a.i for a in node.attribute if a.name == name), 0)


def constant(tensor: onnx.TensorProto) -> np.ndarray:
    """A weight or setting; of many numbers, which cost the same whatever they are, only the shape."""
    return shaped(tensor.dims) if _many(tensor) else numpy_helper.to_array(tensor)


def _many(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == onnx.TensorProto.FLOAT and math.prod(tensor.dims) > FEW


def shaped(shape: Sequence[int]) -> np.ndarray:
    """Weights of a shape, which take no memory: a menu would hold another copy of the model in its blocks."""
    return np.broadcast_to(np.float32(0.05), tuple(shape))


def _with(shape: Sequence[int], axis: int, size: int) -> Shape:
    changed = list(shape)
    changed[axis] = size
    return tuple(changed)
