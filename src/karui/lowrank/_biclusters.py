"""What both kinds of biclusters share: groups that fit, what they cost, and the fit in a metric."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from karui.layers.biclustered import biclustered_conv, pairs_kernel
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._common import factor_matrix
from karui.lowrank._metrics import metric_of
from karui.lowrank._scan import Seen
from karui.numerics.biclusters import Grid, grid_of
from karui.numerics.metrics import Covariance, Metric, Weighted, descend
from karui.numerics.svd import factored_size

if TYPE_CHECKING:
    from karui.model import Model
    from karui.technique import Bench


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How biclusters are found and fitted: the settings that both techniques have."""

    in_groups: int
    out_groups: int
    restarts: int
    metric: str
    images: int
    positions: int
    iterations: int

    def groups_for(self, one: Seen) -> tuple[int, int]:
        """The nearest numbers of groups, from below, into which channels and filters part evenly."""
        filters, channels = one.layer.weight.shape[:2]
        return _divisor(channels, self.in_groups), _divisor(filters, self.out_groups)

    def build(
        self, model: Model, one: Seen, bench: Bench, decompose: Callable[[Tensor], list[Tensor]]
    ) -> tuple[nn.Module, float, str]:
        """The new layer, the relative error of its kernel, and what to tell of it."""
        kernel = one.layer.weight.detach().double().flatten(2)
        grid = grid_of(kernel, *self.groups_for(one), restarts=self.restarts, seed=bench.seed)
        factors = decompose(grid.blocks(kernel))
        wanted, remark = grid.sorted(kernel), ""
        metric = metric_of(self.metric, model, one, bench, images=self.images, positions=self.positions)
        if metric is not None:
            metric = _sorted_metric(metric, grid, kernel.shape)
            before = factors
            factors = descend(factors, lambda parts: pairs_kernel(*parts), wanted, metric, self.iterations)
            lost = [relative(metric, wanted, pairs_kernel(*parts)) for parts in (before, factors)]
            remark = f"error in the metric {lost[0]:.4f} -> {lost[1]:.4f}"
        made = pairs_kernel(*factors)
        error = float((made - wanted).norm() / wanted.norm().clamp(min=1e-300))
        return biclustered_conv(one.layer, grid.rows.flatten(), grid.columns.flatten(), factors), error, remark


def relative(metric: Metric, wanted: Tensor, made: Tensor) -> float:
    """Relative error in a metric."""
    return math.sqrt(float(metric(wanted - made)) / max(float(metric(wanted)), 1e-300))


def _sorted_metric(metric: Metric, grid: Grid, shape: Any) -> Metric:
    """The metric for a kernel whose filters and channels are sorted by group."""
    if isinstance(metric, Weighted):
        return Weighted(grid.sorted(metric.weights.flatten(2)))
    assert isinstance(metric, Covariance)  # noqa: S101  (there are no others)
    columns, taps = grid.columns.flatten(), shape[2]
    order = (columns[:, None] * taps + columns.new_tensor(range(taps))).flatten()
    return Covariance(metric.moment[order][:, order])


def _divisor(number: int, most: int) -> int:
    return max(one for one in range(1, min(number, most) + 1) if number % one == 0)


def pair_cost(one: Seen, groups: tuple[int, int], ranks: tuple[int, ...]) -> tuple[int, int]:
    """(parameters without bias, multiply-adds) of a biclustered convolution."""
    (into, out), taps = groups, math.prod(one.layer.kernel_size)
    filters, channels = one.layer.weight.shape[:2]
    narrow, widen = channels * out * ranks[0], filters * into * ranks[-1]
    core = into * out * taps * (ranks[0] if len(ranks) == 1 else ranks[0] * ranks[1])
    return narrow + core + widen, narrow * one.inputs + (core + widen) * one.outputs


def pair_choice(one: Seen, groups: tuple[int, int], ranks: tuple[int, ...], asked: tuple[int, int]) -> Choice:
    """The layer at these ranks, or left as it is where that saves nothing."""
    filters, channels = one.layer.weight.shape[:2]
    size, macs = pair_cost(one, groups, ranks)
    bias = filters if one.layer.bias is not None else 0
    dense = one.layer.weight.numel()
    inner, outer = channels // groups[0], filters // groups[1]
    told = " x ".join(map(str, ranks))
    remark = f"{asked[0]} x {asked[1]} groups do not part it evenly" if groups != asked else ""
    return unless_larger(
        Choice(
            one.path,
            ranks=ranks,
            full=(min(inner * outer, inner * math.prod(one.layer.kernel_size)),) if len(ranks) == 1 else (inner, outer),
            parameters=(dense + bias, size + bias),
            macs=(dense * one.outputs, macs),
            form=f"{groups[0]} x {groups[1]} groups, rank {told}",
            remark=remark,
        )
    )


def conv_objection(layer: Any) -> str:
    """Why a convolution cannot be biclustered, "" if it can."""
    if not isinstance(layer, nn.Linear) and layer.groups > 1:
        return f"it is grouped ({layer.groups} groups), so that not every filter sees every channel"
    return ""


def linear_choice(one: Seen, share: float, own: int | None) -> Choice:
    """A linear layer by truncated SVD: at its own rank, or at the one whose factors hold `share` of its numbers."""
    if own is None and share == 1:
        return Choice(one.path, reason="linear_share is 1")
    rows, columns = one.layer.weight.shape
    full = min(rows, columns)
    rank = min(full, own or max(1, math.floor(share * rows * columns / (rows + columns) + 1e-9)))
    bias = rows if one.layer.bias is not None else 0
    size = factored_size((rows, columns), rank)
    return unless_larger(
        Choice(
            one.path,
            ranks=(rank,),
            full=(full,),
            parameters=(rows * columns + bias, size + bias),
            macs=(one.outputs * rows * columns, one.outputs * size),
        )
    )


def linear_build(one: Seen, choice: Choice) -> tuple[nn.Module, float, str]:
    """That layer."""
    return (*factor_matrix(one.layer, choice.ranks[0]), "")
