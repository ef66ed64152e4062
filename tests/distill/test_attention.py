"""Attention transfer, [34]: the losses, the technique, and what the paper claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.architectures import WideResNet
from karui.data import Splits
from karui.distill._input_gradients import input_gradient
from karui.distill._maps import fitting_maps, last_of_each_size, paired_layers
from karui.distill.attention import (
    AttentionTransfer,
    attention_loss,
    attention_map,
    normalised,
)
from karui.errors import NeedError, SettingError, UsageError
from karui.measuring import count
from karui.model import Classification, Model, taps
from karui.technique import Bench, Then
from karui.train import SGD, Adam, Constant, Moment, Together, Training
from karui.train.guide import Guide, statistics_kept
from karui.train.transfer import with_unlabelled

pytestmark = pytest.mark.paper(34)


def bench_of(digits: Splits, epochs: int = 1, seed: int = 0) -> Bench:
    training = Training(epochs=epochs, batch_size=64, optimizer=Adam(lr=2e-3), schedule=Constant())
    return Bench(train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed)


def same(a: Model, b: Model) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return all(torch.equal(left[name], right[name]) for name in left)


def staged(width: int, seed: int = 0) -> Model:
    """Two stages of maps: 8x8 and 4x4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages = [
            nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            nn.MaxPool2d(2),
            nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
        ]
        net = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))
    return Model(net, example=(torch.zeros(1, 1, 8, 8),), task=Classification())


@pytest.mark.parametrize("pool", ["sum", "max"])
@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("space", [(5,), (4, 3), (2, 3, 4)])
def test_the_loss_is_the_formula(pool: str, power: float, space: tuple[int, ...]) -> None:
    a, b = torch.randn(3, 5, *space, dtype=torch.float64), torch.randn(3, 7, *space, dtype=torch.float64)
    told = attention_loss(a, b, pool, power)  # pyright: ignore[reportArgumentType]
    total = 0.0
    for x, y in zip(a, b, strict=True):
        maps = []
        for one in (x, y):
            raised = one.abs() ** power
            flat = (raised.sum(0) if pool == "sum" else raised.max(0).values).flatten()
            maps.append(flat / flat.square().sum().sqrt())
        total += float(((maps[0] - maps[1]) ** 2).mean())
    assert float(told) == pytest.approx(total / 3, rel=1e-10)


def test_neither_scale_nor_the_order_of_channels_counts() -> None:
    a, other = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5)
    assert float(attention_loss(7 * a, a[:, torch.randperm(6)])) < 1e-12
    assert float(attention_loss(a, other)) > 1e-4


