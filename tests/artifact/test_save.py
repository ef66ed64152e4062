import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from karui.artifact import load, save, stored_bytes, verify
from karui.artifact.save import named_tensors
from karui.errors import ArtifactError, KaruiError, UsageError
from karui.measuring import count
from karui.measuring.inference import inference
from karui.model import (
    Classification,
    CustomTask,
    Model,
    Note,
    coupled_groups,
    remove_units,
    replace_layers,
    resolve,
)

NETS = Path(__file__).with_name("nets.py")


def made(seed=0, width=6):
    """A model from its factory in a file, with weights and buffers that no factory would give it."""
    origin = resolve(f"{NETS}:small", {"width": width})
    torch.manual_seed(seed)
    net = origin.replay(None, ())
    with torch.no_grad():
        for tensor in named_tensors(net).values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn_like(tensor).abs() * 0.5)
    example = (torch.randn(2, 2, 5, 5),)
    return Model(net.eval(), example=example, task=Classification(ignore=9), lineage=(origin,))


def outputs(model, x):
    with torch.no_grad():
        return model.module(x)


def same(a, b):
    ours, theirs = named_tensors(a.module), named_tensors(b.module)
    return list(ours) == list(theirs) and all(torch.equal(t, theirs[name]) for name, t in ours.items())


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    model = made()
    folder = tmp_path_factory.mktemp("artifact") / "model"
    return model, save(model, folder, measurements=count(model), settings={"seed": 3})


def test_what_is_saved_comes_back(artifact):
    model, saved = artifact
    back = load(saved.folder)
    assert same(model, back)
    assert torch.equal(outputs(model, torch.ones(7, 2, 5, 5)), outputs(back, torch.ones(7, 2, 5, 5)))
    assert (back.task, back.lineage) == (model.task, model.lineage)
    assert torch.equal(back.example[0], model.example[0])
    assert back.module.up.weight is back.module.down.weight
    assert back.module.shift.abs().sum() > 0
    assert not back.module.training


def test_lengths_are_those_of_the_files(artifact):
    _, saved = artifact
    lengths = {path.name: path.stat().st_size for path in saved.folder.iterdir()}
    assert lengths == {
        "model.safetensors": saved.weights_bytes, "model.json": saved.json_bytes, "model.onnx": saved.onnx_bytes,
    }  # fmt: skip
    data = sum(t.bytes for t in saved.tensors)
    assert data <= saved.weights_bytes <= data + 150 * len(saved.tensors) + 500
    assert "up.weight" not in {t.name for t in saved.tensors}
    assert saved.warnings == ()
    assert saved.verification.ok
    json.dumps(saved.to_json())


def test_the_text_tells_how_it_was_made(artifact):
    _, saved = artifact
    told = json.loads((saved.folder / "model.json").read_text())
    assert told["settings"] == {"seed": 3}
    assert told["measurements"]["layers"]
    assert told["lineage"][0]["kind"] == "origin"
    assert told["tied"] == {"up.weight": "down.weight"}
    assert set(told["versions"]) == {"karui", "torch", "python"}


def test_the_same_model_gives_the_same_files(artifact, tmp_path):
    _, saved = artifact
    again = save(made(), tmp_path / "model", measurements=count(made()), settings={"seed": 3})
    for path in saved.folder.iterdir():
        assert path.read_bytes() == (again.folder / path.name).read_bytes(), path.name


