"""The two schemes of "Low Rank Expansions" (survey 13): structure, cost, and the kernel as mixture of features."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.layers.separable_bank import outer, separable_bank
from karui.layers.spatial import split_space
from karui.lowrank._choice import Choice, unless_larger
from karui.lowrank._scan import Seen, groups_of
from karui.lowrank._split import split_cost, split_full, split_kernels
from karui.numerics.alternating import alternating_split
from karui.numerics.expansion import Design, fit_expansion
from karui.numerics.regression import Moments
from karui.numerics.separable import Mixture, by_nuclear_norm
from karui.numerics.unfold import split_groups


@dataclass(frozen=True)
class Expanded:
    """A layer's factors: the first ones, and for each group the last, `[filters, features]`.

    Settings:
        layer: the convolution that they stand for.
        first, last: the factors, in float64.
        design: what the features of a group see, from the first factors.
        assemble: the new layer, from first factors, last factors and bias.
        error: relative Frobenius error of the kernel.
        bias: of the new layer; None keeps the old one.
    """

    layer: Any
    first: tuple[Tensor, ...]
    last: tuple[Float[Tensor, "filters features"], ...]
    design: Design
    assemble: Callable[[Any, tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None], nn.Module]
    error: float = 0.0
    bias: Tensor | None = None

    def measured(self) -> Expanded:
        """With the error of its kernel."""
        kernel = split_groups(self.layer.weight.detach().double(), self.layer.groups).flatten(2)
        made = torch.stack([last @ self.design(self.first, group) for group, last in enumerate(self.last)])
        lost = (kernel - made).norm() / kernel.norm().clamp(min=1e-300)
        return replace(self, error=float(lost))

    def fitted(self, moments: Sequence[Moments], iterations: int) -> Expanded:
        """The factors that imitate responses, from these."""
        found = fit_expansion(moments, self.design, self.first, self.last, iterations)
        bias = torch.cat(found.offsets(moments, self.design))
        return replace(self, first=found.first, last=found.last, bias=bias).measured()

    def response_error(self, moments: Sequence[Moments]) -> float:
        """The error of the responses, relative to their own variance."""
        biases = torch.zeros(self.layer.out_channels) if self.bias is None else self.bias
        parts = zip(moments, self.last, biases.double().chunk(len(moments)), strict=True)
        lost = sum(
            one.error(last @ self.design(self.first, group), bias) for group, (one, last, bias) in enumerate(parts)
        )
        total = sum(one.count * float(one.centred().yy.trace()) for one in moments)
        return math.sqrt(lost / max(total, 1e-300))

    def build(self) -> nn.Module:
        """The new layer."""
        return self.assemble(self.layer, self.first, self.last, self.bias)


@dataclass(frozen=True)
class Joint:
    """Scheme 2: vertical filters over all channels, then horizontal filters over their maps."""

    shared: bool = True

    def full(self, one: Seen) -> int:
        """The rank at which it is exact."""
        filters, channels = one.layer.weight.shape[0] // groups_of(one), one.layer.weight.shape[1]
        return split_full(channels, filters, one.layer.kernel_size)

    def cost(self, one: Seen, rank: int) -> tuple[int, int]:
        """(parameters without bias, multiply-adds)."""
        return split_cost(one, rank, one.layer.weight.shape[0] // groups_of(one))

    def expand(self, one: Seen, rank: int, *, alternating: bool) -> Expanded:
        """Filter reconstruction: in closed form, or by alternation."""
        kernels = split_groups(one.layer.weight.detach().double(), groups_of(one))
        split = alternating_split if alternating else split_kernels
        vertical, horizontal = split(kernels, rank)
        last = tuple(horizontal.flatten(2))
        return Expanded(
            one.layer, (vertical,), tuple(one.flatten(1) for one in last), _seen_jointly(one.layer), _join
        ).measured()


def _seen_jointly(layer: Any) -> Design:
    wide = math.prod(layer.kernel_size[1:])

    def design(first: Sequence[Tensor], group: int) -> Tensor:
        vertical = first[0][group]
        each = torch.einsum("kci,jl->kjcil", vertical, torch.eye(wide).to(vertical))
        return each.reshape(len(vertical) * wide, -1)

    return design


def _join(layer: Any, first: tuple[Tensor, ...], last: tuple[Tensor, ...], bias: Tensor | None) -> nn.Module:
    rank = first[0].shape[1]
    horizontal = torch.stack(last).reshape(len(last), -1, rank, *layer.kernel_size[1:])
    return split_space(layer, first[0], horizontal, bias=bias)


@dataclass(frozen=True)
class Separable:
    """Scheme 1: separable filters of each input channel, the same for all of them if `shared`, and a mixture."""

    shared: bool = True

    def full(self, one: Seen) -> int:
        """The rank at which it is exact for certain: one filter for each position."""
        return math.prod(one.layer.kernel_size)

    def cost(self, one: Seen, rank: int) -> tuple[int, int]:
        """(parameters without bias, multiply-adds)."""
        layer = one.layer
        maps, mix = layer.in_channels * rank, layer.weight.shape[0] * layer.weight.shape[1] * rank
        size, macs = 0, 0
        for dim, taps in enumerate(layer.kernel_size):
            size += taps * (rank if self.shared else maps)
            macs += taps * maps * one.between(dim + 1)
        return size + mix, macs + mix * one.outputs

    def expand(self, one: Seen, rank: int, *, alternating: bool = False) -> Expanded:
        """Filter reconstruction by the nuclear norm."""
        del alternating
        return separated(one.layer, lambda bank: by_nuclear_norm(bank, rank), shared=self.shared)


def choose_rank(one: Seen, kind: Separable | Joint, speedup: float, own: int | None, *, fits_bias: bool) -> Choice:
    """The largest rank that cuts a layer's multiply-adds by `speedup`, or its own; left where that saves nothing."""
    dense = one.outputs * one.layer.weight.numel()
    if own is None and speedup == 1:
        return Choice(one.path, reason="speedup 1 asks for nothing")
    full = kind.full(one)
    unit = kind.cost(one, 1)[1]
    rank = min(full, own or max(1, math.floor(dense / speedup / unit + 1e-9)))
    size, macs = kind.cost(one, rank)
    filters, biased = one.layer.weight.shape[0], one.layer.bias is not None
    short = own is None and macs * speedup > dense
    choice = Choice(
        one.path,
        ranks=(rank,),
        full=(full,),
        parameters=(one.layer.weight.numel() + filters * biased, size + filters * (biased or fits_bias)),
        macs=(dense, macs),
        remark=f"rank 1 falls short of a speed-up of {speedup}" if short else "",
    )
    return unless_larger(choice)


