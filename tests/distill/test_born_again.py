"""Born-again networks, [37]: the losses, the generations, and what the paper claims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.architectures.perceptron import perceptron
from karui.artifact import load, save
from karui.data import Splits, hold_out
from karui.distill.born_again import (
    BornAgain,
    Generation,
    confidence_weights,
    passes_of,
    permuted,
    weighted_cross_entropy,
    weighted_loss,
)
from karui.distill.knowledge import KnowledgeDistillation
from karui.errors import NeedError, SettingError, UsageError
from karui.measuring import evaluate
from karui.model import Classification, CustomTask, Model, Origin, Regression, averaged
from karui.technique import Bench, lacking
from karui.technique.redraw import redrawn
from karui.train import SGD, Adam, Constant, Moment, Training
from karui.train.randomness import seed_of
from karui.train.teaching import Teachers
from karui.train.transfer import with_unlabelled

pytestmark = pytest.mark.paper(37)
FACTORY = f"{__file__}:network"


def network() -> nn.Module:
    """The factory of the network that is saved."""
    return perceptron((64, 12, 10))


def mlp(*widths: int, seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(perceptron((64, *widths, 10)), example=(torch.zeros(1, 1, 8, 8),), task=Classification())


def bench_of(digits: Splits, epochs: int = 1, seed: int = 0, train: object = None) -> Bench:
    return Bench(
        train=digits.train if train is None else train,
        validation=digits.validation,
        test=digits.test,
        training=Training(epochs=epochs, batch_size=64, optimizer=Adam(lr=3e-3), schedule=Constant()),
        seed=seed,
    )


def state(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def same(a: Model, b: Model) -> bool:
    left, right = state(a), state(b)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_confidence_weights_sum_to_one_and_equal_ones_are_plain_cross_entropy() -> None:
    p = torch.rand(20, 5).softmax(1)
    assert float(confidence_weights(p).sum()) == pytest.approx(1.0, abs=1e-6)
    logits, y = torch.randn(20, 5), torch.randint(5, (20,))
    alike = torch.eye(5)[torch.randint(5, (20,))] * 0.6 + 0.08
    torch.testing.assert_close(weighted_cross_entropy(logits, y, alike), nn.functional.cross_entropy(logits, y))
    by_hand = sum(p[i].max() * nn.functional.cross_entropy(logits[i], y[i]) for i in range(20)) / p.max(1).values.sum()
    torch.testing.assert_close(weighted_cross_entropy(logits, y, p), by_hand)
    ignored = weighted_cross_entropy(logits, torch.where(torch.arange(20) < 5, y, -100), p)
    torch.testing.assert_close(ignored, weighted_cross_entropy(logits[:5], y[:5], p[:5]))


def test_permuting_keeps_the_largest_in_place_and_the_rest_as_a_set() -> None:
    torch.manual_seed(0)
    p = (3 * torch.randn(200, 6)).softmax(1)
    q = permuted(p)
    assert torch.equal(q.argmax(1), p.argmax(1))
    torch.testing.assert_close(q.max(1).values, p.max(1).values)
    torch.testing.assert_close(q.sort(1).values, p.sort(1).values)
    torch.testing.assert_close(q.sum(1), torch.ones(200))
    moved = (q != p).any(1)
    assert moved.float().mean() > 0.9
    one = permuted(p[:1].expand(200, -1))
    assert len({tuple(row.tolist()) for row in one}) > 60, "every sample has a draw of its own (120 orders there are)"


def test_each_generation_starts_anew_and_is_taught_by_the_one_before(digits: Splits) -> None:
    start, bench = mlp(12), bench_of(digits)
    unmoved = BornAgain(generations=3, epochs=0).study(start, bench)
    weights = [state(model)["1.weight"] for model in (start, *unmoved)]
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    first, second = BornAgain(generations=2, epochs=1).study(start, bench)
    other = BornAgain(generations=2, epochs=1).study(mlp(12, seed=5), bench)
    assert not same(first, other[0]), "the given model teaches"
    again = BornAgain(generations=2, epochs=1).study(start, bench)
    assert same(first, again[0])
    assert same(second, again[1])


def test_every_generation_tells_as_many_passes_as_the_first_network_had(digits: Splits) -> None:
    """A fair comparison is one of equal trainings: the lineage says how long each of them was."""
    bench = bench_of(digits, 3)
    first = bench.fit(mlp(12))
    generations = BornAgain(generations=2).study(first, bench)
    assert [passes_of(model) for model in (first, *generations)] == [3, 3, 3]
    (remark,) = BornAgain(generations=2, epochs=7).remarks(first)
    assert "7 passes each, their first teacher had 3" in remark
    assert "passes" not in BornAgain(generations=2, epochs=3).remarks(first)[0]
    assert "passes" not in BornAgain(generations=2, epochs=7).remarks(mlp(12))[0], "nobody knows how many it had"


def test_a_generation_is_distillation_at_temperature_one_from_the_one_before(digits: Splits) -> None:
    """The second generation, made by hand from the first one, frozen."""
    start, bench = mlp(12), bench_of(digits)
    first, second = BornAgain(generations=2).study(start, bench)
    before = state(first)
    fresh = redrawn(start, seed_of(0, "generation", 2))
    by_hand = bench.fit(fresh, influence=Generation(teachers=Teachers((first,))), label="generation 2")
    assert same(by_hand, second)
    assert all(torch.equal(value, before[name]) for name, value in state(first).items())


@pytest.mark.parametrize("loss", ["kd", "cwtm", "dkpp"])
@pytest.mark.parametrize("labels", [True, False])
def test_the_losses_differ(loss: str, labels: bool, digits: Splits) -> None:
    technique = BornAgain(loss=loss, labels=labels)  # pyright: ignore[reportArgumentType]
    made, plain = technique.apply(mlp(12), bench_of(digits)), BornAgain().apply(mlp(12), bench_of(digits))
    assert same(made, plain) == (loss == "kd" and labels)


@pytest.mark.parametrize("settings", [{"labels": False}, {"loss": "cwtm"}, {"loss": "dkpp", "labels": False}, {}])
def test_what_another_influence_adds_counts_under_every_loss(settings: dict[str, Any], digits: Splits) -> None:
    """The term of `bench.under(...)` comes to the generation's own; without one, labels count as the loss says."""
    bench, start = bench_of(digits), mlp(12)
    other = KnowledgeDistillation(teacher=mlp(16, seed=4)).influence(start, bench)
    plain, taught = (BornAgain(**settings).apply(start, one) for one in (bench, bench.under(other)))
    assert not same(plain, taught)
    part = Generation(teachers=Teachers((start,)), **settings)
    x, y = torch.rand(5, 1, 8, 8), torch.arange(5)
    outputs = mlp(12, seed=2).module(x)
    loss = nn.functional.cross_entropy(outputs, y)
    moment = Moment(start.module, (x,), y, outputs, plain=loss)
    torch.manual_seed(0)
    alone = part.objective(loss, moment)
    torch.manual_seed(0)
    added = part.objective(loss + 2, moment)
    torch.testing.assert_close(added - alone, torch.tensor(2.0) + (0 if not settings else loss))


