"""The laws: what every technique must keep to, because it exists.

Each technique of the catalogue is run with its card's `quick` settings on one small trained network.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from torch import Tensor

from karui.artifact import load, save
from karui.data import Splits
from karui.errors import KaruiError, NeedError, SettingError
from karui.index import Entry, techniques
from karui.measuring import count
from karui.model import Classification, Model, resolve
from karui.recipes import Recipe, read_recipe, recipe_from_values
from karui.technique import Bench, Technique
from karui.technique.kinds import hints_of
from karui.train import Adam, Constant, Training

ENTRIES = techniques()
NETWORK = f"{Path(__file__).parent / 'law_network.py'}:network"
every = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.slug)


@pytest.fixture(scope="module")
def start(digits: Splits) -> Bench:
    return Bench(
        train=digits.train,
        validation=digits.validation,
        test=digits.test,
        training=Training(epochs=1, batch_size=64, optimizer=Adam(lr=2e-3), schedule=Constant()),
    )


@pytest.fixture(scope="module")
def model(start: Bench) -> Model:
    """The law network, trained for a few epochs."""
    origin = resolve(NETWORK)
    torch.manual_seed(0)
    module = origin.replay(None, ())
    assert module is not None
    fresh = Model(module, example=(torch.rand(2, 1, 8, 8),), task=Classification(), lineage=(origin,))
    return start.fit(fresh, epochs=6)


@pytest.fixture(scope="module")
def bench(start: Bench, model: Model) -> Bench:
    """As in the middle of a pipeline: a teacher is there, the dense model that the pipeline started from."""
    return dataclasses.replace(start, dense=model.copy())


@pytest.fixture(scope="module")
def result(model: Model, bench: Bench) -> Any:
    """The technique's result with its quick settings, made once for all laws."""

    made: dict[str, Model] = {}

    def make(entry: Entry) -> Model:
        if entry.slug not in made:
            made[entry.slug] = quick(entry).apply(model, bench)
        return made[entry.slug]

    return make


def quick(entry: Entry, **settings: Any) -> Technique:
    return entry.load()(**{**entry.card.get("quick", {}), **settings})


def outputs(model: Model, x: Tensor) -> Tensor:
    model.module.eval()
    with torch.no_grad():
        return model.module(x)


def inputs(bench: Bench, number: int = 32) -> Tensor:
    return torch.stack([bench.test[i][0] for i in range(number)])


def state(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@every
def test_settings_make_the_round_trip_through_a_recipe_file(entry: Entry, tmp_path: Path) -> None:
    step = quick(entry)
    file = tmp_path / "recipe.toml"
    file.write_text(Recipe(steps=(step,)).to_toml(), encoding="utf-8")
    assert read_recipe(file).steps == (step,)


@every
def test_the_given_model_is_unchanged(entry: Entry, model: Model, bench: Bench) -> None:
    before, lineage, training = state(model), model.lineage, [m.training for m in model.module.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()]
    quick(entry).apply(model, bench)
    assert same(before, state(model))
    assert model.lineage == lineage
    assert [m.training for m in model.module.modules()] == training
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()] == hooks


@every
def test_signature_stays(entry: Entry, model: Model, bench: Bench, result: Any) -> None:
    if not entry.card.get("same_signature", True):
        pytest.skip("the card says that the signature changes")
    x = inputs(bench, 5)
    before, after = outputs(model, x), outputs(result(entry), x)
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert torch.isfinite(after).all()


@every
def test_identity_changes_nothing(entry: Entry, model: Model, bench: Bench) -> None:
    identity = entry.card.get("identity")
    if identity is None:
        assert entry.card["kind"] in ("build", "data", "trainings", "reader"), "a technique on a model has an identity"
        pytest.skip("a network built or trained anew has no identity setting")
    x = inputs(bench)
    torch.testing.assert_close(
        outputs(quick(entry, **identity).apply(model, bench), x), outputs(model, x), rtol=1e-5, atol=1e-5
    )


@every
def test_exact_techniques_compute_the_same(entry: Entry, model: Model, bench: Bench, result: Any) -> None:
    if not entry.card.get("exact"):
        pytest.skip("the card does not claim equal outputs")
    x = inputs(bench)
    torch.testing.assert_close(outputs(result(entry), x), outputs(model, x), rtol=1e-4, atol=1e-4)


@every
def test_seeded_runs_repeat(entry: Entry, model: Model, bench: Bench, result: Any) -> None:
    torch.rand(7)  # a technique must not depend on where the global generator stands
    again = quick(entry).apply(model, bench)
    assert same(state(result(entry)), state(again))


