"""`karui profile`: counts and times on stdout, notes on stderr, and JSON alone where it is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from karui.cli.app import run


def test_quick_profile_counts_every_layer(capsys: pytest.CaptureFixture[str]):
    assert run(["profile", "resnet20", "--quick"]) == 0
    told = capsys.readouterr()
    assert max(map(len, told.out.splitlines())) <= 80
    for words in ("layer3.2.conv2", "270 k", "40.6 M"):
        assert words in told.out
    assert told.err == ""


def test_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]):
    assert run(["profile", "resnet8", "--quick", "--data", "digits", "--json"]) == 0
    told = capsys.readouterr()
    values = json.loads(told.out)
    assert values["counts"]["parameters"] == 75002
    assert sum(row["parameters"] for row in values["layer_times"]) == 75002
    assert all(row["seconds"] > 0 for row in values["layer_times"])
    assert "random weights" in told.err


NOISY = """
from torch import nn


class Noisy(nn.Linear):
    def forward(self, x):
        print("forward")
        return super().forward(x)


def net():
    print("built")
    return Noisy(4, 2)
"""


@pytest.mark.parametrize("command", [["profile", "--quick"], ["plan"]])
def test_what_a_network_prints_goes_to_stderr(
    command: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "noisy.py").write_text(NOISY)
    monkeypatch.chdir(tmp_path)
    assert run([*command, "noisy.py:net", "--input", "4", "--json"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["model"] == "noisy.py:net"
    assert {"built", "forward"} <= set(told.err.splitlines())
    assert run([*command, "noisy.py:net", "--input", "4"]) == 0
    told = capsys.readouterr()
    assert told.out
    assert "forward" not in told.out


@pytest.mark.slow
def test_full_profile_has_times_and_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "tiny.py").write_text("from torch import nn\n\n\ndef net():\n    return nn.Linear(4, 2)\n")
    monkeypatch.chdir(tmp_path)
    assert run(["profile", "tiny.py:net", "--input", "4"]) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 80
    for words in ("onnxruntime", "torch", "median", "peak memory", "bytes of its ONNX file"):
        assert words in told


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]):
    for arguments in (["profile", "resnet9"], ["profile", "resnet8", "--data", "digit"], ["profile", "a.b:c"]):
        assert run(arguments) == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 2, err
        assert err[0].startswith("error: ")
        assert err[1].startswith("hint: ")
