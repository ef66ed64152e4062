"""Lottery tickets, [66]: survivors start from their own initial values, both controls, and what the paper claims."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from karui.architectures.perceptron import perceptron
from karui.data import Splits
from karui.errors import SettingError, UsageError
from karui.model import Classification, Model, Origin
from karui.sparsify.lottery_ticket import ANEW, MOVED, OWN, LotteryTicket
from karui.technique import Bench
from karui.technique.redraw import redrawn
from karui.train import SGD, Adam, Constant, Training
from karui.train.masks import connections, density

pytestmark = pytest.mark.paper(66)


def mlp(*sizes: int, seed: int = 0) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Model(perceptron(sizes), example=(torch.zeros(1, 1, 8, 8),), task=Classification())


def bench_of(digits: Splits, epochs: int = 1, seed: int = 0, **settings: Any) -> Bench:
    training = Training(
        epochs=epochs, batch_size=60, optimizer=settings.pop("optimizer", Adam(lr=1.2e-3)), schedule=Constant()
    )
    return Bench(
        train=digits.train, validation=digits.validation, test=digits.test, training=training, seed=seed, **settings
    )


def same(a: Model, b: Model) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Model, Model, int]]:
    """Each training: its label, the model at its start, the model it made, the seed."""
    seen: list[tuple[str, Model, Model, int]] = []
    fit = Bench.fit

    def spy(self: Bench, model: Model, **settings: Any) -> Model:
        start = model.copy()
        trained = fit(self, model, **settings)
        seen.append((settings["label"], start, trained, self.seed))
        return trained

    monkeypatch.setattr(Bench, "fit", spy)
    return seen


def test_every_round_starts_from_the_initial_values_to_the_bit(
    digits: Splits, small_cnn: Callable[..., Model], fits: list
) -> None:
    model = small_cnn((8, 8, 8))
    bench = bench_of(digits, optimizer=SGD(lr=0.05, momentum=0.9, weight_decay=1e-3))
    LotteryTicket(rounds=3, rate=0.4).apply(model, bench)
    assert [label for label, *_ in fits] == ["round 0", "round 1", "round 2", "round 3"]
    initial = fits[0][1].module.state_dict()
    assert not torch.equal(initial["conv1.weight"], model.module.state_dict()["conv1.weight"]), "drawn anew"
    weights = list(connections(model.module))
    for (_, _, before, _), (_, start, trained, _) in pairwise(fits):
        for name, value in start.module.state_dict().items():
            if name in weights:
                alive = value != 0
                assert torch.equal(value[alive], initial[name][alive])
                assert not trained.module.state_dict()[name][~alive].any(), "pruned weights stay zero in training"
                earlier = before.module.state_dict()[name] != 0
                assert not (alive & ~earlier).any(), "masks nest"
            else:
                assert torch.equal(value, initial[name]), "biases and normalisation's buffers are reset too"


def test_survivors_are_those_of_largest_trained_magnitude(digits: Splits, fits: list) -> None:
    LotteryTicket(rounds=1, rate=0.3).apply(mlp(64, 30, 10), bench_of(digits, 3))
    (_, initial, trained, _), (_, ticket, _, _) = fits
    for name, weight in connections(trained.module).items():
        alive = ticket.module.get_parameter(name) != 0
        assert weight[alive].abs().min() >= weight[~alive].abs().max()
        moved = (weight - initial.module.get_parameter(name)).abs()
        assert moved[alive].min() < moved[~alive].max(), "not the distance travelled"


def test_density_of_each_layer_is_exact(digits: Splits) -> None:
    study = LotteryTicket(rounds=4, epochs=0, rates={"3": 0.5}).study(
        mlp(64, 300, 100, 10), bench_of(digits), controls=()
    )
    for number, ticket in enumerate(study.tickets):
        counts = {name: int(mask.sum()) for name, mask in ticket.masks.items()}
        assert counts == {
            "1.weight": round(19_200 * 0.8**number),
            "3.weight": round(30_000 * 0.5**number),
            "5.weight": round(1_000 * 0.9**number),
        }
    whole = LotteryTicket(rounds=2, epochs=0, across=True, output=1.0).study(
        mlp(64, 30, 10), bench_of(digits), controls=()
    )
    assert sum(int(mask.sum()) for mask in whole.tickets[-1].masks.values()) == round(1920 * 0.64) + round(300 * 0.64)
    assert all(mask.any() for mask in whole.tickets[-1].masks.values())


def test_controls_differ_in_one_thing_each(digits: Splits, fits: list) -> None:
    study = LotteryTicket(rounds=2, rate=0.5).study(mlp(64, 30, 10), bench_of(digits))
    assert [(trial.kind, trial.round) for trial in study.trials] == [
        (OWN, 0),
        *((kind, number) for number in (1, 2) for kind in (OWN, ANEW, MOVED)),
    ]
    assert len({seed for *_, seed in fits}) == 1, "same data in the same order"
    starts = [start.module.state_dict() for _, start, _, _ in fits]
    for ticket, anew, moved in (starts[1:4], starts[4:7]):
        for name in ("1.weight", "3.weight"):
            mask = ticket[name] != 0
            assert torch.equal(mask, anew[name] != 0), "the same mask"
            assert not torch.equal(ticket[name][mask], anew[name][mask]), "other values"
            assert int(mask.sum()) == int((moved[name] != 0).sum()), "as many in each layer"
            assert not torch.equal(mask, moved[name] != 0), "elsewhere"
            there = moved[name] != 0
            assert torch.equal(moved[name][there], starts[0][name][there]), "with the initial values"
        assert torch.equal(moved["1.bias"], ticket["1.bias"])


def test_no_rounds_is_plain_training(digits: Splits) -> None:
    model, bench = mlp(64, 30, 10), bench_of(digits)
    assert same(LotteryTicket(rounds=0, draw=False).apply(model, bench), bench.fit(model))
    assert same(LotteryTicket(rounds=0).apply(model, bench), bench.fit(redrawn(model, bench.seed)))


def test_a_study_trains_the_tickets_that_apply_trains(digits: Splits, fits: list) -> None:
    technique, bench = LotteryTicket(rounds=2, rate=0.5), bench_of(digits)
    won = technique.apply(mlp(64, 30, 10), bench)
    study = technique.study(mlp(64, 30, 10), bench, controls=())
    assert same(won, fits[-1][2])
    assert study.of(OWN)[-1].kept == pytest.approx(
        density({n: won.module.get_parameter(n) != 0 for n in ("1.weight", "3.weight")})
    )
    assert won.module.state_dict().keys() == mlp(64, 30, 10).module.state_dict().keys()


def test_one_shot_prunes_all_at_once(digits: Splits, fits: list) -> None:
    won = LotteryTicket(rounds=3, rate=0.2, one_shot=True).apply(mlp(64, 30, 10), bench_of(digits))
    assert len(fits) == 2
    assert int((won.module.get_parameter("1.weight") != 0).sum()) == round(1920 * 0.8**3)


def test_without_resetting_only_the_winner_is_reset(digits: Splits, fits: list) -> None:
    LotteryTicket(rounds=2, rate=0.5, resetting=False).apply(mlp(64, 30, 10), bench_of(digits))
    initial, trained = fits[0][1].module.get_parameter("1.weight"), fits[0][2].module.get_parameter("1.weight")
    second, third = fits[1][1].module.get_parameter("1.weight"), fits[2][1].module.get_parameter("1.weight")
    assert torch.equal(second[second != 0], trained[second != 0])
    assert torch.equal(third[third != 0], initial[third != 0])


def test_rewinding_sets_back_to_an_early_step(digits: Splits, fits: list) -> None:
    bench = bench_of(digits)  # 18 steps an epoch
    LotteryTicket(rounds=1, rate=0.5, rewind_step=18, epochs=2).apply(mlp(64, 30, 10), bench)
    after_one = bench.fit(fits[0][1], label="one epoch").module.state_dict()
    start = fits[1][1].module.state_dict()
    for name, value in start.items():
        alive = value != 0 if name.endswith("weight") else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value[alive], after_one[name][alive])
    assert not torch.equal(after_one["1.bias"], fits[0][1].module.state_dict()["1.bias"])


def test_the_early_stop_step_is_that_of_the_smallest_validation_loss(digits: Splits) -> None:
    study = LotteryTicket(rounds=0, epochs=30).study(mlp(64, 100, 10), bench_of(digits, optimizer=Adam(lr=2e-2)))
    (trial,) = study.trials
    assert 18 / 4 <= trial.stop < 30 * 18, "such a rate over-fits before the end"
    assert 0.9 < trial.score <= 1
    assert study.to_json()["trials"][0]["stop"] == trial.stop


def test_what_cannot_be_drawn_anew_is_told_and_may_be_given() -> None:
    model = Model(nn.Sequential(nn.Linear(3, 3), Scaled()), example=(torch.zeros(1, 3),))
    with pytest.raises(UsageError, match=r"'1' \(Scaled\) has parameters that cannot be drawn anew"):
        redrawn(model, 0)
    named = replace(model, lineage=(Origin(f"{__file__}:scaled"),))
    first, second, third = (redrawn(named, seed).module.get_parameter("0.weight") for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    fixed = replace(mlp(64, 5, 10), lineage=(Origin(f"{__file__}:always_the_same"),))
    assert not same(redrawn(fixed, 0), redrawn(fixed, 1)), "a factory that seeds itself is passed by"


def scaled() -> nn.Module:
    """A factory."""
    return nn.Sequential(nn.Linear(3, 3), Scaled())


def always_the_same() -> nn.Module:
    """A factory that seeds itself."""
    return mlp(64, 5, 10, seed=0).module


class Scaled(nn.Module):
    """A layer with a parameter of its own, which nobody can draw anew."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 1.0}, "rate is 1"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"rates": {"1": -0.1}}, r"rates\['1'\] is -0.1"),
        ({"output": 1.1}, "output is 1.1"),
        ({"rounds": -1}, "rounds is -1"),
        ({"rewind_step": -1}, "rewind_step is -1"),
        ({"epochs": -1}, "epochs is -1"),
    ],
)
def test_settings_out_of_range_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        LotteryTicket(**settings)


