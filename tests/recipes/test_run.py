"""Runs: kept step by step, resumed with the same result, recorded whole, and refused before anything is done."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.artifact import load
from karui.artifact.files import sealed
from karui.data import Splits
from karui.distill import KnowledgeDistillation
from karui.errors import KaruiError, NeedError, UsageError
from karui.measuring import Clock, Comparison, OnnxRuntime
from karui.model import Classification, Model, resolve
from karui.recipes import Recipe
from karui.recipes.keeping import contents_of, mark_of
from karui.recipes.run import Asked, read_run, run_recipe
from karui.technique import Bench
from karui.train import Influence, Training

CLOCK = Clock(batches=(1,), threads=(1,), engines=(OnnxRuntime(),), rounds=5, seconds=0.5)

OTHER = "of another recipe, model, data, seed or training, so not gone on from"


@pytest.fixture
def bench(digits: Splits) -> Bench:
    return Bench(
        train=digits.train,
        validation=digits.validation,
        test=digits.test,
        training=Training(epochs=1),
        clock=CLOCK,
        seed=3,
    )


NET = """
from torch import nn


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))
"""


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    file = tmp_path_factory.mktemp("net") / "net.py"
    file.write_text(NET)
    torch.manual_seed(0)
    origin = resolve(f"{file}:net")
    module = origin.build()
    assert isinstance(module, nn.Module)
    return Model(module, example=(torch.rand(2, 1, 8, 8),), task=Classification(), lineage=(origin,))


@pytest.fixture
def calls(dummies: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs of each `TrainMore` that is run."""
    told: list[int] = []
    apply = dummies.TrainMore.apply
    monkeypatch.setattr(dummies.TrainMore, "apply", lambda self, m, b: told.append(self.epochs) or apply(self, m, b))
    return told


class KilledError(BaseException):
    pass


@contextmanager
def killed_at(technique: type) -> Iterator[None]:
    """Runs that end, as by a signal, when they come to this technique."""

    def kill(self, model, bench):
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(technique, "apply", kill)
        with pytest.raises(KilledError):
            yield


@pytest.fixture
def recipe(dummies: ModuleType) -> Recipe:
    return Recipe(steps=(dummies.TrainMore(epochs=1), dummies.Shrink(ratio=0.1), dummies.TrainMore(epochs=2)))


def same(a: Path, b: Path) -> bool:
    one, two = load(a).module.state_dict(), load(b).module.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_leaves_artifact_and_record(model: Model, recipe: Recipe, bench: Bench, tmp_path: Path):
    out, lines = tmp_path / "out", []
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    asked = Asked(model="resnet8", data="digits", command="karui compress")
    run_recipe(model, recipe, bench, out, asked=asked, tell=lines.append)
    assert sorted(path.name for path in out.iterdir()) == ["model.json", "model.onnx", "model.safetensors", "run.json"]
    record = json.loads((out / "run.json").read_text())
    assert record == read_run(out).to_json()
    assert record["format"] == 1
    assert record["asked"]["model"] == "resnet8"
    assert record["asked"]["seed"] == 3
    assert [step["technique"] for step in record["asked"]["recipe"]] == ["train_more", "shrink", "train_more"]
    assert [step["settings"].get("epochs") for step in record["steps"]] == [1, None, 2]
    cards = json.loads((out / "model.json").read_text())["settings"]["cards"]
    assert [card["slug"] for card in cards] == ["train_more", "shrink", "train_more"]
    for step in record["steps"]:
        assert step["seconds"] > 0
        assert 0 <= step["validation"]["value"] <= 1
        assert step["parameters"] == model.parameters
    both = Comparison.from_json(record)
    assert both.ratio("time", "onnxruntime", 1, 1) is not None
    assert both.ratio("bytes as saved") is not None
    assert both.light.score is not None
    assert both.light.score.count == len(bench.test)
    assert [step["kind"] for step in record["lineage"]] == ["origin", "note", "note", "note"]
    assert record["verification"]["ok"]
    assert record["files"]["model.onnx"] == (out / "model.onnx").stat().st_size
    assert record["verdict"]
    assert record["plan"]["parameters"] == model.parameters
    assert {row["path"] for row in record["layers"]["dense"]} == {"0", "1", "2", "3", "4"}
    assert record["example"] == [{"shape": [1, 1, 8, 8], "dtype": "float32"}]
    assert any("train_more: done" in line for line in lines)
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())


