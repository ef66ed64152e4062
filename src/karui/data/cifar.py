"""CIFAR-10 as sheets: lossless pictures of 1,000 samples each, and labels.npz beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset

from karui.data.augment import Compose, HorizontalFlip, RandomCrop
from karui.data.splits import VALIDATION_SHARE, Splits, hold_out
from karui.errors import DataError, require

# what the published networks with these weights were trained with: the statistics of ImageNet
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


def cifar10(folder: Path, *, seed: int = 0) -> Splits:
    """CIFAR-10, normalised, from a folder of sheets `train_00.webp`, ..., `test_00.webp`, ... and `labels.npz`.

    A sheet holds 1,000 pictures of 32x32, 50 a row. `labels.npz` holds `train_y`, `test_y` and `names`. The training
    augmentation of the literature (4 pixels of padding, random crop, mirrored half the time) is in `augment`.

    Args:
        folder: where the sheets lie.
        seed: draws what is held out for validation.

    Raises:
        DataError: a file is missing, damaged, or of another size.
    """
    labels = folder / "labels.npz"
    require(labels.is_file(), f"There is no {labels}.", "Give cifar10:PATH with the folder of the sheets.", DataError)
    try:
        with np.load(labels, allow_pickle=False) as arrays:
            train_y, test_y, names = (arrays[name] for name in ("train_y", "test_y", "names"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"The file {labels} cannot be read: {str(error).splitlines()[0]}.") from error
    train, validation = hold_out(_part(folder, "train", train_y), VALIDATION_SHARE, seed)
    return Splits(
        train=train,
        validation=validation,
        test=_part(folder, "test", test_y),
        classes=tuple(str(name) for name in names),
        name="cifar10",
        augment=Compose((RandomCrop(4), HorizontalFlip())),
    )


def _part(folder: Path, part: str, labels: np.ndarray) -> TensorDataset:
    sheets = sorted(folder.glob(f"{part}_*.webp"))
    require(
        len(sheets) * 1000 == len(labels),
        f"{folder} has {len(sheets)} sheets {part}_*.webp for {len(labels)} labels.",
        "Each sheet holds 1,000 pictures; copy the folder again.",
        DataError,
    )
    pictures = torch.cat([_sheet(file) for file in sheets])
    mean, deviation = torch.tensor(MEAN).reshape(3, 1, 1), torch.tensor(DEVIATION).reshape(3, 1, 1)
    return TensorDataset((pictures - mean) / deviation, torch.from_numpy(labels.astype(np.int64)))


def _sheet(file: Path) -> Float[Tensor, "1000 3 32 32"]:
    try:
        with Image.open(file) as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"The sheet {file} cannot be read: {str(error).splitlines()[0]}.", "Copy it again.") from error
    require(
        pixels.shape == (640, 1600, 3),
        f"The sheet {file} is {pixels.shape[1]}x{pixels.shape[0]}, not 1600x640.",
        "A sheet holds 20 rows of 50 pictures of 32x32.",
        DataError,
    )
    rows = torch.from_numpy(pixels.reshape(20, 32, 50, 32, 3).transpose(0, 2, 4, 1, 3).reshape(1000, 3, 32, 32))
    return rows.float().div(255)
