"""Arrays in an .npz file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from karui.data.splits import VALIDATION_SHARE, Splits, hold_out
from karui.errors import DataError, require

TEST_SHARE = 0.2
KEYS = "Give the arrays train_x, train_y, test_x, test_y (and validation_x, validation_y), or x and y."


def npz(path: Path, *, seed: int = 0) -> Splits:
    """Splits from a file of arrays: `train_x`, `train_y`, `test_x`, `test_y`, or `x` and `y`, which are split here.

    Bytes are taken for pictures: scaled to [0, 1], `[n, h, w]` becomes `[n, 1, h, w]`, and `[n, h, w, 1 or 3]` channels
    first. Other inputs stay as they are (floats as float32, numbers as int64). An array `names` names the classes.

    Args:
        path: the file; nothing in it is unpickled.
        seed: draws what is held out for validation, where it has no `validation_x`.

    Raises:
        DataError: the file is damaged, holds objects, is too large for the memory, or lacks arrays.
    """
    arrays = _arrays(path)
    if "train_x" not in arrays and {"x", "y"} <= arrays.keys():
        train, test = hold_out(_part(path, arrays, ""), TEST_SHARE, seed=0)
    else:
        train, test = _part(path, arrays, "train_"), _part(path, arrays, "test_")
    if "validation_x" in arrays:
        validation = _part(path, arrays, "validation_")
    else:
        train, validation = hold_out(train, VALIDATION_SHARE, seed)
    return Splits(
        train=train, validation=validation, test=test, classes=_classes(arrays, train, test), name=f"npz:{path}"
    )


def npz_inputs(path: Path) -> TensorDataset:
    """Inputs alone, without labels: the array `x` of a file, or its `train_x`; bytes are taken for pictures.

    Raises:
        DataError: the file is damaged, or holds neither.
    """
    arrays = _arrays(path)
    name = next((name for name in ("x", "train_x") if name in arrays), "")
    held = ", ".join(sorted(arrays)) or "nothing"
    require(bool(name), f"{path} has no array x or train_x; it has: {held}.", "Name the inputs x.", DataError)
    return TensorDataset(_inputs(path, name, arrays[name]))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    require(path.is_file(), f"There is no file {path}.", "Give npz:PATH with the path of an .npz file.", DataError)
    try:
        with zipfile.ZipFile(path) as archive:
            needed = sum(entry.file_size for entry in archive.infolist())
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        require(
            needed < memory,
            f"{path} needs {needed / 1e9:.1f} GB of memory; this machine has {memory / 1e9:.1f} GB.",
            "Give fewer samples, or a data set of your own that reads them as needed (package.module:function).",
            DataError,
        )
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zipfile.LargeZipFile, MemoryError) as error:
        raise DataError(
            f"The file {path} cannot be read: {str(error).splitlines()[0]}.",
            "Save plain arrays with numpy.savez_compressed.",
        ) from error


def _part(path: Path, arrays: Mapping[str, np.ndarray], prefix: str) -> TensorDataset:
    names = f"{prefix}x", f"{prefix}y"
    missing = [name for name in names if name not in arrays]
    held = ", ".join(sorted(arrays)) or "nothing"
    require(not missing, f"{path} has no array {' and '.join(missing)}; it has: {held}.", KEYS, DataError)
    x, y = (arrays[name] for name in names)
    require(
        x.ndim > 0 and y.ndim > 0 and len(x) == len(y),
        f"{path}: {names[0]} has shape {x.shape} and {names[1]} {y.shape}.",
        "Both need one entry for each sample.",
        DataError,
    )
    return TensorDataset(_inputs(path, names[0], x), _plain(path, names[1], y))


def _inputs(path: Path, name: str, x: np.ndarray) -> Tensor:
    if x.dtype != np.uint8:
        return _plain(path, name, x)
    pictures = torch.from_numpy(np.ascontiguousarray(x)).float().div(255)
    if pictures.ndim == 3:
        return pictures[:, None]
    if pictures.ndim == 4 and pictures.shape[3] in (1, 3) and pictures.shape[1] not in (1, 3):
        return pictures.permute(0, 3, 1, 2).contiguous()
    return pictures


def _plain(path: Path, name: str, values: np.ndarray) -> Tensor:
    require(
        values.dtype.kind in "biuf",
        f"{path}: {name} holds {values.dtype}, not numbers.",
        "Give floats, or class numbers.",
        DataError,
    )
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32 if values.dtype.kind == "f" else np.int64))


def _classes(arrays: Mapping[str, np.ndarray], train: TensorDataset, test: TensorDataset) -> tuple[str, ...]:
    targets = train.tensors[1]
    if targets.ndim != 1 or targets.is_floating_point() or len(targets) == 0:
        return ()
    if "names" in arrays:
        return tuple(str(name) for name in arrays["names"])
    highest = max(int(part.tensors[1].max()) for part in (train, test) if len(part))
    return tuple(str(number) for number in range(highest + 1))