@pytest.mark.effect
@pytest.mark.slow
def test_tickets_need_their_own_initial_values(digits: Splits) -> None:
    """64-300-100-10, 12 epochs a round, mean of two seeds of the benchmark's five: at about 9 % and 5 % left.

    Five seeds hold 9 % within a point of the dense network; two scatter by more, from one processor to the next too.
    """
    studies = []
    for seed in range(2):
        model = mlp(64, 300, 100, 10, seed=seed)
        glorot_normal(model, seed)
        technique = LotteryTicket(rounds=14, epochs=12, draw=False)
        studies.append(technique.study(model, bench_of(digits, seed=seed, optimizer=Adam(lr=2e-3)), controls=(11, 14)))

    def mean(kind: str, number: int, what: str = "score") -> float:
        return sum(getattr(t, what) for study in studies for t in study.of(kind) if t.round == number) / len(studies)

    assert [round(study.of(OWN)[n].kept, 2) for study in studies for n in (11, 14)] == [0.09, 0.05] * 2
    for control in (ANEW, MOVED):
        assert mean(OWN, 11) - mean(control, 11) >= 0.02
        assert mean(OWN, 14) - mean(control, 14) >= 0.03
        assert mean(OWN, 11, "loss") < mean(control, 11, "loss")
    assert mean(OWN, 11) >= mean(OWN, 0) - 0.02


def glorot_normal(model: Model, seed: int) -> None:
    """The paper's initial values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, parameter in model.module.named_parameters():
            nn.init.xavier_normal_(parameter) if name.endswith("weight") else nn.init.zeros_(parameter)
