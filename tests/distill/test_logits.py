"""Logit regression, [31]: the loss, the folded normalisation, the unlabelled pool, and what the paper claims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from karui.architectures.perceptron import perceptron
from karui.data import Splits, hold_out
from karui.distill import KnowledgeDistillation
from karui.distill._scale import Scale, can_hold, scale_of
from karui.distill.logits import LogitRegression, LogitTargets, logit_loss
from karui.errors import NeedError, SettingError
from karui.measuring import evaluate
from karui.model import Classification, Model
from karui.recipes import recipe_from_values
from karui.technique import Bench, Then, lacking
from karui.train import Adam, Constant, Influence, Moment, Training
from karui.train.teaching import Teachers

pytestmark = pytest.mark.paper(31)


def mlp(*widths: int, seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(perceptron((64, *widths, 10)), example=(torch.zeros(1, 1, 8, 8),), task=Classification())


def bench_of(digits: Splits, epochs: int = 1, seed: int = 0, batch: int = 64, train: object = None) -> Bench:
    return Bench(
        train=digits.train if train is None else train,
        validation=digits.validation,
        test=digits.test,
        training=Training(epochs=epochs, batch_size=batch, optimizer=Adam(lr=3e-3), schedule=Constant()),
        seed=seed,
    )


def same(a: Model, b: Model) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def inputs_of(digits: Splits, number: int = 50) -> torch.Tensor:
    return torch.stack([digits.test[i][0] for i in range(number)])


def test_the_loss_is_zero_for_equal_logits_only_and_its_gradient_their_difference() -> None:
    draw = torch.Generator().manual_seed(0)
    z, g = torch.randn(6, 4, generator=draw), torch.randn(6, 4, generator=draw).requires_grad_()
    assert float(logit_loss(z, z)) == 0
    assert float(logit_loss(z + 1e-3 * torch.eye(6, 4), z)) > 0
    logit_loss(g, z).backward()
    assert g.grad is not None
    torch.testing.assert_close(g.grad * 6, (g - z).detach())
    torch.testing.assert_close(logit_loss(g, z), (g - z).square().sum() / 12)


def test_a_constant_added_to_all_logits_counts_here_and_not_for_soft_targets() -> None:
    from karui.numerics.soft_targets import soft_cross_entropy, soften

    z = torch.randn(5, 4)
    assert float(logit_loss(z + 2.0, z)) == pytest.approx(8.0)
    torch.testing.assert_close(
        soft_cross_entropy(z + 2.0, soften(z, 3.0), 3.0), soft_cross_entropy(z, soften(z, 3.0), 3.0)
    )


def test_several_teachers_give_the_mean_of_their_logits_and_a_scale_for_each_class(digits: Splits) -> None:
    models = (mlp(8, seed=1), mlp(12, seed=2))
    x = torch.stack([x for x, _ in digits.train])
    mean = sum(model.module(x) for model in models).detach() / 2  # pyright: ignore[reportAttributeAccessIssue]
    scale = scale_of(Teachers(models), digits.train, batch=100)
    torch.testing.assert_close(scale.mean, mean.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scale.deviation, mean.std(0, correction=0), rtol=1e-4, atol=1e-5)
    normalised = scale.normalised(mean)
    torch.testing.assert_close(normalised.mean(0), torch.zeros(10), rtol=0, atol=1e-4)
    torch.testing.assert_close(normalised.std(0, correction=0), torch.ones(10), rtol=1e-4, atol=0)
    student, influence = mlp(4), LogitTargets(teachers=Teachers(models), scale=None)
    outputs = student.module(x)
    moment = Moment(student.module, (x,), None, outputs)
    torch.testing.assert_close(influence.objective(torch.tensor(torch.nan), moment), logit_loss(outputs, mean))


def test_a_class_whose_logit_never_changes_is_not_blown_up(digits: Splits) -> None:
    teacher = mlp(8)
    with torch.no_grad():
        teacher.module.get_parameter("3.weight")[4] = 0.0
    scale = scale_of(Teachers((teacher,)), digits.train)
    assert float(scale.deviation[4]) == 1.0
    assert float(scale.deviation.min()) > 0


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(6, 4, 1)])
def test_a_folded_layer_gives_the_denormalised_outputs_exactly(layer: nn.Module) -> None:
    layer = layer.double()
    draw = torch.Generator().manual_seed(0)
    scale = Scale(torch.randn(4, generator=draw) * 5, torch.rand(4, generator=draw) * 7 + 0.1)
    x = torch.randn(3, 6, *[1] * (layer.weight.ndim - 2), generator=draw, dtype=torch.float64)  # pyright: ignore
    normalised = layer(x).detach()
    scale.fold(layer)
    mean, deviation = (v.double().reshape(-1, *[1] * (normalised.ndim - 2)) for v in (scale.mean, scale.deviation))
    torch.testing.assert_close(layer(x).detach(), normalised * deviation + mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scale.normalised(layer(x).detach()), normalised, rtol=1e-12, atol=1e-12)
    scale.unfold(layer)
    torch.testing.assert_close(layer(x).detach(), normalised, rtol=1e-12, atol=1e-12)


def test_a_student_that_starts_as_its_teacher_stays_it(digits: Splits) -> None:
    """Unfolded, zero loss, zero gradient, folded: the very function, to rounding."""
    teacher = mlp(16, seed=3)
    bench = replace(bench_of(digits), training=replace(bench_of(digits).training, optimizer=Adam(lr=1e-6)))
    taught = LogitRegression(teacher=teacher, epochs=1).apply(teacher.copy(), bench)
    x = inputs_of(digits)
    torch.testing.assert_close(taught.module(x), teacher.module(x), rtol=1e-3, atol=1e-3)


class Doubled(nn.Module):
    """A network that works on the output of its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x.flatten(1))