@pytest.mark.parametrize("settings", [{}, {"labels": False}, {"loss": "cwtm"}, {"loss": "dkpp"}])
def test_samples_without_labels_count_by_the_teacher_alone(settings: dict[str, Any], digits: Splits) -> None:
    few, rest = (torch.utils.data.Subset(digits.train, range(*span)) for span in ((0, 20), (20, 400)))
    bench = replace(bench_of(digits, 2, train=with_unlabelled(few, rest)), validation=digits.validation)
    bench = replace(bench, training=replace(bench.training, batch_size=16))
    made = BornAgain(**settings).apply(mlp(12), bench)
    assert all(bool(value.isfinite().all()) for value in state(made).values())


@pytest.mark.parametrize("loss", ["kd", "cwtm", "dkpp"])
def test_the_first_teacher_may_be_of_another_architecture(loss: str, digits: Splits, tmp_path: Path) -> None:
    """Students are the given network, with new values; the second generation is taught by the first."""
    start, bench, file = mlp(12), bench_of(digits), tmp_path / "other.py"
    technique = BornAgain(teacher=mlp(20, 16, seed=3), generations=2, loss=loss, epochs=1)  # pyright: ignore[reportArgumentType]
    first, second = technique.study(start, bench)
    assert {name: v.shape for name, v in state(second).items()} == {name: v.shape for name, v in state(start).items()}
    by_given = replace(technique, teacher=None).study(start, bench)
    assert not same(first, by_given[0])
    alone = Generation(teachers=Teachers((first,)), loss=loss)  # pyright: ignore[reportArgumentType]
    by_hand = bench.fit(redrawn(start, seed_of(0, "generation", 2)), epochs=1, influence=alone, label="generation 2")
    assert same(by_hand, second)
    assert same(replace(technique, teacher=start, generations=1).apply(start, bench), by_given[0])
    file.write_text(
        "import torch\nfrom karui.architectures.perceptron import perceptron\n\n\ndef net():\n"
        "    torch.manual_seed(3)\n    return perceptron((64, 20, 16, 10))\n"
    )
    named = BornAgain(teacher=f"{file}:net", generations=1, loss=loss, epochs=1)  # pyright: ignore[reportArgumentType]
    assert same(named.apply(start, bench), first)
    assert "the teacher is" in named.remarks(start)[-1]


