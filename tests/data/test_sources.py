"""Data by name: what is read, and what is refused with which words."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from karui.data import Compose, Splits, check, load_data
from karui.errors import DataError, KaruiError, UsageError


def paint(root: Path, counts: dict[str, int], size: tuple[int, int] = (8, 6), mode: str = "RGB") -> Path:
    """Pictures whose brightness tells their number within the class."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            Image.new(mode, size, (number,) * 3 if mode == "RGB" else number).save(root / name / f"{number:03d}.png")
    return root


def values(dataset: object) -> list[tuple[int, int]]:
    """Brightness and class of each picture."""
    return sorted((round(float(x.mean()) * 255), int(y)) for x, y in (dataset[i] for i in range(len(dataset))))


def test_one_folder_a_class_is_split_in_proportion(tmp_path: Path) -> None:
    splits = load_data(f"folder:{paint(tmp_path, {'cat': 20, 'dog': 30})}")
    assert splits.classes == ("cat", "dog")
    assert splits.train[0][0].shape == (3, 6, 8)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [36, 4, 10]
    everything = values(splits.train) + values(splits.validation) + values(splits.test)
    assert sorted(everything) == sorted([(n, 0) for n in range(20)] + [(n, 1) for n in range(30)])
    assert values(load_data(f"folder:{tmp_path}", seed=5).test) == values(splits.test)
    check(splits)


def test_train_test_and_val_folders_are_taken_as_they_are(tmp_path: Path) -> None:
    for part, count in (("train", 10), ("test", 3), ("val", 2)):
        paint(tmp_path / part, {"a": count, "b": count}, mode="L")
    splits = load_data(f"folder:{tmp_path}")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [20, 4, 6]
    assert splits.train[0][0].shape == (1, 6, 8)


def test_options_bring_pictures_to_one_form(tmp_path: Path) -> None:
    paint(tmp_path, {"a": 10}, size=(8, 6))
    paint(tmp_path, {"b": 10}, size=(5, 5))
    splits = load_data(f"folder:{tmp_path}?size=4&channels=1")
    assert splits.train[0][0].shape == (1, 4, 4)
    with pytest.raises(DataError, match=r"000.png is 5x5, the first one 8x6.* folder:PATH\?size=32"):
        load_data(f"folder:{tmp_path}")


def test_large_folders_are_read_from_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path, {"a": 10, "b": 10})
    in_memory = load_data(f"folder:{tmp_path}")
    monkeypatch.setattr("karui.data.pictures.IN_MEMORY_BYTES", 100)
    lazy = load_data(f"folder:{tmp_path}")
    assert values(lazy.train) == values(in_memory.train)
    assert torch.utils.data.TensorDataset not in type(lazy.train).__mro__
    check(lazy)
    (tmp_path / "a" / "001.png").write_bytes(b"gone bad")
    with pytest.raises(DataError, match=r"a/001.png cannot be read"):
        check(lazy)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_broken_picture_is_named(tmp_path: Path, share: float) -> None:
    paint(tmp_path, {"a": 10, "b": 10})
    noise = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "png")
    content = buffer.getvalue()
    (tmp_path / "b" / "004.png").write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=r"b/004.png cannot be read"):
        load_data(f"folder:{tmp_path}")


def test_a_picture_too_large_to_be_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path, {"a": 10, "b": 10})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(DataError, match="cannot be read: Image size"):
        load_data(f"folder:{tmp_path}")


def test_folders_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no folder"):
        load_data(f"folder:{tmp_path / 'none'}")
    with pytest.raises(DataError, match="has no folders"):
        load_data(f"folder:{tmp_path}")
    paint(tmp_path / "empty", {"a": 3, "b": 0})
    with pytest.raises(DataError, match="b has no pictures"):
        load_data(f"folder:{tmp_path / 'empty'}")
    paint(tmp_path / "apart" / "train", {"a": 3, "b": 3})
    paint(tmp_path / "apart" / "test", {"a": 3, "c": 3})
    with pytest.raises(DataError, match="classes that the training pictures lack: c"):
        load_data(f"folder:{tmp_path / 'apart'}")