def test_a_fresh_process_loads_it_without_pickle(artifact, tmp_path):
    model, saved = artifact
    torch.save(outputs(model, torch.ones(3, 2, 5, 5)), tmp_path / "want.pt")
    script = f"""
import pickle, sys
def refused(*args, **kwargs): raise SystemExit("pickle was used")
pickle.load = pickle.loads = pickle.Unpickler = refused
import torch
from karui.artifact import load
model = load({str(saved.folder)!r})
assert type(model.module).__name__ == "Small"
with torch.no_grad():
    got = model.module(torch.ones(3, 2, 5, 5))
print(got.flatten().tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    want = outputs(model, torch.ones(3, 2, 5, 5))
    assert torch.equal(torch.tensor(json.loads(done.stdout)).reshape(want.shape), want)


def test_edits_are_replayed(tmp_path):
    model = replace_layers(made(), {"head": nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 3))})
    model = model.evolve(model.module, Note("trained", {"epochs": 3}))
    save(model, tmp_path / "m", onnx=False)
    back = load(tmp_path / "m")
    assert same(model, back)
    assert back.lineage == model.lineage


def test_a_cut_model_comes_back_in_its_graph_form(tmp_path):
    origin = resolve(f"{NETS}:frozen")
    model = Model(origin.replay(None, ()), example=(torch.randn(2, 3, 4, 4),), lineage=(origin,))
    light = remove_units(model, {group.name: torch.arange(2) for group in coupled_groups(model).groups})
    assert light.parameters < model.parameters
    saved = save(light, tmp_path / "m")
    assert saved.verification.ok
    back = load(tmp_path / "m")
    assert type(back.module).__name__ == type(light.module).__name__ == "GraphForm"
    assert same(light, back)
    with inference(light.module):
        assert torch.equal(outputs(back, torch.ones(3, 3, 4, 4)), outputs(light, torch.ones(3, 3, 4, 4)))
    by_layer = {layer.path: layer.macs for layer in count(back).layers}
    assert by_layer == {"first": 16 * 6 * 27, "norm": 0, "second": 16 * 4 * 6, "head": 16 * 4 * 5}


def test_the_bytes_that_a_model_would_take_are_those_that_it_takes(tmp_path):
    """With the inputs that are kept beside the weights: an untouched model is no larger than itself."""
    model = Model(nn.Linear(64, 5), example=(torch.randn(4, 64),))
    assert stored_bytes(model) == save(model, tmp_path / "m", onnx=False).weights_bytes
    assert stored_bytes(dataclasses.replace(model, example=({1},))) < stored_bytes(model)


def test_pruned_weights_are_stored_small_and_exactly(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 5))
    with torch.no_grad():
        net[0].weight.masked_fill_(torch.rand_like(net[0].weight) < 0.9, 0.0)
    model = Model(net, example=(torch.zeros(1, 200),))
    saved = save(model, tmp_path / "m", onnx=False)
    forms = {t.name: (t.form, t.bytes / t.dense_bytes) for t in saved.tensors}
    assert forms["0.weight"][0] == "sparse"
    assert forms["0.weight"][1] < 0.14
    assert saved.weights_bytes < 0.2 * 4 * model.parameters
    assert abs(stored_bytes(model) - saved.weights_bytes) < 200
    assert same(load(tmp_path / "m", base=nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 5))), model)


@pytest.mark.parametrize("convert", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_types(tmp_path, convert):
    net = nn.Linear(4, 3).to(convert)
    model = Model(net, example=(torch.ones(2, 4, dtype=convert),))
    save(model, tmp_path / "m", onnx=False)
    back = load(tmp_path / "m", base=nn.Linear(4, 3))
    assert back.module.weight.dtype == convert
    assert same(model, back)


def test_sharing_is_as_it_was_saved_and_not_as_it_was_built(tmp_path):
    def net(tie):
        parts = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        if tie:
            parts[1].weight = parts[0].weight
        return parts

    for saved_tied in (True, False):
        torch.manual_seed(1)
        model = Model(net(saved_tied), example=(torch.ones(1, 3),))
        save(model, tmp_path / "m", onnx=False)
        back = load(tmp_path / "m", base=net(not saved_tied))
        assert (back.module[1].weight is back.module[0].weight) == saved_tied
        assert same(model, back)


def test_recurrent_layers_and_frozen_parameters(tmp_path):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)

        def forward(self, x):
            return self.lstm(x)[0]

    model = Model(Reader(), example=(torch.randn(2, 5, 3),))
    model.module.lstm.weight_hh_l1.requires_grad_(False)
    save(model, tmp_path / "m", onnx=False)
    back = load(tmp_path / "m", base=Reader())
    assert torch.equal(outputs(model, model.example[0]), outputs(back, model.example[0]))
    assert not back.module.lstm.weight_hh_l1.requires_grad
    assert back.module.lstm.weight_hh_l0.requires_grad


def test_what_cannot_be_exported_is_saved_all_the_same(tmp_path):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    saved = save(Model(Branching(), example=(torch.ones(2, 3),)), tmp_path / "m")
    assert saved.onnx_bytes is None
    assert "model.onnx is not written" in saved.warnings[0]
    assert "\n" not in saved.warnings[0]
    assert load(saved.folder, base=Branching()).parameters == 12
    assert not verify(saved.folder, base=Branching()).onnx


def test_a_task_of_local_functions_is_missed_with_a_warning(tmp_path):
    task = CustomTask(loss=lambda o, t: (o - t).mean(), scores=lambda o, t: (o - t).flatten(1).mean(1))
    model = Model(nn.Linear(4, 3), example=(torch.ones(2, 4),), task=task)
    saved = save(model, tmp_path / "m", onnx=False)
    assert "task is not saved" in str(saved)
    assert load(saved.folder, base=nn.Linear(4, 3)).task is None
    assert load(saved.folder, base=dataclasses.replace(model, module=nn.Linear(4, 3))).task is task


@pytest.mark.parametrize(
    ("settings", "words"), [({"seed": {1, 2}}, "JSON"), ({"rate": float("nan")}, "JSON"), ({"f": nn.ReLU()}, "JSON")]
)
def test_settings_that_are_no_json_are_refused(tmp_path, settings, words):
    with pytest.raises(ArtifactError, match=words):
        save(Model(nn.Linear(4, 3), example=(torch.ones(2, 4),)), tmp_path / "m", onnx=False, settings=settings)
    assert not (tmp_path / "m").exists()


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"anything": object()}

        def set_extra_state(self, state):
            del state

    with pytest.raises(ArtifactError, match="Odd"):
        save(Model(nn.Sequential(Odd(2, 2)), example=(torch.ones(1, 2),)), tmp_path / "m", onnx=False)


def test_other_things_in_the_folder_are_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    save(Model(nn.Linear(4, 3), example=(torch.ones(2, 4),)), tmp_path, onnx=False)
    with pytest.raises(UsageError, match="is a file"):
        save(Model(nn.Linear(4, 3), example=(torch.ones(2, 4),)), tmp_path / "thesis.tex", onnx=False)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert load(tmp_path, base=nn.Linear(4, 3)).parameters == 15


def test_a_second_save_replaces_the_model_and_keeps_other_files(tmp_path):
    folder = tmp_path / "m"
    first, second = (Model(nn.Linear(4, 3), example=(torch.ones(2, 4),)) for _ in range(2))
    save(first, folder)
    (folder / "report.html").write_text("<p>")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.safetensors").write_text("x")
    save(second, folder, onnx=False)
    assert same(load(folder, base=nn.Linear(4, 3)), second)
    names = {path.name for path in folder.iterdir()}
    assert names == {"model.json", "model.safetensors", "report.html", "checkpoints"}
    assert (folder / "checkpoints" / "last.safetensors").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_nothing_there():
    with pytest.raises(ArtifactError, match=r"model\.json is missing"):
        load("/nowhere/at/all")
    assert issubclass(ArtifactError, KaruiError)


def test_a_verified_artifact(artifact):
    _, saved = artifact
    result = verify(saved.folder)
    assert result.ok
    assert result.onnx
    assert result.batches == (1, 2, 5)
    assert 0 <= result.difference <= result.tolerance < 1e-2
    assert "are equal at batches 1, 2, 5" in str(result)
    assert result.to_json()["ok"] is True


def test_an_onnx_file_of_another_model_is_found_out(artifact, tmp_path):
    from karui.artifact import export_onnx
    from karui.artifact.export import compare_onnx
    from karui.measuring import onnx_form

    model, _ = artifact
    other = made(seed=1)
    result = compare_onnx(model, onnx_form(other).data)
    assert not result.ok
    assert "NOT equal" in str(result)
    exported = export_onnx(model, tmp_path / "deep" / "model.onnx")
    assert exported.bytes == exported.path.stat().st_size
    assert [path.name for path in exported.path.parent.iterdir()] == ["model.onnx"]