def test_maps_are_positive_of_unit_length_and_of_each_sample_alone() -> None:
    a = torch.randn(4, 6, 5, 5)
    maps = normalised(attention_map(a))
    assert (maps >= 0).all()
    torch.testing.assert_close(maps.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(normalised(attention_map(a[1:2])), maps[1:2])
    zero = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = attention_loss(zero, a[:2, :, :4, :4])
    loss.backward()
    assert torch.isfinite(loss)
    assert zero.grad is not None
    assert torch.isfinite(zero.grad).all()


def test_high_powers_order_positions_as_the_maximum_does() -> None:
    a = torch.randn(1, 9, 4, 4, dtype=torch.float64)
    by_power, by_max = (attention_map(a, pool, 200.0).flatten().argsort() for pool in ("sum", "max"))  # pyright: ignore[reportArgumentType]
    assert torch.equal(by_power, by_max)


def test_larger_maps_are_averaged_down_before_they_are_normalised() -> None:
    small, large = torch.rand(2, 3, 4, 4), torch.rand(2, 5, 8, 8)
    averaged = nn.functional.avg_pool2d(attention_map(large)[:, None], 2)[:, 0]
    wanted = (normalised(averaged) - normalised(attention_map(small))).square().mean()
    torch.testing.assert_close(attention_loss(small, large), wanted)
    torch.testing.assert_close(attention_loss(large, small), wanted)


def test_double_backward_agrees_with_finite_differences() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
        other = torch.randn(5, 4, dtype=torch.float64)
    weight = net[0].weight

    def term() -> Tensor:
        slope = input_gradient(net, (x,), y, Classification(), differentiable=True)
        return (slope - other).norm(dim=1).mean()

    (told,) = torch.autograd.grad(term(), weight)
    for place in [(0, 0), (2, 3), (5, 1)]:
        sides = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * 1e-5
            sides.append(float(term().detach()))
            with torch.no_grad():
                weight[place] -= sign * 1e-5
        assert float(told[place]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_the_gradient_of_a_sample_does_not_depend_on_the_batch_and_leaves_no_trace() -> None:
    model = staged(4)
    x, y = torch.rand(6, 1, 8, 8), torch.arange(6)
    whole = input_gradient(model.module.eval(), (x,), y, Classification(), differentiable=False)
    one = input_gradient(model.module, (x[2:3],), y[2:3], Classification(), differentiable=False)
    torch.testing.assert_close(whole[2:3], one)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    input_gradient(model.module.train(), (x,), y, Classification(), differentiable=True)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_a_second_forward_pass_can_be_differentiated_with_the_first() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).train()
    x = torch.randn(8, 3)
    first = net(x).sum()
    mean = net[1].running_mean.clone()
    with statistics_kept(net):
        second = net(2 * x).square().sum()
    assert torch.equal(net[1].running_mean, mean)
    (first + second).backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize(("depth", "width", "millions"), [(16, 1, 0.2), (16, 2, 0.7), (40, 2, 2.2)])
def test_networks_of_the_paper_have_its_sizes(depth: int, width: int, millions: float) -> None:
    pictures = TensorDataset(torch.zeros(20, 3, 32, 32), torch.arange(20) % 10)
    bench = Bench(train=pictures, validation=pictures, training=Training(epochs=0))
    model = WideResNet(depth=depth, width=width, epochs=0).apply(None, bench)
    assert count(model).parameters / 1e6 == pytest.approx(millions, abs=0.05)


def test_stages_are_found_and_paired() -> None:
    student, teacher = staged(4), staged(8)
    assert last_of_each_size(student) == ("0", "2")
    assert paired_layers("x", student, teacher, (), ()) == (("0", "2"), ("0", "2"))
    assert paired_layers("x", student, teacher, ("2.2",), ()) == (("2.2",), ("2.2",))
    assert paired_layers("x", student, teacher, ("2",), ("0",)) == (("2",), ("0",))
    with pytest.raises(SettingError, match=r"layers of the student \(2\) and of the teacher \(0, 2\) do not pair"):
        paired_layers("x", student, teacher, ("2",), ("0", "2"))
    flat = Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), example=(torch.zeros(1, 1, 8, 8),))
    with pytest.raises(SettingError, match="gives maps over space"):
        paired_layers("x", flat, teacher, (), ())


def test_the_teacher_is_left_alone_and_in_evaluation_mode(digits: Splits) -> None:
    teacher = staged(8, seed=1)
    teacher.module.train()
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    influence = AttentionTransfer(teacher=teacher, soft=0.9).influence(staged(4), bench_of(digits))
    taught = bench_of(digits).fit(staged(4), influence=influence)
    assert not influence.guide.module.training  # pyright: ignore[reportAttributeAccessIssue]
    assert all(not p.requires_grad for p in influence.guide.module.parameters())  # pyright: ignore[reportAttributeAccessIssue]
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())
    assert taught.module.state_dict().keys() == staged(4).module.state_dict().keys()


def test_without_weight_it_is_plain_training(digits: Splits) -> None:
    plain = bench_of(digits).fit(staged(4), label="attend")
    assert same(AttentionTransfer(teacher=staged(8, 1), beta=0.0, epochs=1).apply(staged(4), bench_of(digits)), plain)
    drawn = AttentionTransfer(teacher=staged(8, 1), epochs=1).apply(staged(4), bench_of(digits))
    assert not same(drawn, plain)


@pytest.mark.parametrize("by", ["gradients", "symmetry"])
def test_gradient_forms_train_and_differ_from_plain_training(by: str, digits: Splits) -> None:
    technique = AttentionTransfer(teacher=None if by == "symmetry" else staged(8, 1), by=by, epochs=1)  # pyright: ignore[reportArgumentType]
    drawn = technique.apply(staged(4), bench_of(digits))
    plain = bench_of(digits).fit(staged(4), label="attend")
    assert not same(drawn, plain)
    assert all(torch.isfinite(p).all() for p in drawn.module.parameters())
    assert same(technique.apply(staged(4), bench_of(digits)), drawn)


def test_symmetry_asks_for_no_teacher_and_the_others_do(digits: Splits) -> None:
    with pytest.raises(NeedError, match="'attention_transfer' needs a teacher"):
        AttentionTransfer().apply(staged(4), bench_of(digits))
    AttentionTransfer(by="symmetry", epochs=0).apply(staged(4), bench_of(digits))
    start = staged(4)
    with pytest.raises(NeedError, match="the student itself"):
        Then(AttentionTransfer()).apply(start, replace(bench_of(digits), dense=start))


