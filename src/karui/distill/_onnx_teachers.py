"""ONNX files as teachers, run by ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from karui.distill.predictors import Gives, Predictor, Scores, digest_of
from karui.errors import KaruiError, NeedError, require
from karui.measuring.engines import onnx_session
from karui.numerics.soft_targets import widened

_KINDS = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
_PASSED_ON = frozenset({"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"})
"""Operators that leave a probability a probability."""


def onnx_teacher(path: Path, *, gives: Gives | None = None, pair: bool = False) -> Predictor:
    """The network of an ONNX file as a predictor.

    Args:
        path: the file; its weights are inside, or in files beside it.
        gives: what comes out; None looks at the graph: probabilities where the output is a softmax's or a sigmoid's,
            or a classifier's of ai.onnx.ml, logits otherwise. Of a softmax over classes, or the sigmoid of one number,
            what goes into it is asked for: of a probability near 1, rounding leaves no logit of the others.
        pair: whether it is a detector, of which the logits and the offsets of boxes are meant, in this order.

    Raises:
        NeedError: ONNX Runtime does not open it, or several outputs may be meant.
    """
    data, name = _whole(path), path.name
    try:
        network = _Network(data, name, pair=pair)
        said = gives or _told_by(data, network.outputs[0])
        bare = _without_ending(data, network.outputs[0]) if gives is None else None
        if bare is not None:
            network = _Network(bare, name, pair=pair, scored=said == "probabilities")
    except KaruiError as error:
        raise NeedError(f"The teacher {name} cannot be used: {error.message}", error.hint) from error
    return Predictor(network, name, digest_of(bare or data), said)


def _whole(path: Path) -> bytes:
    """The bytes of a file; with those of its weights, where the exporter put them beside it."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    data = path.read_bytes()
    try:
        told = onnx.load_model_from_string(data)
    except Exception:  # noqa: BLE001  (it is no ONNX file, which ONNX Runtime says better)
        return data
    beside = [tensor for tensor in told.graph.initializer if uses_external_data(tensor)]
    for name in {ExternalDataInfo(tensor).location for tensor in beside}:
        require(
            (path.parent / name).is_file(),
            f"The teacher {path.name} has its weights in another file, {name}, which is not there.",
            "Put it beside the teacher.",
            NeedError,
        )
    return onnx.load(path).SerializeToString() if beside else data


class _Network:
    """Asks a session, of which each process has its own: a forked one may not use its parent's threads."""

    def __init__(self, data: bytes, name: str, *, pair: bool = False, scored: bool = False) -> None:
        self.data, self.name, self.scored = data, name, scored
        self._session: tuple[int, Any] | None = None
        session = self._here()
        self.puts = [(put.name, list(put.shape), put.type) for put in session.get_inputs()]
        odd = [kind for _, _, kind in self.puts if kind not in _KINDS]
        require(not odd, f"it takes {', '.join(odd)}.", "Export it with tensors as inputs.", NeedError)
        numbers = [put for put in session.get_outputs() if put.type in list(_KINDS)[:3]]
        self.outputs = [put.name for put in numbers] if pair and len(numbers) == 2 else [_meant(numbers)]

    def __call__(self, inputs: tuple[Any, ...]) -> np.ndarray | Scores | tuple[np.ndarray | Scores, ...]:
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            names = [name for name, _, _ in self.puts]
            lacking = [name for name in names if name not in inputs[0]]
            require(
                not lacking,
                f"The teacher {self.name} takes {', '.join(names)}, and the inputs have no {', '.join(lacking)}.",
                "Export it with the names of the student's inputs.",
                NeedError,
            )
            inputs = tuple(inputs[0][name] for name in names)
        require(
            len(inputs) == len(self.puts),
            f"The teacher {self.name} takes {len(self.puts)} inputs, not {len(inputs)}.",
            "Give it the inputs of the student.",
            NeedError,
        )
        arrays = [self._fitted(x, shape, _KINDS[kind]) for x, (_, shape, kind) in zip(inputs, self.puts, strict=True)]
        fixed = self.puts[0][1][0] if self.puts[0][1] else None
        parts = [
            [said[:size] for said in self._run(part)]
            for part, size in _parts(arrays, fixed if isinstance(fixed, int) else None)
        ]
        first, *others = (np.concatenate(said) for said in zip(*parts, strict=True))
        told = Scores(first) if self.scored else first
        return (told, *others) if others else told

    def _fitted(self, x: Tensor, shape: list[Any], kind: Any) -> np.ndarray:
        """An input as the file wants it: of its type; flattened where it takes a table."""
        given = widened(x.detach()).cpu().numpy()
        if len(shape) == 2 and given.ndim > 2 and shape[1] in (given[0].size, None):
            given = given.reshape(len(given), -1)
        fits = len(shape) == given.ndim and all(
            not isinstance(wanted, int) or wanted == size
            for wanted, size in zip(shape[1:], given.shape[1:], strict=True)
        )
        wanted = ", ".join(["batch", *(str(size) if isinstance(size, int) else "any" for size in shape[1:])])
        require(
            fits,
            f"The teacher {self.name} takes inputs of shape ({wanted}), and the inputs are of shape {tuple(x.shape)}.",
            "Give inputs of the shape that it was made for.",
            NeedError,
        )
        return given.astype(kind, copy=False)

    def _run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        named = {name: np.ascontiguousarray(array) for (name, _, _), array in zip(self.puts, arrays, strict=True)}
        try:
            return self._here().run(self.outputs, named)
        except Exception as error:  # ONNX Runtime raises classes of its own, without a common one
            line = str(error).strip().partition("\n")[0]
            raise NeedError(f"The teacher {self.name} fails on inputs of shape {arrays[0].shape}: {line}") from error

    def _here(self) -> Any:
        if self._session is None or self._session[0] != os.getpid():
            self._session = (os.getpid(), onnx_session(self.data, torch.get_num_threads()))
        return self._session[1]


