"""ONNX files as teachers, run by ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from karui.distill.predictors import Gives, Predictor, digest_of
from karui.errors import KaruiError, NeedError, require
from karui.measuring.engines import onnx_session

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
            or a classifier's of ai.onnx.ml, logits otherwise.
        pair: whether it is a detector, of which the logits and the offsets of boxes are meant, in this order.

    Raises:
        NeedError: ONNX Runtime does not open it, or several outputs may be meant.
    """
    data, name = _whole(path), path.name
    try:
        network = _Network(data, name, pair=pair)
    except KaruiError as error:
        raise NeedError(f"The teacher {name} cannot be used: {error.message}", error.hint) from error
    return Predictor(network, name, digest_of(data), gives or _told_by(data, network.outputs[0]))


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

    def __init__(self, data: bytes, name: str, *, pair: bool = False) -> None:
        self.data, self.name = data, name
        self._session: tuple[int, Any] | None = None
        session = self._here()
        self.puts = [(put.name, list(put.shape), put.type) for put in session.get_inputs()]
        odd = [kind for _, _, kind in self.puts if kind not in _KINDS]
        require(not odd, f"it takes {', '.join(odd)}.", "Export it with tensors as inputs.", NeedError)
        numbers = [put for put in session.get_outputs() if put.type in list(_KINDS)[:3]]
        self.outputs = [put.name for put in numbers] if pair and len(numbers) == 2 else [_meant(numbers)]

    def __call__(self, inputs: tuple[Tensor, ...]) -> np.ndarray | tuple[np.ndarray, ...]:
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
        joined = [np.concatenate(said) for said in zip(*parts, strict=True)]
        return joined[0] if len(joined) == 1 else tuple(joined)

    def _fitted(self, x: Tensor, shape: list[Any], kind: Any) -> np.ndarray:
        """An input as the file wants it: of its type; flattened where it takes a table."""
        given = x.detach().cpu().numpy()
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

    graph = onnx.load_model_from_string(data).graph
    makers = {made: node for node in graph.node for made in node.output}
    node = makers.get(output)
    while node is not None and node.op_type in _PASSED_ON:
        node = makers.get(node.input[0])
    if node is None:
        return "logits"
    sure = node.op_type in ("Softmax", "Sigmoid") or (node.domain == "ai.onnx.ml" and "Classifier" in node.op_type)
    return "probabilities" if sure or "prob" in output.lower() else "logits"