@every
def test_what_the_card_says_is_reduced_is_reduced(entry: Entry, model: Model, result: Any, tmp_path: Path) -> None:
    promised = set(entry.card.get("reduces", ()))
    if entry.card["kind"] == "build":
        pytest.skip("a network built anew is compared with its dense peer in the paper's own test")
    light = result(entry)
    before, after = count(model), count(light)
    if "parameters" in promised:
        assert after.parameters < before.parameters
    if "macs" in promised:
        assert after.macs < before.macs
    if "bytes" in promised:
        sizes = []
        for name, value in (("dense", model), ("light", light)):
            save(value, tmp_path / name, onnx=False)
            sizes.append((tmp_path / name / "model.safetensors").stat().st_size)
        assert sizes[1] < sizes[0]


LOAD = """
import json, sys, torch
from karui.artifact import load
model = load(sys.argv[1])
model.module.eval()
x = torch.tensor(json.load(open(sys.argv[2])))
with torch.no_grad():
    json.dump(model.module(x).double().tolist(), open(sys.argv[3], "w"))
"""


@every
def test_saved_and_loaded_in_a_fresh_process_it_computes_the_same(
    entry: Entry, bench: Bench, result: Any, tmp_path: Path
) -> None:
    light = result(entry)
    x = inputs(bench, 3)
    save(light, tmp_path / "light", onnx=False)
    (tmp_path / "x.json").write_text(json.dumps(x.tolist()), encoding="utf-8")
    files = [str(tmp_path / name) for name in ("light", "x.json", "y.json")]
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True)
    told = torch.tensor(json.loads((tmp_path / "y.json").read_text(encoding="utf-8")))
    torch.testing.assert_close(told, outputs(light, x), rtol=1e-6, atol=1e-6)
    assert same(state(load(tmp_path / "light")), state(light))


@every
def test_the_onnx_file_computes_the_same(entry: Entry, result: Any, tmp_path: Path) -> None:
    saved = save(result(entry), tmp_path / "light")
    assert (tmp_path / "light" / "model.onnx").stat().st_size > 0
    assert saved.verification is not None
    assert saved.verification.ok


@every
def test_needs_are_refused_before_work_starts(entry: Entry, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    if not set(entry.card.get("needs", ())) & {"calibration", "labels", "training"}:
        pytest.skip("it needs nothing but the model")

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("work started")

    monkeypatch.setattr(Bench, "fit", started)
    with pytest.raises(NeedError) as caught:
        quick(entry).apply(model, Bench())
    assert entry.slug in caught.value.message
    assert caught.value.hint


@every
def test_wrong_settings_are_told_kindly(entry: Entry) -> None:
    cls = entry.load()
    with pytest.raises(KaruiError, match="step 1"):
        recipe_from_values({"step": [{"technique": entry.slug, "no_such_setting": 1}]})
    for field in dataclasses.fields(cls):
        kind = str(field.type)
        if kind.split(" |", maxsplit=1)[0] in ("int", "float"):
            with pytest.raises(SettingError) as caught:
                quick(entry, **{field.name: -1 if kind.startswith("int") else float("nan")})
            assert field.name in caught.value.message, f"the error must name the setting: {caught.value.message}"


@every
def test_settings_of_a_wrong_kind_are_told_by_name(entry: Entry) -> None:
    cls = entry.load()
    hints = hints_of(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kinds = {get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,))}
        wrong: list[Any] = []
        if kinds & {int, float}:
            wrong += ["x", float("nan"), float("inf"), [1], {}, torch.zeros(2)]
            wrong += [None] if type(None) not in kinds else []
            wrong += [1.5, 1e9] if float not in kinds else []
        elif kinds & {bool, Literal}:
            wrong += ["x", float("nan"), 7, [1]]
        elif kinds <= {tuple, Mapping}:
            wrong += ["fc1", 3, 1.5]
        for value in wrong:
            with pytest.raises(SettingError, match=field.name) as caught:
                quick(entry, **{field.name: value})
            assert "\n" not in str(caught.value)
    for field in dataclasses.fields(cls):
        if hints[field.name] in (int, float) and field.name in entry.card.get("quick", {}):
            given = entry.card["quick"][field.name]
            for scalar in (np.asarray(given)[()], torch.tensor(given)):
                assert getattr(quick(entry, **{field.name: scalar}), field.name) == pytest.approx(given)


@every
def test_a_technique_is_a_value(entry: Entry) -> None:
    step = quick(entry)
    assert step == copy.deepcopy(step)
    assert hash(step) == hash(copy.deepcopy(step))
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.ratio = 2  # pyright: ignore
