"""Low rank plus sparse: Yu, Liu, Wang, Tao 2017, "On Compressing Deep Models by Low Rank and Sparse Decomposition",
CVPR (survey 24).

A weight is the sum of a matrix of low rank and one with few entries, `U V + S`, fitted to the layer's responses on a
small number of inputs, not to the weight itself. Layers are done from the first to the last, each on the inputs that
the already compressed ones give, against the responses of the original network. The solver is greedy and bilateral:
least squares for one factor, then the other, then the largest entries of the sparse part; the rank grows until it is
reached, and no singular values are computed. Pruning (`U V = 0`) and low rank (`S = 0`) are its end points, and both
are tried.

It pays in bytes where a layer has a few large weights beside a low-rank rest; then neither alone does as well. It
does not pay in time: a dense engine multiplies the zeros of the sparse part, and the low-rank part comes on top. Nor
where responses fill few dimensions, as on small networks and easy data: there the low-rank end point alone wins, and
is taken.

Measured on the digits, a perceptron eight times smaller, three seeds (`results/low_rank_sparse.md`): 80 % without
retraining, where the SVD of the weights has 20 % and magnitude pruning 28 %; dense 95.5 %. Not shown: within a point of
dense after two epochs (88 %), nor after six (90 %).

Paper -> here: `W` -> weight, `L = U V` -> low, `S` -> sparse, `r` -> rank, `c` -> nonzeros, `X`, `Y` -> moments.

DEPARTURE: the paper's schedule is not known to us in full; see `karui.numerics.bilateral` for the one taken: steps of
the gradient and an exact solution on the support for the sparse part, a fifth of the rank at a time.

DEPARTURE: where a layer has a bias, moments are centred and the bias follows, so that with `S = 0` the fit is
reduced-rank regression.

DEPARTURE: a hundredth of isotropic inputs is added to those seen, so that the weights stay of their size in directions
in which the inputs hardly vary.

DEPARTURE: one budget for every layer, its split searched with both end points among the candidates (the paper sets
ranks and numbers of entries by hand); an entry of the sparse part is charged one and a half numbers, for its index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from karui.errors import require
from karui.lowrank._calibrate import Calibration
from karui.lowrank._choice import Choice
from karui.lowrank._common import carry_out, fine_tune, require_data, require_fine_tuning, tracked
from karui.lowrank._per_layer import LOOKED_AT, Offering, all_others
from karui.lowrank._scan import Seen, filters_of, groups_of, scan
from karui.lowrank._sums import assembled, for_one_sample
from karui.lowrank._watching import Shelf
from karui.model import replace_layers
from karui.numerics.bilateral import LowRankSparse, low_rank_sparse
from karui.numerics.regression import Moments
from karui.technique import Bench, Card, technique
from karui.train.masks import MaskKeeper

if TYPE_CHECKING:
    from karui.model import Model

ENTRY = 1.5
"""Numbers that an entry of the sparse part is charged: its value, and half as much for its place."""
_QUICK = 1
"""Sweeps for a candidate of a budget."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@technique(
    Card(
        survey=24,
        slug="low_rank_sparse",
        title="On Compressing Deep Models by Low Rank and Sparse Decomposition",
        kind="replace",
        needs=("calibration",),
        reduces=("bytes",),
        identity={"budget": 1.0},
        quick={"budget": 0.3, "images": 100, "sweeps": 10},
        pays="bytes, where layers have a few large weights beside a low-rank rest; no labels, a short retraining",
        costs="time: zeros are multiplied and the low-rank part comes on top; easy data, where low rank alone wins",
    )
)
@dataclass(frozen=True, kw_only=True)
class LowRankAndSparse(Offering):
    """Write every layer as a low-rank plus a sparse one, fitted to its responses on calibration inputs.

    Settings:
        budget: share of each layer's weights to keep, in (0, 1]; 1 leaves the layers. An entry of the sparse part
            counts one and a half, for its index.
        sparse_share: share of the budget that goes to the sparse part, in [0, 1]; None searches, both ends included.
        rank: rank of the low-rank part of every layer instead, 0 for none; `density` then says the rest.
        density: share of the entries that the sparse part keeps, in [0, 1), with `rank`.
        asymmetric: whether a layer is fitted on the inputs that the compressed layers before it give.
        images: calibration inputs.
        positions: random positions of each layer's output that are looked at, for each input.
        sweeps: of the solver, at the final rank.
        skip: paths of layers to leave.
        epochs: passes over the data for retraining, the zeros of the sparse parts kept; 0 leaves the fit as it is.
        learning_rate: of the retraining; None takes the bench's.

    Needs: calibration inputs; labels and a task if `epochs` is not 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there are no calibration inputs, or nothing to retrain on.

    Relations: `AsymmetricNonlinear` (16) has the low-rank part alone, through the ReLU; `MagnitudePruning` (52) the
    sparse one, without data.

    Example:
        >>> import karui
        >>> from torch.utils.data import TensorDataset
        >>> model = karui.Model(nn.Linear(32, 32), example=(torch.zeros(1, 32),))
        >>> bench = karui.Bench(train=TensorDataset(torch.rand(200, 32), torch.zeros(200)))
        >>> light = LowRankAndSparse(rank=2, density=0.05).apply(model, bench)
        >>> int((light.module.sparse.weight != 0).sum()), light.module.rank
        (51, 2)
    """

    ladder: ClassVar[tuple[float, ...]] = (4.0,)

    budget: float = 0.25
    sparse_share: float | None = None
    rank: int | None = None
    density: float = 0.0
    asymmetric: bool = True
    images: int = 500
    positions: int = 10
    sweeps: int = 30
    skip: tuple[str, ...] = ()
    epochs: int = 0
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", tuple(self.skip))
        require(0 < self.budget <= 1, f"budget is {self.budget}; give a share of the weights in (0, 1], as 0.25")
        within = self.sparse_share is None or 0 <= self.sparse_share <= 1
        require(within, f"sparse_share is {self.sparse_share}; give a share of the budget in [0, 1], or None")
        require(self.rank is None or self.rank >= 0, f"rank is {self.rank}; give a number from 0, or None")
        require(0 <= self.density < 1, f"density is {self.density}; give a share of the entries in [0, 1)")
        told = f"density is {self.density} without a rank; give rank too (0 for none), or a budget alone"
        require(self.rank is not None or not self.density, told)
        require(self.rank != 0 or self.density > 0, "rank and density are both 0: nothing would be left; raise one")
        for name in ("images", "positions", "sweeps"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; give a number from 1")
        require_fine_tuning(self.epochs, self.learning_rate)

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The model with its layers as sums, retrained if asked for."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        require_data("low_rank_sparse", model, bench, self.epochs)
        seen, left = self._scan(model)
        calibration, shelf = Calibration(model, bench, self.images, self.positions), Shelf.of(self, model, bench)
        current, choices, layers = model, list(left), {}
        for one in tracked(seen, "fit layers", shown=bench.progress):
            source = current if self.asymmetric else model
            layers[one.path], choice = shelf.layer(one, partial(self._summed, calibration, source, one))
            choices.append(choice)
            current = replace_layers(current, {one.path: layers[one.path]}, check=False)
        wanted = {"budget": self.budget, "images": self.images, "positions": self.positions}
        light = carry_out(model, choices, layers, "low rank plus sparse", wanted)
        keeper = MaskKeeper({name: weight.detach() != 0 for name, weight in sparse_weights(light, layers).items()})
        label = "retrain, zeros kept"
        return fine_tune(light, bench, self.epochs, self.learning_rate, label, influence=keeper) if layers else light

    def remarks(self, model: Model) -> tuple[str, ...]:
        """The sizes that are tried for each layer, or why it is left."""
        seen, left = self._scan(model)
        told = [
            f"{one.path}: "
            + " or ".join(f"rank {rank} plus {entries:,} entries" for rank, entries in self.sizes(one))
            + (" in each group" if groups_of(one) > 1 else "")
            for one in seen
        ]
        return (*told, *(choice.describe() for choice in left))

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        """The layers that are fitted, in the order of their calls, and those left."""
        seen, left = scan(model, lambda _layer: "", self.skip)
        kept, small = [], []
        for one in sorted(seen, key=lambda one: one.order):
            if self.sizes(one):
                kept.append(one)
            else:
                why = "budget is 1, so that nothing is to be saved" if self.budget == 1 else "it is too small to save"
                small.append(Choice(one.path, reason=why))
        return tuple(kept), (*left, *small)

    def sizes(self, one: Seen) -> list[tuple[int, int]]:
        """Pairs of a rank and a number of entries that keep to the budget, for each group."""
        rows, columns = filters_of(one), one.layer.weight[0].numel()
        dense = rows * columns
        if self.rank is not None:
            pairs = [(min(self.rank, rows, columns), round(self.density * dense))]
        elif self.budget == 1:
            pairs = []
        else:
            shares = SHARES if self.sparse_share is None else (self.sparse_share,)
            room = self.budget * dense
            pairs = [
                (
                    min(rows, columns, int((1 - share) * room / (rows + columns) + 1e-9)),
                    int(share * room / ENTRY + 1e-9),
                )
                for share in shares
            ]
        fits = [(r, c) for r, c in pairs if r + c and r * (rows + columns) + ENTRY * c < dense]
        return list(dict.fromkeys(fits))

    def _summed(self, calibration: Calibration, source: Model, one: Seen) -> tuple[nn.Module, Choice]:
        """The layer, on the inputs that `source` gives it, and what was done with it."""
        layer, fits, error = self._made(one, calibration.moments(source, one))
        return layer, _told(one, fits, error)

    def _made(self, one: Seen, found: Sequence[Moments]) -> tuple[nn.Module, list[LowRankSparse], float]:
        """The layer, the fit of each group, and the relative error."""
        biased = one.layer.bias is not None
        weights = one.layer.weight.chunk(groups_of(one))
        moments = [for_one_sample(group, weight, bias=biased) for group, weight in zip(found, weights, strict=True)]
        fits, error = self._fitted(moments, self.sizes(one))
        offsets = [group.y - fit.matrix() @ group.x for fit, group in zip(fits, moments, strict=True)]
        return assembled(one.layer, fits, torch.cat(offsets) if biased else None), fits, error

    def alone(self, model: Model, one: Seen, speedup: float) -> tuple[LowRankAndSparse, Choice]:
        """For a budget: the settings that do this to one layer and nothing else, and what becomes of it."""
        bare = replace(
            self,
            budget=1 / speedup,
            sparse_share=0.0,
            rank=None,
            density=0.0,
            asymmetric=False,
            sweeps=_QUICK,
            skip=tuple(all_others(model, one)),
            epochs=0,
            **LOOKED_AT,
        )
        sizes = bare.sizes(one)
        if not sizes:
            return bare, Choice(one.path, reason="it is too small to save")
        return bare, _costed(one, sizes[0][0], 0)

    def evidence(self, model: Model, one: Seen, bench: Bench) -> list[Moments]:
        """For a budget: moments of what the layer sees and gives."""
        return Calibration(model, bench, **LOOKED_AT).moments(model, one)

    def layer_for(self, one: Seen, choice: Choice, bench: Bench, evidence: Any) -> nn.Module:
        """For a budget: its low-rank part alone, since a dense engine multiplies the zeros of the other."""
        del choice, bench
        return self._made(one, evidence)[0]

    def _fitted(self, moments: Sequence[Moments], sizes: list[tuple[int, int]]) -> tuple[list[LowRankSparse], float]:
        """The fit of each group at the split with the smallest error over all groups, and that relative error."""
        sizes_of_groups = [float(group.yy.trace()) for group in moments]
        best: list[LowRankSparse] = []
        least = math.inf
        for rank, entries in sizes:
            fits = [
                low_rank_sparse(group.yx, group.xx, size, rank, entries, sweeps=self.sweeps)
                for group, size in zip(moments, sizes_of_groups, strict=True)
            ]
            lost = sum(fit.errors[-1] * size for fit, size in zip(fits, sizes_of_groups, strict=True))
            if lost < least:
                best, least = fits, lost
        return best, math.sqrt(least / max(sum(sizes_of_groups), 1e-300))


def _told(one: Seen, fits: Sequence[LowRankSparse], error: float) -> Choice:
    """What was done with a layer; parameters are those that are not zero."""
    rank, entries = fits[0].left.shape[1], sum(int((fit.sparse != 0).sum()) for fit in fits)
    return replace(_costed(one, rank, entries), error=error)


def _costed(one: Seen, rank: int, entries: int) -> Choice:
    """What such a layer holds and multiplies; parameters are those that are not zero."""
    layer, groups = one.layer, groups_of(one)
    low = groups * rank * (filters_of(one) + layer.weight[0].numel())
    bias = len(layer.weight) if layer.bias is not None else 0
    dense, places = layer.weight.numel(), one.outputs
    multiplied = low + (dense if entries else 0)  # a dense engine multiplies the zeros
    return Choice(
        one.path,
        ranks=(rank,),
        full=(min(filters_of(one), layer.weight[0].numel()),),
        parameters=(dense + bias, low + entries + bias),
        macs=(dense * places, multiplied * places),
        form=f"rank {rank} plus {entries:,} entries",
    )


def sparse_weights(model: Model, paths: Any) -> dict[str, Tensor]:
    """The sparse weights among the layers at these paths, by parameter name."""
    names = [f"{path}.sparse.weight".lstrip(".") for path in paths] + [f"{path}.weight".lstrip(".") for path in paths]
    return {name: weight for name, weight in model.module.named_parameters() if name in names}
