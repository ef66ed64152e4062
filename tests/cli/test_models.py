"""MODEL, `--weights`, `--input` and `--task`: what they open, and the line that is told where they do not fit."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import TensorDataset

from karui.architectures.cifar_resnet import resnet8
from karui.cli.models import from_shape, open_model, read_task
from karui.cli.weights import put_weights, read_weights
from karui.data import Splits
from karui.errors import KaruiError, UsageError
from karui.model import Classification, Origin, Regression

NET = """
import torch
from torch import nn

from karui import Classification, Model, Regression


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def whole():
    return Model(nn.Linear(4, 2), example=(torch.zeros(2, 4),), task=Regression())


def two():
    return nn.Bilinear(4, 3, 2)


def broken():
    raise ValueError("no disk")


class Own:
    metric = "gap"
    higher_is_better = False

    def loss(self, outputs, targets):
        return (outputs - targets).abs().mean()

    def scores(self, outputs, targets):
        return (outputs - targets).abs().flatten(1).mean(1)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_net.py").write_text(NET)
    (tmp_path / "half.py").write_text("def task(: pass")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(caught: pytest.ExceptionInfo[KaruiError]) -> str:
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value.message


def test_architecture_is_sized_for_the_data(digits: Splits):
    opened = open_model("resnet8", data=digits)
    assert opened.untrained
    assert opened.model.example[0].shape == (2, 1, 8, 8)
    assert opened.model.module(opened.model.example[0]).shape == (2, 10)
    assert isinstance(opened.model.lineage[0], Origin)
    assert isinstance(opened.model.task, Classification)
    again = open_model("resnet8", data=digits)
    assert torch.equal(opened.model.module.conv1.weight, again.model.module.conv1.weight)
    other = open_model("resnet8", data=digits, seed=1)
    assert not torch.equal(opened.model.module.conv1.weight, other.model.module.conv1.weight)


def test_architecture_with_settings_and_without_data():
    opened = open_model("resnet8:width=0.5,num_classes=3")
    assert opened.model.example[0].shape == (2, 3, 32, 32)
    assert opened.model.module.linear.weight.shape == (3, 32)


def test_several_inputs_of_a_sample_are_the_models(folder: Path):
    pairs = TensorDataset(torch.rand(6, 4), torch.rand(6, 3), torch.arange(6) % 2)
    data = Splits(train=pairs, validation=pairs, test=pairs)
    opened = open_model("own_net.py:two", data=data)
    assert [tuple(x.shape) for x in opened.model.example] == [(2, 4), (2, 3)]
    with pytest.raises(UsageError) as caught:
        open_model("resnet8", data=data)
    assert "does not take the data's inputs (data: 4 and 3)" in told(caught)


