"""Train, prune, retrain: Han, Pool, Tran and Dally 2015, "Learning both Weights and Connections" (survey 63).

Training tells which connections matter. The small weights are removed, the surviving ones retrained from their trained
values, and again, in rounds. Units that lose all their connections go too.

Pays in bytes: the saved file holds only the weights that are left, with relative indices. What that costs in accuracy
is the network's matter: on the digits, 15 % of an over-parametrised network's weights retrain to what the dense one
has. A network that is tight already does not bear it: at 10 % of the weights and two passes of fine-tuning the CIFAR-10
ResNet-20 falls from 91.73 to 78.69 % and ResNet-56 from 93.39 to 86.64 % (`results/cifar_resnets.md`).

Does NOT pay in time: a matrix with zeros all over is multiplied no faster by the engines that people deploy on, and
cutting out the dead units leaves odd widths: those two networks ran 1.2 to 1.3 times slower in ONNX Runtime, for 6 and
9 % fewer multiplications (`dead=False` keeps the widths). For time, cut whole units (`l1_filter_pruning`).

Rounds pay where each retraining is short, and lose where the passes are counted: on the digits with 8 % kept, eleven
rounds reach 90.9 %, one cut retrained as long as all rounds together 95.4 %, and one cut retrained as long as a single
round 82.0 % (`results/iterative_magnitude_pruning.md`).

Paper -> here: q -> `quality`, C_ir / C_io -> the density of a layer's mask, D_r -> `retraining_dropout`, iterations ->
`rounds`, retraining at a tenth of the learning rate -> `rate`.

DEPARTURE: besides a threshold per layer (`quality`), the share that survives can be given (`keep`), ranked over all
layers or within each, because a budget is what people have; no layer is emptied by the ranking.

DEPARTURE: the sensitivity scan chooses each layer's share by a rule (`max_drop`), where the paper reads it off plots.

DEPARTURE: a unit without inputs is only removed where its constant can move into the biases of those that read it: not
across zero padding, nor into layers without a bias. Nor does a unit go that anything else reads than weights that are
zero: the units of a group where a sum, a product or a layer applied again reads them too stay, and a note says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from karui.errors import CaptureError, require
from karui.model import Analysis, Model, Note, coupled_groups, layer_at
from karui.sparsify._rounds import Gradual, Selection, by_name, computing_order, sensitivity
from karui.technique import Card, require_passes, technique
from karui.technique.pruning.dead_units import cut_unread, settle
from karui.technique.pruning.readers import Readers, find_readers
from karui.train import Influence, Together
from karui.train.conditions import DropoutRates, Penalty, Resting, dropout_rates
from karui.train.masks import MaskKeeper, connections, density, zero_masks, zero_pruned

if TYPE_CHECKING:
    from karui.technique import Bench
    from karui.technique.card import Need

Alive = dict[str, Bool[Tensor, "..."]]


def retraining_dropout(rate: float, kept: float) -> float:
    """D_r = D_o sqrt(C_ir / C_io): a layer with fewer connections needs less dropout (equation 2).

    Example:
        >>> retraining_dropout(0.5, 0.25)
        0.25
    """
    return rate * kept**0.5


def dropout_after(model: Model) -> dict[str, str]:
    """The weight whose outputs each dropout layer drops: the last one used before it."""
    weights = {name.rpartition(".")[0]: name for name in connections(model.module)}
    found, last = {}, None
    for path in computing_order(model, (*weights, *dropout_rates(model.module))):
        last = weights.get(path, last)
        if path not in weights and last is not None:
            found[path] = last
    return found


@technique(
    Card(
        survey=63,
        slug="iterative_magnitude_pruning",
        title="Learning both Weights and Connections for Efficient Neural Networks",
        kind="influence",
        needs=("labels", "training"),
        reduces=("bytes",),
        identity={"keep": 1.0},
        quick={"keep": 0.2, "rounds": 2, "epochs": 1},
        arxiv="1506.02626",
        pays="Bytes: the saved file holds only what is left; 15 % of an over-parametrised network's weights can do.",
        costs="A tight network falls far (a CIFAR ResNet-20 at 10 %, two passes: 91.7 to 78.7 %). Time does not fall; "
        "with dead units cut, ONNX Runtime took 1.2 times as long. One long retraining beats rounds of equal passes.",
    )
)
@dataclass(frozen=True, kw_only=True)
class MagnitudePruning:
    """Remove the smallest weights in rounds, and retrain the others after each.

    Settings:
        keep: share of the weights that survive in the end, in (0, 1].
        keeps: shares of single layers, by name or shell pattern ("layer3.*"), to which keep then does not apply.
        quality: q, removes weights below q times the standard deviation of their layer's survivors, in each round;
            decides instead of keep. None goes by keep.
        qualities: q of single layers, by name or shell pattern; the first convolution bears the smallest.
        max_drop: how much worse the validation metric may be (0.02: two points of accuracy) when one layer alone is
            pruned; a scan then gives each layer its share, but none less than keep. None scans nothing.
        across: whether weights are ranked over all layers, or each layer keeps the same share.
        skip: layers left dense, by name or shell pattern.
        rounds: number of times that is pruned and retrained.
        epochs: passes of retraining in each round.
        rate: learning rate of the retraining, as a share of the training's; the paper's is 0.1 to 0.01.
        l1: strength of an L1 penalty on the weights; better than L2 only without retraining.
        l2: strength of an L2 penalty on the weights, beside the optimizer's weight decay; the paper's choice.
        learn: passes of training, under the penalties, before the first pruning.
        dropout: whether dropout falls with the connections of the layer before it while retraining.
        local: whether linear layers are pruned and retrained with all else at rest, and then the others likewise,
            against vanishing gradients in deep networks.
        dead: whether units that lost all inputs or all outputs are removed.

    Needs:
        Labels and training data, for retraining and the scan.

    Raises:
        SettingError: a setting is out of range, or a layer that is named is not there.

    Relations: `lottery_ticket` sets the survivors back to their initial values instead. `l1_filter_pruning` cuts whole
    filters, which is faster in every engine and bears less.

    Example:
        >>> import torch, karui
        >>> model = karui.Model(torch.nn.Linear(100, 10), example=(torch.zeros(1, 100),))
        >>> sparse = MagnitudePruning(keep=0.1, epochs=0).apply(model, karui.Bench())
        >>> int(sparse.module.weight.count_nonzero())
        100
    """

    keep: float = 0.1
    keeps: Mapping[str, float] = field(default_factory=dict, hash=False)
    quality: float | None = None
    qualities: Mapping[str, float] = field(default_factory=dict, hash=False)
    max_drop: float | None = None
    across: bool = True
    skip: tuple[str, ...] = ()
    rounds: int = 3
    epochs: int = 10
    rate: float = 0.1
    l1: float = 0.0
    l2: float = 0.0
    learn: int = 0
    dropout: bool = True
    local: bool = False
    dead: bool = True

    def __post_init__(self) -> None:
        keeps = {f"keeps['{key}']": share for key, share in self.keeps.items()}
        for name, share in {"keep": self.keep, **keeps}.items():
            require(0 < share <= 1, f"{name} is {share}; give a share in (0, 1], for example 0.1")
        qualities = {f"qualities['{key}']": quality for key, quality in self.qualities.items()}
        optional = {"quality": self.quality, "max_drop": self.max_drop, **qualities}
        strengths = {name: value for name, value in optional.items() if value is not None}
        for name, value in {**strengths, "l1": self.l1, "l2": self.l2}.items():
            require(value >= 0, f"{name} is {value}; give 0 or more")
        require(self.rate > 0, f"rate is {self.rate}; give a positive share of the learning rate, for example 0.1")
        require(self.rounds >= 1, f"rounds is {self.rounds}; give 1 or more")
        require_passes(epochs=self.epochs, learn=self.learn)
        require(
            not self.qualities or self.quality is not None,
            "qualities is given without quality.",
            "Set quality too, for the other layers (0 leaves them dense).",
        )

    @property
    def _nothing(self) -> bool:
        shares = (self.keep, *self.keeps.values())
        return self.quality is None and self.max_drop is None and self.learn == 0 and min(shares) == 1

    def needs(self) -> tuple[Need, ...]:
        """Labels and training data, unless nothing is pruned, or neither scanned for nor retrained."""
        free = self._nothing or (self.epochs == 0 and self.learn == 0 and self.max_drop is None)
        return () if free else ("labels", "training")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """For `plan`: how many weights may go, and what that will not do."""
        weights = connections(model.module, self.skip)
        total = sum(weight.numel() for weight in weights.values())
        share = "those below their layer's threshold" if self.quality is not None else f"{1 - self.keep:.0%}"
        return (
            f"Of {total:,} weights in {len(weights)} layers {share} go, in {self.rounds} rounds.",
            "The saved file shrinks; time does not, as the zeros are scattered.",
        )

    def influence(self, model: Model, bench: Bench) -> Influence:
        """All rounds within one training, which may have other influences: prunings at equal distances."""
        weights, selection = self._selected(model, bench)
        keeper = MaskKeeper(_alive(model, weights))
        parts = (Gradual(keeper=keeper, selection=selection, rounds=self.rounds), *self._penalty(weights))
        return parts[0] if len(parts) == 1 else Together(*parts)

    def apply(self, model: Model, bench: Bench) -> Model:
        """The sparse model, retrained."""
        if self._nothing:
            return model
        if self.learn:
            names = list(connections(model.module, self.skip))
            model = bench.fit(model, epochs=self.learn, influence=Together(*self._penalty(names)), label="learn")
        weights, selection = self._selected(model, bench)
        current, alive, analysis = model.copy(), _alive(model, weights), self._analysis(model)
        readers = None if analysis is None else find_readers(model, analysis)
        folded = 0
        for number in range(1, self.rounds + 1):
            for phase in self._phases(model, weights):
                chosen = {name: alive[name] for name in phase}
                alive |= selection.masks(current.module, chosen, number / self.rounds)
                zero_pruned(current.module, alive)
                if analysis is not None and readers is not None:
                    folded += _settled(current, analysis, readers, alive)
                if self.epochs:
                    current = self._retrained(current, bench, alive, phase)
        kept = {name: round(density({name: mask}), 6) for name, mask in alive.items()}
        facts = {"kept": kept, "folded": folded, "rounds": self.rounds}
        current = current.evolve(current.module, Note(f"{1 - density(alive):.1%} of the weights pruned", facts))
        return current if analysis is None else cut_unread(current, analysis, settle(current, analysis, readers))

    def _selected(self, model: Model, bench: Bench) -> tuple[list[str], Selection]:
        """The weights that are pruned, and by which rule."""
        weights = list(connections(model.module, self.skip))
        keeps = by_name(self.keeps, weights, "keeps")
        if self.max_drop is not None:
            curve = sensitivity(model, bench, skip=self.skip)
            borne = {name: 1 - curve.bearable(name, self.max_drop) for name in weights}
            keeps = {name: max(self.keep, share) for name, share in borne.items()} | keeps
        qualities = by_name(self.qualities, weights, "qualities")
        return weights, Selection(
            keep=self.keep, keeps=keeps, quality=self.quality, qualities=qualities, across=self.across
        )

    def _analysis(self, model: Model) -> Analysis | None:
        """The coupled groups; None where dead units are not asked for, or the model cannot be captured."""
        if not self.dead:
            return None
        try:
            return coupled_groups(model)
        except CaptureError:
            return None

    def _phases(self, model: Model, weights: list[str]) -> Iterator[list[str]]:
        """What is pruned and retrained together: everything, or linear layers and then the others."""
        linear = [name for name in weights if isinstance(layer_at(model.module, name.rpartition(".")[0]), nn.Linear)]
        others = [name for name in weights if name not in linear]
        yield from ([part for part in (linear, others) if part] if self.local else [weights])

    def _penalty(self, names: list[str]) -> tuple[Penalty, ...]:
        return (Penalty(names=tuple(names), l1=self.l1, l2=self.l2),) if self.l1 or self.l2 else ()

    def _retrained(self, model: Model, bench: Bench, alive: Alive, phase: list[str]) -> Model:
        masks = {name: mask.clone() for name, mask in alive.items()}  # an influence is a value; these go on changing
        parts: list[Influence] = [MaskKeeper(masks), *self._penalty(list(alive))]
        if self.dropout:
            parts.append(_dropout(model, alive))
        if len(phase) < len(alive):
            parts.insert(0, Resting(_at_rest(model.module, phase)))
        optimizer = bench.training.optimizer
        slowed = replace(optimizer, lr=self.rate * optimizer.lr)  # pyright: ignore[reportArgumentType]  (a value)
        slower = replace(bench.training, optimizer=slowed)
        return replace(bench, training=slower).fit(
            model, epochs=self.epochs, influence=Together(*parts), label="retrain"
        )


def _alive(model: Model, weights: list[str]) -> Alive:
    """The masks at the start: what an earlier pruning left."""
    known = zero_masks(model.module)
    parameters = dict(model.module.named_parameters())
    return {name: known.get(name, torch.ones_like(parameters[name], dtype=torch.bool)) for name in weights}


def _dropout(model: Model, alive: Alive) -> DropoutRates:
    """Dropout lowered by the density of the layer whose outputs it drops."""
    own, after = dropout_rates(model.module), dropout_after(model)
    rates = {
        path: retraining_dropout(own[path], density({weight: alive[weight]}))
        for path, weight in after.items()
        if weight in alive
    }
    return DropoutRates(own={path: own[path] for path in rates}, rates=rates)


def _at_rest(module: nn.Module, phase: list[str]) -> tuple[str, ...]:
    """The parameters of all layers but those whose turn it is; what is in neither goes with the convolutions."""
    linear = isinstance(layer_at(module, phase[0].rpartition(".")[0]), nn.Linear)
    owners = {name.rpartition(".")[0] for name in phase}
    resting = []
    for name, parameter in module.named_parameters():
        owner = name.rpartition(".")[0]
        moves = owner in owners if linear else not isinstance(layer_at(module, owner), nn.Linear)
        if parameter.requires_grad and not moves:
            resting.append(name)
    return tuple(resting)


def _settled(model: Model, analysis: Analysis, readers: Readers, alive: Alive) -> int:
    """Zero the weights of dead units in the model and in the masks; how many units' constants moved into biases."""
    before = {name: model.module.get_parameter(name) != 0 for name in alive}
    folded = settle(model, analysis, readers).folded
    for name, mask in alive.items():
        mask.logical_and_(~before[name] | (model.module.get_parameter(name) != 0))
    return folded
