"""`karui compress`, `report` and `bench`: the main job by one command, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from karui.artifact import export_onnx, load
from karui.cli import comparing
from karui.cli.app import run
from karui.data import Splits
from karui.measuring import Ratio
from karui.model import Model
from karui.survey.papers import catalogue

WITHOUT_TECHNIQUE = next((row.slug for row in catalogue() if row.technique is None), "")
COMPRESS = ["compress", "net.py:net", "--data", "digits", "--recipe", "recipe.toml"]


@pytest.mark.parametrize(
    ("ratio", "told"),
    [
        (Ratio(quantity="time", value=0.5, low=0.4, high=0.8), ("2.00x slower", "1.25x to 2.50x")),
        (Ratio(quantity="time", value=2.0, low=1.9, high=2.1), ("2.00x faster", "1.90x to 2.10x")),
        (Ratio(quantity="time", value=1.0, low=0.9, high=1.1), ("none seen", "0.90x to 1.10x")),
        (Ratio(quantity="macs", value=0.5, low=0.5, high=0.5), ("2.00x larger", "")),
        (None, ("", "")),
    ],
)
def test_the_interval_is_of_what_the_word_says(ratio: Ratio | None, told: tuple[str, str]):
    assert comparing._gain(ratio) == told


@pytest.mark.slow
def test_one_command_leaves_a_lighter_deployable_model(
    folder: Path, capsys: pytest.CaptureFixture[str], digits: Splits
):
    assert run([*COMPRESS, "--out", "light"]) == 0
    told = capsys.readouterr()
    out = folder / "light"
    assert max(len(line) for line in told.out.splitlines() if not line.startswith(("-", "The", "for", "the"))) <= 80
    for words in ("dense", "light", "parameters", "test accuracy", "model.onnx", "report.html", "95 % interval"):
        assert words in told.out
    assert "l1_filter_pruning: done" in told.err
    assert sorted(path.name for path in out.iterdir()) == [
        "model.json", "model.onnx", "model.safetensors", "report.html", "run.json",
    ]  # fmt: skip
    light = load(out)
    x = torch.stack([digits.test[i][0] for i in range(7)])
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    deployed = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.as_tensor(deployed), light.module(x), rtol=1e-4, atol=1e-4)
    record = json.loads((out / "run.json").read_text())
    assert record["asked"]["command"].startswith("karui ")
    assert record["light"]["counts"]["parameters"] == light.parameters < record["dense"]["counts"]["parameters"]

    (out / "report.html").unlink()
    assert run(["report", "light"]) == 0
    assert capsys.readouterr().out.strip() == str(Path("light") / "report.html")
    assert (out / "report.html").stat().st_size > 1000

    before = (out / "run.json").read_bytes()
    assert run([*COMPRESS, "--out", "light"]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: light holds a finished run, which would be lost."
    assert "--overwrite" in hint
    assert "--resume" in hint
    assert run([*COMPRESS, "--out", "light", "--resume"]) == 0
    assert (out / "run.json").read_bytes() == before
    capsys.readouterr()
    (folder / "other.toml").write_text((folder / "recipe.toml").read_text().replace("epochs = 1", "epochs = 0"))
    assert run([*COMPRESS[:-1], "other.toml", "--out", "light", "--resume"]) == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error.startswith("error: light holds a finished run of something else (recipe or budget, model, data")
    assert hint == "hint: Give --out another folder, or --overwrite in place of --resume to replace it."
    assert (out / "run.json").read_bytes() == before
    assert load(out).parameters == light.parameters
    assert run([*COMPRESS, "--out", "light", "--resume", "--overwrite"]) == 2
    assert "both given" in capsys.readouterr().err

    assert run(["profile", "light", "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["parameters"] == light.parameters


@pytest.mark.slow
def test_json_is_alone_on_stdout_and_the_network_is_trained_first(folder: Path, capsys: pytest.CaptureFixture[str]):
    command = [
        "compress",
        "resnet8:width=0.25",
        *COMPRESS[2:],
        "--out",
        "light",
        "--epochs",
        "2",
        "--seed",
        "5",
        "--json",
    ]
    assert run(command) == 0
    told = capsys.readouterr()
    record = json.loads(told.out)
    assert record["asked"]["seed"] == 5
    assert record["asked"]["epochs"] == 2
    assert [step["technique"] for step in record["steps"]] == ["dense", "l1_filter_pruning", "knowledge_distillation"]
    assert "comes without weights, so it is trained first, for 2 epochs" in told.err
    assert (folder / "light" / "dense" / "model.json").is_file()


@pytest.mark.slow
@pytest.mark.paper(30)
@pytest.mark.paper(31)
def test_teachers_of_other_kinds_are_named_on_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]):
    """An ensemble of an ONNX file and a factory in a recipe's file, and one teacher in a recipe that is a line."""
    teacher = Model(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)), example=(torch.zeros(2, 1, 8, 8),)
    )
    export_onnx(teacher, folder / "teacher.onnx")
    head = (folder / "recipe.toml").read_text().partition("[[step]]")[0]
    step = '[[step]]\ntechnique = "knowledge_distillation"\nepochs = 1\nteacher = ["teacher.onnx", "net.py:net"]\n'
    (folder / "taught.toml").write_text(head + step)
    assert run([*COMPRESS[:-1], "taught.toml", "--out", "taught"]) == 0
    assert run(["plan", "net.py:net", "--data", "digits", "--recipe", "taught.toml"]) == 0
    assert "the teacher is teacher.onnx and net.py:net" in " ".join(capsys.readouterr().out.split())
    light = load(folder / "taught")
    assert len(light.module.state_dict()) == 11, "the student's tensors, and none of a teacher"
    told = json.loads((folder / "taught" / "run.json").read_text())["asked"]
    assert "net.py:net" in json.dumps(told)
    for lost, words in (
        ("lost.onnx", "no file lost.onnx"),
        ("lost.py:net", "no file lost.py"),
        ("nowhere", "no saved"),
    ):
        line = f"logit_regression:teacher={lost},epochs=1"
        assert run([*COMPRESS[:-1], line, "--out", "x"]) == 2
        assert words in capsys.readouterr().err
        assert not (folder / "x" / "model.json").exists()