def test_which_last_layer_takes_up_the_scale() -> None:
    assert can_hold(mlp(8), "3")
    assert not can_hold(mlp(8), None)
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    assert not can_hold(Model(bare, example=(torch.zeros(1, 64),)), "1")
    tied = mlp(10)
    tied.module.other = nn.Linear(10, 10)  # pyright: ignore[reportAttributeAccessIssue]
    tied.module.other.weight = tied.module.get_parameter("3.weight")  # pyright: ignore[reportAttributeAccessIssue]
    assert not can_hold(tied, "3")


@pytest.mark.parametrize("kind", ["folded", "in the loss", "not normalised"])
def test_the_student_comes_near_its_teachers_logits(digits: Splits, kind: str) -> None:
    teacher = bench_of(digits, 6).fit(mlp(32, seed=1))
    student = mlp(32) if kind != "in the loss" else replace(mlp(32), module=Doubled())
    technique = LogitRegression(teacher=teacher, epochs=8, normalise=kind != "not normalised")
    taught = technique.apply(student, bench_of(digits))
    x = inputs_of(digits, 200)
    wanted, before, after = (one.module(x).detach() for one in (teacher, student, taught))
    assert float(logit_loss(after, wanted)) < 0.25 * float(logit_loss(before, wanted))
    assert any("logits" in step.describe() for step in taught.lineage)


def test_no_label_is_looked_at(digits: Splits) -> None:
    x = torch.stack([x for x, _ in digits.train])
    teacher, student = mlp(16, seed=1), replace(mlp(8), task=None)
    technique = LogitRegression(teacher=teacher, epochs=1)
    made = [
        technique.apply(student, bench_of(digits, train=TensorDataset(*tensors)))
        for tensors in ((x, torch.zeros(len(x)).long()), (x, torch.full((len(x),), 77)), (x,))
    ]
    assert same(made[0], made[1])
    assert same(made[0], made[2])


def test_the_pool_is_taught_on_by_value_and_by_name(digits: Splits, tmp_path: Path) -> None:
    few, rest = hold_out(digits.train, 0.8, 0)
    pool = torch.stack([x for x, _ in rest])
    np.savez(tmp_path / "pool.npz", x=pool.numpy())
    bench = bench_of(digits, train=few)
    base = LogitRegression(teacher=mlp(16, seed=1), epochs=1)
    alone = base.apply(mlp(8), bench)
    by_value = replace(base, unlabelled=rest).apply(mlp(8), bench)
    by_name = replace(base, unlabelled=f"npz:{tmp_path / 'pool.npz'}").apply(mlp(8), bench)
    bare = replace(base, unlabelled=rest).apply(mlp(8), replace(bench, train=TensorDataset(few.tensors[0])))
    assert same(by_value, by_name)
    assert same(by_value, bare), "also where the training data have no labels"
    assert not same(alone, by_value)
    note = by_value.lineage[-1]
    assert f"{len(few) + len(rest)}" in str(note)
    lost = replace(base, unlabelled="npz:nowhere.npz")
    assert "no unlabelled data at nowhere.npz" in lacking(lost, mlp(8), bench)[0][0]
    written = recipe_from_values({"step": [{"technique": "logit_regression", "unlabelled": "npz:pool.npz"}]})
    assert written.steps == (LogitRegression(unlabelled="npz:pool.npz"),)


def test_zeros_stay_and_another_training_can_run_under_it(digits: Splits) -> None:
    student, teacher = mlp(16), mlp(16, seed=1)
    with torch.no_grad():
        student.module.get_parameter("1.weight")[:, ::2] = 0.0
        student.module.get_parameter("3.weight")[:, ::2] = 0.0
    taught = LogitRegression(teacher=teacher, epochs=2).apply(student, bench_of(digits))
    for name in ("1.weight", "3.weight"):
        assert torch.equal(
            taught.module.get_parameter(name)[:, ::2], torch.zeros_like(student.module.get_parameter(name)[:, ::2])
        )
    technique = LogitRegression(teacher=teacher)
    influence = technique.influence(mlp(8), bench_of(digits))
    assert isinstance(influence, Influence)
    under = bench_of(digits).under(influence).fit(mlp(8))
    assert not same(under, bench_of(digits).fit(mlp(8)))