def test_a_killed_run_goes_on_to_the_same_result(
    model: Model, recipe: Recipe, bench: Bench, tmp_path: Path, calls: list[int]
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_recipe(model, recipe, bench, whole, train_first=True)
    with killed_at(type(recipe.steps[1])):
        run_recipe(model, recipe, bench, cut, train_first=True)
    assert not (cut / "model.json").exists()
    calls.clear()
    run_recipe(model, recipe, bench, cut, train_first=True, resume=True)
    assert calls == [2]
    assert same(whole, cut)
    assert same(whole / "dense", cut / "dense")
    one, two = (read_run(folder).record for folder in (whole, cut))
    assert one["lineage"] == two["lineage"]
    assert [step["validation"] for step in one["steps"]] == [step["validation"] for step in two["steps"]]
    assert one["light"]["score"] == two["light"]["score"]


def test_another_seed_repeats_what_was_finished(
    model: Model, recipe: Recipe, bench: Bench, tmp_path: Path, calls: list[int]
):
    with killed_at(type(recipe.steps[1])):
        run_recipe(model, recipe, bench, tmp_path)
    calls.clear()
    run_recipe(model, recipe, dataclasses.replace(bench, seed=4), tmp_path, resume=True)
    assert calls == [1, 2]


def test_one_other_sample_repeats_what_was_finished(
    model: Model, recipe: Recipe, bench: Bench, tmp_path: Path, calls: list[int]
):
    """Neither the first nor the last sample, and a length that is the same."""
    with killed_at(type(recipe.steps[1])):
        run_recipe(model, recipe, bench, tmp_path)
    calls.clear()
    assert bench.train is not None
    x, y = (torch.stack([torch.as_tensor(part) for part in column]) for column in zip(*bench.train, strict=True))
    x[len(x) // 2] += 0.5
    run_recipe(model, recipe, dataclasses.replace(bench, train=TensorDataset(x, y)), tmp_path, resume=True)
    assert calls == [1, 2]


def test_another_task_repeats_what_was_finished(
    model: Model, recipe: Recipe, bench: Bench, tmp_path: Path, calls: list[int]
):
    """What was trained for one loss is not what another asks for."""
    with killed_at(type(recipe.steps[1])):
        run_recipe(model, recipe, bench, tmp_path)
    calls.clear()
    smooth = dataclasses.replace(model, task=Classification(label_smoothing=0.5))
    run_recipe(smooth, recipe, bench, tmp_path, resume=True)
    assert calls == [1, 2]


def test_a_finished_run_is_not_repeated(model: Model, recipe: Recipe, bench: Bench, tmp_path: Path, calls: list[int]):
    first = run_recipe(model, recipe, bench, tmp_path).record
    calls.clear()
    assert run_recipe(model, recipe, bench, tmp_path, resume=True).record == first
    assert calls == []
    run_recipe(model, recipe, bench, tmp_path)
    assert calls == [1, 2]


def test_a_run_that_is_being_replaced_does_not_pass_for_finished(
    model: Model, recipe: Recipe, bench: Bench, tmp_path: Path, calls: list[int]
):
    run_recipe(model, recipe, bench, tmp_path)
    with killed_at(type(recipe.steps[1])):
        run_recipe(model, recipe, bench, tmp_path)
    assert not list(tmp_path.glob("model.*"))
    calls.clear()
    run_recipe(model, recipe, bench, tmp_path, resume=True)
    assert calls == [2]


def test_a_finished_run_whose_model_is_gone_is_made_anew(
    model: Model, recipe: Recipe, bench: Bench, tmp_path: Path, calls: list[int]
):
    run_recipe(model, recipe, bench, tmp_path)
    (tmp_path / "model.onnx").unlink()
    calls.clear()
    lines: list[str] = []
    run_recipe(model, recipe, bench, tmp_path, resume=True, tell=lines.append)
    assert calls == [1, 2]
    assert "this run was finished before, and model.onnx of it is gone: made anew" in lines
    assert (tmp_path / "model.onnx").is_file()


def test_resuming_does_not_replace_a_finished_run_of_another_recipe(
    model: Model, recipe: Recipe, bench: Bench, tmp_path: Path, calls: list[int]
):
    run_recipe(model, recipe, bench, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    calls.clear()
    other = Recipe(steps=recipe.steps[:1])
    for given, seed in ((other, bench.seed), (recipe, bench.seed + 1)):
        with pytest.raises(UsageError, match="finished run of something else") as refused:
            run_recipe(model, given, dataclasses.replace(bench, seed=seed), tmp_path, resume=True)
        assert "--overwrite" in refused.value.hint
    assert calls == []
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    (tmp_path / "run.json").write_bytes(before["run.json"].replace(b"steps", b"stops"))
    with pytest.raises(UsageError, match="finished run of something else"):
        run_recipe(model, recipe, bench, tmp_path, resume=True)


def test_what_is_left_of_another_unfinished_run_is_told(model: Model, recipe: Recipe, bench: Bench, tmp_path: Path):
    with killed_at(type(recipe.steps[1])):
        run_recipe(model, recipe, bench, tmp_path)
    (kept,) = (tmp_path / "steps").iterdir()
    lines: list[str] = []
    run_recipe(model, recipe, dataclasses.replace(bench, seed=4), tmp_path, resume=True, tell=lines.append)
    assert [line for line in lines if "another" in line] == [f"{kept.name} in {tmp_path / 'steps'}: {OTHER}"]


def test_a_model_given_as_an_object_is_resumed_too(model: Model, recipe: Recipe, bench: Bench, tmp_path: Path):
    model = dataclasses.replace(model, lineage=())
    with killed_at(type(recipe.steps[1])):
        run_recipe(model, recipe, bench, tmp_path)
    record = run_recipe(model, recipe, bench, tmp_path, resume=True).record
    assert len(record["steps"]) == 3
    assert load(tmp_path, base=model).parameters == model.parameters


def test_a_resumed_run_notices_a_changed_teacher(model: Model, dummies: ModuleType, bench: Bench, tmp_path: Path):
    """The step that it taught is done anew, those before it are not; what was finished is not replaced."""
    file, out = tmp_path / "teacher.py", tmp_path / "out"
    file.write_text(NET)
    taught = KnowledgeDistillation(teacher=f"{file}:net", epochs=1)
    recipe = Recipe(steps=(dummies.Shrink(ratio=0.1), taught, dummies.TrainMore(epochs=1)))

    def told() -> list[str]:
        lines: list[str] = []
        run_recipe(model, recipe, bench, out, resume=True, tell=lines.append)
        return [line for line in lines if "started" in line or "before" in line or "another" in line]

    with killed_at(dummies.TrainMore):
        run_recipe(model, recipe, bench, out)
    file.write_text(f"{NET}\n\nANOTHER = True\n")
    assert told() == [
        "shrink: finished before, not repeated",
        f"02-knowledge_distillation in {out / 'steps'}: {OTHER}",
        "knowledge_distillation: started",
        "train_more: started",
    ]
    assert told() == ["this run was finished before; nothing is repeated"]
    file.write_text(NET)
    with pytest.raises(UsageError, match="finished run of something else"):
        told()


def test_the_contents_of_what_settings_name_are_told(tmp_path: Path):
    """Files, folders of saved models, factories and data; not what a technique writes, nor other settings."""
    (tmp_path / "saved").mkdir()
    for name in ("x.onnx", "net.py", "pool.npz", "saved/model.json", "saved/model.safetensors", "record"):
        (tmp_path / name).write_text(name)
    here = str(tmp_path)
    named = {
        f"{here}/x.onnx": 1,
        f"{here}/saved": 2,
        f"{here}/net.py:make": 1,
        f"npz:{here}/pool.npz?key=x": 1,
        "package.module:make": 0,
    }
    for text, files in named.items():
        step = {"technique": "other", "settings": {"teacher": ["nowhere", text], "record": f"{here}/record"}}
        assert len(contents_of([step])) == files, text
    assert contents_of({"epochs": 3, "note": f"{here}/x.onnx"}) == []


def test_without_data_nothing_is_judged(model: Model, dummies: ModuleType, tmp_path: Path):
    record = run_recipe(model, Recipe(steps=(dummies.Shrink(),)), Bench(clock=CLOCK), tmp_path).record
    assert record["steps"][0]["validation"] is None
    assert record["light"]["score"] is None
    assert record["change"] is None


def test_what_a_step_lacks_is_refused_before_anything(model: Model, recipe: Recipe, tmp_path: Path):
    with pytest.raises(
        NeedError, match=r"Step 1: 'train_more' needs training data\. \(1 more: karui plan tells them\)"
    ):
        run_recipe(model, recipe, Bench(clock=CLOCK), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_somebody_elses_folder_is_refused(model: Model, recipe: Recipe, bench: Bench, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no folder of a run: it holds thesis.txt"):
        run_recipe(model, recipe, bench, tmp_path)
    with pytest.raises(UsageError, match="holds a file"):
        run_recipe(model, recipe, bench, tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no finished run"), (b"{", "no finished run"), (sealed({"format": 9}, ordered=True), "format 9")],
)
def test_reading_what_is_no_run(content: bytes | None, message: str, tmp_path: Path):
    if content is not None:
        (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(KaruiError, match=message):
        read_run(tmp_path)


def test_what_acts_in_every_training_is_part_of_the_mark(model: Model, bench: Bench):
    class Slower(Influence):
        def __init__(self, by: float) -> None:
            self.by = by

    marks = [
        mark_of(model, bench if by is None else bench.under(Slower(by)), "a budget") for by in (None, 1.0, 2.0, 2.0)
    ]
    assert len(set(marks)) == 3
    assert marks[2] == marks[3]