def _meant(puts: list[Any]) -> str:
    """The output that holds the answer: the only one of numbers, or the one that is called probabilities."""
    chosen = puts if len(puts) == 1 else [put for put in puts if "prob" in put.name.lower()]
    names = ", ".join(put.name for put in puts) or "none of numbers (a classifier is exported with zipmap=False)"
    require(len(chosen) == 1, f"its outputs are {names}.", "Export it with one output, or give a function.", NeedError)
    return chosen[0].name


def _parts(arrays: list[np.ndarray], fixed: int | None) -> Iterator[tuple[list[np.ndarray], int]]:
    """The batch in parts of the size that the file was exported for, the last one filled up; and their sizes."""
    samples = len(arrays[0])
    for start in range(0, samples, fixed or max(1, samples)):
        size = min(fixed or samples, samples - start)
        rows = np.minimum(np.arange(start, start + (fixed or samples)), samples - 1)
        yield [array[rows] for array in arrays], size


def _told_by(data: bytes, output: str) -> Gives:
    """What the graph says of an output."""
    import onnx

    node = _maker(onnx.load_model_from_string(data).graph, output, _PASSED_ON)
    if node is None:
        return "logits"
    sure = node.op_type in ("Softmax", "Sigmoid") or (node.domain == "ai.onnx.ml" and "Classifier" in node.op_type)
    return "probabilities" if sure or "prob" in output.lower() else "logits"


def _without_ending(data: bytes, output: str) -> bytes | None:
    """The same network without the softmax or sigmoid that an output is made by; None where it ends otherwise."""
    import onnx

    model = onnx.load_model_from_string(data)
    node = _maker(model.graph, output, frozenset({"Identity", "Cast"}))  # which leave each number in its place
    if node is None or node.domain or node.op_type not in ("Softmax", "LogSoftmax", "Sigmoid"):
        return None
    (put,) = (put for put in model.graph.output if put.name == output)
    sizes = [size.dim_value for size in put.type.tensor_type.shape.dim]
    if node.op_type == "Sigmoid":
        over_classes = len(sizes) == 1 or sizes[1:] == [1]
    else:
        version = next(one.version for one in model.opset_import if not one.domain)
        axis = next((part.i for part in node.attribute if part.name == "axis"), -1 if version >= 13 else 1)
        # Before version 13 all dimensions from the axis on were one.
        over_classes = len(sizes) > 1 and axis % len(sizes) == 1 and (version >= 13 or len(sizes) == 2)
    if not over_classes:
        return None
    node.op_type = "Identity"  # in its place, so that what follows stays as it is
    del node.attribute[:]
    return model.SerializeToString()


def _maker(graph: Any, output: str, passed_on: frozenset[str]) -> Any:
    """The node that an output comes from, behind those that pass it on; None where it is an input."""
    makers = {made: node for node in graph.node for made in node.output}
    node = makers.get(output)
    while node is not None and node.op_type in passed_on:
        node = makers.get(node.input[0])
    return node