def test_file_and_module_factories(folder: Path, digits: Splits):
    opened = open_model("own_net.py:net", data=digits)
    assert not opened.untrained
    assert opened.model.lineage[0].describe().startswith("built by ")
    assert open_model("own_net:net", shape="1x8x8").model.example[0].shape == (2, 1, 8, 8)
    assert isinstance(open_model("own_net:whole").model.task, Regression)
    assert isinstance(open_model("own_net:whole", task="classification").model.task, Classification)
    assert open_model("own_net:net", shape="64", task="own_net:Own").model.task.metric == "gap"
    assert open_model("own_net:net", shape="64", task="own_net.py:Own").model.task.metric == "gap"


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("resnet9", {}, "Model 'resnet9' is not known."),
        ("own_net.py:nett", {}, "has no 'nett'"),
        ("lost.py:net", {}, "There is no file lost.py"),
        ("no_such_package.nets:net", {}, "no_such_package"),
        ("own_net:broken", {"shape": "4"}, "failed: ValueError: no disk"),
        ("own_net:net", {}, "The shape of the input of 'own_net:net' is not known."),
        ("own_net:net", {"shape": "4"}, "The model does not take an input of 4:"),
        ("own_net:net", {"shape": "3x"}, "'3x' is no shape of an input."),
        ("own_net:net", {"shape": "0x4"}, "'0x4' is no shape of an input."),
        ("own_net:net", {"shape": "64", "task": "classify"}, "Task 'classify' is not known."),
        ("own_net:net", {"shape": "64", "task": "own_net:nobody"}, "has no 'nobody'"),
        ("own_net:net", {"shape": "64", "task": "own_net:net"}, "not a task"),
        ("own_net:net", {"shape": "64", "task": "own_net.py:nobody"}, "has no 'nobody'"),
        ("own_net:net", {"shape": "64", "task": "lost.py:task"}, "There is no file lost.py."),
        ("own_net:net", {"shape": "64", "task": "half.py:task"}, "half.py failed: SyntaxError"),
        ("own_net:net", {"shape": "64", "task": "half:task"}, "Importing 'half' failed: SyntaxError"),
        ("own_net:net", {"shape": "99999999x99999999"}, "An input of 99999999x99999999 does not fit into memory."),
        (".", {}, "is no karui directory"),
        ("resnet8:depth=3", {}, "does not take these settings"),
    ],
)
def test_a_model_that_cannot_be_opened(folder: Path, spec: str, settings: dict[str, str], message: str):
    with pytest.raises(UsageError) as caught:
        open_model(spec, **settings)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_an_input_of_numbers_is_asked_for_in_words(folder: Path):
    with pytest.raises(UsageError) as caught:
        open_model("own_net:net", shape="4")
    assert "128:int" in caught.value.hint


def test_data_that_does_not_fit(folder: Path, digits: Splits):
    with pytest.raises(UsageError) as caught:
        open_model("own_net:whole", data=digits)
    assert told(caught).startswith("The model does not take the data's inputs (digits: 1x8x8):")
    few = dataclasses.replace(digits, classes=tuple("abcdefghijkl"))
    with pytest.raises(UsageError) as caught:
        open_model("own_net:net", data=few)
    assert told(caught) == "The model tells 10 classes apart, and the data has 12."


@pytest.mark.parametrize(
    ("inputs", "remedy"),
    [
        (torch.zeros(40, 1, 8, 8, dtype=torch.int64), "The inputs are whole numbers (int64): save them as float32."),
        (torch.zeros(40, 8, 8), "A sample is 8x8, without channels: give it as 1x8x8, in NumPy x[:, None]."),
        (torch.zeros(40, 64), "Give data of the shape that the network was made for, or a network for this data."),
    ],
)
def test_the_remedy_for_a_known_mistake_in_data(inputs: torch.Tensor, remedy: str):
    rows = TensorDataset(inputs, torch.arange(40) % 10)
    data = Splits(train=rows, validation=rows, test=rows, classes=tuple("0123456789"), name="mine")
    with pytest.raises(UsageError) as caught:
        open_model("resnet8", data=data)
    assert caught.value.hint == remedy


def test_shapes():
    assert [(x.shape, x.dtype) for x in from_shape("3x4x4,16:int")] == [
        ((2, 3, 4, 4), torch.float32),
        ((2, 16), torch.int64),
    ]
    assert isinstance(read_task("regression"), Regression)


@pytest.mark.parametrize("form", ["safetensors", "npz", "pt", "wrapped", "beside", "alone", "parallel"])
def test_weights_of_every_form(form: str, tmp_path: Path, digits: Splits):
    net = resnet8(in_channels=1)
    weights = net.state_dict()
    path = tmp_path / f"weights.{form if form in ('safetensors', 'npz') else 'pt'}"
    if form == "safetensors":
        save_file(weights, path)
    elif form == "npz":
        np.savez(path, **{name: value.numpy() for name, value in weights.items() if "num_batches" not in name})
    else:
        held = {f"module.{name}": value for name, value in weights.items()} if form == "parallel" else weights
        wrapping = {
            "wrapped": {"epoch": 3, "state_dict": held},
            "beside": {"epoch": torch.tensor(3), "net": held, "optimizer": {"state": {}, "step": torch.tensor(1)}},
            "alone": {"best": held, "epoch": 3},
        }
        torch.save(wrapping.get(form, held), path)
    opened = open_model("resnet8", weights=path, data=digits)
    assert not opened.untrained
    for name, value in net.named_parameters():
        assert torch.equal(opened.model.module.get_parameter(name), value)


