"""Bytes that wait in a file: the form of a large model is needed now and then, and would fill memory meanwhile."""

from __future__ import annotations

import hashlib
import mmap
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast, overload

SMALL = 2**16
"""Bytes up to which they stay in memory."""


class File(Protocol):
    """What has the bytes of a file: they are read where they are used, and held by nobody."""

    @property
    def data(self) -> bytes:
        """The bytes."""
        ...


class Filed:
    """A field of a dataclass that holds bytes: in an unnamed file, and read from it each time they are asked for.

    The file goes with the last of its owners, also where the process is killed: given an owner in the place of bytes,
    another one shares its file, and nothing is read. Whoever holds what was read holds it in memory.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Form:
        ...     data: bytes = Filed()
        >>> form = Form(bytes(100_000))
        >>> len(form.data), Filed.size(form), form == Form(bytes(100_000))
        (100000, 100000, True)
        >>> Form(form) == form
        True
    """

    def __set__(self, owner: Any, data: bytes | File) -> None:
        if not isinstance(data, bytes):
            if "_filed" in vars(data):
                vars(owner)["_filed"] = vars(data)["_filed"]
                return
            data = data.data
        held = data if len(data) <= SMALL else _OnDisk(data)
        vars(owner)["_filed"] = (held, len(data), hashlib.sha256(data).hexdigest())

    @overload
    def __get__(self, owner: None, kind: type) -> Filed: ...
    @overload
    def __get__(self, owner: object, kind: type) -> bytes: ...
    def __get__(self, owner: Any, kind: type) -> Any:
        if owner is None:
            raise AttributeError("data")  # so a dataclass sees a field without a default
        held, size, _ = vars(owner)["_filed"]
        if isinstance(held, bytes):
            return held
        held.file.seek(0)
        return held.file.read(size)

    @staticmethod
    def size(owner: Any) -> int:
        """Length of what an owner's field holds, without reading it."""
        return vars(owner)["_filed"][1]

    @staticmethod
    def digest(owner: Any) -> str:
        """What tells the content of a field from another, without reading either."""
        return vars(owner)["_filed"][2]


class _OnDisk:
    """An unnamed file, which is closed when nobody has it any more."""

    def __init__(self, data: bytes) -> None:
        self.file: IO[bytes] = tempfile.TemporaryFile(prefix="karui-")  # noqa: SIM115  (closed as told above)
        weakref.finalize(self, self.file.close)
        self.file.write(data)
        self.file.flush()  # for those who map it


@dataclass(frozen=True)
class Waiting:
    """Bytes that wait in a file until they are used."""

    data: bytes = Filed()  # pyright: ignore[reportAssignmentType]  (reads and takes bytes)


def shared(owner: File) -> bytes:
    """What is put into another owner's field where it is to have the same file: the owner, which a field takes, too."""
    return cast("bytes", owner)


def mapped(file: File) -> memoryview:
    """A file's bytes to look into: of those that wait on disk only what is read comes into memory."""
    held = vars(file).get("_filed", (b"",))[0]
    if isinstance(held, bytes):
        return memoryview(file.data)
    return memoryview(mmap.mmap(held.file.fileno(), 0, access=mmap.ACCESS_READ))


def write(file: File, path: Path) -> None:
    """Write a file's bytes to a path; those that wait on disk pass in pieces."""
    held = vars(file).get("_filed", (b"",))[0]
    if isinstance(held, bytes):
        path.write_bytes(file.data)
        return
    held.file.seek(0)
    with path.open("wb") as target:
        shutil.copyfileobj(held.file, target)
