"""Files that are either the old ones or the new ones, whatever happens while they are written; and their digests."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from karui.errors import ArtifactError, UsageError, require
from karui.measuring import filed
from karui.measuring.filed import File

JSON, TENSORS, ONNX = "model.json", "model.safetensors", "model.onnx"
OURS = (JSON, TENSORS, ONNX)
_AT_FDCWD, _EXCHANGE = -100, 2
_COPY_AGAIN = "The file was changed or cut off after it was written; copy the folder again, or save the model again."


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def canonical(values: Mapping[str, Any], *, ordered: bool = False) -> bytes:
    """The one text of these JSON values: keys sorted, or in their own order with `ordered`."""
    return (json.dumps(values, sort_keys=not ordered, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def sealed(values: Mapping[str, Any], *, ordered: bool = False) -> bytes:
    """The text with a digest of its own content in it. With `ordered` keys keep their order, for tables to read."""
    body = {key: value for key, value in values.items() if key != "sha256"}
    return canonical({**body, "sha256": digest(canonical(body, ordered=ordered))}, ordered=ordered)


def unsealed(data: bytes, path: Path, *, ordered: bool = False, remedy: str = _COPY_AGAIN) -> dict[str, Any]:
    """The values that `sealed` wrote, if not one byte has changed.

    Raises:
        ArtifactError: the file is no such text, or not the one that was written.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: it is no JSON.", remedy) from error
    require(isinstance(values, dict), f"{path} is damaged: it is no JSON object.", remedy, ArtifactError)
    # Byte for byte: a changed blank or a doubled key would not show in the digest of the values alone.
    try:
        intact = data == sealed(values, ordered=ordered)
    except (ValueError, TypeError, RecursionError):
        intact = False
    require(intact, f"{path} is damaged: its digest does not fit its content.", remedy, ArtifactError)
    return values


def read(path: Path) -> bytes:
    """The bytes of a file of an artifact.

    Raises:
        ArtifactError: it is not there, or cannot be read.
    """
    with _readable(path):
        return path.read_bytes()


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Errors of the system, in words."""
    try:
        yield
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} is missing.", "Is this the folder of a saved model?") from error
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror}.", "Check the file and its permissions."
        ) from error


class Opened:
    """A file of an artifact, whose bytes are read where they are used: whatever is put in its place, it stays the same.

    Settings:
        bytes: its length.
        digest: its SHA-256 in hexadecimal.

    Raises:
        ArtifactError: it is not there, or cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with _readable(path):
            self._handle = path.open("rb")
            weakref.finalize(self, self._handle.close)
            self.digest = hashlib.file_digest(self._handle, "sha256").hexdigest()
            self.bytes = self._handle.tell()

    @property
    def data(self) -> bytes:
        """The bytes."""
        self._handle.seek(0)
        return self._handle.read()

    @property
    def name(self) -> str:
        """A path to it that others can open: to the very file that was checked, where the system has such paths."""
        same = Path(f"/dev/fd/{self._handle.fileno()}")
        return str(same if same.exists() else self._handle.name)


def write_file(path: Path, data: bytes | File) -> None:
    """Write a file under a temporary name and rename it: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _write(path: Path, data: bytes | File) -> None:
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        filed.write(data, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder last; where folders cannot be opened, the system does it by itself."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_folder(folder: Path, files: Mapping[str, bytes | File]) -> None:
    """Put `files` into `folder` in one step, in place of an artifact that is there. Other files in it are kept.

    A process that is killed while writing leaves the old artifact or the new one, complete.

    Raises:
        UsageError: a folder cannot be put there.
    """
    check_target(folder)
    recover(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in _leftovers(folder):
        shutil.rmtree(left, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        for name, data in files.items():
            _write(temporary / name, data)
        if folder.exists():
            _keep_others(folder, temporary)
            _sync_folder(temporary)
            _exchange(temporary, folder)
        else:
            _sync_folder(temporary)
            temporary.rename(folder)
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_target(folder: Path) -> None:
    """Refuse a place where a folder cannot be put, or swapped for another.

    Raises:
        UsageError: it is a file, or this process works in it (it would go on working in the one that was swapped out).
    """
    require(
        not folder.exists() or folder.is_dir(), f"{folder} is a file; a model is saved as a folder.", "", UsageError
    )
    require(
        not folder.exists() or not Path.cwd().is_relative_to(folder.resolve()),
        f"{folder} is the folder that you work in.",
        "Save into a folder in it.",
        UsageError,
    )


def recover(folder: Path) -> None:
    """Where a swap was cut off between its two steps, put the old artifact back."""
    old = _old(folder)
    if old.is_dir() and not folder.exists():
        old.rename(folder)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _leftovers(folder: Path) -> Iterator[Path]:
    """Temporary folders of writers that are not alive any more."""
    if folder.exists() and _old(folder).exists():
        yield _old(folder)
    for path in folder.parent.glob(f".{folder.name}.*.tmp"):
        found = re.fullmatch(rf"\.{re.escape(folder.name)}\.(\d+)\.tmp", path.name)
        if found and not _alive(int(found[1])):
            yield path


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _keep_others(folder: Path, temporary: Path) -> None:
    """Files that are not the artifact's (a report, checkpoints) go along, by a second name of the same file."""
    for entry in folder.iterdir():
        if entry.name in OURS:
            continue
        if entry.is_dir():
            shutil.copytree(entry, temporary / entry.name, copy_function=_link, symlinks=True)
        else:
            _link(str(entry), str(temporary / entry.name))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(new: Path, folder: Path) -> None:
    """Swap two folders: in one step where the system can, else in two, which `recover` can undo."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None, use_errno=True)
        rename = getattr(library, "renameat2", None)
        if rename is not None and rename(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(folder), _EXCHANGE) == 0:
            return
    old = _old(folder)
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
