import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from karui.artifact import files
from karui.artifact.files import JSON, canonical, recover, sealed, unsealed, write_file, write_folder
from karui.errors import ArtifactError, UsageError

# Imported once; each line on its input has it fork a child that writes until it is killed.
FORKER = """
import os, sys
from pathlib import Path
from karui.artifact import files
files.os.fsync = lambda handle: None  # the disk's own time is not what is tested
for line in sys.stdin:
    steps, folder = line.split()
    child = os.fork()
    if child == 0:
        if steps == "two":
            files.sys = type("Elsewhere", (), {"platform": "darwin"})
        print(os.getpid(), flush=True)
        for number in range(1, 10_000_000):
            text = b"%d" % number
            files.write_folder(Path(folder), {"model.json": text * 2000, "model.safetensors": text * 9000})
    os.waitpid(child, 0)
    print("done", flush=True)
"""


@pytest.fixture(scope="module")
def forker():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", FORKER], **pipes) as process:
        yield process
        process.stdin.close()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def whole(folder):
    """The number of the write that left this folder; fails where it is a mixture."""
    found = contents(folder)
    assert set(found) == {"model.json", "model.safetensors"}
    number = len(found["model.json"]) // 2000
    text = found["model.json"][:number]
    assert found == {"model.json": text * 2000, "model.safetensors": text * 9000}
    return int(text)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks its writers")
@pytest.mark.parametrize("steps", ["one", "two"])
def test_a_killed_write_leaves_the_old_or_the_new(tmp_path, forker, steps):
    """Kill -9 at random moments, with the swap of the system and with the one of two renames."""
    folder, chance = tmp_path / "model", random.Random(0)  # noqa: S311
    write_folder(folder, {"model.json": b"0" * 2000, "model.safetensors": b"0" * 9000})
    numbers = []
    for _ in range(60):
        forker.stdin.write(f"{steps} {folder}\n")
        forker.stdin.flush()
        writer = int(forker.stdout.readline())
        time.sleep(chance.random() * 0.03)
        os.kill(writer, signal.SIGKILL)
        assert forker.stdout.readline() == "done\n"
        recover(folder)
        numbers.append(whole(folder))
    assert len(set(numbers)) > 2, "the writers did get to write"
    write_folder(folder, {"model.json": b"7" * 2000, "model.safetensors": b"7" * 9000})
    assert whole(folder) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "what killed writers left is cleaned up"


@pytest.mark.parametrize("step", ["_write", "_sync_folder", "_keep_others", "_exchange"])
def test_an_error_in_the_middle_leaves_the_old_one(tmp_path, monkeypatch, step):
    folder = tmp_path / "model"
    write_folder(folder, {JSON: b"old"})

    def fails(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(files, step, fails)
    with pytest.raises(OSError, match="full"):
        write_folder(folder, {JSON: b"new"})
    assert contents(folder) == {JSON: b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_other_files_go_along(tmp_path, monkeypatch, platform):
    monkeypatch.setattr(files.sys, "platform", platform)
    folder = tmp_path / "model"
    write_folder(folder, {JSON: b"old", files.ONNX: b"onnx"})
    (folder / "report.html").write_text("page")
    (folder / "deep").mkdir()
    (folder / "deep" / "note").write_text("text")
    write_folder(folder, {JSON: b"new"})
    assert (folder / JSON).read_bytes() == b"new"
    assert not (folder / files.ONNX).exists()
    assert (folder / "report.html").read_text() == "page"
    assert (folder / "deep" / "note").read_text() == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_writer_at_work_is_left_alone(tmp_path):
    busy = tmp_path / f".model.{os.getppid()}.tmp"
    busy.mkdir()
    write_folder(tmp_path / "model", {JSON: b"new"})
    assert busy.exists()


def test_a_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "model.onnx"
    write_file(path, b"old")

    def fails(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(files, "_write", fails)
    with pytest.raises(OSError, match="full"):
        write_file(path, b"new")
    assert contents(path.parent) == {"model.onnx": b"old"}


def test_a_place_that_cannot_be_swapped_is_refused(tmp_path, monkeypatch):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    for place, words in ((tmp_path / "holiday.jpg", "is a file"), (tmp_path, "you work in"), (Path(), "you work in")):
        with pytest.raises(UsageError, match=words):
            write_folder(place, {JSON: b""})
    write_folder(Path("model"), {JSON: b"new"})
    assert contents(tmp_path / "deep" / "model") == {JSON: b"new"}


def test_a_seal_holds_only_for_the_very_bytes():
    values = {"b": [1, 2.5, None], "a": "ä"}
    data = sealed(values)
    assert unsealed(data, Path("model.json")) | {"sha256": ""} == {**values, "sha256": ""}
    assert sealed(dict(reversed(values.items()))) == data
    doubled = data.replace(b'"a":', b'"a": "x",\n "a":')
    for other in (data + b" ", data.replace(b"2.5", b"2.6"), data.replace(b": ", b":"), doubled, canonical(values)):
        with pytest.raises(ArtifactError, match=r"model\.json is damaged"):
            unsealed(other, Path("model.json"))