def save(file: Path, **arrays: object) -> str:
    np.savez(file, **arrays)
    return f"npz:{file}"


def test_arrays_with_their_own_split(tmp_path: Path) -> None:
    x, y = np.arange(60, dtype=np.float64).reshape(20, 3), np.arange(20) % 4
    spec = save(tmp_path / "a.npz", train_x=x, train_y=y, test_x=x[:4], test_y=y[:4], names=np.array(list("abcd")))
    splits = load_data(spec)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [18, 2, 4]
    assert splits.test.tensors[0].dtype == torch.float32
    assert splits.test.tensors[1].dtype == torch.int64
    assert splits.classes == ("a", "b", "c", "d")
    spec = save(tmp_path / "b.npz", train_x=x, train_y=y, test_x=x, test_y=y, validation_x=x[:7], validation_y=y[:7])
    assert len(load_data(spec).validation) == 7


def test_arrays_that_are_split_here(tmp_path: Path) -> None:
    spec = save(tmp_path / "a.npz", x=np.zeros((50, 3), np.float32), y=np.arange(50) % 5)
    splits = load_data(spec)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [36, 4, 10]
    assert torch.equal(load_data(spec, seed=9).test.tensors[1], splits.test.tensors[1])
    regression = load_data(save(tmp_path / "b.npz", x=np.zeros((50, 3)), y=np.zeros((50, 2))))
    assert regression.classes == ()


@pytest.mark.parametrize(
    ("shape", "read"),
    [((20, 5, 6), (1, 5, 6)), ((20, 5, 6, 3), (3, 5, 6)), ((20, 3, 5, 6), (3, 5, 6)), ((20, 5, 6, 1), (1, 5, 6))],
)
def test_bytes_are_pictures(tmp_path: Path, shape: tuple[int, ...], read: tuple[int, ...]) -> None:
    splits = load_data(save(tmp_path / "a.npz", x=np.full(shape, 255, np.uint8), y=np.arange(20) % 2))
    assert splits.train[0][0].shape == read
    assert bool((splits.train.tensors[0] == 1).all())


def test_files_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    x, y = np.zeros((10, 3)), np.zeros(10, int)
    for arrays, words in (
        ({"train_x": x, "train_y": y}, r"has no array test_x and test_y; it has: train_x, train_y"),
        ({"x": x, "y": y[:9]}, r"x has shape \(10, 3\) and y \(9,\)"),
        ({"x": x, "y": np.array(["a"] * 10)}, r"y holds <U1, not numbers"),
        ({"x": x, "y": np.array([{}] * 10, dtype=object)}, r"cannot be read: Object arrays cannot be loaded"),
    ):
        with pytest.raises(DataError, match=words):
            load_data(save(tmp_path / "a.npz", **arrays))
    with pytest.raises(DataError, match="There is no file"):
        load_data("npz:none.npz")
    np.savez_compressed(tmp_path / "good.npz", x=np.random.default_rng(0).random((50, 3)), y=np.arange(50) % 2)
    content = (tmp_path / "good.npz").read_bytes()
    for length in range(0, len(content), 37):
        (tmp_path / "cut.npz").write_bytes(content[:length])
        with pytest.raises(DataError, match="cannot be read"):
            load_data(f"npz:{tmp_path / 'cut.npz'}")


def test_an_archive_that_unpacks_to_more_than_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = save(tmp_path / "a.npz", x=np.zeros((1000, 100)), y=np.zeros(1000, int))
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100}[name])
    with pytest.raises(DataError, match="of memory; this machine has"):
        load_data(spec)


