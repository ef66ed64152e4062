"""ONNX graphs without their large constants: what looks at a graph, or changes it, need not hold the weights.

A graph that is parsed holds every weight, each tool that copies it holds them again, and none are given back before
the last part of it goes. Here the weights stay where they are, in a file that is mapped, and are put into the graph
where their values are needed, or are written beside it for an engine, which maps them, too.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from karui.measuring.filed import File, mapped

if TYPE_CHECKING:
    import onnx

LARGE = 4096
"""Bytes up to which a constant stays in its graph: shapes, limits and scales, which decide what a graph computes."""
PAGE = 4096
"""Bytes that the place of a constant in a file is a multiple of, so that an engine can map it."""
SIZES = {1: 4, 2: 1, 3: 1}
"""Bytes of a value of the types that weights have: FLOAT, UINT8, INT8."""
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
"""Numbers of the fields that lead to the bytes of a constant, in `onnx.proto`."""


class Hollow:
    """An ONNX graph whose large constants are empty, and their bytes in the file that it was read from.

    Attributes:
        proto: the graph; an empty constant has its name, type and dimensions.

    Args:
        file: the ONNX file, or its bytes.

    Raises:
        ValueError: it is no ONNX file. The parser has errors of its own beside this.

    Example:
        >>> import torch
        >>> from karui.measuring import onnx_form
        >>> from karui.model import Model
        >>> graph = Hollow(onnx_form(Model(torch.nn.Linear(64, 32), example=(torch.zeros(1, 64),))))
        >>> [weight] = [tensor for tensor in graph.proto.graph.initializer if len(tensor.dims) == 2]
        >>> len(weight.raw_data), graph.fill([weight]), len(weight.raw_data)
        (0, None, 8192)
    """

    def __init__(self, file: File | bytes) -> None:
        import onnx

        self.proto = onnx.ModelProto()
        self._values: dict[str, memoryview] = {}
        view = memoryview(file) if isinstance(file, bytes) else mapped(file)
        for graph in _taken_out(view, GRAPH, self.proto):
            for constant in _taken_out(graph, INITIALIZER, self.proto.graph):
                self._read_constant(constant)

    def _read_constant(self, constant: memoryview) -> None:
        tensor = self.proto.graph.initializer.add()
        for values in _taken_out(constant, RAW_DATA, tensor):
            # Bytes that do not fit the dimensions stay, so that whoever checks the graph sees them.
            if len(values) > LARGE and len(values) == SIZES.get(tensor.data_type, 0) * math.prod(tensor.dims):
                self._values[tensor.name] = values
            else:
                tensor.raw_data = bytes(values)

    def values(self, name: str) -> memoryview | None:
        """The bytes of a large constant, which come into memory where they are read; None where there is none."""
        return self._values.get(name)

    def fill(self, tensors: Iterable[onnx.TensorProto]) -> None:
        """Give constants their values, in place; those that are not empty keep theirs."""
        for tensor in tensors:
            if tensor.name in self._values and not tensor.raw_data:
                tensor.raw_data = bytes(self._values[tensor.name])

    def write(self, proto: onnx.ModelProto, path: Path) -> None:
        """Write a graph with its large constants in a file beside it.

        Args:
            proto: this graph, or one that was made of it, with the same empty constants.
            path: the ONNX file; that of the constants has its name with "weights" at the end.
        """
        beside = path.with_suffix(".weights")
        with beside.open("wb") as file:
            path.write_bytes(self._marked(proto, beside.name, file).SerializeToString())

    def check(self, *, full: bool = False) -> None:
        """Check what makes a file valid, the values of its weights apart.

        Args:
            full: also that shapes go together.

        Raises:
            onnx.checker.ValidationError: it is not valid.
            onnx.shape_inference.InferenceError: shapes do not go together.
        """
        import onnx

        with tempfile.TemporaryDirectory(prefix="karui-") as folder:
            path = Path(folder) / "model.onnx"
            self.write(self.proto, path)
            onnx.checker.check_model(path, full_check=full)  # of a parsed graph the checker makes two more copies

    def _marked(self, proto: onnx.ModelProto, name: str, file: IO[bytes]) -> onnx.ModelProto:
        """A copy of a graph that says where the large constants are, which are written there."""
        import onnx

        marked = onnx.ModelProto()
        marked.CopyFrom(proto)
        for tensor in marked.graph.initializer:
            if tensor.name not in self._values or tensor.raw_data:
                continue
            values = self._values[tensor.name]
            file.seek(-file.tell() % PAGE, 1)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            told: dict[str, Any] = {"location": name, "offset": file.tell(), "length": len(values)}
            for key, value in told.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(values)
        return marked


def _taken_out(message: memoryview, number: int, rest: Any) -> list[memoryview]:
    """The fields of a number; the others go into `rest`, parsed.

    Messages that stand one after the other are one: what is left of a message is parsed as it stands.
    """
    fields = list(_fields(message))
    rest.MergeFromString(b"".join(whole for found, _, whole in fields if found != number))
    return [content for found, content, _ in fields if found == number]


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """The number, the content and all bytes of each field of a message.

    Raises:
        ValueError: it is none.
    """
    place = 0
    while place < len(message):
        start = place
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == 0:
            end = _varint(message, place)[1]
        elif kind == 2:
            size, place = _varint(message, place)
            end = place + size
        elif kind in (1, 5):
            end = place + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"there is no field of kind {kind}")
        if end > len(message):
            raise ValueError("it ends too early")
        yield tag >> 3, message[place:end], message[start:end]
        place = end


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            raise ValueError("it ends too early")
        byte = message[place]
        value |= (byte & 127) << shift
        place += 1
        if byte < 128:
            return value, place
    raise ValueError("a number has no end")
