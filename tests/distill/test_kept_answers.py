"""What a teacher has said is kept, where it may be, and the lineage says whether."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import nn
from torch.utils.data import TensorDataset

from karui.data import RandomCrop
from karui.distill._onnx_teachers import onnx_teacher
from karui.distill._teachers import keeping
from karui.distill.attention import AttentionTransfer
from karui.distill.born_again import BornAgain
from karui.distill.detection import DetectionDistillation
from karui.distill.hint import FitNets
from karui.distill.knowledge import KnowledgeDistillation
from karui.distill.logits import LogitRegression
from karui.distill.munge import ModelCompression
from karui.distill.neurons import NeuronSelection
from karui.distill.predictors import predictor
from karui.measuring import Clock
from karui.measuring.engines import Torch
from karui.model import Classification, Model
from karui.recipes.recipe import recipe_from
from karui.recipes.run import run_recipe
from karui.technique import Bench
from karui.train import Influence, Moment
from karui.train.fingerprint import fingerprint
from karui.train.teaching import Teachers


@pytest.mark.parametrize(
    "technique",
    [
        pytest.param(KnowledgeDistillation(epochs=3), marks=pytest.mark.paper(30)),
        pytest.param(LogitRegression(epochs=3, normalise=False), marks=pytest.mark.paper(31)),
        pytest.param(FitNets(hint_epochs=0, epochs=3), marks=pytest.mark.paper(33)),
    ],
    ids=lambda step: type(step).__name__,
)
def test_a_teacher_is_asked_once_for_each_sample_unless_every_pass_augments_anew(
    nets: Any, technique: Any, bench: Bench
) -> None:
    """Two batches, three passes; two more calls tell whether it fits, and the size of an answer."""

    def calls(bench: Bench) -> int:
        seen: list[tuple[bool, bool]] = []
        replace(technique, teacher=nets.Watched(seen)).apply(nets.student(), bench)
        return len(seen)

    assert calls(bench) == 2 + 2
    shifted = replace(bench, training=replace(bench.training, augment=RandomCrop(1)))
    assert calls(shifted) == 1 + 6


class Killed(Influence):
    """Kills the training that it is in at a step, the first time."""

    def __init__(self, done: list[int]) -> None:
        self.done = done

    def constraints(self, module: nn.Module, moment: Moment) -> None:
        if moment.step == 3 and not self.done:
            self.done.append(moment.step)
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "technique",
    [
        pytest.param(KnowledgeDistillation(epochs=3), marks=pytest.mark.paper(30)),
        pytest.param(LogitRegression(epochs=3), marks=pytest.mark.paper(31)),
        pytest.param(FitNets(hint_epochs=0, epochs=3), marks=pytest.mark.paper(33)),
        pytest.param(ModelCompression(copies=1, epochs=3), marks=pytest.mark.paper(36)),
    ],
    ids=lambda step: type(step).__name__,
)
def test_a_killed_training_with_kept_answers_ends_as_if_it_had_not_been(
    nets: Any, technique: Any, bench: Bench, tmp_path: Path
) -> None:
    step, training = replace(technique, teacher=nets.Watched([])), replace(bench.training, checkpoint_seconds=0.0)
    whole, cut = (
        replace(bench, training=training, checkpoints=tmp_path / name, influence=Killed(done))
        for name, done in (("whole", [0]), ("cut", []))
    )
    wanted = step.apply(nets.student(), whole)
    with pytest.raises(KeyboardInterrupt):
        step.apply(nets.student(), cut)
    assert list((tmp_path / "cut").rglob("*.answers")), "what was said so far is kept"
    assert nets.same(step.apply(nets.student(), cut), wanted)


@pytest.mark.paper(37)
def test_a_generation_asks_the_one_before_once_for_each_sample(nets: Any, bench: Bench) -> None:
    seen: list[tuple[bool, bool]] = []
    model = Model(nets.Watched(seen), example=(torch.zeros(1, 1, 8, 8),), task=Classification())
    BornAgain(generations=2, epochs=3).apply(model, bench)
    assert seen.count((False, False)) == 2 * (1 + 2)


def test_what_is_kept_on_disk_belongs_to_the_very_content(
    nets: Any, forest: RandomForestClassifier, few: TensorDataset, onnx_file: Path
) -> None:
    x, y = nets.table_of(few)
    again = RandomForestClassifier(20, random_state=0).fit(x, y)
    other = RandomForestClassifier(20, random_state=1).fit(x, y)
    assert fingerprint(predictor(forest)) == fingerprint(predictor(again)) != fingerprint(predictor(other))
    assert fingerprint(onnx_teacher(onnx_file)) == fingerprint(onnx_teacher(onnx_file))
    assert fingerprint(predictor(nets.plain)) != fingerprint(predictor(lambda x: 2 * x))


@pytest.mark.parametrize("technique", [KnowledgeDistillation, LogitRegression])
def test_answers_are_kept_by_themselves_but_not_under_augmentation_and_it_is_told(
    nets: Any,
    technique: Callable[..., Any],
    bench: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def taught(bench: Bench, **settings: Any) -> tuple[Model, str]:
        made = technique(teacher=nets.mlp(16, seed=3), epochs=3, **settings).apply(nets.mlp(8), bench)
        return made, made.lineage[-2].describe()

    asked: list[int] = []
    ask = Teachers._ask
    monkeypatch.setattr(Teachers, "_ask", lambda self, inputs: asked.append(len(inputs[0])) or ask(self, inputs))
    anew, told = taught(bench, remember=0)
    assert "answers are not kept, as asked" in told
    often = sum(asked)
    asked.clear()
    kept, told = taught(replace(bench, checkpoints=tmp_path))
    assert "asked once for each input; those for 120 are kept beside the checkpoints" in told
    assert nets.same(kept, anew)
    assert sum(asked) == 120 < often
    assert "in memory" in taught(bench)[1]
    several = replace(bench, training=replace(bench.training, devices=2))
    assert "by each of 2 processes, once for each input that it comes to see" in str(
        keeping((nets.mlp(8),), several).why
    )
    asked.clear()
    moved = replace(bench, training=replace(bench.training, augment=RandomCrop(1)))
    _, told = taught(moved)
    assert "asked anew in each pass, as augmentation makes every sample a new one" in told
    assert sum(asked) >= 3 * 120
    monkeypatch.setattr("karui.distill._teachers.MEMORY", 2**12)
    assert "asked anew in each pass, as its answers for 120 samples would take" in taught(bench)[1]
    assert "beside the checkpoints" in taught(replace(bench, checkpoints=tmp_path))[1]  # there is more room there


def test_answers_in_double_precision_are_not_said_to_be_kept(nets: Any, bench: Bench, few: TensorDataset) -> None:
    def wide(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :10].double()

    made = KnowledgeDistillation(teacher=wide, epochs=1).apply(nets.mlp(8), bench)
    assert "asked anew in each pass, as its answers are in double precision" in made.lineage[-2].describe()

    made = KnowledgeDistillation(teacher=wide, epochs=1, remember=500).apply(nets.mlp(8), bench)
    assert "asked anew in each pass, as its answers are in double precision" in made.lineage[-2].describe()


@pytest.mark.paper(30)
@pytest.mark.paper(36)
def test_what_a_step_before_asked_the_same_teacher_takes_no_room(
    nets: Any, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    ask = Teachers._ask
    monkeypatch.setattr(Teachers, "_ask", lambda self, inputs: asked.append(len(inputs[0])) or ask(self, inputs))
    teacher, bench = nets.mlp(16, seed=3), replace(bench, checkpoints=tmp_path)
    first = LogitRegression(teacher=teacher, epochs=1, unlabelled=TensorDataset(torch.rand(300, 1, 8, 8))).apply(
        nets.mlp(8), bench
    )
    assert sum(asked) >= 420
    other = torch.Generator().manual_seed(5)
    fresh = TensorDataset(torch.rand(120, 1, 8, 8, generator=other), torch.randint(10, (120,), generator=other))
    asked.clear()
    made = KnowledgeDistillation(teacher=teacher, epochs=3).apply(first, replace(bench, train=fresh))
    assert sum(asked) == 120
    assert "asked once for each input; those for 120 are kept beside the checkpoints" in made.lineage[-2].describe()
    made = KnowledgeDistillation(teacher=nets.mlp(16, seed=4), epochs=3, remember=50).apply(nets.student(), bench)
    told = made.lineage[-2].describe()
    assert re.search(r"for 50 samples are kept .*; \d+ times it was asked .* for which there was no room", told)


@pytest.mark.parametrize(
    ("technique", "why"),
    [
        pytest.param(NeuronSelection(epochs=1, number=5, by="random"), r"give \(hidden\)", marks=pytest.mark.paper(32)),
        pytest.param(
            FitNets(layer="1", teacher_layer="norm", hint_epochs=1, epochs=0), r"\(norm\)", marks=pytest.mark.paper(33)
        ),
        pytest.param(
            AttentionTransfer(layers=("1",), teacher_layers=("norm",), epochs=1),
            r"\(norm\)",
            marks=pytest.mark.paper(34),
        ),
        pytest.param(
            AttentionTransfer(layers=("1",), teacher_layers=("norm",), epochs=1, soft=0.9),
            r"\(norm\)",
            marks=pytest.mark.paper(34),
        ),
        pytest.param(
            AttentionTransfer(by="gradients", epochs=1), "the gradient of its loss", marks=pytest.mark.paper(34)
        ),
        pytest.param(DetectionDistillation(epochs=1), r"\(drop|norm\)", marks=pytest.mark.paper(35)),
    ],
    ids=lambda one: f"{type(one).__name__} {getattr(one, 'by', '')}".strip() if not isinstance(one, str) else "",
)
def test_who_looks_inside_says_that_nothing_is_kept_and_why(nets: Any, technique: Any, why: str, bench: Bench) -> None:
    made = replace(technique, teacher=nets.Watched([])).apply(nets.student(), bench)
    (line,) = [line for line in told_of_teachers(made) if "asked anew in each pass" in line]
    assert re.search(why, line), line
    assert line.endswith("only answers are kept")


def told_of_teachers(made: Model) -> list[str]:
    return [edit.describe() for edit in made.lineage if edit.describe().startswith("teacher: ")]


@pytest.mark.paper(37)
def test_every_generation_says_whether_answers_are_kept(nets: Any, bench: Bench) -> None:
    made = BornAgain(generations=2, epochs=1).apply(nets.student(), bench)
    assert any("asked once for each input; those for 120 are kept in memory" in line for line in told_of_teachers(made))


@pytest.mark.paper(30)
def test_a_training_under_a_teacher_says_whether_answers_are_kept(nets: Any, bench: Bench) -> None:
    """Whatever trains, though it knows of no teacher: the line is the influence's, and the loop writes it down."""
    soft = KnowledgeDistillation(teacher=nets.mlp(16, seed=3)).influence(nets.mlp(8), bench)
    (line,) = told_of_teachers(bench.under(soft).fit(nets.mlp(8)))
    assert "asked once for each input; those for 120 are kept in memory" in line


@pytest.mark.paper(30)
def test_a_run_tells_whether_answers_are_kept(nets: Any, bench: Bench, tmp_path: Path, onnx_file: Path) -> None:
    recipe = recipe_from(f"knowledge_distillation:teacher={onnx_file},epochs=1")
    clock, told = Clock(batches=(1,), threads=(1,), engines=(Torch(),), rounds=5), []
    run_recipe(nets.mlp(8), recipe, replace(bench, clock=clock), tmp_path / "out", train_first=True, tell=told.append)
    assert any("knowledge_distillation: teacher: asked once for each input" in line for line in told), told
