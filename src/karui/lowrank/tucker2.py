"""Tucker-2 with ranks by variational Bayes: Kim, Park, Yoo, Choi, Yang, Shin 2016, "Compression of Deep Convolutional
Neural Networks for Fast and Low Power Mobile Applications", ICLR, arXiv 1511.06530 (survey 12).

The whole network is compressed in one shot, in three steps. Ranks: for every kernel, global analytic variational
Bayes (`karui.numerics.evbmf`) tells how much of the unfolding along the inputs, and along the outputs, is more than
noise; there is no search. Decomposition: Tucker-2 projects both channel modes and leaves space whole, so a convolution
becomes a pointwise one, a smaller spatial one and a pointwise one. Fine-tuning: the whole network, a few epochs.

It pays for convolutions with many channels that were trained to convergence. It does not pay for kernels that are full
rank already (small networks, depthwise convolutions, networks pruned before), which are left and reported; and the
added pointwise layers are bound by memory, so time falls less than multiply-adds do: measure it.

Paper -> here: `K` -> the kernel, `S`, `T` (input and output channels) -> channels, filters, `R3` -> rank_in, `R4` ->
rank_out, `U^(3)` -> inner, `U^(4)` -> outer, core tensor `C` -> core.

DEPARTURE: a mode that keeps its full rank gets no pointwise layer, which could only rotate it.

DEPARTURE: the groups of a grouped convolution are decomposed one by one and share the largest of their ranks; the
paper has no grouped convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from karui.errors import require
from karui.layers.factored import factor_conv, factor_full_map, factor_linear
from karui.lowrank._common import (
    Choice,
    Seen,
    carry_out,
    fine_tune,
    require_data,
    scan,
    tracked,
    unless_larger,
)
from karui.numerics.evbmf import evbmf
from karui.numerics.svd import Ratio, truncated_svd
from karui.numerics.tucker import tucker2
from karui.numerics.unfold import split_groups, unfold
from karui.technique import Bench, Card, technique

if TYPE_CHECKING:
    from karui.model import Model


@technique(
    Card(
        survey=12,
        slug="tucker2",
        title="Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications",
        kind="replace",
        reduces=("parameters", "macs", "bytes"),
        identity={"ratio": 1.0, "epochs": 0},
        quick={"ratio": 0.4, "epochs": 1},
        arxiv="1511.06530",
        pays="convolutions with many channels in a network trained to convergence, with data to fine-tune on",
        costs="small or depthwise kernels; time falls less than multiply-adds, as pointwise layers are bound by memory",
    )
)
@dataclass(frozen=True, kw_only=True)
class Tucker2:
    """Decompose every convolution over both channel modes, at ranks that the kernel itself tells, and fine-tune.

    The first convolution keeps its input channels (Tucker-1). A linear layer on a flattened feature map is a
    convolution over the whole map; other linear layers get an SVD at the rank of the same estimate.

    Settings:
        ratio: share of the full rank for both modes of every layer, in (0, 1]; None finds ranks by variational Bayes.
        ranks: ranks of single layers, as (path, rank_in, rank_out); they go before the other settings. A linear layer
            that gets an SVD takes the second.
        pointwise: whether convolutions with a kernel of one position are decomposed too, by SVD; the paper leaves them.
        fully_connected: whether linear layers are decomposed too.
        sweeps: most sweeps of HOOI that refine the start from HOSVD.
        skip: paths of layers to leave.
        epochs: passes over the data for fine-tuning; 0 leaves the factors as they are.
        learning_rate: of the fine-tuning; None takes the bench's.

    Needs: nothing; training data and a task if `epochs` is not 0.

    Raises:
        SettingError: a setting is out of range, or names no layer.
        NeedError: there is nothing to fine-tune on.

    Relations: `SvdRestructuring` (11) is for linear layers and takes ranks from the share of the spectrum.

    Example:
        >>> import karui
        >>> net = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
        >>> model = karui.Model(net, example=(torch.zeros(1, 16, 8, 8),))
        >>> light = Tucker2(ratio=0.25, epochs=0).apply(model, karui.Bench())
        >>> [type(layer).__name__ for layer in light.module]
        ['FactoredConv', 'ReLU', 'FactoredConv']
    """

    ratio: float | None = None
    ranks: tuple[tuple[str, int, int], ...] = ()
    pointwise: bool = False
    fully_connected: bool = True
    sweeps: int = 20
    skip: tuple[str, ...] = ()
    epochs: int = 10
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple((path, inner, outer) for path, inner, outer in self.ranks))
        object.__setattr__(self, "skip", tuple(self.skip))
        within = self.ratio is None or 0 < self.ratio <= 1
        require(within, f"ratio is {self.ratio}; give a share of the full rank in (0, 1], for example 0.4")
        for path, inner, outer in self.ranks:
            require(min(inner, outer) >= 1, f"ranks has {inner}, {outer} for '{path}'; give numbers from 1")
        require(self.sweeps >= 0, f"sweeps is {self.sweeps}; give 0 or more, for example 20")
        require(self.epochs >= 0, f"epochs is {self.epochs}; give 0 or more")
        positive = self.learning_rate is None or self.learning_rate > 0
        require(positive, f"learning_rate is {self.learning_rate}; give a positive number, for example 0.001")

    def apply(self, model: Model | None, bench: Bench) -> Model:
        """The decomposed model, fine-tuned."""
        assert model is not None  # noqa: S101  (the card's kind asks for one)
        require_data("tucker2", model, bench, self.epochs)
        seen, left = self._scan(model)
        choices, layers = [], {}
        for one in tracked(seen, "decompose", shown=bench.progress):
            choice = self._choose(one, first=one is _first_conv(seen))
            new, error = self._build(one, choice) if choice.replaced else (None, None)
            choices.append(replace(choice, error=error))
            if new is not None:
                layers[one.path] = new
        extra = {"ranks": "variational Bayes" if self.ratio is None else f"{self.ratio} of full"}
        decomposed = carry_out(model, (*choices, *left), layers, "Tucker-2", extra)
        if not layers:
            return decomposed
        return fine_tune(decomposed, bench, self.epochs, self.learning_rate, "fine-tune the decomposed network")

    def remarks(self, model: Model) -> tuple[str, ...]:
        """What would be done with each layer, and why."""
        return tuple(choice.describe() for choice in self.choose(model))

    def choose(self, model: Model) -> tuple[Choice, ...]:
        """The ranks (input, output) of each layer, or the reason why it is left."""
        seen, left = self._scan(model)
        return (*(self._choose(one, first=one is _first_conv(seen)) for one in seen), *left)

    def _scan(self, model: Model) -> tuple[tuple[Seen, ...], tuple[Choice, ...]]:
        seen, left = scan(model, self._objection, self.skip)
        known = {choice.path: choice.reason for choice in left}
        for path, *_ in self.ranks:
            found = any(one.path == path for one in seen)
            why = known.get(path, "there is no such layer")
            require(found, f"ranks names '{path}', which cannot be decomposed: {why}")
        return seen, left

    def _objection(self, layer: Any) -> str:
        if isinstance(layer, nn.Linear):
            return "" if self.fully_connected else "linear layers are left (fully_connected=False)"
        if all(taps == 1 for taps in layer.kernel_size) and not self.pointwise:
            return "pointwise convolutions are left (pointwise=False)"
        return ""

    def _choose(self, one: Seen, *, first: bool) -> Choice:
        """Ranks by the setting; then the layer is left if that would not save anything."""
        kernel = kernel_of(one)
        filters, channels = kernel.shape[1:3]
        outer, outer_noise = self._rank(kernel, 0)
        inner, inner_noise = (outer, False) if _is_matrix(one) else self._rank(kernel, 1)
        own = {path: ranks for path, *ranks in self.ranks}
        if one.path in own:
            inner, outer = min(own[one.path][0], channels), min(own[one.path][1], filters)
        elif first:
            inner = channels
        taps = math.prod(kernel.shape[3:])
        # A core cannot hold more directions in one mode than the other mode and space together span.
        inner = inner if inner == channels else min(inner, outer * taps)
        outer = outer if outer == filters else min(outer, inner * taps)
        if _is_matrix(one):
            return self._cost(one, kernel, (outer,), (min(filters, channels),), noise=outer_noise)
        if (inner, outer) == (channels, filters):
            return Choice(one.path, reason=f"its ranks are full ({inner} x {outer})")
        noise = one.path not in own and (outer_noise or (inner_noise and not first))
        return self._cost(one, kernel, (inner, outer), (channels, filters), noise=noise)

    def _rank(self, kernel: Float[Tensor, "groups filters channels *kernel"], mode: int) -> tuple[int, bool]:
        """The rank of a mode, the largest of the groups, and whether some group held nothing but noise."""
        if self.ratio is not None:
            return Ratio(self.ratio)(kernel.new_zeros(kernel.shape[1 + mode]), (1, 1)), False
        found = [evbmf(unfold(block, (mode,))).rank for block in kernel]
        return max(1, *found), min(found) == 0

    def _cost(self, one: Seen, kernel: Tensor, ranks: tuple[int, ...], full: tuple[int, ...], *, noise: bool) -> Choice:
        groups = kernel.shape[0]
        dense, factored = kernel[0].numel(), 0
        macs = 0
        for size, places in _stages(one, kernel, ranks):
            factored, macs = factored + size, macs + size * places
        bias = one.layer.weight.shape[0] if one.layer.bias is not None else 0
        choice = Choice(
            one.path,
            ranks=ranks,
            full=full,
            parameters=(groups * dense + bias, groups * factored + bias),
            macs=(one.calls * groups * dense * one.outputs, one.calls * groups * macs),
            remark="variational Bayes found nothing but noise; rank 0 taken as 1" if noise else "",
        )
        return unless_larger(choice)

    def _build(self, one: Seen, choice: Choice) -> tuple[nn.Module, float]:
        kernel = kernel_of(one)
        if isinstance(one.layer, nn.Linear) and len(choice.ranks) == 1:
            svd = truncated_svd(kernel[0], choice.ranks[0])
            return factor_linear(one.layer, *svd.factors()), svd.error
        rank_in, rank_out = choice.ranks * 2 if len(choice.ranks) == 1 else choice.ranks
        whole = (rank_in == kernel.shape[2], rank_out == kernel.shape[1])
        parts = [tucker2(block, rank_out, rank_in, sweeps=self.sweeps) for block in kernel]
        core, inner, outer = (torch.stack([getattr(p, name) for p in parts]) for name in ("core", "inner", "outer"))
        if len(choice.ranks) == 1:  # a pointwise convolution: one factor suffices on each side of the bottleneck
            core, whole = torch.einsum("gqp...,gcp->gqc...", core, inner), (True, False)
        elif whole[0]:
            core = torch.einsum("gqp...,gcp->gqc...", core, inner)
        elif whole[1]:
            core = torch.einsum("gqp...,gnq->gnp...", core, outer)
        total, lost = kernel.flatten(1).square().sum(1), torch.tensor([part.error for part in parts]).double()
        error = float(((lost.square() * total).sum() / total.sum().clamp(min=1e-300)).sqrt())
        factors = {"inner": None if whole[0] else inner, "outer": None if whole[1] else outer}
        if not isinstance(one.layer, nn.Linear):
            return factor_conv(one.layer, core, **factors), error
        single = {name: None if factor is None else factor[0] for name, factor in factors.items()}
        return factor_full_map(one.layer, one.map, core[0], **single), error


def kernel_of(one: Seen) -> Float[Tensor, "groups filters channels *kernel"]:
    """The weight in float64, a block for each group; that of a linear layer on a feature map as a kernel over it."""
    weight, layer = one.layer.weight.detach().double(), one.layer
    if not isinstance(layer, nn.Linear):
        return split_groups(weight, layer.groups)
    return split_groups(weight if _is_matrix(one) else weight.reshape(-1, *one.map), 1)


def _is_matrix(one: Seen) -> bool:
    """Whether the layer has no space to see: Tucker-2 of a matrix is its SVD."""
    if isinstance(one.layer, nn.Linear):
        return math.prod(one.map[1:]) == 1 or len(one.map) > 4
    return all(taps == 1 for taps in one.layer.kernel_size)


def _first_conv(seen: tuple[Seen, ...]) -> Seen | None:
    return next((one for one in seen if not isinstance(one.layer, nn.Linear)), None)


def _stages(one: Seen, kernel: Tensor, ranks: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(parameters, positions) of each layer of the chain, for one group: the first works at the input's positions."""
    filters, channels = kernel.shape[1:3]
    if len(ranks) == 1:
        yield ranks[0] * channels, one.outputs
        yield ranks[0] * filters, one.outputs
        return
    rank_in, rank_out = ranks
    taps = math.prod(kernel.shape[3:])
    if rank_in != channels:
        inputs = taps if isinstance(one.layer, nn.Linear) else one.inputs
        yield channels * rank_in, inputs
    yield taps * rank_in * rank_out, one.outputs
    if rank_out != filters:
        yield rank_out * filters, one.outputs
