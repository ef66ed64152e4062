"""Recipes: from a file, from one line, from Python, and back; and what is told when they are wrong."""

from __future__ import annotations

import math
import operator
from pathlib import Path
from types import ModuleType

import pytest

from karui.errors import KaruiError, SettingError, UsageError
from karui.measuring import Clock, OnnxRuntime
from karui.recipes import Recipe, read_recipe, recipe_from
from karui.technique import Then
from karui.train import Adam, Constant, Steps, Training


def test_file_with_everything(tmp_path: Path, dummies: ModuleType):
    file = tmp_path / "mine.toml"
    file.write_text(
        """
        [bench]
        seed = 3
        [training]
        epochs = 2
        optimizer = { kind = "Adam", lr = 1 }
        [clock]
        batches = [1]
        engines = [{ kind = "Torch" }]
        [[step]]
        technique = "shrink"
        ratio = 0
        [[step]]
        technique = "train_more"
        epochs = 4
        """
    )
    recipe = read_recipe(file)
    assert recipe.steps == (dummies.Shrink(ratio=0.0), dummies.TrainMore(epochs=4))
    assert recipe.training == Training(epochs=2, optimizer=Adam(lr=1.0))
    assert (recipe.seed, recipe.name) == (3, "mine")
    assert recipe.clock is not None
    assert recipe.clock.batches == (1,)
    assert recipe.technique() == Then(*recipe.steps)


def test_settings_make_the_round_trip(tmp_path: Path, dummies: ModuleType):
    step = dummies.Shrink(
        ratio=0.25,
        skip=('a "b"', "c\\d", "é\x7f\n"),
        ranks={"layer.1": 3, "plain": 4},
        scale=dummies.Shift(by=-math.inf),
        limit=None,
        mode="odd",
        training=Training(optimizer=Adam(lr=3e-4), schedule=Steps(milestones=(0.5,)), epochs=0),
        pick=math.sqrt,
        folder=Path("a/b"),
    )
    recipe = Recipe(
        steps=(step, dummies.TrainMore()), seed=7, training=Training(schedule=Constant()), clock=Clock(rounds=5)
    )
    file = tmp_path / "recipe.toml"
    file.write_text(recipe.to_toml(), encoding="utf-8")
    again = read_recipe(file)
    assert again.steps == recipe.steps
    assert (again.seed, again.training, again.clock) == (7, recipe.training, recipe.clock)
    assert type(again.steps[0].ratio) is float
    assert again.clock is not None
    assert again.clock.engines[0] == OnnxRuntime()


def test_a_nested_then_becomes_plain_steps(dummies: ModuleType):
    recipe = Recipe(steps=(Then(dummies.Shrink(), dummies.TrainMore()), dummies.Shrink(ratio=0.1)))
    assert [told["technique"] for told in recipe.told()] == ["shrink", "train_more", "shrink"]


def test_one_line(dummies: ModuleType):
    line = "shrink:ratio=0.5,skip=['a,b','c+d'],mode=odd,ranks={x=1, y=2},limit={none=true}+train_more:epochs=3+shrink"
    assert recipe_from(line).steps == (
        dummies.Shrink(ratio=0.5, skip=("a,b", "c+d"), mode="odd", ranks={"x": 1, "y": 2}, limit=None),
        dummies.TrainMore(epochs=3),
        dummies.Shrink(),
    )
    assert recipe_from("shrink:ratio=1e-2").steps[0].ratio == 0.01


@pytest.mark.parametrize(
    ("line", "error", "message", "hint"),
    [
        ("shrnk", UsageError, "Step 1: Technique 'shrnk' is not known.", "Did you mean shrink?"),
        ("shrink+tucker2", UsageError, "Step 2: Paper 12 ('tucker2') has no technique yet.", "karui list"),
        ("shrink:ratoi=0.5", SettingError, "step 1 (shrink): setting 'ratoi' is not known.", "Did you mean ratio?"),
        ("shrink+shrink:ratio=2", SettingError, "step 2 (shrink): ratio is 2.0; give a share", ""),
        ("shrink:ratio=half", SettingError, "step 1 (shrink): ratio is 'half', a str; it takes float.", ""),
        ("shrink:ratio=true", SettingError, "ratio is True, a bool; it takes float.", ""),
        ("train_more:epochs=1.5", SettingError, "epochs is 1.5, a float; it takes int.", ""),
        ("shrink:mode=both", SettingError, "mode is 'both'.", "'even', 'odd'"),
        ("shrink:skip=[1]", SettingError, "skip[0] is 1, a int; it takes str.", ""),
        ("shrink:scale={kind='Thrice'}", SettingError, "'karui_test_techniques:Thrice' cannot be imported", ""),
        ("shrink:scale={kind='Shift',bye=1}", SettingError, "scale (Shift): setting 'bye' is not known.", "by"),
        ("shrink:scale={by=1}", SettingError, "scale is a table without `kind`.", "kind"),
        ("shrink:pick=nowhere", SettingError, "'nowhere' cannot be imported", "package.module:name"),
        ("shrink:ratio", UsageError, "'ratio' in 'shrink:ratio' is no setting.", "slug:name=value"),
        ("", UsageError, "Technique '' is not known", "karui list"),
        ("none.toml", UsageError, "There is no recipe file none.toml.", "TOML"),
    ],
)
def test_mistakes_on_the_line(line: str, error: type[KaruiError], message: str, hint: str):
    with pytest.raises(error) as caught:
        recipe_from(line)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The recipe has no step."),
        ("step = 3", "The recipe has no step."),
        ("[[step]]\nratio = 1", "Step 1 names no technique."),
        ("[[step]]\ntechnique = 3", "Step 1 names no technique."),
        ("[[steps]]\ntechnique = 'shrink'", "Table 'steps' is not known."),
        ("[[step]]\ntechnique = shrink", "no TOML file"),
        ("[bench]\nseed = 1.5\n[[step]]\ntechnique = 'shrink'", "seed is 1.5; it takes a whole number"),
        ("[bench]\nsede = 1\n[[step]]\ntechnique = 'shrink'", "[bench]: setting 'sede' is not known."),
        ("[training]\nepoch = 1\n[[step]]\ntechnique = 'shrink'", "[training]: setting 'epoch' is not known."),
        ("[training]\nepochs = -1\n[[step]]\ntechnique = 'shrink'", "[training]: epochs is -1"),
        ("[training]\noptimizer = 'Adam'\n[[step]]\ntechnique = 'shrink'", "optimizer is 'Adam'"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, message: str):
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    with pytest.raises(KaruiError) as caught:
        read_recipe(file)
    assert message in caught.value.message
    assert "wrong.toml" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_lambda_cannot_be_written(dummies: ModuleType):
    with pytest.raises(SettingError, match=r"Shrink\.pick is <function"):
        Recipe(steps=(dummies.Shrink(pick=lambda x: x),)).to_toml()


def test_a_technique_without_a_card_has_no_place_in_a_file():
    class Own:
        def apply(self, model, bench):
            return model

    with pytest.raises(SettingError, match="has no card"):
        Recipe(steps=(Own(),)).to_toml()
    with pytest.raises(UsageError, match="has no step"):
        Recipe(steps=())


def test_functions_keep_their_import_path(dummies: ModuleType, tmp_path: Path):
    step = dummies.Shrink(pick=operator.neg)
    assert 'pick = "_operator:neg"' in Recipe(steps=(step,)).to_toml()