def test_weights_that_do_not_fit(tmp_path: Path, digits: Splits):
    path = tmp_path / "big.safetensors"
    save_file(resnet8(in_channels=3, num_classes=7).state_dict(), path)
    with pytest.raises(UsageError) as caught:
        open_model("resnet8", weights=path, data=digits)
    assert told(caught) == (
        "big.safetensors does not fit the model: conv1.weight is 16x3x3x3 there and 16x1x3x3 in the model "
        "(3 of another shape, 0 missing, 0 unexpected, of 44)."
    )


def test_weights_that_are_missing_or_too_many():
    net = nn.Linear(2, 1)
    before = net.weight.clone()
    with pytest.raises(UsageError, match=r"bias is not in the file \(0 of another shape, 1 missing, 0 unexpected"):
        put_weights(net, {"weight": torch.zeros(1, 2)}, "w")
    with pytest.raises(UsageError, match=r"the model has no scale \(0 of another shape, 0 missing, 1 unexpected"):
        put_weights(net, {"weight": torch.zeros(1, 2), "bias": torch.zeros(1), "scale": torch.zeros(1)}, "w")
    assert torch.equal(net.weight, before)


def test_weights_of_another_kind_or_spoilt():
    net = nn.Linear(2, 1)
    before = net.weight.clone()
    good = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
    with pytest.raises(UsageError, match="weight holds int64 there and float32 in the model"):
        put_weights(net, {**good, "weight": torch.zeros(1, 2, dtype=torch.long)}, "w")
    with pytest.raises(UsageError, match=r"w: bias holds values that are no numbers \(NaN\)"):
        put_weights(net, {**good, "bias": torch.tensor([float("nan")])}, "w")
    assert torch.equal(net.weight, before)
    put_weights(net, {name: value.half() for name, value in good.items()}, "w")
    assert net.weight.dtype == torch.float32


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.safetensors", b"\x10\x00\x00\x00"),
        ("empty.npz", b""),
        ("text.pt", b"hello"),
        ("code.pt", None),
        ("list.pt", [1, 2]),
        ("objects.npz", {"a": np.array([{}], dtype=object)}),
        ("words.npz", {"a": np.array(["weight"])}),
    ],
)
def test_weights_files_that_are_none(name: str, content: object, folder: Path):
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, list):
        torch.save(content, path)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(UsageError) as caught:
        read_weights(path)
    assert name in told(caught)
    assert re.search(r"[a-z]Error\b", told(caught)) is None, "a class of Python's in place of words"
    assert not (folder / "touched").exists()


def test_a_file_of_two_sets_of_weights_is_not_chosen_from(tmp_path: Path):
    torch.save({"first": {"a": torch.zeros(1)}, "second": {"a": torch.zeros(1)}}, tmp_path / "two.pt")
    with pytest.raises(UsageError, match=r"two\.pt holds 2 sets of weights: first, second\."):
        read_weights(tmp_path / "two.pt")


def test_no_weights_file():
    with pytest.raises(UsageError, match=r"There is no weights file nowhere\.npz"):
        read_weights(Path("nowhere.npz"))


@pytest.mark.external
@pytest.mark.parametrize("spec", ["torchvision:mobilenet_v2", "timm:resnet18"])
def test_public_models(spec: str):
    pytest.importorskip(spec.partition(":")[0])
    opened = open_model(spec)
    assert opened.model.example[0].shape == (2, 3, 224, 224)
    with pytest.raises(UsageError, match="There is no model"):
        open_model(f"{spec}_of_mine")