def flat_objection(layer: Any) -> str:
    """Why a layer has no space to split, "" if it has."""
    if isinstance(layer, nn.Linear):
        return "a linear layer has no space to split"
    if sum(taps > 1 for taps in layer.kernel_size) < 2:
        return f"its kernel {' x '.join(map(str, layer.kernel_size))} has no two dimensions of space to part"
    return ""


def separated(layer: Any, solve: Callable[[Float[Tensor, "bank *taps"]], Mixture], *, shared: bool) -> Expanded:
    """A convolution as mixture of separable filters that `solve` finds: for all its slices, or channel by channel."""
    kernels = split_groups(layer.weight.detach().double(), layer.groups)
    groups, filters, channels = kernels.shape[:3]
    if shared:
        found = solve(kernels.flatten(0, 2))
        first = tuple(factor.unsqueeze(0) for factor in found.factors)
        mix = found.mix.reshape(groups, filters, -1)
    else:
        each = [solve(kernels[group, :, channel]) for group in range(groups) for channel in range(channels)]
        first = tuple(torch.stack(side) for side in zip(*(one.factors for one in each), strict=True))
        mix = torch.stack([one.mix for one in each]).unflatten(0, (groups, channels))
        mix = mix.transpose(1, 2).reshape(groups, filters, -1)
    return Expanded(layer, first, tuple(mix), _seen_apart(layer), _mix).measured()


def _seen_apart(layer: Any) -> Design:
    channels = layer.weight.shape[1]

    def design(first: Sequence[Tensor], group: int) -> Tensor:
        basis = outer(first).flatten(2)
        basis = basis.expand(channels, -1, -1) if len(basis) == 1 else basis[group * channels : (group + 1) * channels]
        each = torch.einsum("cd,cmi->cmdi", torch.eye(channels).to(basis), basis)
        return each.reshape(channels * basis.shape[1], -1)

    return design


def _mix(layer: Any, first: tuple[Tensor, ...], last: tuple[Tensor, ...], bias: Tensor | None) -> nn.Module:
    rank = first[0].shape[1]
    mix = torch.cat(last).reshape(layer.out_channels, -1, rank)
    return separable_bank(layer, first, mix, bias)


SCHEMES: dict[int, type[Separable] | type[Joint]] = {1: Separable, 2: Joint}
