"""The ONNX form of a model: the file that is deployed, timed, and weighed."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import inspect
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
from karui.measuring.filed import Filed
from karui.measuring.hollow import Hollow
from karui.measuring.inference import batch_of, inference
from karui.model import Model

if TYPE_CHECKING:
    import onnx

LARGE = 2**22
"""Bytes of a file whose capture is let go at once: a full collection takes some tenths of a second."""
LIMIT = 2**31 - 1
"""Bytes that a protobuf message can hold; an ONNX file that carries its weights is one message."""


@dataclass(frozen=True)
class OnnxForm:
    """A model as ONNX.

    Settings:
        data: the bytes of the file, weights included; the first dimension of inputs is the batch, of any size. Those of
            a large form wait on disk, and are read each time they are asked for.
        layers: for each operator of the file, by name: the path of its layer; empty for the model itself.
    """

    data: bytes = Filed()  # pyright: ignore[reportAssignmentType]  (reads and takes bytes)
    layers: dict[str, str]  # pyright: ignore[reportGeneralTypeIssues]  (what is filed has no default)

    @property
    def bytes(self) -> int:
        """Length of the file."""
        return Filed.size(self)


_known: weakref.WeakKeyDictionary[Model, tuple[bytes, OnnxForm]] = weakref.WeakKeyDictionary()


def onnx_form(model: Model) -> OnnxForm:
    """The model as ONNX, kept for the next call, as an export takes seconds.

    It is kept as long as the weights stay the same, and what the layers' `repr` shows of their settings.

    Raises:
        CaptureError: the model cannot be exported; the message names the operator, where there is one.
    """
    state = _state(model)
    if model in _known and _known[model][0] == state:
        return _known[model][1]
    form = _export(model)
    _known[model] = (state, form)
    return form


def _state(model: Model) -> bytes:
    """Changes whenever a weight does, or a setting that a layer's `repr` shows: a digest of both.

    Of values, since torch counts no change that is made through `weight.data`.
    """
    digest = hashlib.blake2b(repr(model.module).encode(), digest_size=16)
    for name, t in (*model.module.named_parameters(), *model.module.named_buffers()):
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().to_dense().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _export(model: Model) -> OnnxForm:
    # A batch of 1 would be taken for a constant, so the example is brought to 2 samples.
    example = batch_of(model.example, 2)
    shapes = pytree.tree_map(
        lambda leaf: {0: torch.export.Dim.DYNAMIC} if isinstance(leaf, Tensor) and leaf.ndim else None, example
    )
    with inference(model.module) as module, _silence():
        try:
            # By name, since the shapes of `forward(self, *inputs)` are one tuple.
            named = dict(inspect.signature(module.forward).bind(*shapes).arguments)
            program = torch.export.export(module, example, dynamic_shapes=named, strict=False)
        except Exception as error:
            raise CaptureError(*_capture_failed(error)) from error
        try:
            exported = torch.onnx.export(program, dynamo=True, external_data=False, verbose=False, optimize=False)
            assert exported is not None  # noqa: S101  (dynamo=True returns one)
            values = _constants(exported)
            _simplify(exported)
        except Exception as error:
            raise CaptureError(*_translation_failed(error)) from error
        proto = exported.model_proto
        # The optimiser's rules live as long as the process, and each remembers the last graph that it looked at.
        for value in {*values, *_constants(exported)}:
            value.const_value = None
    layers = _strip(proto, {path for path, _ in model.module.named_modules()})
    _check(proto)
    form = OnnxForm(data=proto.SerializeToString(deterministic=True), layers=layers)
    del proto, exported, program  # the checker reads the file, and makes copies of its own
    if form.bytes > LARGE:
        gc.collect()  # a captured program is a cycle that keeps its weights, and Python counts objects, not bytes
    _check_file(form)
    return form


def _constants(exported: torch.onnx.ONNXProgram) -> list[Any]:
    """All values of a graph that hold numbers."""
    graph = exported.model.graph
    made = [value for node in graph for value in node.outputs]
    return [value for value in (*graph.initializers.values(), *made) if value.const_value is not None]


def _simplify(exported: torch.onnx.ONNXProgram) -> None:
    """What the exporter does by itself: constants computed, redundant operators removed; but packed bits stay packed.

    Weights that are held as bits (`karui.numerics.bit_planes`) are constants, and computed they would be 32 times as
    large. The engine computes them when it loads the file.
    """
    from onnxscript.optimizer import optimize_ir

    if any(node.op_type == "BitwiseAnd" for node in exported.model.graph):
        optimize_ir(exported.model, should_fold=lambda node: False if node.op_type == "BitwiseAnd" else None)
    else:
        exported.optimize()


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


def _capture_failed(error: BaseException) -> tuple[str, str]:
    """One line on why a model cannot be captured, and the remedy."""
    text = str(error)
    if "specialized" in text or "user-specified ranges" in text or "Constraints violated" in text:
        return (
            "The model cannot be exported to ONNX: its forward fixes the batch size (by a reshape, for example).",
            "Use x.shape[0] or -1 for the batch dimension.",
        )
    if "data-dependent" in text:
        return (
            "The model cannot be exported to ONNX: its forward decides by the values of a tensor.",
            "Write the decision with torch.where, or measure in torch only (engines=(Torch(),)).",
        )
    return (
        f"The model cannot be exported to ONNX, as torch.export cannot capture it: {_first_line(error)}",
        "Run torch.export.export(module, example, strict=False) to see the place.",
    )


def _translation_failed(error: BaseException) -> tuple[str, str]:
    """One line on why a captured model has no ONNX form: the operator, where there is one; and the remedy."""
    causes = [error]
    while (below := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(below)
    text = "\n".join(map(str, causes))
    remedy = "Replace the layer that uses it, or measure in torch only (engines=(Torch(),))."
    operator = re.search(r"No ONNX function found for.*?OpOverload\(op='([\w.:]+)'", text)
    if operator:
        return f"The model cannot be exported to ONNX: operator '{operator[1]}' has no ONNX form.", remedy
    node = re.search(r"translating node %?\w+.*?target=([\w.]+)", text)
    where = f" (operator '{node[1]}')" if node else ""
    return f"The model cannot be exported to ONNX{where}: {_first_line(causes[-1])}", remedy


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _strip(proto: onnx.ModelProto, paths: set[str]) -> dict[str, str]:
    """Remove what the exporter notes beside the graph (paths of source files); return the layer of each node."""
    layers = {}
    weights = {tensor.name for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes = re.findall(r"'([^']*)'", notes.get("pkg.torch.onnx.name_scopes", ""))
        # A folded normalisation leaves its own name on the convolution before it; whose weight it is tells the truth.
        owners = [name.rpartition(".")[0] for name in node.input if name in weights and "." in name]
        known = [path for path in (*scopes, *reversed(owners)) if path in paths]
        layers[node.name] = known[-1] if known else ""
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


def _check_file(form: OnnxForm) -> None:
    """The whole file must be valid, with shapes that go together."""
    try:
        Hollow(form).check(full=True)
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise CaptureError(f"The exported ONNX graph is not valid: {line}", "Update torch and onnxscript.") from error
