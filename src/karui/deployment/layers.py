"""Which layers of an ONNX form can compute in 8 bits, which can only store them, and what became of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from karui.errors import SettingError, UsageError, did_you_mean
from karui.measuring import OnnxForm
from karui.measuring.hollow import Hollow

if TYPE_CHECKING:
    import onnx

WEIGHTED = ("Conv", "Gemm", "MatMul", "Gather")
"""Operators with weights that ONNX Runtime computes in integers on the CPU."""
PASSING = (
    "Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Mul", "Pad",
    "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Where",
)  # fmt: skip
"""Operators between them that also run on integers, so that values need not be widened and narrowed on the way.

Softmax and normalisation are left out: they have no integer kernel, or lose more by it than they gain.
"""
INTEGER = [*WEIGHTED, *PASSING]
STORED = {"LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2), "ConvTranspose": (1,)}
"""Operators without an integer kernel: their weights, the inputs of these numbers, are stored in 8 bits."""


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers with weights of a form, in the order of its operators.

    Settings:
        operators: for each layer that can be quantised, by path: the names of its operators that can.
        stored: for each layer whose weights alone can be: the names of its operators.
        other: for each other layer with weights: the kind of its operator.
    """

    operators: dict[str, tuple[str, ...]]
    stored: dict[str, tuple[str, ...]]
    other: dict[str, str]

    @property
    def paths(self) -> tuple[str, ...]:
        """Every layer that gets smaller in 8 bits."""
        return tuple(dict.fromkeys((*self.operators, *self.stored)))

    def covered(self, asked: Sequence[str]) -> tuple[str, ...]:
        """The layers that these paths name: themselves, or parts of what they name.

        Raises:
            SettingError: a path names none.
        """
        found: dict[str, None] = {}
        for path in asked:
            below = [known for known in self.paths if known == path or known.startswith(f"{path}.")]
            if not below:
                did_you_mean(path, list(self.paths), "Layer", SettingError)
            found |= dict.fromkeys(below)
        return tuple(found)


def parsed(form: OnnxForm) -> Hollow:
    """The graph in a form's bytes, without the values of its weights.

    Raises:
        UsageError: they are no ONNX file.
    """
    try:
        graph = Hollow(form)
        graph.check()
        return graph
    except Exception as error:  # the parser has errors of its own, of several kinds
        line = str(error).strip().partition("\n")[0]
        raise UsageError(f"The form is no whole ONNX file: {line}", "Export the model again.") from error


def layers_of(form: OnnxForm, proto: onnx.ModelProto) -> Layers:
    """The layers with weights of a form that was parsed."""
    floats = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.data_type == 1}
    heavy: dict[str, list[str]] = {}
    stored: dict[str, list[str]] = {}
    other: dict[str, str] = {}
    for node in proto.graph.node:
        path = form.layers.get(node.name, "")
        if node.op_type in STORED:
            stored.setdefault(path, []).append(node.name)
        elif node.op_type in WEIGHTED and (node.op_type != "Gather" or node.input[0] in floats):
            heavy.setdefault(path, []).append(node.name)
        elif node.op_type not in INTEGER and any(name in floats and sum(floats[name].dims) for name in node.input):
            other[path] = node.op_type
    for node in proto.graph.node:  # what lies between them goes with the layer that it belongs to
        path = form.layers.get(node.name, "")
        if path in heavy and node.op_type in PASSING:
            heavy[path].append(node.name)
    return Layers(
        operators={path: tuple(names) for path, names in heavy.items()},
        stored={path: tuple(names) for path, names in stored.items()},
        other={path: kind for path, kind in other.items() if path not in heavy and path not in stored},
    )


def integer_layers(layers: Layers, proto: onnx.ModelProto) -> tuple[str, ...]:
    """The layers of which every operator with weights takes its values from integers in this graph."""
    makers = {output: node for node in proto.graph.node for output in node.output}
    nodes = {node.name: node for node in proto.graph.node}

    def narrow(name: str) -> bool:
        return name in makers and makers[name].op_type == "DequantizeLinear"

    def computes(name: str) -> bool:
        node = nodes[name]
        return all(narrow(value) for value in node.input[: 1 if node.op_type == "Gather" else 2])

    return tuple(
        path
        for path, names in layers.operators.items()
        if all(computes(name) for name in names if name in nodes and nodes[name].op_type in WEIGHTED)
    )


def with_added(known: dict[str, str], proto: onnx.ModelProto) -> dict[str, str]:
    """The layer of each operator, those that quantisation added included.

    What widens a value belongs to the layer that reads it; what narrows one, to the layer that made it.
    """
    makers = {output: node.name for node in proto.graph.node for output in node.output}
    readers: dict[str, list[str]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node.name)
    found = {node.name: known[node.name] for node in proto.graph.node if node.name in known}
    for node in proto.graph.node:
        if node.name not in found:
            around = readers.get(node.output[0], []) if node.op_type == "DequantizeLinear" else []
            around = [*around, makers.get(node.input[0], "")]
            found[node.name] = next((known[name] for name in around if name in known), "")
    return found
