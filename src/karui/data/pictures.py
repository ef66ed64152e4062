"""Pictures in folders: one folder a class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from karui.data.splits import VALIDATION_SHARE, Splits, hold_out
from karui.errors import DataError, require

TEST_SHARE = 0.2
IN_MEMORY_BYTES = 1 << 30  # larger sets are read from their files in each epoch


def read_picture(file: Path, channels: int, size: int | None = None) -> Float[Tensor, "channels height width"]:
    """A picture in [0, 1], gray or RGB, brought to `size` by `size` pixels if that is given.

    Raises:
        DataError: the file is no picture, is cut short, or is too large to be one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as picture:
                plain = picture.convert("L" if channels == 1 else "RGB")
        if size is not None:
            plain = plain.resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"The picture {file} cannot be read: {str(error).splitlines()[0]}.", "Remove it or replace it."
        ) from error
    values = torch.from_numpy(np.array(plain, dtype=np.uint8)).float().div(255)
    return values[None] if channels == 1 else values.permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Pictures(Dataset[tuple[Tensor, int]]):
    """Picture files and their class numbers, read when they are asked for.

    Settings:
        files: the pictures.
        labels: the class number of each.
        channels: 1 for gray, 3 for RGB.
        height, width: what each picture must measure.
        size: side to which each picture is brought; None leaves them as they are.
    """

    files: tuple[Path, ...]
    labels: tuple[int, ...]
    channels: int
    height: int
    width: int
    size: int | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        picture = read_picture(self.files[number], self.channels, self.size)
        require(
            picture.shape[1:] == (self.height, self.width),
            f"The picture {self.files[number]} is {picture.shape[2]}x{picture.shape[1]}, the first one "
            f"{self.width}x{self.height}.",
            "Bring all to one size with folder:PATH?size=32.",
            DataError,
        )
        return picture, self.labels[number]

    @cached_property
    def targets(self) -> Tensor:
        """All class numbers, without reading a picture."""
        return torch.tensor(self.labels)


def folder(path: Path, *, size: int | None = None, channels: int | None = None, seed: int = 0) -> Splits:
    """Pictures sorted into one folder a class, below `path` or below its train, test and (where there is) val.

    Without a test folder a fifth of each class, always the same, is kept for testing. Pictures are scaled to [0, 1];
    the first one decides size and colour where they are not given. Sets of up to a gigabyte are read once, into memory.

    Args:
        path: the folder.
        size: side to which each picture is brought.
        channels: 1 for gray, 3 for RGB.
        seed: draws what is held out for validation.

    Raises:
        DataError: there is no such folder, a class is empty or unknown, a picture cannot be read or has another size.
    """
    require(path.is_dir(), f"There is no folder {path}.", "Give folder:PATH with one folder a class.", DataError)
    require(channels in (None, 1, 3), f"channels is {channels}; give 1 for gray or 3 for RGB.", error=DataError)
    apart = (path / "train").is_dir() and (path / "test").is_dir()
    root = path / "train" if apart else path
    classes = tuple(sorted(part.name for part in root.iterdir() if part.is_dir() and not part.name.startswith(".")))
    require(len(classes) > 0, f"{root} has no folders.", "Put the pictures of each class in a folder.", DataError)
    files, labels = _listed(root, classes)
    channels, height, width = _form(files[0], channels, size)

    def pictures(files: Sequence[Path], labels: Sequence[int]) -> Dataset[tuple[Tensor, int]]:
        return _in_memory(Pictures(tuple(files), tuple(labels), channels, height, width, size))

    train = pictures(files, labels)
    held = next((path / name for name in ("val", "validation") if apart and (path / name).is_dir()), None)
    if apart:
        test = pictures(*_listed(path / "test", classes))
    else:
        train, test = hold_out(train, TEST_SHARE, seed=0)
    validation = pictures(*_listed(held, classes)) if held else None
    if validation is None:
        train, validation = hold_out(train, VALIDATION_SHARE, seed)
    return Splits(train=train, validation=validation, test=test, classes=classes, name=f"folder:{path}")


def _listed(root: Path, classes: tuple[str, ...]) -> tuple[list[Path], list[int]]:
    """The picture files below a folder and their class numbers, in alphabetical order."""
    suffixes = Image.registered_extensions()
    found = sorted(part.name for part in root.iterdir() if part.is_dir() and not part.name.startswith("."))
    unknown = [name for name in found if name not in classes]
    require(
        not unknown,
        f"{root} has classes that the training pictures lack: {', '.join(unknown[:5])}.",
        "Use the same class folders in each part.",
        DataError,
    )
    files, labels = [], []
    for number, name in enumerate(classes):
        own = sorted(f for f in (root / name).rglob("*") if f.suffix.lower() in suffixes and not f.name.startswith("."))
        require(
            len(own) > 0 or name not in found,
            f"The class folder {root / name} has no pictures.",
            "Add some, or remove the folder.",
            DataError,
        )
        files += own
        labels += [number] * len(own)
    require(len(files) > 0, f"{root} has no pictures.", "Put the pictures of each class in a folder.", DataError)
    return files, labels


def _form(first: Path, channels: int | None, size: int | None) -> tuple[int, int, int]:
    """Channels, height and width that every picture shall have."""
    if channels is None:
        read_picture(first, 3)  # a clear error if it is no picture
        with Image.open(first) as picture:
            channels = 1 if picture.mode in ("1", "L", "I", "I;16", "F") else 3
    shape = read_picture(first, channels, size).shape
    return channels, shape[1], shape[2]


def _in_memory(pictures: Pictures) -> Dataset[tuple[Tensor, int]]:
    floats = len(pictures) * pictures.channels * pictures.height * pictures.width
    if 4 * floats > IN_MEMORY_BYTES:
        return pictures
    inputs = torch.stack([pictures[number][0] for number in range(len(pictures))])
    return TensorDataset(inputs, pictures.targets)  # pyright: ignore[reportReturnType]  (of pairs, like the other)
