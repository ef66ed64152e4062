"""The lottery ticket hypothesis: Frankle and Carbin 2018, arXiv 1803.03635 version 1 (survey 66).

A dense network holds a small one that, trained alone from its *own initial values*, does as well. It is found by
training, removing the smallest weights, setting the others back to what they were before training, and again.

Pays to learn how small a network could be trained; the file of a sparse one is small. Does NOT pay in time, neither to
train (a training for each round) nor to run, and a sparse file alone is had for less by `iterative_magnitude_pruning`.
The claim is about initial values, so `study` also trains both controls: the same mask with new values, and as many
survivors in each layer at other places.

The initial values are drawn anew under the bench's seed, since a trained model no longer holds its own: by the factory
that the model's origin names, or else by each layer's `reset_parameters` (see `karui.technique.redraw`). With
`draw=False` the given model's weights are the initial values, for a model not yet trained.

Paper -> here: theta_0 -> `Ticket.values`, m -> `Ticket.masks`, p^(1/n) -> `rate`, early-stop iteration -> `stop`,
re-initialised -> control "drawn anew", rearranged -> control "rearranged".

DEPARTURE: `rewind_step` sets back to the values after some steps of the first training, as later papers need for larger
networks; 0, the default, is this paper. Each training then still runs its whole length.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from karui.errors import require
from karui.model import Model, Note
from karui.numerics.selection import keep_largest, keep_largest_overall, rearranged
from karui.sparsify._rounds import by_name, computing_order
from karui.technique import Card, technique
from karui.technique.redraw import redrawn
from karui.train import Influence, Together
from karui.train.masks import MaskKeeper, Masks, connections, density, zero_pruned
from karui.train.randomness import seed_of
from karui.train.watching import Snapshot, ValidationLosses, mean_loss

if TYPE_CHECKING:
    from karui.technique import Bench

OWN, ANEW, MOVED = "ticket", "drawn anew", "rearranged"
POINTS_PER_EPOCH = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Ticket:
    """Initial values and a mask: what a training starts from.

    Settings:
        values: a model that holds the initial values, buffers and biases too.
        masks: by parameter name, True where a weight survives.
    """

    values: Model
    masks: Masks

    def model(self) -> Model:
        """The network at the start of its training."""
        started = self.values.copy()
        zero_pruned(started.module, self.masks)
        return started

    def drawn_anew(self, seed: int) -> Ticket:
        """The first control: the same mask, other initial values."""
        return Ticket(values=redrawn(self.values, seed), masks=self.masks)

    def rearranged(self, seed: int) -> Ticket:
        """The second control: the same initial values, and in each layer as many survivors at other places."""
        generator = torch.Generator().manual_seed(seed_of(seed, "rearranged"))
        return Ticket(
            values=self.values, masks={name: rearranged(mask.cpu(), generator) for name, mask in self.masks.items()}
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training of a study.

    Settings:
        kind: the ticket, or which control.
        round: number of prunings before it.
        kept: share of the weights that survive.
        score: the metric on the test split (validation, where there is none).
        loss: the loss there.
        stop: step of the smallest validation loss.
    """

    kind: str
    round: int
    kept: float
    score: float
    loss: float
    stop: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Study:
    """All rounds and their controls.

    Settings:
        tickets: one for each round; the first is the dense network.
        trials: each training's outcome.
    """

    tickets: tuple[Ticket, ...]
    trials: tuple[Trial, ...]

    def of(self, kind: str) -> tuple[Trial, ...]:
        """The trials of a kind, by round."""
        return tuple(trial for trial in self.trials if trial.kind == kind)

    def to_json(self) -> dict[str, Any]:
        """The trials as JSON values."""
        return {"trials": [vars(trial) for trial in self.trials]}