def test_a_first_teacher_that_does_not_fit_is_told_before_any_training(digits: Splits) -> None:
    start, bench = mlp(12), bench_of(digits)
    lost = BornAgain(teacher="nowhere/teacher.onnx")
    assert any("there is no file nowhere/teacher.onnx" in message for message, _ in lacking(lost, start, bench))
    assert lacking(BornAgain(), start, bench) == []
    seven = perceptron((64, 12, 7))
    with pytest.raises(NeedError, match=r"\(1, 10\).*\(1, 7\)"):
        BornAgain(teacher=seven).fits(start, bench)
    with pytest.raises(NeedError, match="2 are given"):
        BornAgain(teacher=(mlp(8), mlp(9))).fits(start, bench)  # pyright: ignore[reportArgumentType]


def test_weights_by_confidence_are_those_of_all_processes(digits: Splits) -> None:
    """Under ddp, each process with half of every batch, as in one: in double precision, where nothing is rounded."""
    few = TensorDataset(*(part.double() if part.is_floating_point() else part for part in pile(digits, 128)))
    torch.manual_seed(0)
    start = Model(perceptron((64, 12, 10)).double(), example=(few.tensors[0][:1],), task=Classification())
    settings = {"epochs": 2, "accelerator": "cpu", "optimizer": SGD(lr=0.5), "schedule": Constant()}
    one = Training(batch_size=32, **settings)
    alone, both = (
        BornAgain(loss="cwtm").apply(start, replace(bench_of(digits, train=few), training=training))
        for training in (one, replace(one, batch_size=16, devices=2, strategy="ddp"))
    )
    for name, value in state(alone).items():
        torch.testing.assert_close(state(both)[name], value, rtol=1e-10, atol=1e-12)


def pile(digits: Splits, number: int) -> tuple[Tensor, Tensor]:
    pairs = [digits.train[i] for i in range(number)]
    return torch.stack([x for x, _ in pairs]), torch.tensor([int(y) for _, y in pairs])


def test_no_generation_is_the_model_and_an_ensemble_of_one_is_that_one(digits: Splits) -> None:
    start, bench = mlp(12), bench_of(digits)
    assert same(BornAgain(generations=0).apply(start, bench), start)
    assert same(BornAgain(ensemble=True).apply(start, bench), BornAgain().apply(start, bench))
    with pytest.raises(UsageError, match="no model to average"):
        averaged([])
    with pytest.raises(UsageError, match="differ in structure"):
        averaged([mlp(12), mlp(8)])


def test_the_ensemble_is_the_mean_and_is_saved_as_one_model(digits: Splits, tmp_path: Path) -> None:
    start = replace(mlp(12), lineage=(Origin(FACTORY),))
    technique = BornAgain(generations=3, epochs=1)
    members = technique.study(start, bench_of(digits))
    whole = replace(technique, ensemble=True).apply(start, bench_of(digits))
    x = torch.stack([digits.test[i][0] for i in range(9)])
    mean = sum(member.module(x).softmax(1) for member in members) / 3
    torch.testing.assert_close(whole.module(x).softmax(1), mean)
    assert whole.parameters == 3 * start.parameters
    assert "mean of the probabilities of 3 networks" in " ".join(step.describe() for step in whole.lineage)
    save(whole, tmp_path / "whole")
    torch.testing.assert_close(load(tmp_path / "whole").module(x), whole.module(x))


