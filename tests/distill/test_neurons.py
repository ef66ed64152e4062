"""Neuron selection, [32]: descriptors, the selection, the regression, and what the paper claims."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from karui.architectures.cifar_resnet import resnet8
from karui.architectures.perceptron import perceptron
from karui.data import Splits
from karui.distill._nuisances import NUISANCES, changed
from karui.distill._selection import (
    chosen,
    cost_of,
    descriptors_of,
    responses_of,
    select_neurons,
    verification_accuracy,
)
from karui.distill.logits import logit_loss
from karui.distill.neurons import NeuronSelection, last_hidden, with_outputs
from karui.errors import NeedError, SettingError, UsageError
from karui.model import Classification, Model
from karui.numerics.neurons import energy, likeness
from karui.technique import Bench
from karui.train import Adam, Constant, Training

pytestmark = pytest.mark.paper(32)
BY_LIGHT = {"brightness": NUISANCES["brightness"]}


def mlp(*widths: int, seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(perceptron((64, *widths, 10)), example=(torch.zeros(1, 1, 8, 8),), task=Classification())


def bench_of(digits: Splits, epochs: int = 1, seed: int = 0) -> Bench:
    return Bench(
        train=digits.train,
        validation=digits.validation,
        test=digits.test,
        training=Training(epochs=epochs, batch_size=64, optimizer=Adam(lr=3e-3), schedule=Constant()),
        seed=seed,
    )


@pytest.fixture(scope="module")
def teacher(digits: Splits) -> Model:
    return bench_of(digits, 10).fit(mlp(32, 24, seed=1))


def test_without_redundancy_it_keeps_the_neurons_of_negative_cost_or_the_cheapest() -> None:
    wanted, unwanted = torch.rand(20, 4) / 2 + 0.5, torch.rand(20, 3) / 2 + 0.5
    cost = cost_of(wanted, unwanted)
    torch.testing.assert_close(cost, unwanted.max(1).values - wanted.mean(1))
    assert chosen(wanted, unwanted, redundancy=0.0).tolist() == (cost < 0).nonzero().flatten().tolist()
    seven = chosen(wanted, unwanted, 7, redundancy=0.0)
    assert seven.tolist() == sorted(cost.argsort()[:7].tolist())


def test_of_two_alike_one_is_kept_where_redundancy_counts() -> None:
    wanted, unwanted = torch.rand(6, 3).repeat(2, 1) / 4 + 0.75, torch.full((12, 1), 0.5)
    both = chosen(wanted, unwanted, redundancy=0.0)
    assert len(both) == 12
    kept = set(chosen(wanted, unwanted, redundancy=50.0, width=0.02).tolist())
    assert kept
    assert not any(i in kept and i + 6 in kept for i in range(6))


def energy_of(kept: Iterable[int], wanted: Tensor, unwanted: Tensor, redundancy: float, width: float) -> float:
    y = torch.zeros(len(wanted), dtype=torch.float64)
    y[list(kept)] = 1.0
    alike = likeness(torch.cat([wanted, unwanted], 1).double(), width)
    return float(energy(y, cost_of(wanted, unwanted).double(), alike, redundancy))


@pytest.mark.parametrize("redundancy", [1.0, 50.0])
@pytest.mark.parametrize("number", [3, 5, 6, 8])
def test_of_a_given_number_twins_come_last(redundancy: float, number: int) -> None:
    """Five good neurons, each twice, and three poor ones of their own: no pair of twins while another is left."""
    torch.manual_seed(0)
    base, poor = torch.rand(5, 3) / 4 + 0.75, torch.rand(3, 3) / 10 + 0.45
    wanted, unwanted = torch.cat([base, base, poor]).double(), torch.full((13, 1), 0.55).double()
    kept = chosen(wanted, unwanted, number, redundancy=redundancy, width=0.02).tolist()
    assert len(kept) == number
    assert not any(i in kept and i + 5 in kept for i in range(5))
    told = energy_of(kept, wanted, unwanted, redundancy, 0.02)
    least = min(energy_of(one, wanted, unwanted, redundancy, 0.02) for one in itertools.combinations(range(13), number))
    assert told == pytest.approx(least, rel=1e-9)


def test_a_given_number_is_near_the_best_of_all_choices() -> None:
    """Against brute force: ten neurons, every number of them, twenty draws of which a few neurons are alike."""
    sets = torch.tensor(list(itertools.product([0.0, 1.0], repeat=10)), dtype=torch.float64)
    shares = []  # of the way from the best choice of so many to the worst
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        wanted, unwanted = (0.5 + torch.rand(10, k, generator=draw, dtype=torch.float64) / 2 for k in (4, 2))
        wanted[7:9], unwanted[7:9] = wanted[0], unwanted[0]
        every = energy(sets, cost_of(wanted, unwanted), likeness(torch.cat([wanted, unwanted], 1), 0.3), 0.5)
        for number in range(1, 10):
            kept = chosen(wanted, unwanted, number, redundancy=0.5, width=0.3)
            assert len(kept) == number
            of_so_many = every[sets.sum(1) == number]
            least, most = float(of_so_many.min()), float(of_so_many.max())
            shares.append((energy_of(kept.tolist(), wanted, unwanted, 0.5, 0.3) - least) / (most - least))
        assert len(chosen(wanted, unwanted, 99)) == 10
    assert sum(share < 1e-9 for share in shares) / len(shares) > 0.95
    assert max(shares) < 0.05


def test_the_selection_does_not_depend_on_a_neurons_scale(digits: Splits, teacher: Model) -> None:
    scaled = teacher.copy()
    with torch.no_grad():
        factor = torch.rand(24, generator=torch.Generator().manual_seed(0)) * 9 + 0.1
        scaled.module.get_parameter("3.weight").mul_(factor[:, None])
        scaled.module.get_parameter("3.bias").mul_(factor)
    left, right = (select_neurons(model, "3", digits.validation, 9, seed=4) for model in (teacher, scaled))
    assert torch.equal(left, right)


def test_a_neuron_of_light_alone_is_not_kept_and_one_of_identity_is() -> None:
    """Two neurons: the mean of a picture's upper half, which its light changes, and a contrast, which it does not."""
    draw = torch.Generator().manual_seed(0)
    identity = torch.arange(200) % 2
    x = torch.rand(200, 1, 8, 8, generator=draw) * 0.1 + 1.0
    x[identity == 1, :, 4:] *= 2.0
    contrast = nn.Linear(64, 2, bias=False)
    with torch.no_grad():
        contrast.weight.zero_()
        contrast.weight[0, :32] = 1.0
        contrast.weight[1, :32], contrast.weight[1, 32:] = -1.5, 1.0
    net = nn.Sequential(nn.Flatten(), contrast, nn.ReLU(), nn.Linear(2, 2))
    model = Model(net, example=(torch.zeros(1, 1, 8, 8),))
    data = TensorDataset(x, identity)
    wanted, unwanted = descriptors_of(model, "1", data)
    assert wanted.shape == (2, 2)
    assert unwanted.shape == (2, len(NUISANCES))
    assert float(wanted[1].min()) > 0.99
    assert float(wanted[0].max()) < 0.65
    assert float(unwanted[0, 0]) > 0.99, "brightness"
    assert select_neurons(model, "1", data, 1).tolist() == [1]
    lit = descriptors_of(model, "1", data, wanted={"bright": x.mean((1, 2, 3)) > x.mean()}, changes=BY_LIGHT)
    assert lit[0].shape == lit[1].shape == (2, 1)
    assert select_neurons(model, "1", TensorDataset(x), 1, wanted={"contrast": identity == 1}).tolist() == [1]
    given = {"light": torch.rand(200, generator=draw) < 0.5}
    assert descriptors_of(model, "1", data, given)[1].shape == (2, 1)


