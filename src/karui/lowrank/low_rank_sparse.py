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

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from karui.errors import require
from karui.layers.factored import factor_conv, factor_linear
from karui.layers.low_rank_sparse import LowRankPlusSparse
from karui.lowrank._calibrate import Calibration
from karui.lowrank._common import (
    Choice,
    Seen,
    carry_out,
    filters_of,
    fine_tune,
    groups_of,
    require_data,
    require_fine_tuning,
    scan,
    tracked,
)
from karui.model import replace_layers
from karui.numerics.bilateral import LowRankSparse, low_rank_sparse
from karui.numerics.regression import Moments
from karui.technique import Bench, Card, technique
from karui.train.masks import MaskKeeper

if TYPE_CHECKING:
    from karui.model import Model

ENTRY = 1.5
"""Numbers that an entry of the sparse part is charged: its value, and half as much for its place."""
RIDGE = 0.01
"""Isotropic inputs that are added to those seen, as a share of their mean variance."""
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
class LowRankAndSparse:
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
        calibration = Calibration(model, bench, self.images, self.positions)
        current, choices, layers = model, list(left), {}
        for one in tracked(seen, "fit layers", shown=bench.progress):
            biased = one.layer.bias is not None
            found = calibration.moments(current if self.asymmetric else model, one)
            weights = one.layer.weight.chunk(groups_of(one))
            moments = [_second(group, weight, bias=biased) for group, weight in zip(found, weights, strict=True)]
            fits, error = self._fitted(moments, self._sizes(one))
            offsets = [group.y - fit.matrix() @ group.x for fit, group in zip(fits, moments, strict=True)]
            layers[one.path] = assembled(one.layer, fits, torch.cat(offsets) if biased else None)
            choices.append(_told(one, fits, error))
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
            + " or ".join(f"rank {rank} plus {entries:,} entries" for rank, entries in self._sizes(one))
            + (" in each group" if groups_of(one) > 1 else "")
            for one in seen
        ]
        return (*told, *(choice.describe() for choice in left))

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        """The layers that are fitted, in the order of their calls, and those left."""
        seen, left = scan(model, lambda _layer: "", self.skip)
        kept, small = [], []
        for one in sorted(seen, key=lambda one: one.order):
            if self._sizes(one):
                kept.append(one)
            else:
                why = "budget is 1, so that nothing is to be saved" if self.budget == 1 else "it is too small to save"
                small.append(Choice(one.path, reason=why))
        return tuple(kept), (*left, *small)

    def _sizes(self, one: Seen) -> list[tuple[int, int]]:
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


def _second(moments: Moments, weight: Tensor, *, bias: bool) -> Moments:
    """Second moments for one sample: around the means where a bias makes up for these, else around zero.

    A little of isotropic inputs, to which the weight itself responds, is added: else directions in which the inputs
    hardly vary would be free to take any size, and retraining would start from there.
    """
    n, weight = moments.count, weight.detach().double().flatten(1)
    if bias:
        moments = moments.centred()
    else:
        moments = Moments(n, moments.x / n, moments.y / n, moments.xx / n, moments.yx / n, moments.yy / n)
    ridge = RIDGE * float(moments.xx.diagonal().mean())
    xx = moments.xx + ridge * torch.eye(len(moments.xx), dtype=torch.float64)
    return replace(moments, xx=xx, yx=moments.yx + ridge * weight, yy=moments.yy + ridge * weight @ weight.T)


def assembled(layer: Any, fits: Sequence[LowRankSparse], bias: Tensor | None) -> nn.Module:
    """The layer that takes the place of one: a sum of two branches, or one alone where the other is empty."""
    left, right, sparse = (torch.stack([getattr(fit, name) for fit in fits]) for name in ("left", "right", "sparse"))
    left, right = _balanced(left, right)
    if left.shape[2] and sparse.any():
        return LowRankPlusSparse.of(layer, left, right, sparse, bias)
    if left.shape[2] and isinstance(layer, nn.Linear):
        return factor_linear(layer, left[0], right[0], bias)
    if left.shape[2]:
        return factor_conv(layer, right.reshape(*right.shape[:2], *layer.weight.shape[1:]), outer=left, bias=bias)
    new = copy.deepcopy(layer)
    with torch.no_grad():
        new.weight.copy_(sparse.reshape(layer.weight.shape))
        if bias is not None:
            new.bias.copy_(bias)
    return new


def _balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same products with each pair of a column and a row equally long, so that both factors train alike."""
    scale = (right.norm(dim=2) / left.norm(dim=1).clamp(min=1e-300)).sqrt().clamp(min=1e-150)
    return left * scale.unsqueeze(1), right / scale.unsqueeze(2)


def _told(one: Seen, fits: Sequence[LowRankSparse], error: float) -> Choice:
    """What was done with a layer; parameters are those that are not zero."""
    layer, groups = one.layer, groups_of(one)
    rank, entries = fits[0].left.shape[1], sum(int((fit.sparse != 0).sum()) for fit in fits)
    low = groups * rank * (filters_of(one) + layer.weight[0].numel())
    bias = len(layer.weight) if layer.bias is not None else 0
    dense, places = layer.weight.numel(), one.calls * one.outputs
    multiplied = low + (dense if entries else 0)  # a dense engine multiplies the zeros
    return Choice(
        one.path,
        ranks=(rank,),
        full=(min(filters_of(one), layer.weight[0].numel()),),
        parameters=(dense + bias, low + entries + bias),
        macs=(dense * places, multiplied * places),
        error=error,
        form=f"rank {rank} plus {entries:,} entries",
    )


def sparse_weights(model: Model, paths: Any) -> dict[str, Tensor]:
    """The sparse weights among the layers at these paths, by parameter name."""
    names = [f"{path}.sparse.weight".lstrip(".") for path in paths] + [f"{path}.weight".lstrip(".") for path in paths]
    return {name: weight for name, weight in model.module.named_parameters() if name in names}
