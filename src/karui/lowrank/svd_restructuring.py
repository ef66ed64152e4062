"""SVD restructuring: Xue, Li, Gong 2013, "Restructuring of Deep Neural Network Acoustic Models with Singular Value
Decomposition", Interspeech (survey 11).

The weight of a trained linear layer has a steep spectrum. Keep its leading singular directions, write the layer as two
linear layers with a narrow, purely linear bottleneck between them, do so for all layers at once, the output layer too,
and fine-tune the restructured network with both factors free.

It pays for wide linear layers (multilayer perceptrons, the heads of older convolutional networks, the projections of
transformers) when there is data to fine-tune on: light compression needs none, heavy compression does. It does not pay
for small layers, whose factors are larger than they are (they are left and reported), nor for convolutions that see
space, which have better decompositions (Tucker-2, survey 12).

Paper -> here: `A` (m x n) -> the weight, `k` -> rank, `U_k` -> the second layer, `Sigma_k V_k^T` -> the first one.

DEPARTURE: pointwise convolutions are restructured too, since each is a linear layer at every position; the paper has
linear layers only.

DEPARTURE: the paper sets a rank for each layer from its spectrum; other rules are there to be asked for: an error, a
share of the layer, the rank that variational Bayes tells from noise, or a budget for the whole network. This keeps
the singular values that hold most of their layer's squared energy for each parameter that they cost, since one common
share of the spectrum would take most of an output layer over few classes, whose spectrum is flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from karui.errors import require
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._common import (
    blocks,
    carry_out,
    factor_matrix,
    fine_tune,
    require_data,
    require_fine_tuning,
    require_ranks,
    tracked,
)
from karui.lowrank._per_layer import rank_ladder
from karui.lowrank._scan import Seen, scan
from karui.model.taps import layer_at
from karui.numerics.evbmf import singular_values
from karui.numerics.svd import Energy, Error, Fixed, Parameters, RankPolicy, Vbmf, Worth, factored_size
from karui.technique import Bench, Candidate, Card, technique

if TYPE_CHECKING:
    from karui.model import Model

_BISECTIONS = 60
_ALONE: dict[str, Any] = {
    "energy": 1.0, "rank": None, "error": None, "share": None, "vbmf": False, "budget": None, "epochs": 0,
}  # fmt: skip
"""Settings that leave all layers but those that `ranks` names."""


@technique(
    Card(
        survey=11,
        slug="svd_restructuring",
        title="Restructuring of Deep Neural Network Acoustic Models with Singular Value Decomposition",
        kind="replace",
        reduces=("parameters", "macs", "bytes"),
        identity={"energy": 1.0, "epochs": 0},
        quick={"energy": 0.6, "epochs": 1},
        pays="wide linear layers, with data to fine-tune on when much is cut",
        costs="small layers, and networks that spend their time in convolutions",
    )
)
@dataclass(frozen=True, kw_only=True)
class SvdRestructuring:
    """Write every linear layer as two, through its leading singular directions, and fine-tune.

    Settings:
        energy: share of the sum of singular values that a layer keeps (the paper's measure), in (0, 1].
        squared: take the share of the sum of their squares instead.
        rank: the same rank for every layer, instead of a share; None keeps to `energy`.
        error: relative error of each layer's weight that is allowed, in (0, 1), instead of a share of its spectrum.
        share: share of each layer's weights that its factors may hold, in (0, 1), instead; it is that of its
            multiply-adds too.
        vbmf: whether each rank is instead what variational Bayes finds in the weight beside noise, as `Tucker2` has it;
            layers of few outputs may look like noise to it (name them in `skip`).
        budget: share of the network's parameters to keep, in (0, 1]; it is spent where it keeps most of the layers'
            squared energy. None keeps to `energy`.
        ranks: ranks of single layers, as (path, rank) pairs; they go before the other settings.
        pointwise: whether convolutions with a kernel of one position are restructured too.
        balanced: give each factor the roots of the singular values, instead of all to the first factor.
        skip: paths of layers to leave.
        epochs: passes over the data for fine-tuning; 0 leaves the factors as they are.
        learning_rate: of the fine-tuning; about the last one of the dense training. None takes the bench's.

    Needs: nothing; training data and a task if `epochs` is not 0.

    Raises:
        SettingError: a setting is out of range, names no layer, or the budget cannot be met.
        NeedError: there is nothing to fine-tune on.

    Relations: `Tucker2` (12) is for convolutions and finds its ranks itself.

    Example:
        >>> import karui, torch
        >>> model = karui.Model(nn.Linear(64, 64), example=(torch.zeros(1, 64),))
        >>> SvdRestructuring(rank=8, epochs=0).apply(model, karui.Bench()).parameters
        1088
    """

    energy: float = 0.8
    squared: bool = False
    rank: int | None = None
    error: float | None = None
    share: float | None = None
    vbmf: bool = False
    budget: float | None = None
    ranks: tuple[tuple[str, int], ...] = ()
    pointwise: bool = True
    balanced: bool = False
    skip: tuple[str, ...] = ()
    epochs: int = 5
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        pairs = self.ranks.items() if isinstance(self.ranks, dict) else self.ranks
        object.__setattr__(self, "ranks", tuple((path, rank) for path, rank in pairs))
        object.__setattr__(self, "skip", tuple(self.skip))
        require(0 < self.energy <= 1, f"energy is {self.energy}; give a share in (0, 1], for example 0.8")
        require(self.rank is None or self.rank >= 1, f"rank is {self.rank}; give a number from 1, for example 32")
        within = self.budget is None or 0 < self.budget <= 1
        require(within, f"budget is {self.budget}; give a share of the parameters in (0, 1], for example 0.2")
        for name in ("error", "share"):
            value = getattr(self, name)
            require(value is None or 0 < value < 1, f"{name} is {value}; give a number in (0, 1), for example 0.3")
        rules = [
            name for name in ("rank", "error", "share", "vbmf", "budget") if getattr(self, name) not in (None, False)
        ]
        require(len(rules) < 2, f"{' and '.join(rules)} are given together; give one of them")
        for path, rank in self.ranks:
            require(rank >= 1, f"ranks has {rank} for '{path}'; give a number from 1")
        require_fine_tuning(self.epochs, self.learning_rate)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The restructured model, fine-tuned."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        require_data("svd_restructuring", model, bench, self.epochs)
        choices, layers = [], {}
        for choice in tracked(self.choose(model), "factor", shown=bench.progress):
            if not choice.replaced:
                choices.append(choice)
                continue
            layer = layer_at(model.module, choice.path)
            layers[choice.path], error = factor_matrix(layer, choice.ranks[0], balanced=self.balanced)
            choices.append(replace(choice, error=error))
        restructured = carry_out(model, choices, layers, "SVD restructuring", {"squared": self.squared})
        if not layers:
            return restructured
        return fine_tune(restructured, bench, self.epochs, self.learning_rate, "fine-tune the restructured network")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with each layer, and why."""
        return tuple(choice.describe() for choice in self.choose(model))

    def candidates(self, model: Model, bench: Bench, *, multiple: int = 1) -> Iterator[Candidate]:
        """For a budget: each linear layer and pointwise convolution at lower and lower ranks."""
        seen, _ = scan(model, self._objection, self.skip)
        for one in seen:
            groups = 1 if isinstance(one.layer, nn.Linear) else one.layer.groups
            full = min(one.layer.weight.shape[0] // groups, one.layer.weight.shape[1])
            for rank in rank_ladder(full, multiple):
                choice = _choice(one, [torch.zeros(full)] * groups, Fixed(rank))
                if choice.replaced:
                    alone = replace(self, **_ALONE, ranks=((one.path, rank),))
                    yield _candidate(alone, one, rank, full)

    def choose(self, model: Model) -> tuple[Choice, ...]:
        """The rank of each layer, or the reason why it is left."""
        seen, left = scan(model, self._objection, self.skip)
        spectra = [(one, [singular_values(block) for block in blocks(one.layer)]) for one in seen]
        own = dict(self.ranks)
        require_ranks(tuple(own), seen, left)
        fixed = {path: Fixed(rank) for path, rank in own.items()}
        policy = self._policy(model, spectra, fixed)
        return (*(_choice(one, values, fixed.get(one.path, policy)) for one, values in spectra), *left)

    def _objection(self, layer: Any) -> str:
        if isinstance(layer, nn.Linear):
            return ""
        if any(taps != 1 for taps in layer.kernel_size):
            return f"{type(layer).__name__} with kernel {' x '.join(map(str, layer.kernel_size))} sees space"
        return "" if self.pointwise else "pointwise convolutions are left (pointwise=False)"

    def _rule(self) -> RankPolicy:
        """What finds a layer's rank from its own spectrum."""
        if self.rank is not None:
            return Fixed(self.rank)
        if self.error is not None:
            return Error(self.error)
        if self.share is not None:
            return Parameters(self.share)
        return Vbmf() if self.vbmf else Energy(self.energy, squared=self.squared)

    def _policy(self, model: Model, spectra: list[tuple[Seen, list[Tensor]]], fixed: dict[str, Fixed]) -> RankPolicy:
        if self.budget is None:
            return self._rule()
        room = self.budget * model.parameters

        def total(threshold: float) -> int:
            policy = Worth(threshold)
            chosen = [_choice(one, values, fixed.get(one.path, policy)) for one, values in spectra]
            return model.parameters - sum(c.parameters[0] - c.parameters[1] for c in chosen if c.replaced)

        # The share of a layer's energy for one parameter is less than 1, and no rank counts below rounding.
        low, high = math.log(1e-30), 0.0
        least = total(1.0) / model.parameters
        told = f"budget is {self.budget}; rank 1 everywhere still keeps {least:.3f} of the network"
        require(least <= self.budget, told, "Give a larger budget.")
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if total(math.exp(middle)) <= room else (middle, high)
        return Worth(math.exp(high))


def _choice(one: Seen, spectra: list[Tensor], policy: RankPolicy) -> Choice:
    """Groups share a rank, since they share a layer: the largest that any of them asks for."""
    layer, groups = one.layer, len(spectra)
    rows, columns = layer.weight.shape[0] // groups, layer.weight.shape[1]
    rank = max(policy(values, (rows, columns)) for values in spectra)
    dense, factored = groups * rows * columns, groups * factored_size((rows, columns), rank)
    bias = layer.weight.shape[0] if layer.bias is not None else 0
    places = one.outputs
    choice = Choice(
        one.path,
        ranks=(rank,),
        full=(min(rows, columns),),
        parameters=(dense + bias, factored + bias),
        macs=(dense * places, factored * places),
    )
    return unless_larger(choice)


def _candidate(alone: SvdRestructuring, one: Seen, rank: int, full: int) -> Candidate:
    return Candidate(
        place=one.path,
        technique=alone,
        text=f"rank {rank} of {full}",
        layers=lambda: {one.path: factor_matrix(one.layer, rank, balanced=alone.balanced)[0]},
    )