@pytest.mark.parametrize("name", list(NUISANCES))
def test_pictures_are_changed_one_way_or_the_other(name: str) -> None:
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    other, more = changed(x, NUISANCES[name], seed=1)
    again, _ = changed(x, NUISANCES[name], seed=1)
    assert other.shape == x.shape
    assert torch.equal(other, again)
    assert 15 < int(more.sum()) < 45
    assert float((other - x)[more].abs().mean()) > 0.01
    assert name == "noise" or float((other - x)[~more].abs().mean()) > 0.01


def test_the_student_gives_as_many_numbers_as_are_kept_and_comes_near_them(digits: Splits, teacher: Model) -> None:
    technique = NeuronSelection(teacher=teacher, number=9, epochs=10)
    kept = technique.selection(teacher, "3", bench_of(digits))
    assert len(kept.unique()) == 9
    taught = technique.apply(mlp(32), bench_of(digits))
    x = torch.stack([x for x, _ in digits.test])
    with torch.no_grad():
        wanted = teacher.module[:4](x)[:, kept]  # pyright: ignore[reportIndexIssue]
        made, start = taught.module(x), with_outputs(mlp(32), 9).module(x)
    assert made.shape == (len(x), 9)
    assert float(logit_loss(made, wanted)) < 0.2 * float(logit_loss(start, wanted))
    assert taught.task is None
    assert "9 neurons" in taught.lineage[-1].describe()