OWN = """
import torch
from torch.utils.data import TensorDataset
from karui.data import Splits

def part(n):
    return TensorDataset(torch.zeros(n, 2), torch.arange(n) % 2)

def two():
    return part(40), part(6)

def three():
    return part(40), part(5), part(6)

def whole():
    return Splits(train=part(4), validation=part(4), test=part(4), name="mine")

def wrong():
    return 7

def failing():
    raise KeyError("no such disk")
"""


def test_a_function_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my_data.py"
    file.write_text(OWN)
    splits = load_data(f"{file}:two")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [36, 4, 6]
    assert len(load_data(f"{file}:three").validation) == 5
    assert load_data(f"{file}:whole").name == "mine"
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(load_data("my_data:two"), Splits)
    with pytest.raises(DataError, match=r"returned a int, not data sets"):
        load_data(f"{file}:wrong")
    with pytest.raises(DataError, match=r"failed: KeyError: 'no such disk'"):
        load_data(f"{file}:failing")


def test_a_stream_without_a_length_is_refused(tmp_path: Path) -> None:
    code = (
        "from torch.utils.data import IterableDataset\n"
        "class Stream(IterableDataset):\n    def __iter__(self): yield 0, 0\n"
        "def data(): return Stream(), Stream()\n"
    )
    (tmp_path / "stream.py").write_text(code)
    with pytest.raises(DataError, match="returned a Stream, which has no length") as caught:
        load_data(f"{tmp_path / 'stream.py'}:data")
    assert "__len__" in caught.value.hint


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("digit", "Data 'digit' is not known. Did you mean digits"),
        ("imagenet", "Data 'imagenet' is not known. Known: "),
        ("folder", "'folder' needs a path. Write folder:PATH"),
        ("npz:", "'npz' needs a path"),
        ("folder:x?sise=3", "option 'sise' is not known. Did you mean size"),
        ("folder:x?size=big", "size is 'big'; give a positive number"),
        ("no_such_package:data", "no_such_package"),
        ("no_such_file.py:data", "no_such_file.py"),
        ("math:no_such_function", "no_such_function"),
    ],
)
def test_what_cannot_be_understood_says_so_in_one_line(spec: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_data(spec)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_cifar10_as_sheets(shared_data: Path) -> None:
    splits = load_data(f"cifar10:{shared_data / 'cifar10'}")
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [13500, 1500, 10000]
    assert splits.classes[0] == "airplane"
    assert isinstance(splits.augment, Compose)
    assert torch.bincount(splits.validation.tensors[1]).tolist() == [150] * 10
    with Image.open(shared_data / "cifar10" / "test_00.webp") as sheet:
        second = np.asarray(sheet.convert("RGB"))[:32, 32:64]
    restored = splits.test[1][0].permute(1, 2, 0) * torch.tensor([0.229, 0.224, 0.225])
    restored = (restored + torch.tensor([0.485, 0.456, 0.406])) * 255
    assert np.array_equal(restored.round().numpy().astype(np.uint8), second)


def test_sheets_that_are_not_there_or_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no"):
        load_data(f"cifar10:{tmp_path}")
    (tmp_path / "labels.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"labels.npz cannot be read"):
        load_data(f"cifar10:{tmp_path}")
    labels = {"train_y": np.zeros(1000, np.uint8), "test_y": np.zeros(1000, np.uint8), "names": np.array(["a"])}
    np.savez(tmp_path / "labels.npz", **labels)
    with pytest.raises(DataError, match=r"has 0 sheets train_\*.webp for 1000 labels"):
        load_data(f"cifar10:{tmp_path}")
    (tmp_path / "train_00.webp").write_bytes(b"RIFF")
    with pytest.raises(DataError, match=r"train_00.webp cannot be read"):
        load_data(f"cifar10:{tmp_path}")
    Image.new("RGB", (32, 32)).save(tmp_path / "train_00.webp", lossless=True)
    with pytest.raises(KaruiError, match="is 32x32, not 1600x640"):
        load_data(f"cifar10:{tmp_path}")