class Watch(Influence):
    """Keeps the outputs of each step."""

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []

    def objective(self, loss: torch.Tensor, moment: Moment) -> torch.Tensor:
        self.outputs.append(moment.outputs.detach())
        return loss


def test_another_influence_sees_logits_on_their_own_scale(digits: Splits) -> None:
    """Soft targets beside it would be compared with normalised outputs otherwise."""
    teacher, watch = bench_of(digits, 3).fit(mlp(16, seed=1)), Watch()
    with torch.no_grad():
        teacher.module.get_parameter("3.bias").add_(40.0)
    first = LogitRegression(teacher=teacher, epochs=1).apply(teacher.copy(), bench_of(digits).under(watch))
    assert all(float(outputs.mean()) > 30 for outputs in watch.outputs)
    assert float(first.module(inputs_of(digits)).detach().mean()) > 30


def test_a_new_shallow_student_is_taught_by_the_given_model(digits: Splits) -> None:
    deep = bench_of(digits, 3).fit(mlp(24, 24, seed=1))
    technique = LogitRegression(parameters=3000, rank=8, epochs=4)
    assert lacking(technique, deep, bench_of(digits)) == []
    shallow = technique.apply(deep, bench_of(digits))
    assert 2900 < shallow.parameters <= 3000
    assert [type(layer).__name__ for layer in shallow.module] == ["Flatten", "FactoredLinear", "ReLU", "Linear"]  # pyright: ignore
    assert same(shallow, Then(technique).apply(deep, bench_of(digits)))
    by_other = replace(technique, teacher=mlp(8, seed=9)).apply(deep, bench_of(digits))
    assert not same(shallow, by_other)
    assert any("new student" in text for text in technique.remarks(deep))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", -1), ("remember", -1), ("parameters", -5), ("rank", -1), ("filters", -1), ("parameters", 30)],
)
def test_wrong_settings_are_told(setting: str, value: int, digits: Splits) -> None:
    with pytest.raises(SettingError, match=setting):
        LogitRegression(**{setting: value}).apply(mlp(8), bench_of(digits))  # pyright: ignore[reportArgumentType]


def test_a_teacher_of_other_classes_is_refused(digits: Splits) -> None:
    other = Model(perceptron((64, 8, 7)), example=(torch.zeros(1, 1, 8, 8),), task=Classification())
    with pytest.raises(NeedError, match=r"student gives .*\(1, 10\) and the teacher .*\(1, 7\)"):
        LogitRegression(teacher=other, normalise=False).apply(mlp(8), bench_of(digits))
    with pytest.raises(NeedError, match="needs a teacher"):
        LogitRegression().apply(mlp(8), bench_of(digits))


@pytest.mark.effect
@pytest.mark.slow
def test_logits_of_the_same_few_points_beat_their_labels_and_a_pool_adds_to_it(digits: Splits) -> None:
    """One hidden layer, 100 labelled points, two teachers; five converged seeds gave +5 and +0.7 points."""
    hard, logits, pooled = [], [], []
    for seed in range(2):
        teachers = tuple(bench_of(digits, 30, 100 + k).fit(mlp(128, 128, seed=100 + k)) for k in (seed, seed + 10))
        few = hold_out(digits.train, 100 / len(digits.train), seed)[1]
        bench, student = bench_of(digits, 500, seed, 128, train=few), mlp(32, seed=seed)
        technique = LogitRegression(teacher=teachers, epochs=500, remember=2000)
        pool = replace(technique, unlabelled=digits.train, epochs=120)
        made = bench.fit(student), technique.apply(student, bench), pool.apply(student, bench)
        for scores, model in zip((hard, logits, pooled), made, strict=True):
            scores.append(100 * evaluate(model, digits.test).value)
    assert sum(logits) / 2 >= sum(hard) / 2 + 3, (hard, logits)
    assert sum(pooled) / 2 >= sum(logits) / 2 + 0.2, (logits, pooled)


def test_the_default_rate_does_not_diverge(digits: Splits) -> None:
    """A rate fit for cross-entropy is steep for squared distances summed over ten classes."""
    plain = Bench(train=digits.train, validation=digits.validation, test=digits.test, training=Training())
    teacher = bench_of(digits).fit(mlp(64), epochs=8)
    student = LogitRegression(parameters=20_000, epochs=4).apply(teacher, plain)
    assert evaluate(student, digits.test).value > 0.6


def test_the_term_of_another_teacher_counts_beside_it_in_either_order(digits: Splits) -> None:
    """Alone it replaces the labels; what another influence has made of the loss it does not throw away."""
    bench, student = bench_of(digits), mlp(16)
    soft = KnowledgeDistillation(teacher=mlp(24, seed=1)).influence(student, bench)
    logits = LogitRegression(teacher=mlp(24, seed=2)).influence(student, bench)
    alone = bench.fit(student, influence=logits)
    assert not same(bench.under(soft).under(logits).fit(student), alone)
    assert not same(bench.under(logits).under(soft).fit(student), alone)