def test_neurons_that_are_not_kept_do_not_count(digits: Splits, teacher: Model) -> None:
    technique = NeuronSelection(teacher=teacher, number=9, by="random", epochs=1)
    kept = technique.selection(teacher, "3", bench_of(digits))
    other = teacher.copy()
    with torch.no_grad():
        rest = torch.tensor([i for i in range(24) if i not in kept.tolist()])
        other.module.get_parameter("3.weight")[rest] += 5.0
    left = technique.apply(mlp(16), bench_of(digits))
    right = replace(technique, teacher=other).apply(mlp(16), bench_of(digits))
    for a, b in zip(left.module.parameters(), right.module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("inplace", [False, True])
def test_neurons_are_taken_before_a_relu_also_where_it_works_in_place(inplace: bool, digits: Splits) -> None:
    """Behind it most targets are zero, which the regression would not tell."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(inplace=inplace), nn.Linear(20, 10))
    model = Model(net, example=(torch.zeros(1, 1, 8, 8),), task=Classification())
    x = torch.stack([x for x, _ in digits.validation])
    values, _ = responses_of(model, "1", digits.validation)
    torch.testing.assert_close(values, net[1](x.flatten(1)).detach())
    taught = NeuronSelection(teacher=model, number=6, epochs=4).apply(mlp(24), bench_of(digits))
    assert float((taught.module(x) < 0).float().mean()) > 0.15


def test_the_neurons_of_several_teachers_stand_side_by_side(digits: Splits, teacher: Model) -> None:
    technique = NeuronSelection(teacher=(teacher, mlp(16, 12, seed=5)), number=5, epochs=1)
    taught = technique.apply(mlp(16), bench_of(digits))
    assert taught.module(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    everything = replace(technique, number=None, by="all").apply(mlp(16), bench_of(digits))
    assert everything.module(torch.zeros(3, 1, 8, 8)).shape == (3, 24 + 12)


def test_neurons_are_judged_on_held_out_data_only(digits: Splits, teacher: Model) -> None:
    bench = bench_of(digits)
    x = torch.rand(50, 1, 8, 8)
    swapped = replace(bench, train=TensorDataset(x, torch.zeros(50).long()))
    technique = NeuronSelection(teacher=teacher, number=9)
    assert torch.equal(technique.selection(teacher, "3", bench), technique.selection(teacher, "3", swapped))


def test_verification_of_features_that_tell_all_and_of_those_that_tell_nothing() -> None:
    draw = torch.Generator().manual_seed(0)
    identity = torch.arange(120) % 6
    good = torch.eye(6)[identity] + 0.05 * torch.randn(120, 6, generator=draw)
    assert verification_accuracy(good, identity) > 0.99
    assert 0.44 < verification_accuracy(torch.randn(120, 6, generator=draw), identity) < 0.56
    with pytest.raises(UsageError, match="no pairs of both kinds"):
        verification_accuracy(good, torch.zeros(120))


def test_what_cannot_be_done_is_told(digits: Splits, teacher: Model) -> None:
    bench = bench_of(digits)
    assert last_hidden(teacher) == "3"
    with pytest.raises(SettingError, match=r"number is 99; the layer '3' has 24 neurons"):
        NeuronSelection(teacher=teacher, number=99).apply(mlp(8), bench)
    with pytest.raises(SettingError, match="random neurons need a number"):
        NeuronSelection(by="random")
    resnet = Model(resnet8(in_channels=1), example=(torch.zeros(2, 1, 8, 8),), task=Classification())
    named = r"Name another: layer=layer3 \(256 neurons\), layer=layer2 \(512 neurons\), layer=layer1"
    with pytest.raises(UsageError, match=named):
        NeuronSelection(teacher=resnet).fits(resnet.copy(), Bench())
    with pytest.raises(UsageError, match="no linear layer before its last one"):
        NeuronSelection(teacher=mlp(), number=2).apply(mlp(8), bench)
    with pytest.raises(NeedError, match="needs a teacher"):
        NeuronSelection().apply(mlp(8), bench)
    line = Model(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), example=(torch.zeros(1, 6),))
    flat = TensorDataset(torch.rand(20, 6), torch.arange(20) % 3)
    with pytest.raises(NeedError, match="not pictures"):
        select_neurons(line, "0", flat)
    assert len(select_neurons(line, "0", flat, 2, attributes={"even": torch.arange(20) % 2 == 0})) == 2


def test_attributes_are_given_by_name_and_looked_at_before_anything_trains() -> None:
    flat = TensorDataset(torch.rand(24, 6), torch.arange(24) % 3)
    bench = Bench(train=flat, validation=flat, training=Training(epochs=1, batch_size=8))

    def line(seed: int) -> Model:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        return Model(net, example=(torch.zeros(1, 6),), task=Classification())

    plain = NeuronSelection(teacher=line(0), layer="0", number=2, epochs=1)
    with pytest.raises(NeedError, match=r"not pictures.*attributes="):
        plain.fits(line(1), bench)
    for few in (torch.ones(23), torch.ones(24, 1)):
        with pytest.raises(
            SettingError, match=r"attributes\['lit'\] has the shape .* each of the 24 validation samples"
        ):
            replace(plain, attributes={"lit": few}).fits(line(1), bench)
    with pytest.raises(SettingError, match="wanted names none"):
        replace(plain, attributes={"lit": torch.ones(24)}, wanted={}).fits(line(1), bench)
    lit, old = torch.arange(24) % 2 == 0, torch.arange(24) < 12
    told = replace(plain, attributes={"lit": lit.tolist()}, wanted={"old": old})
    told.fits(line(1), bench)
    expected = select_neurons(line(0), "0", flat, 2, attributes={"lit": lit}, wanted={"old": old})
    assert torch.equal(told.selection(line(0), "0", bench), expected)
    assert told.apply(line(1), bench).module[2].out_features == 2
    with pytest.raises(SettingError, match="number is 2 and by is 'all'"):
        replace(plain, by="all")


def test_a_pruned_student_keeps_its_zeros(digits: Splits, teacher: Model) -> None:
    student = mlp(24)
    with torch.no_grad():
        student.module[1].weight[:, ::2] = 0
    for keep in (True, False):
        technique = NeuronSelection(teacher=teacher, number=6, epochs=1, keep_zeros=keep)
        taught = technique.apply(student, bench_of(digits))
        assert bool((taught.module[1].weight[:, ::2] == 0).all()) is keep
        assert bool((taught.module[1].weight[:, 1::2] != 0).any())


@pytest.mark.effect
@pytest.mark.slow
def test_selected_neurons_of_a_teacher_verify_unseen_faces_better_than_random_ones(shared_data: Path) -> None:
    """Eight of 128 neurons, changed pictures of 15 people new to the teacher; eight seeds gave 1.8 points.

    The section asks it of students of selected and of random neurons, which five seeds did not tell apart, so that the
    teacher's own neurons are judged; its claim about soft labels for a hundred classes was not tried.
    """
    faces = np.load(shared_data / "orl_faces" / "orl.npz")["x"]
    x, people = torch.from_numpy(faces.reshape(400, 1, 28, 23)).float() / 255, torch.arange(40).repeat_interleave(10)
    gains = []
    for seed in range(6):
        draw = torch.Generator().manual_seed(seed)
        known = torch.randperm(40, generator=draw)[:25]
        names, seen = torch.zeros(40, dtype=torch.long), torch.isin(people, known)
        names[known] = torch.arange(25)
        order = torch.randperm(250, generator=draw)
        mine, named = x[seen][order], names[people[seen]][order]
        held, rest = TensorDataset(mine[:62], named[:62]), TensorDataset(*_varied(mine[62:], named[62:], 3, seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = perceptron((28 * 23, 256, 128, 25))
        training = Training(epochs=15, batch_size=64, optimizer=Adam(lr=1e-3), schedule=Constant())
        fresh = Model(net, example=(torch.zeros(1, 1, 28, 23),), task=Classification())
        teacher = Bench(train=rest, validation=held, training=training, seed=seed).fit(fresh)
        pictures, others = _varied(x[~seen], people[~seen], 2, seed + 77)
        features = teacher.module[:4](pictures).detach()  # pyright: ignore[reportIndexIssue]
        kept = [select_neurons(teacher, "3", held, 8, seed=seed)]
        kept += [torch.randperm(128, generator=draw)[:8] for _ in range(20)]
        chosen_, *at_random = [verification_accuracy(features[:, k], others, pairs=4000, seed=seed) for k in kept]
        gains.append(chosen_ - sum(at_random) / 20)
    assert sum(gains) / 6 >= 0.005, gains


def _varied(x: torch.Tensor, names: torch.Tensor, times: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures, and so many copies of each with all nuisances at once."""
    parts = [x]
    for number in range(times):
        other = x
        for place, change in enumerate(NUISANCES.values()):
            other, _ = changed(other, change, seed * 100 + number * 10 + place)
        parts.append(other)
    return torch.cat(parts), names.repeat(times + 1)