@pytest.mark.parametrize(
    ("factory", "words"),
    [("nn.Conv2d(3, 4, 3)", "which takes 3 channels"), ("nn.Sequential(nn.Flatten(), nn.Linear(64, 7))", "(2, 7)")],
)
def test_a_teacher_that_does_not_fit_is_told_before_the_dense_network_is_trained(
    factory: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / "teacher.py").write_text(f"from torch import nn\n\n\ndef made():\n    return {factory}\n")
    line = "knowledge_distillation:teacher=teacher.py:made,epochs=1"
    assert run(["compress", "resnet8", "--data", "digits", "--recipe", line, "--out", "x"]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "started" not in told
    assert not (folder / "x" / "steps").exists()


@pytest.mark.slow
def test_a_killed_command_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Killed by a signal when the first step is kept; the resumed result equals an uninterrupted one, bit for bit."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "karui", *COMPRESS, "--out", "cut"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    kept = folder / "cut" / "steps" / "01-l1_filter_pruning" / "run.json"
    deadline = time.monotonic() + 120
    while not kept.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the command ended before it could be killed"
    assert not (folder / "cut" / "model.json").exists()
    assert run([*COMPRESS, "--out", "cut", "--resume"]) == 0
    assert "l1_filter_pruning: finished before, not repeated" in capsys.readouterr().err
    assert run([*COMPRESS, "--out", "whole"]) == 0
    one, two = (load(folder / name).module.state_dict() for name in ("cut", "whole"))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.slow
def test_bench_compares_recipes_over_seeds(folder: Path, capsys: pytest.CaptureFixture[str]):
    recipe = (folder / "recipe.toml").read_text()
    (folder / "mild.toml").write_text(
        recipe.replace("ratio = 0.5", "ratio = 0.25").partition('[[step]]\ntechnique = "know')[0]
    )
    command = ["bench", "net.py:net", "--data", "digits", "-r", "recipe.toml", "-r", "mild.toml", "--seeds", "2"]
    assert run([*command, "--out", "runs"]) == 0
    shown = capsys.readouterr().out
    assert "recipe.toml" in shown
    assert "mild.toml" in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert run([*command, "--out", "runs", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["recipe"] for row in rows] == ["recipe.toml", "mild.toml"]
    assert rows[0]["macs"]["mean"] > rows[1]["macs"]["mean"] > 1
    assert all(len(row["light accuracy"]["values"]) == 2 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["compress"], "Missing argument 'MODEL'.", "karui compress --help"),
        (
            [*COMPRESS[:-1], "l1_filter_prunning", "--out", "x"],
            "Step 1: Technique 'l1_filter_prunning'",
            "Did you mean",
        ),
        pytest.param(
            [*COMPRESS[:-1], WITHOUT_TECHNIQUE, "--out", "x"],
            "has no technique yet",
            "karui list",
            marks=pytest.mark.skipif(not WITHOUT_TECHNIQUE, reason="every paper has its techniques"),
        ),
        ([*COMPRESS[:-1], "lost.toml", "--out", "x"], "There is no recipe file lost.toml.", "TOML"),
        (
            [*COMPRESS, "-r", "tucker2", "--out", "x"],
            "recipe.toml is a whole recipe, and --recipe is given 2 times.",
            "Give it alone",
        ),
        (["compress", "net.py:lost", *COMPRESS[2:], "--out", "x"], "has no 'lost'", "net"),
        (["compress", "resnet8", "--recipe", "recipe.toml", "--out", "x"], "no data to train it on", "--data"),
        (
            [*COMPRESS, "--out", "x", "--weights", "other.safetensors"],
            "6.weight is 3x72 there and 10x72",
            "very network",
        ),
        ([*COMPRESS, "--out", "x", "--input", "3x8x8"], "does not take", "shape"),
        ([*COMPRESS, "--out", "taken"], "taken is no folder of a run: it holds thesis.txt.", "new folder"),
        ([*COMPRESS, "--out", "x", "--data", "digit"], "Data 'digit'", "digits"),
        (
            [*COMPRESS, "--out", "taken/thesis.txt/x"],
            "The folder taken/thesis.txt/x cannot be made: Not a dir",
            "--out",
        ),
        (["compress", "saved", *COMPRESS[2:], "--out", "./saved"], "the folder of the model itself, saved", "its own"),
        (["report", "nowhere"], "nowhere", "compress"),
        (["bench", "net.py:net", "-d", "digits", "-r", "recipe.toml", "--seeds", "0"], "--seeds is 0.", "1"),
    ],
)
def test_mistakes(folder: Path, arguments: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]):
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.txt").write_text("years of work")
    (folder / "saved").mkdir()
    (folder / "saved" / "model.json").write_text("{}")
    shapes = {"0.weight": (8, 1, 3, 3), "0.bias": (8,), "3.weight": (8, 8, 3, 3), "3.bias": (8,), "6.weight": (3, 72)}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "other.safetensors")
    assert run(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    err = [line for line in told.err.splitlines() if not line.startswith("note: ")]
    assert len(err) == 2, err
    assert err[0].startswith("error: ")
    assert error in err[0]
    assert hint in err[1]
    assert not (folder / "x" / "model.json").exists()


BAD_DATA = """
import torch
from torch.utils.data import TensorDataset


def part(samples=60, classes=10):
    return TensorDataset(torch.zeros(samples, 1, 8, 8), torch.arange(samples) % classes)


def one_class():
    return part(classes=1), part()


def empty_test():
    return part(), part(0)


def spoilt_test():
    test = part()
    test.tensors[0][7] = float("nan")
    return part(), test


def other_shape():
    return part(), TensorDataset(torch.zeros(60, 1, 9, 9), torch.arange(60) % 10)


def no_targets():
    return TensorDataset(torch.zeros(60, 1, 8, 8)), part()


def real_targets():
    return TensorDataset(torch.zeros(60, 1, 8, 8), torch.rand(60)), part()


def unread():
    class Lazy(torch.utils.data.Dataset):
        def __len__(self):
            return 60

        def __getitem__(self, number):
            if number == 33:
                raise OSError("no such picture")
            return torch.zeros(1, 8, 8), number % 10

    return Lazy(), part()
"""


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("one_class", "are of one class (0)"),
        ("empty_test", "The test split of"),
        ("spoilt_test", "test split: the input of sample 7 holds values that are not finite"),
        ("other_shape", "inputs of the test split are (1, 9, 9) float32"),
        ("no_targets", "train split: sample 0 has no target"),
        ("real_targets", "targets are torch.float32, and classification needs class numbers"),
        ("unread", "cannot be read: OSError: no such picture"),
    ],
)
@pytest.mark.parametrize("command", ["compress", "plan"])
def test_bad_data_is_refused_before_anything_is_trained(
    folder: Path, command: str, function: str, words: str, capsys: pytest.CaptureFixture[str]
):
    (folder / "bad.py").write_text(BAD_DATA)
    where = ["--out", "x"] if command == "compress" else []
    assert run([command, "net.py:net", "--data", f"bad.py:{function}", "--recipe", "recipe.toml", *where]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    error, hint = told.err.splitlines()
    assert words in error
    assert hint.startswith("hint: ")
    assert not (folder / "x").exists()


def test_an_unforeseen_fault_is_one_line_and_has_a_code_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "x/run.json")

    monkeypatch.setattr("karui.recipes.run.run_recipe", full)
    assert run([*COMPRESS, "--out", "x"]) == 3
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert error == "error: OSError: [Errno 28] No space left on device: 'x/run.json'."
    assert "free space" in hint

    def broken(*_: object, **__: object) -> None:
        raise KeyError("weight")

    monkeypatch.setattr("karui.recipes.run.run_recipe", broken)
    assert run([*COMPRESS, "--out", "x"]) == 3
    told = capsys.readouterr().err
    assert "error: KeyError: 'weight'." in told
    assert "--debug" in told
    assert "Traceback" not in told
    assert run(["--debug", *COMPRESS, "--out", "x"]) == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_a_task_of_ones_own_in_a_file_comes_back_in_a_fresh_process_elsewhere(folder: Path):
    (folder / "own.py").write_text(
        "import karui, torch\nfrom torch.utils.data import TensorDataset\n"
        "def loss(outputs, targets): return (outputs - targets).abs().mean()\n"
        "def gaps(outputs, targets): return (outputs - targets).abs().mean(1)\n"
        "gap = karui.CustomTask(loss=loss, scores=gaps, metric='gap', higher_is_better=False)\n"
        "def data(): return tuple(TensorDataset(torch.rand(n, 1, 8, 8), torch.rand(n, 10)) for n in (60, 30))\n"
    )
    recipe = (folder / "recipe.toml").read_text().partition('[[step]]\ntechnique = "know')[0]
    (folder / "cut.toml").write_text(recipe)
    command = ["compress", "net.py:net", "--data", "own.py:data", "--task", "own.py:gap", "--recipe", "cut.toml"]
    assert run([*command, "--out", "light"]) == 0
    code = f"import karui; print(karui.load({str(folder / 'light')!r}).task.metric)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, map(os.path.abspath, sys.path)))}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "gap"
