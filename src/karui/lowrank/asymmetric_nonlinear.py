"""Asymmetric reconstruction through the ReLU: Zhang, Zou, He, Sun 2016, "Accelerating Very Deep Convolutional Networks
for Classification and Detection", IEEE TPAMI, arXiv 1505.06798; first as "Efficient and Accurate Approximations of
Nonlinear Convolutional Networks", CVPR 2015, arXiv 1411.4229 (survey 16).

The responses of a layer lie near a subspace of few dimensions. So a convolution is written as one with fewer filters
and a pointwise one, and what counts is not the error of its kernel but that of its responses on real inputs: after the
ReLU that follows, and on the inputs that the already compressed earlier layers give, against the responses of the
original network. Layers are done from the first to the last, each in closed form or by alternation; nothing is trained
and no labels are seen. The ranks of all layers come from one greedy search.

It pays for deep plain convolutional networks with wide layers, a few thousand pictures and no labels, or before a
short fine-tuning. It does not pay for thin or depthwise layers, whose responses fill their space, nor in layers that
add to a residual sum: no ReLU of their own follows them, so they are fitted linearly (the plan names them). The search
keeps the product of energies large; on small networks it is no more accurate than the same share of every layer's
filters (`ratio`), and the error of the last map is larger.

Paper -> here: `y = Wx` -> made (of the compressed network), wanted (of the original), `M = P Q^T` -> left right, `b` ->
offset, `d'` -> rank, `z_i` -> hidden, `lambda` -> penalties, `sigma_{l,a}` -> energies, `C_l` -> cost.

DEPARTURE: the paper's networks have no batch normalisation. One that alone uses a layer's output is a scale and shift
of each channel, so responses are taken behind it, where the ReLU sees them, and the factors are turned back.

DEPARTURE: the share of a layer's cost that one direction takes counts the pointwise convolution too, so that a budget
of multiply-adds holds as counted; the paper takes `rank / filters` of the dense layer.

DEPARTURE: of all iterates, the linear start included, the one with the smallest error after the ReLU is kept; the
paper takes the last.

DEPARTURE: isotropic responses, which the map should leave as they are, are added to those seen, a hundredth as many as
there are filters: with as few rows as filters the fit would else be of the rows alone. A perceptron of 784-512-512 for
MNIST at an eighth of its ranks, 500 pictures: the error of the outputs on others falls from 0.23 to 0.02 by it.

DEPARTURE: the groups of a grouped convolution are fitted one by one, at one rank. The paper has none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from karui.errors import require
from karui.lowrank._calibrate import RIDGE, Calibration
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._common import carry_out, fine_tune, require_data, require_fine_tuning, require_ranks, tracked
from karui.lowrank._per_layer import LARGE, LOOKED_AT, Offering
from karui.lowrank._reconstruction import all_turned_back, assemble
from karui.lowrank._scan import Seen, filters_of, groups_of, scan
from karui.lowrank._split import split_cost, split_full, split_rank
from karui.lowrank._watching import Shelf
from karui.model import replace_layers
from karui.model.following import Following, followings
from karui.numerics.rank_allocation import Spectrum, greedy_ranks
from karui.numerics.regression import AffineMap, Moments, reduced_rank_regression
from karui.numerics.relu_regression import relu_regression
from karui.technique import Bench, Card, technique

if TYPE_CHECKING:
    from karui.model import Model

_BISECTIONS = 40
_QUICK = 5
"""Sweeps for a candidate of a budget."""


@technique(
    Card(
        survey=16,
        slug="asymmetric_nonlinear",
        title="Accelerating Very Deep Convolutional Networks for Classification and Detection",
        kind="replace",
        needs=("calibration",),
        reduces=("parameters", "macs", "bytes"),
        identity={"speedup": 1.0},
        quick={"speedup": 1.5, "images": 200, "sweeps": 5},
        arxiv="1505.06798",
        pays="wide convolutions, a few thousand inputs without labels, and no training or a short one",
        costs="thin, depthwise or residual layers; layers that no ReLU of their own follows are fitted linearly",
    )
)
@dataclass(frozen=True, kw_only=True)
class AsymmetricNonlinear(Offering):
    """Give every convolution fewer filters and a pointwise layer, fitted to the responses behind its ReLU.

    The first convolution is left alone.

    Settings:
        speedup: how many times fewer multiply-adds the network shall do, as counted; from 1. Ranks are then found.
        ratio: share of its filters that every layer keeps as its rank, in (0, 1], in place of a search; None searches.
        ranks: ranks of single layers, as (path, rank) pairs; they go before the other settings, and a search is for the
            other layers.
        nonlinear: whether errors count after the ReLU; else all layers are fitted linearly.
        asymmetric: whether a layer is fitted on the inputs that the compressed layers before it give.
        spatial_split: whether the convolution with fewer filters is split over space once more, in two (the paper's
            "3d"); each of the two steps takes the root of the speed-up.
        images: calibration inputs.
        positions: random positions of each layer's output that are looked at, for each input.
        penalties: weights of the relaxed problem, one after the other.
        sweeps: alternations at each penalty.
        fully_connected: whether linear layers are factored too; the paper leaves them.
        skip: paths of layers to leave.
        epochs: passes over the data for fine-tuning; 0 leaves the factors as they are, as the paper mostly does.
        learning_rate: of the fine-tuning; None takes the bench's.

    Needs: calibration inputs; labels and a task if `epochs` is not 0.

    Raises:
        SettingError: a setting is out of range, names no layer, or the speed-up cannot be reached.
        NeedError: there are no calibration inputs, or nothing to fine-tune on.

    Relations: `Tucker2` (12) fits kernels and needs no inputs; `LowRankExpansion` (13) fits responses without the ReLU.

    Example:
        >>> import karui
        >>> from torch.utils.data import TensorDataset
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU())
        >>> model = karui.Model(net, example=(torch.zeros(1, 3, 8, 8),))
        >>> bench = karui.Bench(train=TensorDataset(torch.rand(100, 3, 8, 8), torch.zeros(100)))
        >>> light = AsymmetricNonlinear(ranks=(("2", 8),)).apply(model, bench)
        >>> [tuple(layer.weight.shape[:2]) for layer in light.module[2]]
        [(8, 16), (32, 8)]
    """

    most: ClassVar[int] = LARGE

    speedup: float = 2.0
    ratio: float | None = None
    ranks: tuple[tuple[str, int], ...] = ()
    nonlinear: bool = True
    asymmetric: bool = True
    spatial_split: bool = False
    images: int = 3000
    positions: int = 10
    penalties: tuple[float, ...] = (0.01, 1.0)
    sweeps: int = 25
    fully_connected: bool = False
    skip: tuple[str, ...] = ()
    epochs: int = 0
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple((path, rank) for path, rank in self.ranks))
        object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "penalties", tuple(self.penalties))
        require(self.speedup >= 1, f"speedup is {self.speedup}; give a number from 1, for example 2")
        within = self.ratio is None or 0 < self.ratio <= 1
        require(within, f"ratio is {self.ratio}; give a share of the filters in (0, 1], for example 0.3")
        for path, rank in self.ranks:
            require(rank >= 1, f"ranks has {rank} for '{path}'; give a number from 1")
        require(self.images >= 1, f"images is {self.images}; give a number from 1, for example 3000")
        require(self.positions >= 1, f"positions is {self.positions}; give a number from 1, for example 10")
        positive = len(self.penalties) > 0 and all(penalty > 0 for penalty in self.penalties)
        require(positive, f"penalties is {self.penalties}; give positive numbers, for example 0.01 and 1")
        require(self.sweeps >= 1, f"sweeps is {self.sweeps}; give a number from 1, for example 25")
        require_fine_tuning(self.epochs, self.learning_rate)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The model with its convolutions factored, fine-tuned if asked for."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        require_data("asymmetric_nonlinear", model, bench, self.epochs)
        choices = self.choose(model, bench)
        after = followings(model, [choice.path for choice in choices if choice.replaced])
        seen = {one.path: one for one in scan(model, self._objection, self.skip)[0]}
        layers: dict[str, nn.Module] = {}
        calibration, shelf = self._calibration(model, bench), Shelf.of(self, model, bench)
        current, told = model, []
        for choice in tracked(choices, "fit layers", shown=bench.progress):
            if not choice.replaced:
                told.append(choice)
                continue
            one, source = seen[choice.path], current if self.asymmetric else model
            make = partial(self._made, calibration, source, one, choice, after[choice.path])
            layers[one.path], done = shelf.layer(one, make)
            current = replace_layers(current, {one.path: layers[one.path]}, check=False)
            told.append(done)
        wanted = {"speedup": self.speedup, "ratio": self.ratio, "images": self.images, "positions": self.positions}
        light = carry_out(model, told, layers, "Asymmetric reconstruction", wanted)
        return fine_tune(light, bench, self.epochs, self.learning_rate, "fine-tune the network") if layers else light

    def remarks(self, model: Model) -> tuple[str, ...]:
        """How each layer would be fitted, or why it is left."""
        seen, left = self._scan(model)
        after = followings(model, [one.path for one in seen])
        how = {one.path: self._manner(after[one.path]) for one in seen}
        return (*(f"{path}: {text}" for path, text in how.items()), *(choice.describe() for choice in left))

    def choose(self, model: Model, bench: Bench) -> tuple[Choice, ...]:
        """The rank of each layer in the order of their calls, or the reason why it is left."""
        seen, left = self._scan(model)
        after = followings(model, [one.path for one in seen])
        own = dict(self.ranks)
        if self.ratio is not None or self.speedup == 1 or all(one.path in own for one in seen):
            share = 1.0 if self.ratio is None else self.ratio
            ranks = {one.path: max(1, math.ceil(share * filters_of(one) - 1e-9)) for one in seen} | own
            step = 1 / math.sqrt(self.speedup)
        else:
            ranks, step = self._search(model, seen, after, bench)
        return (*(self._costed(one, ranks[one.path], step, after[one.path]) for one in seen), *left)

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        seen, left = scan(model, self._objection, self.skip)
        named = {path for path, _ in self.ranks}
        require_ranks(tuple(named), seen, left)
        kept = tuple(one for one in seen if not one.first or one.path in named)
        first = tuple(
            Choice(one.path, reason="the first convolution is left alone; name it in ranks to factor it")
            for one in seen
            if one not in kept
        )
        return tuple(sorted(kept, key=lambda one: one.order)), (*left, *first)

    def _objection(self, layer: Any) -> str:
        if isinstance(layer, nn.Linear):
            return "" if self.fully_connected else "linear layers are left (fully_connected=False)"
        return ""

    def _manner(self, following: Following) -> str:
        if not self.nonlinear:
            return "fitted linearly (nonlinear=False)"
        if following.relu:
            return f"fitted through {following.describe()}"
        return f"fitted linearly: {following.describe()} follows it"

    def alone(self, model: Model, one: Seen, speedup: float) -> tuple[AsymmetricNonlinear, Choice]:
        """For a budget: the settings that do this to one layer and nothing else, and what becomes of it."""
        del model
        rank = max(1, math.floor(_dense_macs(one) / speedup / _unit(one) + 1e-9))
        alone = replace(
            self,
            speedup=1.0,
            ratio=None,
            ranks=((one.path, rank),),
            asymmetric=False,
            spatial_split=False,
            sweeps=_QUICK,
            epochs=0,
            **LOOKED_AT,
        )
        return alone, self._costed(one, rank, 1.0, Following()) if rank < filters_of(one) else _whole(one)

    def evidence(self, model: Model, one: Seen, bench: Bench) -> tuple[list[tuple[Tensor, Tensor]], Following]:
        """For a budget: responses of the layer, and what follows it."""
        following = followings(model, [one.path])[one.path]
        calibration = Calibration(model, bench, **LOOKED_AT)
        return list(calibration.outputs(model, one, following)), following

    def layer_for(self, one: Seen, choice: Choice, bench: Bench, evidence: Any) -> nn.Module:
        """For a budget: the two layers fitted to responses."""
        del bench
        pairs, following = evidence
        return self._fitted(pairs, one, choice, following)[0]

    def _search(
        self, model: Model, seen: tuple[Seen, ...], after: dict[str, Following], bench: Bench
    ) -> tuple[dict[str, int], float]:
        """Ranks by the product of energies for the multiply-adds of the whole network, and the share of each step.

        The layers' budget is the largest with which the network keeps to its own, which other layers share.
        """
        from karui.measuring import count

        own = dict(self.ranks)
        free = [one for one in seen if one.path not in own]
        energies = self._calibration(model, bench).energies(free, after)
        spectra = [Spectrum(energies[one.path], _unit(one), _dense_macs(one)) for one in free]
        whole = count(model).macs

        def tried(step: float) -> tuple[dict[str, int], float]:
            found = greedy_ranks(spectra, step * sum(spectrum.dense for spectrum in spectra))
            ranks = {one.path: rank for one, rank in zip(free, found, strict=True)} | own
            choices = [self._costed(one, ranks[one.path], step, after[one.path]) for one in seen]
            saved = sum(choice.macs[0] - choice.macs[1] for choice in choices if choice.replaced)
            return ranks, (whole - saved) / whole

        dense = max(1.0, sum(spectrum.dense for spectrum in spectra))
        low, high = sum(spectrum.cost(1) for spectrum in spectra) / dense * (1 + 1e-9), 1.0
        ranks, least = tried(low)
        told = f"speedup is {self.speedup}; rank 1 everywhere still does {least:.3f} of the multiply-adds"
        require(least * self.speedup <= 1, told, "Ask for less, or let more layers be factored.")
        for _ in range(_BISECTIONS):
            step = (low + high) / 2
            now, share = tried(step)
            low, high, ranks = (step, high, now) if share * self.speedup <= 1 else (low, step, ranks)
        return ranks, low

    def _calibration(self, model: Model, bench: Bench) -> Calibration:
        return Calibration(model, bench, self.images, self.positions)

    def _made(
        self, calibration: Calibration, source: Model, one: Seen, choice: Choice, following: Following
    ) -> tuple[nn.Module, Choice]:
        """The factored layer, on the inputs that `source` gives it, and the choice with its error."""
        layer, error = self._fitted(calibration.outputs(source, one, following), one, choice, following)
        return layer, replace(choice, error=error)

    def _fitted(
        self, pairs: Iterable[tuple[Tensor, Tensor]], one: Seen, choice: Choice, following: Following
    ) -> tuple[nn.Module, float]:
        """The factored layer, and the relative error of its responses where they are looked at."""
        made, wanted = (
            torch.cat(side).unflatten(1, (groups_of(one), -1)).unbind(1) for side in zip(*pairs, strict=True)
        )
        through = self.nonlinear and following.relu
        fits, squares, sizes = [], 0.0, 0.0
        for x, y in zip(made, wanted, strict=True):
            found, error, size = self._fit(x, y, choice.ranks[-1], through=through)
            fits.append(found)
            squares, sizes = squares + error, sizes + size
        layer = assemble(
            one.layer, all_turned_back(fits, following), choice.ranks[0] if len(choice.ranks) > 1 else None
        )
        return layer, math.sqrt(squares / max(sizes, 1e-300))

    def _fit(self, made: Tensor, wanted: Tensor, rank: int, *, through: bool) -> tuple[AffineMap, float, float]:
        """The map of one group, the squared error of its outputs as the network uses them, and their squares."""
        moments = Moments.of(made, wanted)
        few = made.shape[1] / len(made)  # with many rows it is next to nothing
        variance = RIDGE * few * float(moments.centred().xx.diagonal().mean())
        if through:
            fit = relu_regression(made, wanted, rank, self.penalties, self.sweeps, variance=variance)
            size = float(wanted.double().clamp(min=0).square().sum())
            return fit.found, fit.error**2 * size, size
        found = reduced_rank_regression(moments.with_isotropic(torch.eye(made.shape[1]), variance), rank)
        return found, moments.error(found.matrix(), found.offset), float(moments.yy.trace())

    def _costed(self, one: Seen, rank: int, step: float, following: Following) -> Choice:
        """What the layer costs at this rank, before and after; it is left where that saves nothing.

        With a spatial split the convolution of `rank` filters keeps the share `step` of its own cost.
        """
        filters, groups = filters_of(one), groups_of(one)
        rank = min(rank, filters)
        sizes = (*one.layer.weight.shape[1:],)
        inner, ranks, full = groups * rank * math.prod(sizes), (rank,), (filters,)
        macs = inner * one.outputs
        most = split_full(sizes[0], rank, sizes[1:])
        if self.spatial_split and most:
            split = split_rank(sizes[0], rank, sizes[1:], step)
            size, cost = split_cost(one, split, rank)
            if size < inner and cost < macs:
                inner, macs, ranks, full = size, cost, (split, rank), (most, filters)
        outer = groups * filters * rank
        dense, width = one.layer.weight.numel(), one.layer.weight.shape[0]
        choice = Choice(
            one.path,
            ranks=ranks,
            full=full,
            parameters=(dense + width * (one.layer.bias is not None), inner + outer + width),
            macs=(_dense_macs(one), macs + outer * one.outputs),
            remark=self._manner(following),
        )
        return unless_larger(choice)


def _unit(one: Seen) -> int:
    """Multiply-adds of one direction: a filter in each group, and its column of the pointwise layer."""
    directions = math.prod(one.layer.weight.shape[1:]) + filters_of(one)
    return one.outputs * groups_of(one) * directions


def _whole(one: Seen) -> Choice:
    return Choice(one.path, reason="its rank is full")


def _dense_macs(one: Seen) -> int:
    return one.outputs * one.layer.weight.numel()