@technique(
    Card(
        survey=66,
        slug="lottery_ticket",
        title="The Lottery Ticket Hypothesis: Training Pruned Neural Networks",
        kind="trainings",
        needs=("labels", "training"),
        reduces=("bytes",),
        quick={"rounds": 1, "rate": 0.5, "epochs": 1},
        arxiv="1803.03635",
        pays="To learn how small a network can be trained, from its own initial values; its file is small.",
        costs="A whole training for each round, and no time is saved at use: the zeros are scattered.",
    )
)
@dataclass(frozen=True, kw_only=True)
class LotteryTicket:
    """Find a sparse network that trains from its own initial values, and train it.

    Settings:
        rounds: number of prunings; each is preceded by a training, and one more trains the winning ticket. 0 is plain
            training.
        rate: share of the remaining weights of each layer that a round removes, in [0, 1).
        output: the output layer's rate, as a share of `rate`, in [0, 1].
        rates: rates of single layers, by name or shell pattern ("conv*").
        skip: layers left dense, by name or shell pattern.
        across: whether weights are ranked over all layers rather than within each; no layer is emptied.
        one_shot: whether all is removed at once, after one training.
        resetting: whether each round starts from the initial values; otherwise training goes on between prunings, and
            only the winning ticket is reset.
        rewind_step: steps of the first training after which the values are taken that survivors are reset to.
        epochs: passes of each training; None takes the training's.
        draw: whether initial values are drawn anew; otherwise the model's own are taken, as of an untrained one.

    Needs:
        Labels and training data.

    Raises:
        SettingError: a setting is out of range, or a layer that is named is not there.
        UsageError: the initial values cannot be drawn.

    Relations: `iterative_magnitude_pruning` goes on from the trained values. `study` trains the controls as well.

    Example:
        >>> LotteryTicket(rounds=10).remarks(Model(nn.Linear(2, 2), example=(torch.zeros(1, 2),)))[0]
        '11 trainings; 10.7% of the weights of most layers are left.'
    """

    rounds: int = 5
    rate: float = 0.2
    output: float = 0.5
    rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    skip: tuple[str, ...] = ()
    across: bool = False
    one_shot: bool = False
    resetting: bool = True
    rewind_step: int = 0
    epochs: int | None = None
    draw: bool = True

    def __post_init__(self) -> None:
        rates = {f"rates['{key}']": rate for key, rate in self.rates.items()}
        for name, rate in {"rate": self.rate, **rates}.items():
            require(0 <= rate < 1, f"{name} is {rate}; give a share in [0, 1), for example 0.2")
        require(0 <= self.output <= 1, f"output is {self.output}; give a share of the rate in [0, 1], for example 0.5")
        for name, value in (("rounds", self.rounds), ("rewind_step", self.rewind_step), ("epochs", self.epochs or 0)):
            require(value >= 0, f"{name} is {value}; give 0 or more")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """For `plan`: how many trainings it takes, and what is left."""
        trainings = min(self.rounds, 1) + 1 if self.one_shot else self.rounds + 1
        left = (1 - self.rate) ** self.rounds
        del model
        return (
            f"{trainings} trainings; {left:.1%} of the weights of most layers are left.",
            "The saved file shrinks; time does not, as the zeros are scattered.",
        )

    def apply(self, model: Model, bench: Bench) -> Model:
        """The winning ticket, trained."""
        *_, won = self._rounds(model, bench, watched=False)
        masks, trained = won.ticket.masks, won.trained
        facts = {"round": won.number, "kept": {name: density({name: mask}) for name, mask in masks.items()}}
        return trained.evolve(trained.module, Note(f"lottery ticket, {density(masks):.1%} of the weights", facts))

    def study(self, model: Model, bench: Bench, *, controls: Collection[int] | None = None) -> Study:
        """Every round's ticket trained, and both controls beside it, with the same data in the same order.

        Args:
            model: as for `apply`.
            bench: its test split judges, where it has one.
            controls: rounds whose controls are trained too; None means all after the first training.
        """
        tickets, trials = [], []
        for outcome in self._rounds(model, bench, watched=True):
            tickets.append(outcome.ticket)
            trials.append(_trial(OWN, outcome, bench))
            if outcome.number in (range(1, self.rounds + 1) if controls is None else controls):
                seed = seed_of(bench.seed, "control", outcome.number)
                others = {ANEW: outcome.ticket.drawn_anew(seed), MOVED: outcome.ticket.rearranged(seed)}
                trials += [
                    _trial(kind, self._outcome(outcome.number, ticket, bench, watched=True), bench)
                    for kind, ticket in others.items()
                ]
        return Study(tickets=tuple(tickets), trials=tuple(trials))

    def _rounds(self, model: Model, bench: Bench, *, watched: bool) -> Iterator[_Outcome]:
        """Each round's ticket, trained; one-shot has the first and the last only."""
        values = redrawn(model, bench.seed) if self.draw else model.copy()
        weights = connections(values.module, self.skip)
        rates = self._rates(values, list(weights))
        masks: Masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        snapshot = Snapshot(self.rewind_step)
        taken = (snapshot,) if self.rewind_step else ()
        outcome = self._outcome(0, Ticket(values=values, masks=masks), bench, watched=watched, also=taken)
        yield outcome
        if taken:
            values = values.copy()
            values.module.load_state_dict(snapshot.state)
        for number in (self.rounds,) if self.one_shot and self.rounds else range(1, self.rounds + 1):
            masks = self._pruned(outcome.trained.module, masks, rates, number)
            start = values if self.resetting or number == self.rounds else outcome.trained
            outcome = self._outcome(number, Ticket(values=start, masks=masks), bench, watched=watched)
            yield outcome

    def _rates(self, model: Model, weights: list[str]) -> dict[str, float]:
        layers = {name.rpartition(".")[0]: name for name in connections(model.module)}
        rates = dict.fromkeys(weights, self.rate)
        last = layers.get(next(reversed(computing_order(model, layers)), ""))
        if last in rates:
            rates[last] *= self.output
        return rates | by_name(self.rates, weights, "rates")

    def _pruned(
        self, module: nn.Module, masks: Masks, rates: Mapping[str, float], number: int
    ) -> dict[str, Bool[Tensor, "..."]]:
        """The masks after round `number`: by trained magnitude, and never what the initial values were."""
        scores = {name: module.get_parameter(name).detach().abs() for name in masks}
        counts = {name: max(1, round(mask.numel() * (1 - rates[name]) ** number)) for name, mask in masks.items()}
        if self.across:
            return keep_largest_overall(scores, masks, sum(counts.values()))
        return {name: keep_largest(scores[name], mask, counts[name]) for name, mask in masks.items()}

    def _outcome(
        self, number: int, ticket: Ticket, bench: Bench, *, watched: bool, also: tuple[Influence, ...] = ()
    ) -> _Outcome:
        """The ticket trained, and where early stopping would have stopped."""
        epochs = bench.training.epochs if self.epochs is None else self.epochs
        watch = ValidationLosses(data=bench.validation, task=ticket.values.task, points=POINTS_PER_EPOCH * epochs)
        parts = (*also, MaskKeeper(ticket.masks), *([watch] if watched else []))
        trained = bench.fit(ticket.model(), epochs=epochs, influence=Together(*parts), label=f"round {number}")
        return _Outcome(number=number, ticket=ticket, trained=trained, stop=watch.best_step)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Outcome:
    """A round: its ticket, trained."""

    number: int
    ticket: Ticket
    trained: Model
    stop: int


def _trial(kind: str, outcome: _Outcome, bench: Bench) -> Trial:
    split, data = ("validation", bench.validation) if bench.test is None else ("test", bench.test)
    trained = outcome.trained
    return Trial(
        kind=kind,
        round=outcome.number,
        kept=density(outcome.ticket.masks),
        score=bench.evaluate(trained, split).value,
        loss=mean_loss(trained.module, data, trained.task),
        stop=outcome.stop,
    )