def test_what_it_cannot_do_is_told(digits: Splits) -> None:
    with pytest.raises(SettingError, match="loss is 'mse'"):
        BornAgain(loss="mse")  # pyright: ignore[reportArgumentType]
    data = TensorDataset(torch.randn(40, 3), torch.randn(40))
    line = Model(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), example=(torch.zeros(2, 3),), task=Regression())
    with pytest.raises(NeedError, match="scores of classes"):
        BornAgain().apply(line, Bench(train=data, training=Training(epochs=1, batch_size=64)))


@pytest.mark.effect
@pytest.mark.slow
def test_generations_are_better_where_labels_are_few_and_some_are_wrong(digits: Splits) -> None:
    """250 labels, of which 20 % are drawn at random, and epochs enough to learn them by heart; four seeds of eight.

    The mean of three generations is near that of three networks trained alone, as the section asks.
    """
    gains, ensembles, beside = [], [], []
    for seed in range(4):
        few = hold_out(digits.train, 250 / len(digits.train), seed)[1]
        x, y = torch.stack([a for a, _ in few]), torch.tensor([int(b) for _, b in few])
        draw = torch.Generator().manual_seed(seed)
        wrong = torch.rand(len(y), generator=draw) < 0.2
        y = torch.where(wrong, torch.randint(10, (len(y),), generator=draw), y)
        bench = bench_of(digits, 150, seed, train=TensorDataset(x, y))
        teacher = bench.fit(mlp(48, seed=seed))
        generations = BornAgain(generations=3, labels=False).study(teacher, bench)
        scores = [evaluate(m, digits.test).value for m in (teacher, generations[0], averaged(generations))]
        gains.append(scores[1] - scores[0])
        ensembles.append(scores[2] - scores[0])
        alone = averaged([teacher, *(bench.fit(mlp(48, seed=100 * seed + k)) for k in (1, 2))])
        beside.append(scores[2] - evaluate(alone, digits.test).value)
    assert sum(gains) / 4 >= 0.005, gains
    assert sum(ensembles) / 4 >= 0.005, ensembles
    assert sum(beside) / 4 >= -0.01, beside


@pytest.mark.parametrize("positions", [(), (3,)], ids=["samples", "positions"])
@pytest.mark.parametrize("ignore", [None, 2])
def test_with_constant_confidence_labels_count_as_the_task_has_them(
    positions: tuple[int, ...], ignore: int | None
) -> None:
    """Smoothing was left out, and the loss of a task of one's own replaced by cross-entropy."""
    z, y = torch.randn(6, 4, *positions), torch.randint(0, 4, (6, *positions))
    y[0] = -100
    alike = torch.full((y.numel(), 4), 0.25)
    task = Classification(label_smoothing=0.2, ignore=ignore)
    torch.testing.assert_close(weighted_cross_entropy(z, y, alike, task), task.loss(z, y))
    unsure = torch.rand(y.numel(), 4)
    by_hand = confidence_weights(unsure, ((y != -100) & (y != (9 if ignore is None else ignore))).flatten())
    wanted = (by_hand * task.terms(z, y).flatten()).sum()
    torch.testing.assert_close(weighted_cross_entropy(z, y, unsure, task), wanted)


def test_confidence_weighs_the_loss_of_a_task_of_ones_own(digits: Splits) -> None:
    def margins(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.multi_margin_loss(outputs, targets)

    task = CustomTask(loss=margins, scores=lambda z, y: (z.argmax(1) == y).float())
    z, y = torch.randn(6, 4), torch.randint(0, 4, (6,))
    torch.testing.assert_close(weighted_loss(task, z, y, torch.full((6, 4), 0.25)), margins(z, y))
    silent = torch.cat([y, torch.tensor([-100])])
    with_one = weighted_loss(task, torch.cat([z, z[:1]]), silent, torch.full((7, 4), 0.25))
    torch.testing.assert_close(with_one, margins(z, y))
    p = torch.rand(6, 4)
    by_hand = (confidence_weights(p) * nn.functional.multi_margin_loss(z, y, reduction="none")).sum()
    torch.testing.assert_close(weighted_loss(task, z, y, p), by_hand)
    bench, start = bench_of(digits), mlp(12)
    own, plain = (BornAgain(loss="cwtm", epochs=1).apply(replace(start, task=t), bench) for t in (task, start.task))
    assert not same(own, plain)