def test_mistakes_name_the_layer(digits: Splits) -> None:
    bench = bench_of(digits)
    with pytest.raises(UsageError, match="no layer 'stage9'"):
        AttentionTransfer(teacher=staged(8, 1), layers=("stage9",), teacher_layers=("0",)).apply(staged(4), bench)
    with pytest.raises(SettingError, match=r"layer '5' of the student gives a tensor of shape \(batch, 10\)"):
        AttentionTransfer(teacher=staged(8, 1), layers=("5",)).apply(staged(4), bench)
    other = Model(nn.Sequential(*list(staged(8).module)[:-1], nn.Linear(16, 7)), example=(torch.zeros(1, 1, 8, 8),))
    with pytest.raises(NeedError, match="same classes"):
        AttentionTransfer(teacher=other, soft=0.5).apply(staged(4), bench)
    words = Model(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 10)), (torch.zeros(1, 3).long(),))
    with pytest.raises(NeedError, match="with respect to the input"):
        AttentionTransfer(by="symmetry").apply(replace(words, task=Classification()), bench)
    with pytest.raises(SettingError, match="soft targets go with activations"):
        AttentionTransfer(by="gradients", soft=0.5)
    with pytest.raises(SettingError, match="layers and pool are of maps, and by is 'gradients'"):
        AttentionTransfer(by="gradients", layers=("0",), pool="max")
    with pytest.raises(SettingError, match="power is of maps, and by is 'symmetry'"):
        AttentionTransfer(by="symmetry", power=1.0)


def tokens(units: int) -> Model:
    """Tokens, a transformer, classes."""
    torch.manual_seed(units)
    layer = nn.TransformerEncoderLayer(units, 2, 2 * units, batch_first=True)
    layers = nn.Embedding(30, units), layer, nn.Flatten(), nn.Linear(7 * units, 10)
    return Model(nn.Sequential(*layers), example=(torch.zeros(2, 7).long(),), task=Classification())


def test_the_map_of_a_sequence_is_over_time() -> None:
    """Units are summed up, so that networks of other widths pair without averaging; by hand and by the technique."""
    student, teacher, x = tokens(8), tokens(16), torch.randint(30, (6, 7))
    bench = Bench(train=TensorDataset(x, torch.arange(6)), training=Training(epochs=1, optimizer=SGD(lr=0.01)))
    assert last_of_each_size(student) == ("1",)
    step = AttentionTransfer(teacher=teacher, epochs=1, keep_zeros=False)
    influence = step.influence(student, bench)
    with taps(student.module.eval(), ("1",)) as seen, taps(teacher.module.eval(), ("1",)) as shown:
        outputs = student.module(x)
        teacher.module(x)
    maps = [normalised(one["1"].square().sum(2)) for one in (seen, shown)]
    assert maps[0].shape == (6, 7)
    moment = Moment(student.module, (x,), torch.arange(6), outputs, taps=seen)
    told = influence.objective(torch.tensor(0.0), moment)
    torch.testing.assert_close(told, 1000 * (maps[0] - maps[1]).square().mean(), rtol=1e-4, atol=1e-5)
    assert not same(step.apply(student, bench), student)


def test_where_it_is_not_known_where_channels_are_it_is_said(digits: Splits) -> None:
    """Maps of pixels as a sequence, by functions alone: the plan refuses them, and takes the user's word."""

    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.head = nn.ReLU(), nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(x[:, 0] - 0.5).flatten(1))

    student, teacher = (Model(Functions(), example=(torch.zeros(1, 1, 8, 8),), task=Classification()) for _ in range(2))
    step = AttentionTransfer(teacher=teacher, layers=("act",), epochs=1)
    with pytest.raises(SettingError, match=r"'act' of the student.*cannot be known"):
        step.fits(student, bench_of(digits))
    with pytest.raises(SettingError, match="no layer of the student gives maps"):
        replace(step, layers=()).fits(student, bench_of(digits))
    for channels in ("first", "last"):
        replace(step, channels=channels).apply(student, bench_of(digits))  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingError, match="channels is 'middle'. Choose from 'auto', 'first', 'last'"):
        AttentionTransfer(channels="middle")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("known", [True, False])
