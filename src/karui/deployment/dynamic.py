"""Dynamic quantisation to 8 bits: for networks whose weights are mostly those of linear layers and embeddings.

Weights are integers; the activations that meet them become integers at each call, by their own range, so that no
calibration is needed and nothing is narrowed between the layers. What a static form must narrow and widen on the way
(the gates and states of an LSTM) stays as it is here.

Does not pay on convolutions, which stay in 32 bits: their integer kernel for ranges that are known only at the call is
slow. OpenVINO does not take such forms.

Source: `quantize_dynamic` in the documentation of `onnxruntime.quantization`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from karui.deployment.factors import with_balanced_factors
from karui.deployment.int8 import Int8Form, requantised, without_unread
from karui.deployment.layers import layers_of, parsed
from karui.measuring import OnnxForm
from karui.measuring.hollow import Hollow

if TYPE_CHECKING:
    import onnx

LINEAR = ("Gemm", "MatMul", "Gather")


def mostly_linear(form: OnnxForm) -> bool:
    """Whether linear layers and embeddings hold more than half of the numbers of a form."""
    proto = parsed(form).proto
    sizes = _floats(proto)
    linear = {name for names in _weights(form, proto).values() for name in names}
    return 2 * sum(sizes[name] for name in linear) > sum(sizes.values())


def quantise_dynamically(form: OnnxForm) -> Int8Form:
    """A form whose linear layers and embeddings are in 8 bits; weights have 7 of them, one scale a channel.

    Raises:
        UsageError: the form is damaged, or cannot be quantised.

    Example:
        >>> import torch
        >>> from karui.measuring import onnx_form
        >>> from karui.model import Model
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 8))
        >>> form = onnx_form(Model(net, example=(torch.zeros(1, 64),)))
        >>> light = quantise_dynamically(form)
        >>> light.quantised, len(light.data) < len(form.data) / 2
        (('0', '2'), True)
    """
    from onnxruntime.quantization import QuantizationMode, QuantType
    from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer

    graph = parsed(form)
    form, before = with_balanced_factors(form, graph), form
    graph = graph if form is before else parsed(form)
    proto = graph.proto
    layers, weights = layers_of(form, proto), _weights(form, proto)
    turned = _turned(graph)
    made = requantised(
        graph,
        lambda: ONNXQuantizer(
            proto,
            per_channel=True,
            reduce_range=True,
            mode=QuantizationMode.IntegerOps,
            static=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=None,
            nodes_to_quantize=[],
            nodes_to_exclude=_deep(proto),
            op_types_to_quantize=["MatMul", "Gather"],
            extra_options={"MatMulConstBOnly": True},
        ),
        "Deploy it in 32 bits.",
        lambda tensors: _fill(graph, turned, tensors),
    )
    left = _floats(made)
    quantised = tuple(path for path, names in weights.items() if not any(name in left for name in names))
    known = sorted(form.layers, key=len)
    return Int8Form(
        form=OnnxForm(
            data=made.SerializeToString(deterministic=True),
            layers={
                node.name: next((form.layers[name] for name in reversed(known) if node.name.startswith(name)), "")
                for node in made.graph.node
            },
        ),
        quantised=quantised,
        stored=(),
        fp32={path: "dynamic 8 bits have no fast kernel for it" for path in layers.paths if path not in quantised},
        dynamic=True,
    )


def _turned(graph: Hollow) -> dict[str, str]:
    """The weights of linear layers as a product with a matrix takes them, in place; what each was made of, by its name.

    ONNX Runtime's quantiser does the same, under the same names, but with weights that are there, and copies the graph
    with both of each. What it cannot be spared (a name that is taken, inner graphs) gets its values here.
    """
    from onnx import helper, numpy_helper

    inner = graph.proto.graph
    constants = {tensor.name: tensor for tensor in inner.initializer}
    taken = {*constants, *(name for node in inner.node for name in (*node.input, *node.output))}
    if any(attribute.HasField("g") for node in inner.node for attribute in node.attribute):
        graph.fill(inner.initializer)
        return {}
    found: dict[str, str] = {}
    for node in inner.node:
        told = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = [told.get("alpha", 1.0), told.get("beta", 1.0), told.get("transA", 0)] == [1.0, 1.0, 0]
        if node.op_type != "Gemm" or not plain or told.get("transB") != 1 or node.input[1] not in constants:
            continue
        weight = constants[node.input[1]]
        name = f"{weight.name}_Transposed"
        if taken & {name, f"{name}_quantized", f"{name}_scale", f"{name}_zero_point"}:
            graph.fill([weight])
            continue
        if name not in found and graph.values(weight.name) is None:
            inner.initializer.append(numpy_helper.from_array(numpy_helper.to_array(weight).T, name))
        elif name not in found:
            inner.initializer.add(name=name, data_type=weight.data_type, dims=weight.dims[::-1])
        found[name] = weight.name
        node.input[1] = name
        next(attribute for attribute in node.attribute if attribute.name == "transB").i = 0
    without_unread(graph.proto)
    return found


def _fill(graph: Hollow, turned: Mapping[str, str], tensors: Iterable[onnx.TensorProto]) -> None:
    """Give constants their values, also those that were turned."""
    from onnx import helper

    for tensor in tensors:
        values = graph.values(turned.get(tensor.name, ""))
        if values is None:
            graph.fill([tensor])
        else:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.raw_data = np.frombuffer(values, dtype).reshape(tensor.dims[::-1]).T.tobytes()


def _deep(proto: onnx.ModelProto) -> list[str]:
    """Products with a constant of more than two dimensions, for which ONNX Runtime has no integer kernel."""
    deep = {tensor.name for tensor in proto.graph.initializer if len(tensor.dims) > 2}
    return [node.name for node in proto.graph.node if node.op_type in LINEAR and deep & set(node.input)]


def _floats(proto: onnx.ModelProto) -> dict[str, int]:
    """How many numbers each constant in 32 bits has."""
    return {tensor.name: math.prod(tensor.dims) for tensor in proto.graph.initializer if tensor.data_type == 1}


def _weights(form: OnnxForm, proto: onnx.ModelProto) -> dict[str, list[str]]:
    """The constant matrices of linear layers and embeddings, by the path of the layer."""
    matrices = {tensor.name for tensor in proto.graph.initializer if tensor.data_type == 1 and len(tensor.dims) == 2}
    found: dict[str, list[str]] = {}
    for node in proto.graph.node:
        names = [name for name in node.input[:2] if name in matrices]
        if node.op_type in LINEAR and names:
            found.setdefault(form.layers.get(node.name, ""), []).extend(names)
    return found
