"""Every file, every region: a changed or cut file is told, never loaded as a wrong model."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from karui.artifact import load, save, verify
from karui.artifact.files import canonical, sealed
from karui.errors import ArtifactError
from karui.model import Classification, Model

FILES = ("model.json", "model.safetensors", "model.onnx")


def net():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 30), nn.BatchNorm1d(30), nn.ReLU(), nn.Linear(30, 4))
    with torch.no_grad():
        module[0].weight.masked_fill_(torch.rand(30, 12) < 0.8, 0.0)
        module[3].weight.copy_(torch.where(module[3].weight > 0, 0.5, -0.5))
    return module


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intact") / "m"
    model = Model(net(), example=(torch.randn(2, 12),), task=Classification())
    saved = save(model, folder, settings={"seed": 1})
    assert saved.warnings == ()
    assert {t.form for t in saved.tensors} == {"dense", "sparse", "codebook"}
    return folder


@pytest.fixture(scope="module")
def damaged(intact, tmp_path_factory):
    """A copy of the artifact, and a way to load it with one file replaced."""
    folder = tmp_path_factory.mktemp("damaged") / "m"
    shutil.copytree(intact, folder)

    def attempt(name, data):
        (folder / name).write_bytes(data)
        try:
            load(folder, base=net())
        finally:
            shutil.copy(intact / name, folder / name)

    return attempt


def refused(attempt, name, data):
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")) as told:
        attempt(name, data)
    assert "\n" not in str(told.value)


def test_the_intact_copy_loads(intact, damaged):
    damaged("model.json", (intact / "model.json").read_bytes())


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere(intact, damaged, name):
    whole = (intact / name).read_bytes()
    step = max(1, len(whole) // 150)
    for place in [*range(min(64, len(whole))), *range(0, len(whole), step), *range(len(whole) - 16, len(whole))]:
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        refused(damaged, name, bytes(data))


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_anywhere(intact, damaged, name):
    whole = (intact / name).read_bytes()
    for length in [*range(20), *range(0, len(whole), max(1, len(whole) // 60)), *range(len(whole) - 10, len(whole))]:
        refused(damaged, name, whole[:length])


@pytest.mark.parametrize("name", FILES)
def test_bytes_added_at_either_end(intact, damaged, name):
    whole = (intact / name).read_bytes()
    for data in (whole + b"\n", whole + b"\0", b" " + whole, whole + whole):
        refused(damaged, name, data)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_other_content(intact, damaged, data):
    name = data.draw(st.sampled_from(FILES))
    whole = (intact / name).read_bytes()
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, len(whole)))
    changed = whole[:start] + data.draw(st.binary(max_size=40)) + whole[end:]
    if changed != whole:
        refused(damaged, name, changed)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(intact, tmp_path, name):
    shutil.copytree(intact, tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    for attempt in (load, verify):
        with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
            attempt(tmp_path / "m", base=net())


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_place_of_a_file(intact, tmp_path, name):
    shutil.copytree(intact, tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    (tmp_path / "m" / name).mkdir()
    with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
        load(tmp_path / "m", base=net())


def test_files_of_two_artifacts_are_not_mixed(intact, tmp_path):
    other = save(Model(net(), example=(torch.ones(2, 12),)), tmp_path / "other")
    with torch.no_grad():
        module = net()
        module[0].bias.add_(1)
    other = save(Model(module, example=(torch.ones(2, 12),)), tmp_path / "other")
    for name in FILES:
        shutil.copytree(intact, tmp_path / name)
        shutil.copy(other.folder / name, tmp_path / name / name)
        with pytest.raises(ArtifactError):
            load(tmp_path / name, base=net())


@pytest.mark.parametrize(
    "change",
    [
        {"lineage": [{"kind": "no such edit"}]},
        {"lineage": [{"kind": "replace", "layers": {"0": ["os:system", {}]}}]},
        {"lineage": [{"kind": "replace", "layers": {"7": ["torch.nn:ReLU", {}]}}]},
        {"lineage": [{"kind": "note"}]},
        {"lineage": None},
        {"lineage": [3]},
        {"task": {"kind": "custom", "loss": "os:system", "scores": "os:system"}},
        {"task": {"kind": "classification", "settings": {"label_smoothing": 7}}},
        {"example": {}},
        {"tensors": {}},
        {"tensors": {"0.weight": {}}},
        {"tied": {"0.weight": "nowhere"}},
        {"tied": {"nowhere": "0.weight"}},
        {"frozen": None},
        {"probe": [{}]},
        {"probe": 3},
        {"files": {}},
        {"files": {"model.safetensors": {}}},
        {"files": {"../model.safetensors": {"bytes": 0, "sha256": ""}}},
        {"files": []},
        {"format": 0},
        {"format": None},
    ],
)  # fmt: skip
def test_wrong_values_under_a_right_digest(intact, tmp_path, change):
    shutil.copytree(intact, tmp_path / "m")
    path = tmp_path / "m" / "model.json"
    path.write_bytes(sealed({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match=r"model\.json|model\.safetensors|tmp"):
        load(tmp_path / "m", base=net())


@pytest.mark.parametrize(
    "field", ["format", "files", "lineage", "tensors", "tied", "frozen", "probe", "example", "task"]
)
def test_a_field_left_out_under_a_right_digest(intact, tmp_path, field):
    shutil.copytree(intact, tmp_path / "m")
    path = tmp_path / "m" / "model.json"
    path.write_bytes(sealed({k: v for k, v in json.loads(path.read_text()).items() if k != field}))
    with pytest.raises(ArtifactError):
        load(tmp_path / "m", base=net())


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"null", b"3", b"{", b"{}", b"[" * 100_000, b"\xff\xfe", canonical({"sha256": ""})]
)
def test_other_texts(intact, damaged, text):
    refused(damaged, "model.json", text)
