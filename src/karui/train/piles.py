"""Rows of numbers of one shape, in memory or in files that outlive the process, many of them taken by one operation.

In memory a pile grows as rows are added. A file is a row of records, each one batch: a check sum, sizes, digests of the
samples, and their rows. It is mapped, not read: what is asked for again stays in memory as far as the system has room.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

KEY = 16
"""Bytes of a digest."""
HEAD = struct.Struct("<IIBB")
"""Of a record: check sum of the rest, number of samples, bytes of a number, number of dimensions."""
FORM = 2
"""Where check sums start: records of an older form, whose digests and rows were others, are passed over by them."""


class Pile:
    """Rows of one shape and kind of number.

    Args:
        shape: of a row.
        kind: of its numbers, as numpy names it.
        file: where they lie; None for memory.

    Example:
        >>> pile = Pile((2,), "<f4")
        >>> pile.add(np.array([[1, 2], [3, 4], [5, 6]], "<f4"))
        0
        >>> pile.rows(np.array([16, 0])).tolist()
        [[5.0, 6.0], [1.0, 2.0]]
    """

    def __init__(self, shape: tuple[int, ...], kind: str, file: Path | None = None) -> None:
        self.shape, self.kind, self.file = shape, kind, file
        self.length = np.dtype(kind).itemsize * math.prod(shape)
        self._data = np.empty(0, np.uint8)
        self._used = 0

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be mapped again."""
        return self.__dict__ if self.file is None else {**self.__dict__, "_data": np.empty(0, np.uint8)}

    def add(self, rows: np.ndarray) -> int:
        """Put rows on the pile, in memory; the byte at which they begin."""
        start, end = self._used, self._used + rows.nbytes
        if end > len(self._data):  # doubled, so that each row is moved about twice however many there are
            grown = np.empty(max(end, 2 * len(self._data)), np.uint8)
            grown[:start] = self._data[:start]
            self._data = grown
        self._data[start:end] = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
        self._used = end
        return start

    def rows(self, offsets: np.ndarray) -> np.ndarray:
        """Copies of the rows that begin at these bytes."""
        if self.file is not None and int(offsets.max()) + self.length > len(self._data):  # it has grown
            self._data = np.asarray(np.memmap(self.file, np.uint8, "r"))
        # Each byte begins a window as long as a row; those asked for are copied out by one indexing operation.
        windows = np.ndarray((len(self._data) - self.length + 1, self.length), np.uint8, self._data, strides=(1, 1))
        return windows[offsets].view(self.kind).reshape(len(offsets), *self.shape)


def write(file: Path, keys: list[bytes], rows: np.ndarray) -> int:
    """Add a record to a file, by one write; the byte at which its rows begin."""
    rest = struct.pack(f"<{rows.ndim}I", *rows.shape) + b"".join(keys) + rows.tobytes()
    with file.open("ab") as handle:
        start = handle.tell()
        handle.write(HEAD.pack(zlib.crc32(rest, FORM), len(keys), rows.itemsize, rows.ndim) + rest)
    return start + HEAD.size + 4 * rows.ndim + KEY * len(keys)


def records(file: Path) -> Iterator[tuple[list[bytes], int, tuple[int, ...], str]]:
    """Digests, first byte of the rows, their shape and kind, of each whole record up to the first that is not."""
    with file.open("rb") as handle:
        while len(head := handle.read(HEAD.size)) == HEAD.size:
            check, count, width, dimensions = HEAD.unpack(head)
            sizes = handle.read(4 * dimensions)
            if width not in (2, 4) or len(sizes) < 4 * dimensions:
                return
            shape = struct.unpack(f"<{dimensions}I", sizes)
            left = file.stat().st_size - handle.tell()
            length = KEY * count + width * math.prod(shape)
            if length > left:
                return
            rest = handle.read(length)
            if zlib.crc32(sizes + rest, FORM) != check:
                return
            keys = [rest[KEY * row : KEY * (row + 1)] for row in range(count)]
            yield keys, handle.tell() - length + KEY * count, shape[1:], f"<f{width}"