def test_layers_are_looked_at_in_the_plan(known: bool, digits: Splits) -> None:
    """Paths and kinds of the student's, also where the teacher is the start of the pipeline and not known yet."""
    teacher = staged(8, 1) if known else None
    bench = bench_of(digits)
    with pytest.raises(UsageError, match="no layer 'nope'"):
        AttentionTransfer(teacher=teacher, layers=("nope",), teacher_layers=("0",)).fits(staged(4), bench)
    with pytest.raises(SettingError, match=r"layer '5' of the student gives a tensor of shape \(batch, 10\)"):
        AttentionTransfer(teacher=teacher, layers=("5",), teacher_layers=("0",)).fits(staged(4), bench)
    AttentionTransfer(teacher=teacher, layers=("5.1",), teacher_layers=("0",)).fits(staged(4), bench)  # may come yet
    AttentionTransfer(teacher=teacher).fits(staged(4), bench)
    AttentionTransfer(teacher=teacher, epochs=0, by="symmetry").fits(staged(4), bench)
    with pytest.raises(UsageError, match="no layer 'nope'"):
        AttentionTransfer(layers=("nope",), teacher_layers=("0",)).fits(staged(4), replace(bench, dense=staged(8)))
    line = Model(nn.Sequential(nn.Conv1d(1, 4, 1), nn.Flatten(), nn.Linear(256, 10)), (torch.zeros(1, 1, 64),))
    with pytest.raises(SettingError, match=r"'0' of the student gives .* \(4, 8, 8\), '0' of the teacher \(4, 64\)"):
        fitting_maps("x", staged(4), line, (("0",), ("0",)), "auto")


@pytest.mark.parametrize("settings", [{}, {"soft": 0.9}, {"by": "gradients"}, {"by": "symmetry"}])
def test_batches_without_labels_are_taught_by_the_teacher_alone(settings: dict[str, Any], digits: Splits) -> None:
    few, rest = (torch.utils.data.Subset(digits.train, range(*span)) for span in ((0, 20), (20, 400)))
    bench = replace(bench_of(digits), train=with_unlabelled(few, rest))
    bench = replace(bench, training=replace(bench.training, batch_size=10))
    made = AttentionTransfer(teacher=staged(8, 1), epochs=1, **settings).apply(staged(4), bench)
    assert all(bool(value.isfinite().all()) for value in made.module.state_dict().values())


def test_zeros_of_a_pruned_student_stay(digits: Splits) -> None:
    student = staged(4)
    with torch.no_grad():
        student.module.get_parameter("2.0.weight")[:, 0] = 0.0
    technique = AttentionTransfer(teacher=staged(8, 1), epochs=1)
    assert isinstance(technique.influence(student, bench_of(digits)), Together)
    taught = technique.apply(student, bench_of(digits))
    assert (taught.module.get_parameter("2.0.weight")[:, 0] == 0).all()


def test_beta_falls_to_zero_where_asked() -> None:
    influence = AttentionTransfer(teacher=staged(8, 1), decay=True).influence(staged(4), Bench())
    moments = [Moment(nn.Identity(), (), None, None, step=step, steps=11) for step in (0, 5, 10)]
    assert [influence._beta(moment) for moment in moments] == [1000.0, 500.0, 0.0]  # pyright: ignore[reportAttributeAccessIssue]


def similarity(student: Model, guide: Guide, x: Tensor, layers: tuple[str, ...]) -> float:
    """Mean cosine of held-out maps."""
    with torch.no_grad(), taps(student.module.eval(), layers) as seen:
        student.module(x)
        _, shown = guide((x,))
        cosines = [(normalised(attention_map(seen[p])) * normalised(attention_map(shown[p]))).sum(1) for p in layers]
    return float(torch.cat(cosines).mean())


@pytest.mark.effect
def test_maps_of_pictures_never_seen_come_together(digits: Splits, small_cnn: Callable[..., Model]) -> None:
    """Cosine of held-out maps, beside a student trained on labels alone.

    The section asks for a rise by 0.2; maps without negative numbers are alike from the start (0.85 here), which leaves
    0.15 at most, and nearly all of it is reached. Accuracy, of which it asks half a point over five seeds of colour
    pictures, takes longer trainings than fit here: `results/distillation_table.md` tells of it.
    """
    layers = ("bn1", "bn3")
    bench = replace(bench_of(digits, 8), training=Training(epochs=8, batch_size=64, optimizer=SGD(lr=0.05)))
    teacher = bench.fit(small_cnn(widths=(32, 48, 48), seed=1))
    guide = Guide(teacher, layers)
    x = torch.stack([digits.test[i][0] for i in range(200)])
    plain = bench.fit(small_cnn(widths=(8, 12, 12)))
    drawn = AttentionTransfer(teacher=teacher, layers=layers, epochs=8).apply(small_cnn(widths=(8, 12, 12)), bench)
    found = {name: similarity(model, guide, x, layers) for name, model in (("plain", plain), ("drawn", drawn))}
    assert found["drawn"] > found["plain"] + 0.1, found
