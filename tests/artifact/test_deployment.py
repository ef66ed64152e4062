"""A saved model whose deployed form was chosen: int8, another engine; checked, told, and found damaged."""

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from karui.artifact import load, load_deployment, save, verify
from karui.artifact.export import compare_deployment
from karui.artifact.files import sealed, unsealed
from karui.deployment import Deployment, Int8, to_int8
from karui.errors import ArtifactError
from karui.measuring import onnx_form
from karui.model import Classification, Model

OPENVINO = importlib.util.find_spec("openvino") is not None


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4)).eval()


def model_of(seed=0):
    return Model(net(seed), example=(torch.randn(4, 48),), task=Classification())


def int8_of(model, **settings):
    light = to_int8(onnx_form(model), [(torch.randn(64, 48),)], Int8(**settings))
    return Deployment(
        name="int8", engine="onnxruntime", precision="int8", data=light.data, fp32_layers=tuple(light.fp32)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = model_of()
    deployment = int8_of(model, leave=("4",))
    return model, deployment, save(model, tmp_path_factory.mktemp("int8") / "m", deployment=deployment)


def told(folder):
    return json.loads((folder / "model.json").read_text())


def test_the_chosen_form_is_the_onnx_file(saved):
    _, deployment, result = saved
    assert (result.folder / "model.onnx").read_bytes() == deployment.data
    assert result.onnx_bytes == deployment.bytes
    assert (result.engine, result.precision) == ("onnxruntime", "int8")
    assert "ONNX (int8, onnxruntime)" in str(result)
    assert sorted(path.name for path in result.folder.iterdir()) == ["model.json", "model.onnx", "model.safetensors"]
    json.dumps(result.to_json())


def test_the_text_tells_engine_and_precision(saved):
    _, _, result = saved
    noted = told(result.folder)["deployment"]
    assert noted == {
        "name": "int8", "engine": "onnxruntime", "precision": "int8", "fp32_layers": ["4"],
        "tolerance": result.verification.tolerance,
    }  # fmt: skip


def test_it_comes_back(saved):
    model, deployment, result = saved
    assert load_deployment(result.folder) == deployment
    back = load(result.folder, base=net(1))
    x = torch.randn(5, 48)
    assert torch.equal(back.module(x), model.module(x))  # the weights in 32 bits are kept to the bit


def test_it_is_verified_with_a_measured_tolerance(saved):
    _, _, result = saved
    checked = verify(result.folder, base=net(1))
    assert checked.ok
    assert checked.precision == "int8"
    assert checked.tolerance == result.verification.tolerance
    assert 0 < checked.difference <= checked.tolerance == 2 * result.verification.difference
    assert "up to the rounding of 8 bits" in str(checked)


def test_a_file_that_computes_something_else_is_not_verified(saved, tmp_path):
    model, deployment, result = saved
    proto = onnx.load_model_from_string(deployment.data)
    scale = next(t for t in proto.graph.initializer if t.name == "0.weight_scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
    other = dataclasses.replace(deployment, data=proto.SerializeToString())
    assert not compare_deployment(model, other, tolerance=result.verification.tolerance).ok


def test_the_form_of_another_model_is_refused(saved, tmp_path):
    with pytest.raises(ArtifactError, match="computes something else than the model"):
        save(model_of(3), tmp_path / "m", deployment=saved[1])
    wrong_shape = Model(nn.Linear(48, 7), example=(torch.randn(1, 48),))
    with pytest.raises(ArtifactError, match="computes something else than the model"):
        save(wrong_shape, tmp_path / "m", deployment=saved[1])
    assert not (tmp_path / "m").exists()


def test_the_same_in_32_bits_is_held_to_rounding(tmp_path):
    model, other = model_of(), model_of()
    with torch.no_grad():
        other.module[0].weight.mul_(1.01)
    form = Deployment(name="x", engine="onnxruntime", precision="fp32", data=onnx_form(other).data)
    with pytest.raises(ArtifactError, match="computes something else"):
        save(model, tmp_path / "m", deployment=form)


@pytest.mark.parametrize("name", ["model.json", "model.onnx"])
def test_a_flipped_bit_anywhere_is_found(saved, tmp_path, name):
    folder = tmp_path / "m"
    shutil.copytree(saved[2].folder, folder)
    whole = (folder / name).read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        (folder / name).write_bytes(bytes(data))
        with pytest.raises(ArtifactError, match=name):
            load_deployment(folder)


@pytest.mark.parametrize("change", [{"engine": "abacus"}, {"precision": "int4"}, {"fp32_layers": None}])
def test_a_deployment_of_a_later_version_is_told(saved, tmp_path, change):
    folder = tmp_path / "m"
    shutil.copytree(saved[2].folder, folder)
    text = unsealed((folder / "model.json").read_bytes(), folder)
    (folder / "model.json").write_bytes(sealed({**text, "deployment": {**text["deployment"], **change}}))
    with pytest.raises(ArtifactError, match="does not know"):
        load_deployment(folder)


def test_a_folder_of_before_there_was_a_choice(tmp_path):
    model = model_of()
    folder = save(model, tmp_path / "m").folder
    assert told(folder)["deployment"]["precision"] == "fp32"
    text = unsealed((folder / "model.json").read_bytes(), folder)
    del text["deployment"]
    (folder / "model.json").write_bytes(sealed(text))
    assert load_deployment(folder).precision == "fp32"
    assert verify(folder, base=net(1)).ok


def test_without_a_file_there_is_no_deployment(tmp_path):
    folder = save(model_of(), tmp_path / "m", onnx=False).folder
    assert told(folder)["deployment"] is None
    with pytest.raises(ArtifactError, match=r"holds no model\.onnx"):
        load_deployment(folder)


@pytest.mark.skipif(not OPENVINO, reason="openvino is not installed")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_another_engine(tmp_path, precision, monkeypatch):
    model = model_of()
    data = int8_of(model).data if precision == "int8" else onnx_form(model).data
    form = Deployment(name="ov", engine="openvino", precision=precision, data=data)
    folder = save(model, tmp_path / "m", deployment=form).folder
    assert load_deployment(folder) == form
    checked = verify(folder, base=net(1))
    assert checked.ok
    assert checked.engine == "openvino"
    monkeypatch.setattr("karui.measuring.engines.OpenVino.missing", lambda _: "it is not installed")
    elsewhere = verify(folder, base=net(1))
    assert elsewhere.ok
    assert elsewhere.engine == "onnxruntime"


def test_killed_while_it_is_written_it_is_the_old_or_the_new(tmp_path):
    folder = tmp_path / "m"
    forms = {}
    for number, leave in enumerate(((), ("4",))):
        forms[number] = int8_of(model_of(), leave=leave)
        (tmp_path / f"{number}.onnx").write_bytes(forms[number].data)
    save(model_of(), folder, deployment=forms[0])
    script = f"""
import sys
import torch
from torch import nn
from pathlib import Path
from karui.artifact import save
from karui.deployment import Deployment
from karui.model import Classification, Model
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4)).eval()
model = Model(net, example=(torch.randn(4, 48),), task=Classification())
print("ready", flush=True)
for number in range(10_000):
    data = Path({str(tmp_path)!r}, f"{{number % 2}}.onnx").read_bytes()
    form = Deployment(name="int8", engine="onnxruntime", precision="int8", data=data)
    save(model, {str(folder)!r}, deployment=form)
"""
    seen = set()
    for pause in (0.05, 0.13, 0.21, 0.34):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=dict(os.environ))
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        found = load_deployment(folder)
        assert found.data in {form.data for form in forms.values()}
        assert verify(folder, base=net(1)).ok
        seen.add(found.data)
    assert seen
