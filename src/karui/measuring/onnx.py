"""The ONNX form of a model: the file that is deployed, timed, and weighed."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from karui.errors import CaptureError
from karui.measuring.inference import batch_of, inference
from karui.model import Model

if TYPE_CHECKING:
    import onnx

LIMIT = 2**31 - 1
"""Bytes that a protobuf message can hold; an ONNX file that carries its weights is one message."""


@dataclass(frozen=True)
class OnnxForm:
    """A model as ONNX.

    Settings:
        data: the bytes of the file, weights included; the first dimension of inputs is the batch, of any size.
        layers: for each operator of the file, by name: the path of the layer it came from.
    """

    data: bytes
    layers: dict[str, str]


_known: weakref.WeakKeyDictionary[Model, tuple[tuple[Any, ...], OnnxForm]] = weakref.WeakKeyDictionary()


def onnx_form(model: Model) -> OnnxForm:
    """The model as ONNX, kept for the next call as long as its weights stay the same (an export takes seconds).

    Raises:
        CaptureError: the model cannot be exported; the message names the operator, where there is one.
    """
    state = _state(model)
    if model in _known and _known[model][0] == state:
        return _known[model][1]
    form = _export(model)
    _known[model] = (state, form)
    return form


def _state(model: Model) -> tuple[Any, ...]:
    """Changes whenever a weight is written in place or replaced."""
    tensors = (*model.module.named_parameters(), *model.module.named_buffers())
    return tuple((name, t.data_ptr(), t._version, t.shape) for name, t in tensors)  # noqa: SLF001


def _export(model: Model) -> OnnxForm:
    # A batch of 1 would be taken for a constant, so the example is brought to 2 samples.
    example = batch_of(model.example, 2)
    shapes = pytree.tree_map(
        lambda leaf: {0: torch.export.Dim.DYNAMIC} if isinstance(leaf, Tensor) and leaf.ndim else None, example
    )
    with inference(model.module) as module, _silence():
        try:
            program = torch.onnx.export(
                module, example, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False
            )
        except Exception as error:
            raise CaptureError(*_reason(error)) from error
        assert program is not None  # noqa: S101  (dynamo=True returns one)
        proto = program.model_proto
    layers = _strip(proto)
    _check(proto)
    return OnnxForm(data=proto.SerializeToString(deterministic=True), layers=layers)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """No chatter of the exporter: it prints, logs and warns about its own inner workings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> tuple[str, str]:
    """One line on why an export failed, and the remedy."""
    chain, text = [error], str(error)
    while (below := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(below)
        text += f"\n{below}"
    operator = re.search(r"No ONNX function found for.*?OpOverload\(op='([\w.:]+)'", text)
    if operator:
        return (
            f"The model cannot be exported to ONNX: operator '{operator[1]}' has no ONNX form.",
            "Replace the layer that uses it, or measure in torch only (engines=(Torch(),)).",
        )
    batch = re.search(r"(specialized|constant|Constraints violated)[^\n]*", text)
    if batch and "dynamic" in text.lower():
        return (
            "The model cannot be exported to ONNX: its forward fixes the batch size (by a reshape, for example).",
            "Use x.shape[0] or -1 for the batch dimension.",
        )
    lines = [line for line in str(chain[-1]).strip().splitlines() if line.strip()] or [type(chain[-1]).__name__]
    return (
        f"The model cannot be exported to ONNX: {lines[0][:200]}",
        "torch.export must be able to capture it: control flow on tensor values cannot be.",
    )


def _strip(proto: onnx.ModelProto) -> dict[str, str]:
    """Remove what the exporter notes beside the graph (paths of source files); return the layer of each node."""
    layers = {}
    for node in proto.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes = re.findall(r"'([^']*)'", notes.get("pkg.torch.onnx.name_scopes", ""))
        layers[node.name] = scopes[-2] if len(scopes) > 1 else ""
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
        value.doc_string = ""
    for function in proto.functions:
        del function.metadata_props[:]
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    proto.doc_string = proto.graph.doc_string = ""
    return layers


def _check(proto: onnx.ModelProto) -> None:
    """The file must be one that an engine can open by itself."""
    import onnx

    if proto.ByteSize() > LIMIT:
        raise CaptureError(
            "The model is over 2 GB: an ONNX file cannot carry its weights.", "Compress it further first."
        )
    outside = [t.name for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    if outside:
        raise CaptureError(
            f"The exporter put the tensor '{outside[0]}' beside the ONNX file.", "Update torch and onnxscript."
        )
    foreign = sorted({f"{n.domain}::{n.op_type}" for n in proto.graph.node if n.domain not in ("", "ai.onnx")})
    local = {f"{f.domain}::{f.name}" for f in proto.functions}
    if unknown := [name for name in foreign if name not in local]:
        raise CaptureError(
            f"The model cannot be exported to ONNX: operator '{unknown[0]}' is no standard one.",
            "Replace the layer that uses it, or measure in torch only (engines=(Torch(),)).",
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise CaptureError(f"The exported ONNX graph is not valid: {line}", "Update torch and onnxscript.") from error
